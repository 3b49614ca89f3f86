"""The definition of the op: plain float32, rounded at the end.

D width
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.norm.arguments import Arguments


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """The reference takes everything."""
    del arguments, platform
    return None


def apply(a: Arguments) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
    """Computes the op in float32; what is normed is the sum before it is rounded."""
    y = a.x.astype(jnp.float32)
    if a.add is not None:
        scale = 1 if a.scale is None else a.scale.astype(jnp.float32)
        y += scale * a.add.astype(jnp.float32)
    centred = y - y.mean(axis=-1, keepdims=True) if a.centred else y
    normed = centred / jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + a.eps)
    normed *= a.weight.astype(jnp.float32)
    if a.centred:
        normed += a.bias.astype(jnp.float32)
    return normed.astype(a.normed_dtype), y.astype(a.x.dtype)
