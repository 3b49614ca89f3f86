"""What every implementation of the linear map and what follows it is called with.

M rows, K inputs, N outputs
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
    """One checked call; `fused_linear` builds it and says what is in it, implementations read it."""

    x: Float[Array, "... K"]
    kernel: Float[Array, "K N"] | Float[Array, "N K"]
    scale: Float[Array, " N"] | None = None
    bias: Float[Array, " N"] | None = None
    out_scale: Float[Array, " 1"] | None = None
    residual: Float[Array, "... N"] | None = None
    gelu: bool = dataclasses.field(default=False, kw_only=True, metadata={"static": True})
    out_dtype: jnp.dtype = dataclasses.field(kw_only=True, metadata={"static": True})

    def __post_init__(self):
        if not hasattr(self.x, "ndim"):  # JAX rebuilds pytrees around placeholders.
            return
        x, kernel = self.x, self.kernel
        wide = jnp.issubdtype(kernel.dtype, jnp.floating) and kernel.dtype.itemsize > 1
        if x.dtype != kernel.dtype or not (wide or self.in_8_bits):
            raise ValueError(
                "x and kernel are both in float8_e4m3fn, or both in another float dtype of 16 bits or more, "
                f"not {x.dtype} and {kernel.dtype}"
            )
        if kernel.ndim != 2 or kernel.shape[1 if self.in_8_bits else 0] != x.shape[-1]:
            named = "[N, K]" if self.in_8_bits else "[K, N]"
            raise ValueError(f"x [..., K] and kernel {named} must share K; got {x.shape} and {kernel.shape}")
        if (self.scale is not None) != self.in_8_bits:
            raise ValueError(f"kernels in float8_e4m3fn have a scale, others none; this is in {kernel.dtype}")
        for name, size in (("scale", self.outputs), ("bias", self.outputs), ("out_scale", 1)):
            vector = getattr(self, name)
            if vector is not None and vector.shape != (size,):
                raise ValueError(f"{name} must be {(size,)}; got {vector.shape}")
        if (residual := self.residual) is None:
            return
        if self.out_dtype.itemsize == 1:
            raise ValueError(f"a residual is for results of 16 bits or more, not for {self.out_dtype}")
        shape = (*x.shape[:-1], self.outputs)
        if (residual.shape, residual.dtype) != (shape, self.out_dtype):
            raise ValueError(
                f"residual is as the results, {self.out_dtype} {shape}; got {residual.dtype} {residual.shape}"
            )

    @property
    def in_8_bits(self) -> bool:
        """Whether the factors of the product are; then the kernel is [N, K]."""
        return self.kernel.dtype == jnp.float8_e4m3fn

    @property
    def outputs(self) -> int:
        """N."""
        return self.kernel.shape[0 if self.in_8_bits else 1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """M, K, N."""
        *rows, inputs = self.x.shape
        return math.prod(rows), inputs, self.outputs
