"""Rotary position embeddings (RoPE) of queries and keys.

B batch/slot, T tokens, D head
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Rotation(NamedTuple):
    """Cosines and sines of positions' angles, float32 [B, T, D/2]."""

    cos: Float[Array, "B T R"]
    sin: Float[Array, "B T R"]


def rotate(x: Float[Array, "B T ... D"], rotation: Rotation) -> Float[Array, "B T ... D"]:
    """Rotates channel `i` with channel `i + D/2` (the rotate-half convention), in float32."""
    heads = tuple(range(2, x.ndim - 1))
    cos, sin = (jnp.expand_dims(part, heads) for part in rotation)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
