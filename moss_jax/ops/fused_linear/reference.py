"""The definition of the op: plain float32.

K inputs, N outputs
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.fused_linear.arguments import Arguments


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """The reference takes everything."""
    del arguments, platform
    return None


def apply(a: Arguments) -> Float[Array, "... N"]:
    """Computes the op in float32 at the highest matmul precision."""
    x, kernel = a.x.astype(jnp.float32), a.kernel.astype(jnp.float32)
    y = jnp.matmul(x, kernel.T if a.in_8_bits else kernel, precision="highest")
    if a.scale is not None:
        y *= a.scale
    if a.bias is not None:
        y += a.bias.astype(jnp.float32)
    y = jax.nn.gelu(y, approximate=False) if a.gelu else y
    if a.out_scale is not None:
        y *= a.out_scale
    if a.residual is not None:
        y += a.residual.astype(jnp.float32)
    return y.astype(a.out_dtype)
