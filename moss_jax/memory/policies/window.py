"""The policy "window": the newest frames whole, nothing of the others.

B slots, S vectors
"""

import functools

import jax.numpy as jnp

from moss_jax.config import MemoryConfig, ModelConfig
from moss_jax.memory.bank import MemoryBank
from moss_jax.memory.compaction import FORGET, frames_of, regroup


def window(memory: MemoryConfig, model: ModelConfig, frames: int):
    """Keeps as many of the newest frames as fit below the low-water mark."""
    return functools.partial(keep_newest, low=memory.low_mark(frames) * model.vectors_per_frame)


def keep_newest(bank: MemoryBank, *, low: int) -> MemoryBank:
    """Forgets the oldest frames until at most `low` vectors are left."""
    frames = frames_of(bank)
    vector = jnp.arange(bank.capacity, dtype=jnp.int32)
    first = jnp.where(frames.is_first & (bank.length[:, None] - vector <= low), vector, bank.capacity)
    first = first.min(axis=1, keepdims=True)  # Of the vectors that stay.
    return regroup(bank, jnp.where(vector >= first, vector - first, FORGET), bank.places, most=1)
