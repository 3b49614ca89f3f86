"""What every implementation is called with.

M rows, K inputs, N outputs
"""

import dataclasses

import jax
from jaxtyping import Array, Float, Float8e4m3fn, Int8

from moss_jax.ops.linear.arguments import QUANTIZED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
    """One checked call; `norm_linear` builds it and says what is in it, implementations read it."""

    x: Float[Array, "M K"]
    norm: Float[Array, " K"]
    weights: Int8[Array, "N K"] | Float8e4m3fn[Array, "N K"]
    scale: Float[Array, " N"]
    eps: float = dataclasses.field(kw_only=True, metadata={"static": True})

    def __post_init__(self):
        if not hasattr(self.x, "ndim"):  # JAX rebuilds pytrees around placeholders.
            return
        K = self.x.shape[-1]
        if self.weights.dtype.name not in QUANTIZED:
            raise ValueError(f"weights are in {' or '.join(QUANTIZED)}, not {self.weights.dtype}")
        if self.weights.ndim != 2 or self.weights.shape[1] != K:
            raise ValueError(
                f"x [..., K] and weights [N, K] must share K; got {self.x.shape} and {self.weights.shape}"
            )
        for name, size in (("norm", K), ("scale", self.weights.shape[0])):
            if (got := getattr(self, name).shape) != (size,):
                raise ValueError(f"with weights {self.weights.shape}, {name} must be {(size,)}; got {got}")
