"""Rotary position embedding with the llama3 frequency scaling."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moss_jax.config import RopeConfig
from moss_jax.ops.rotary import Rotation


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
