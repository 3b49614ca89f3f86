"""What every implementation of the gelu is called with.

N columns
"""

import dataclasses

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
    """One checked call; `gelu` builds it, implementations read it."""

    x: Float[Array, "... N"]
    bias: Float[Array, " N"] | None = None

    def __post_init__(self):
        if not hasattr(self.x, "ndim"):  # JAX rebuilds pytrees around placeholders.
            return
        if self.bias is not None and self.bias.shape != self.x.shape[-1:]:
            raise ValueError(f"bias is one number a column, [N] = {self.x.shape[-1:]}; got {self.bias.shape}")

    @property
    def biased(self) -> Float[Array, "... N"]:
        """What the gelu is taken of."""
        return self.x if self.bias is None else (self.x + self.bias).astype(self.x.dtype)
