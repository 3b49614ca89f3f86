"""What every implementation of the linear map is called with.

M rows, K inputs, N outputs
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, Int8

# Weights of these dtypes come as [N, K] with a scale per output, others as [K, N].
QUANTIZED = ("int8", "float8_e4m3fn")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
    """One checked call; `linear` and `dense` build it, implementations read it.

    Attributes:
      x: if it was rounded to 8 bits, in float8_e4m3fn.
      kernel: [N, K] in 8 bits, otherwise [K, N].
      scale: what the outputs are multiplied with; there exactly if the kernel is in 8 bits.
      x_scale: what the rows are multiplied with; there exactly if x was rounded to 8 bits.
    """

    x: Float[Array, "M K"]
    kernel: Int8[Array, "N K"] | Float8e4m3fn[Array, "N K"] | Float[Array, "K N"]
    scale: Float[Array, " N"] | None = None
    x_scale: Float[Array, " M"] | None = None
    out_dtype: jnp.dtype = dataclasses.field(kw_only=True, metadata={"static": True})

    def __post_init__(self):
        if not hasattr(self.x, "ndim"):  # JAX rebuilds pytrees around placeholders.
            return
        stored = self.kernel.dtype.name
        if (self.scale is not None) != self.quantized:
            raise ValueError(
                f"linear takes a kernel in {' or '.join(QUANTIZED)} with a scale, dense others; got {stored}"
            )
        shape = "[N, K]" if self.quantized else "[K, N]"
        if self.kernel.ndim != 2 or self.kernel.shape[1 if self.quantized else 0] != self.x.shape[-1]:
            raise ValueError(
                f"x [..., K] and kernel {shape} must share K; got {self.x.shape} and {self.kernel.shape}"
            )
        if self.scale is not None and self.scale.shape != (self.outputs,):
            raise ValueError(
                f"scale is one number an output, [N] = {(self.outputs,)}; got {self.scale.shape}"
            )

    @property
    def quantized(self) -> bool:
        """Whether the kernel is stored in 8 bits."""
        return self.kernel.dtype.name in QUANTIZED

    @property
    def outputs(self) -> int:
        """N."""
        return self.kernel.shape[0 if self.quantized else 1]

    def scaled(self, products: Float[Array, "M N"]) -> Float[Array, "M N"]:
        """The result, given the plain products in float32."""
        if self.scale is not None:
            products = products * self.scale
        if self.x_scale is not None:
            products = products * self.x_scale[:, None]
        return products.astype(self.out_dtype)
