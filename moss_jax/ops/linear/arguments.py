"""What every implementation of the linear map is called with.

M rows, K inputs, N outputs
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, Int8

# Dtypes of the kernel.
QUANTIZED = ("int8", "float8_e4m3fn")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
    """One checked call; `linear` builds it, implementations read it.

    Attributes:
      x: the inputs.
      kernel: the weights.
      scale: what the outputs are multiplied with.
    """

    x: Float[Array, "M K"]
    kernel: Int8[Array, "N K"] | Float8e4m3fn[Array, "N K"]
    scale: Float[Array, " N"]
    out_dtype: jnp.dtype = dataclasses.field(kw_only=True, metadata={"static": True})

    def __post_init__(self):
        if not hasattr(self.x, "ndim"):  # JAX rebuilds pytrees around placeholders.
            return
        if self.kernel.dtype.name not in QUANTIZED:
            raise ValueError(f"kernel is in {' or '.join(QUANTIZED)}, not {self.kernel.dtype}")
        if self.kernel.ndim != 2 or self.kernel.shape[1] != self.x.shape[-1]:
            raise ValueError(
                f"x [..., K] and kernel [N, K] must share K; got {self.x.shape} and {self.kernel.shape}"
            )
        if self.scale.shape != (self.outputs,):
            raise ValueError(
                f"scale is one number an output, [N] = {(self.outputs,)}; got {self.scale.shape}"
            )

    @property
    def outputs(self) -> int:
        """N."""
        return self.kernel.shape[0]

    def scaled(self, products: Float[Array, "M N"]) -> Float[Array, "M N"]:
        """The result, given the plain products in float32."""
        return (products * self.scale).astype(self.out_dtype)
