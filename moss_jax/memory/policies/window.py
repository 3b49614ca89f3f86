"""The "window" policy: keeps the newest frames whole and drops the others.

B slots, S vectors
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from moss_jax.config import MemoryConfig, ModelConfig
from moss_jax.memory.bank import MemoryBank
from moss_jax.memory.compaction import FORGET, frames_of, regroup
from moss_jax.memory.policies.policy import Policy, make_budget


def window(memory: MemoryConfig, model: ModelConfig, frames: int) -> Policy:
    """Keeps as many of the newest frames as fit below the low-water mark."""
    return Policy(keep_newest, make_budget([memory.low_mark(frames) * model.vectors_per_frame]))


def keep_newest(bank: MemoryBank, budget: Int[Array, "1 ..."]) -> MemoryBank:
    """Drops the oldest frames until the number of vectors is within the budget."""
    (low,) = budget
    frames = frames_of(bank)
    vector = jnp.arange(bank.capacity, dtype=jnp.int32)
    first = jnp.where(frames.is_first & (bank.length[:, None] - vector <= low), vector, bank.capacity)
    first = first.min(axis=1, keepdims=True)  # The first vector that stays.
    return regroup(bank, jnp.where(vector >= first, vector - first, FORGET), bank.places, most=1)
