"""Rotary position embedding with the llama3 frequency scaling."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moss_jax.config import RopeConfig


class Rotation(NamedTuple):
    """Cosines and sines of the angles of some positions, float32 [B, T, D/2]."""

    cos: Float[Array, "B T R"]
    sin: Float[Array, "B T R"]


def frequencies(config: RopeConfig, head_dim: int) -> Float[Array, " R"]:
    """Radians a position for each pair of channels.

    Waves longer than the original context are slowed by `factor`, those much shorter are left alone, and a
    linear ramp joins the two (Llama 3.1; `rope_type: llama3` in transformers).
    """
    base = config.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if config.factor == 1:
        return base
    turns = config.original_max_positions * base / (2 * math.pi)
    keep = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    keep = jnp.clip(keep, 0, 1)
    return base * (keep + (1 - keep) / config.factor)


def rotation(positions: Int[Array, "B T"], config: RopeConfig, head_dim: int) -> Rotation:
    """The rotation of each position."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(config, head_dim)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "B T ... D"], by: Rotation) -> Float[Array, "B T ... D"]:
    """Rotates channel `i` with channel `i + D/2` (the rotate-half convention), in float32."""
    heads = tuple(range(2, x.ndim - 1))
    cos, sin = (jnp.expand_dims(part, heads) for part in by)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
