"""The definition of the op: plain float32.

M rows, K inputs, N outputs
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.linear.arguments import Arguments


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """The reference takes everything."""
    del arguments, platform
    return None


def apply(a: Arguments) -> Float[Array, "M N"]:
    """Computes the op in float32 at the highest matmul precision."""
    x, kernel = a.x.astype(jnp.float32), a.kernel.astype(jnp.float32)
    return a.scaled(jnp.matmul(x, kernel.T, precision="highest"))
