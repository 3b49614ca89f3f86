"""The norms in plain JAX, for any platform.

D width
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.norm.arguments import Arguments
from moss_jax.ops.rounding import Rounded, round_rows


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """XLA takes everything."""
    del arguments, platform
    return None


def apply(a: Arguments) -> tuple[Float[Array, "... D"] | Rounded, Float[Array, "... D"]]:
    """Computes the op; differentiable in all that is given."""
    y = a.x
    if a.add is not None:
        y += a.add if a.scale is None else a.scale * a.add
    wide = y.astype(jnp.float32)
    if a.centred:
        wide -= wide.mean(axis=-1, keepdims=True)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + a.eps)
    wide *= a.weight.astype(jnp.float32)
    if a.centred:
        wide += a.bias.astype(jnp.float32)
    normed = wide.astype(y.dtype)
    return round_rows(normed) if a.rounded else normed, y
