"""What every implementation of the norms is called with.

M rows, D width
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
    """One checked call; `rms_norm` and `layer_norm` build it, implementations read it.

    Attributes:
      x: the residual stream.
      add: the branch that is added to it first, if any.
      scale: what the branch is multiplied with, in a shape that broadcasts to [..., 1]; 1 if None.
      weight: what the normed rows are multiplied with.
      bias: what is then added; there exactly if the rows' mean is taken off before (a layer norm).
      eps: what is added to the mean square.
      out_dtype: of the normed rows; that of x if None.
    """

    x: Float[Array, "... D"]
    add: Float[Array, "... D"] | None
    scale: Float[Array, "..."] | None
    weight: Float[Array, " D"]
    bias: Float[Array, " D"] | None
    eps: float = dataclasses.field(kw_only=True, metadata={"static": True})
    out_dtype: jnp.dtype | None = dataclasses.field(default=None, kw_only=True, metadata={"static": True})

    @property
    def normed_dtype(self) -> jnp.dtype:
        """Of the normed rows."""
        return self.out_dtype or self.x.dtype

    @property
    def centred(self) -> bool:
        """Whether the rows' mean is taken off."""
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
