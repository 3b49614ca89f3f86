"""The linear map in plain JAX, for any platform.

M rows, K inputs, N outputs
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moss_jax.ops.linear.arguments import Arguments


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """XLA takes everything."""
    del arguments, platform
    return None


def apply(a: Arguments) -> Float[Array, "M N"]:
    """Computes the op; differentiable in x."""
    kernel = a.kernel.astype(a.x.dtype)  # Which holds 8 bits exactly.
    products = lax.dot_general(a.x, kernel, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return a.scaled(products)
