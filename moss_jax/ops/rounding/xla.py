"""Rows in float8_e4m3fn in plain JAX, for any platform.

M rows, K columns
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.rounding.rounded import Rounded

LARGEST = 448.0  # Of float8_e4m3fn.
# What counts as the largest number of a row at least, so that nothing is divided by 0: zeros stay zeros under
# any scale, and 448 times its inverse is a float32.
SMALLEST = 1e-30


def unsupported(x: Float[Array, "M K"], platform: str) -> str | None:
    """XLA takes everything."""
    del x, platform
    return None


def apply(x: Float[Array, "M K"]) -> Rounded:
    """Computes the op; differentiable."""
    x = x.astype(jnp.float32)
    largest = jnp.maximum(jnp.abs(x).max(axis=-1), SMALLEST)
    scale = largest / LARGEST
    return Rounded((x / scale[:, None]).astype(jnp.float8_e4m3fn), scale)
