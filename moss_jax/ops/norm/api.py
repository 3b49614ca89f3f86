"""The norms: their contract, and the choice among their implementations.

D width
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from moss_jax.ops import dispatch
from moss_jax.ops.norm import mosaic_gpu, reference, xla
from moss_jax.ops.norm.arguments import Arguments

# Each is a module with `unsupported(arguments, platform) -> reason or None` and `apply(arguments)`.
IMPLEMENTATIONS = {"mosaic_gpu": mosaic_gpu, "xla": xla, "reference": reference}

# The first that supports the arguments is taken.
ORDER = {"gpu": ("mosaic_gpu", "xla")}


def rms_norm(
    x: Float[Array, "... D"],
    weight: Float[Array, " D"],
    *,
    eps: float,
    add: Float[Array, "... D"] | None = None,
    scale: Float[Array, "..."] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
    """`y / sqrt(mean(y²) + eps) * weight` over the last axis of the residual sum `y = x + scale * add`.

    Statistics are in float32. It has gradients in all arrays.

    Args:
      x: the residual stream; the results have its dtype.
      weight: one number a column.
      eps: what is added to the mean.
      add: a branch in the shape and dtype of x; y is x if None.
      scale: what the branch is multiplied with, rounded to the dtype of x: an array that broadcasts to
        [..., 1], so one number or one for each row; 1 if None.
      implementation: a name in `IMPLEMENTATIONS`; None takes the first of the platform's order that can.

    Returns:
      The normed rows and y, both shaped as x.

    Raises:
      ValueError: shapes or dtypes that don't fit together.
      Unsupported: the named implementation cannot take these arguments.
    """
    return _norm(x, weight, None, eps, add, scale, implementation)


def layer_norm(
    x: Float[Array, "... D"],
    weight: Float[Array, " D"],
    bias: Float[Array, " D"],
    *,
    eps: float,
    add: Float[Array, "... D"] | None = None,
    scale: Float[Array, "..."] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
    """`(y - mean(y)) / sqrt(var(y) + eps) * weight + bias` over the last axis of `y = x + scale * add`.

    Arguments, results and errors are those of `rms_norm`; `bias` is one number a column. The normed rows come
    in `out_dtype`, that of x if None. In float8_e4m3fn their numbers must stay within 448: such a norm of D
    columns gives none beyond sqrt(D) |weight| + |bias|.
    """
    return _norm(x, weight, bias, eps, add, scale, implementation, out_dtype)


def choose(arguments: Arguments, implementation: str | None = None, platform: str | None = None) -> str:
    """Name of the implementation that takes a call; the choice and its reasons are logged once each.

    Raises:
      Unsupported: the named implementation does not exist or cannot take the arguments.
    """
    return dispatch.choose("norm", IMPLEMENTATIONS, ORDER, arguments, implementation, platform)


def _norm(x, weight, bias, eps, add, scale, implementation, out_dtype=None):
    *rows, width = x.shape
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != (width,):
            raise ValueError(f"{name} is one number a column, [D] = {(width,)}; got {vector.shape}")
    if add is None and scale is not None:
        raise ValueError("scale is what `add` is multiplied with, and there is no `add`")
    if add is not None and (add.shape, add.dtype) != (x.shape, x.dtype):
        raise ValueError(f"add is as x, {x.dtype} {x.shape}; got {add.dtype} {add.shape}")
    if scale is not None:
        scale = jnp.asarray(scale, x.dtype)
        if not _broadcasts(scale.shape, (*rows, 1)):
            raise ValueError(f"scale broadcasts to [..., 1] = {(*rows, 1)}; got {scale.shape}")
    a = Arguments(x, add, scale, weight, bias, eps=eps, out_dtype=out_dtype and jnp.dtype(out_dtype))
    return IMPLEMENTATIONS[choose(a, implementation)].apply(a)


def _broadcasts(shape, to) -> bool:
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False
