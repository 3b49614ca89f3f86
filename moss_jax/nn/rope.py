"""Rotary position embedding with llama3 frequency scaling, for unbounded positions.

B batch/slot, T tokens, R pairs of channels
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moss_jax.config import RopeConfig
from moss_jax.ops.rotary import Rotation

# log2 of the positions in a block, in which angles are float32 products; the original's context length.
BLOCK_BITS = 17


def frequencies(config: RopeConfig, head_dim: int) -> Float[np.ndarray, " R"]:
    """Radians per position for each pair of channels, float32, identical on every platform.

    Wavelengths beyond the original context are stretched by `factor`, much shorter ones are unchanged, and a
    linear ramp joins the two (Llama 3.1; `rope_type: llama3` in transformers).
    """
    one = np.float32(1)
    base = (config.theta ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    if config.factor == 1:
        return base
    # Products with reciprocals, as XLA divides by a scalar.
    turns = np.float32(config.original_max_positions) * base * (one / np.float32(2 * math.pi))
    ramp = one / np.float32(config.high_freq_factor - config.low_freq_factor)
    keep = np.clip((turns - np.float32(config.low_freq_factor)) * ramp, 0, 1)
    return base * (keep + (1 - keep) * (one / np.float32(config.factor)))


def rotation(positions: Int[Array, "B T"], config: RopeConfig, head_dim: int) -> Rotation:
    """Computes the rotation of each position.

    A float32 product of position and frequency is off by up to 2^-8 at the last position of the original,
    and by more beyond. So a position is split into the start of its block and an offset, whose rotations are
    composed: in the first block the result equals the plain product bit for bit, and later blocks are as
    accurate.
    """
    positions = jnp.asarray(positions, jnp.int32)[..., None]
    radians = frequencies(config, head_dim)
    block, rest = positions >> BLOCK_BITS, positions & ((1 << BLOCK_BITS) - 1)
    near = rest.astype(jnp.float32) * radians
    # A turn is 2^32 units, so overflow of the int32 product drops whole turns. The units of one block are
    # rounded by up to a half, which puts the last of 2^14 blocks off by 2^-19 turns.
    turns = radians.astype(np.float64) * 2**BLOCK_BITS / (2 * math.pi)
    units = np.round(turns % 1 * 2**32).astype(np.int64).astype(np.int32)
    far = (block * units).astype(jnp.float32) * np.float32(2 * math.pi / 2**32)
    cos, sin = jnp.cos(far), jnp.sin(far)
    return Rotation(
        jnp.cos(near) * cos - jnp.sin(near) * sin,
        jnp.sin(near) * cos + jnp.cos(near) * sin,
    )
