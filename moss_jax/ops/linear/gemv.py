"""Matrix-vector product in plain JAX for NVIDIA GPUs.

XLA compiles "multiply and sum along the last axis" to a kernel that reads small matrices faster than its
one-row matmul does.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.linear.base import Arguments


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """Why this product is not worthwhile for the arguments; None if it is."""
    del platform  # Only GPUs have it in their order.
    a = arguments
    if a.weights.scheme != "float" or not a.weights.outputs_first:
        return "it takes float weights with their outputs first"
    if a.gelu or a.weights.bias is not None or a.residual is not None:
        return "it has no epilogue"
    return None if a.shape[0] == 1 else f"it takes 1 row, not {a.shape[0]}"


def apply(a: Arguments) -> Float[Array, "..."]:
    """Computes the op; differentiable."""
    assert isinstance(a.x, Array)
    products = a.x.reshape(1, -1).astype(jnp.float32) * a.matrix.astype(jnp.float32)
    return a.unflatten(products.sum(axis=-1).astype(a.out_dtype))
