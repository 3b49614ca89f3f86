"""What every implementation of the linear map in float8 is called with.

M rows, K inputs, N outputs
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn

from moss_jax.ops.rounding import Rounded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
    """One checked call; `fp8_linear` builds it and says what is in it, implementations read it."""

    x: Rounded
    kernel: Float8e4m3fn[Array, "N K"]
    scale: Float[Array, " N"]
    bias: Float[Array, " N"] | None = None
    gelu: bool = dataclasses.field(default=False, kw_only=True, metadata={"static": True})
    out_dtype: jnp.dtype = dataclasses.field(kw_only=True, metadata={"static": True})

    def __post_init__(self):
        if not hasattr(self.kernel, "ndim"):  # JAX rebuilds pytrees around placeholders.
            return
        x, kernel = self.x.numbers, self.kernel
        if not x.dtype == kernel.dtype == jnp.float8_e4m3fn:
            raise ValueError(f"x and kernel are in float8_e4m3fn, not {x.dtype} and {kernel.dtype}")
        if kernel.ndim != 2 or kernel.shape[1] != x.shape[-1]:
            raise ValueError(f"x [..., K] and kernel [N, K] must share K; got {x.shape} and {kernel.shape}")
        vectors = (("x.scale", self.x.scale, x), ("scale", self.scale, kernel), ("bias", self.bias, kernel))
        for name, vector, matrix in vectors:
            if vector is not None and vector.shape != matrix.shape[:1]:
                raise ValueError(f"{name} must be {matrix.shape[:1]}; got {vector.shape}")

    @property
    def outputs(self) -> int:
        """N."""
        return self.kernel.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """M, K, N."""
        return *self.x.numbers.shape, self.outputs
