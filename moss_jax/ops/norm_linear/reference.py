"""The definition of the op: plain float32.

M rows, N outputs
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.norm_linear.arguments import Arguments


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """The reference takes everything."""
    del arguments, platform
    return None


def apply(a: Arguments) -> Float[Array, "M N"]:
    """Computes the op in float32 at the highest matmul precision."""
    x, norm, weights = (x.astype(jnp.float32) for x in (a.x, a.norm, a.weights))
    normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + a.eps) * norm
    return (jnp.matmul(normed, weights.T, precision="highest") * a.scale).astype(a.x.dtype)
