"""Arguments and definition of the fused residual add and norm.

M rows, D width
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moss_jax.ops import dispatch


class Residual(NamedTuple):
    """A residual stream whose last branch is still pending: it stands for `x + scale * branch`.

    The norm that follows adds the branch as well, in one pass over GPU memory instead of two.

    Attributes:
      x: the stream.
      branch: the pending branch, in the shape and dtype of x; None if all has been added.
      scale: factor of the branch, in a shape that broadcasts to [..., 1]; 1 if None.
    """

    x: Float[Array, "... D"]
    branch: Float[Array, "... D"] | None = None
    scale: Float[Array, "..."] | None = None

    def sum(self) -> Float[Array, "... D"]:
        """The stream with the branch added, for use when no norm follows."""
        if self.branch is None:
            return self.x
        return self.x + (self.branch if self.scale is None else self.scale * self.branch)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Norm:
    """Parameters of an RMS norm, or, with a bias, of a layer norm.

    Attributes:
      weight: factor of each normalised column.
      bias: added after the weight; only for layer norms, which also subtract the mean first.
      eps: added to the mean square.
    """

    weight: Float[Array, " D"]
    bias: Float[Array, " D"] | None = None
    eps: float = dataclasses.field(kw_only=True, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
    """Validated arguments of one call, built by `add_norm` and read by implementations.

    Attributes:
      x, add, scale: the residual stream and its branch, as in `Residual`; scale in the dtype of x.
      weight, bias: as in `Norm`, divided by the scale of results in 8 bits.
      out_dtype: of the normalised rows.
    """

    x: Float[Array, "... D"]
    add: Float[Array, "... D"] | None
    scale: Float[Array, "..."] | None
    weight: Float[Array, " D"]
    bias: Float[Array, " D"] | None
    eps: float = dataclasses.field(kw_only=True, metadata={"static": True})
    out_dtype: jnp.dtype = dataclasses.field(kw_only=True, metadata={"static": True})

    @property
    def centred(self) -> bool:
        """Whether the rows' mean is subtracted, as in a layer norm."""
        return self.bias is not None

    def flat(self) -> "Arguments":
        """The same call with the rows on one axis: x and add [M, D], scale [1] or [M]."""
        *rows, width = self.x.shape
        add = None if self.add is None else self.add.reshape(-1, width)
        scale = self.scale
        if scale is not None:
            many = math.prod(scale.shape) > 1
            scale = jnp.broadcast_to(scale, (*rows, 1)).reshape(-1) if many else scale.reshape(1)
        return dataclasses.replace(self, x=self.x.reshape(-1, width), add=add, scale=scale)


def check(residual: Residual, norm: Norm) -> None:
    """Raises ValueError unless shapes and dtypes fit together."""
    x, add, scale = residual
    *rows, width = x.shape
    for name, vector in (("weight", norm.weight), ("bias", norm.bias)):
        if vector is not None and vector.shape != (width,):
            raise ValueError(f"{name} is one number a column, [D] = {(width,)}; got {vector.shape}")
    if add is None and scale is not None:
        raise ValueError("a residual without a branch has no scale")
    if add is not None and (add.shape, add.dtype) != (x.shape, x.dtype):
        raise ValueError(f"the branch is like the stream, {x.dtype} {x.shape}; got {add.dtype} {add.shape}")
    if scale is not None and not _broadcasts(scale.shape, (*rows, 1)):
        raise ValueError(f"scale broadcasts to [..., 1] = {(*rows, 1)}; got {scale.shape}")


def _broadcasts(shape, to) -> bool:
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def define(a: Arguments) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
    """Returns the normalised rows and the residual sum, with statistics in float32; differentiable.

    The rounded sum is what is normalised, since the next layer sees it too.
    """
    y = Residual(a.x, a.add, a.scale).sum()
    wide = y.astype(jnp.float32)
    if a.centred:
        wide -= wide.mean(axis=-1, keepdims=True)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + a.eps)
    wide *= a.weight.astype(jnp.float32)
    if a.bias is not None:
        wide += a.bias.astype(jnp.float32)
    return wide.astype(a.out_dtype), y


reference = dispatch.in_float32(define, lambda a: (a.out_dtype, a.x.dtype))
