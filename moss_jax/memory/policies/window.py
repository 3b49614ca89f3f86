"""The policy "window": the newest frames whole, nothing of the others.

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


def keep_newest(bank: MemoryBank, budget: Int[Array, " 1"]) -> MemoryBank:
    """Forgets the oldest frames until no more vectors are left than the budget says."""
    (low,) = budget
    frames = frames_of(bank)
    vector = jnp.arange(bank.capacity, dtype=jnp.int32)
    first = jnp.where(frames.is_first & (bank.length[:, None] - vector <= low), vector, bank.capacity)
    first = first.min(axis=1, keepdims=True)  # Of the vectors that stay.
    return regroup(bank, jnp.where(vector >= first, vector - first, FORGET), bank.places, most=1)
