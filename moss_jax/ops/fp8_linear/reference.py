"""The definition of the op: plain float32.

M rows, N outputs
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.fp8_linear.arguments import Arguments


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """The reference takes everything."""
    del arguments, platform
    return None


def apply(a: Arguments) -> Float[Array, "M N"]:
    """Computes the op in float32 at the highest matmul precision."""
    x, kernel = a.x.numbers.astype(jnp.float32), a.kernel.astype(jnp.float32)
    y = jnp.matmul(x, kernel.T, precision="highest") * a.scale * a.x.scale[:, None]
    if a.bias is not None:
        y += a.bias.astype(jnp.float32)
    return (jax.nn.gelu(y, approximate=False) if a.gelu else y).astype(a.out_dtype)
