"""The norms in plain JAX, for any platform.

D width
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.norm.arguments import Arguments


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """XLA takes everything."""
    del arguments, platform
    return None


def apply(a: Arguments) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
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
    return wide.astype(a.normed_dtype), y
