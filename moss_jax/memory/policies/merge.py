"""The "merge" policy: merges similar vectors at the same place of neighbouring frames.

B slots, K kv heads, S vectors, D head
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moss_jax.config import MemoryConfig, ModelConfig
from moss_jax.memory.bank import MemoryBank
from moss_jax.memory.compaction import regroup
from moss_jax.memory.policies.policy import Policy, make_budget
from moss_jax.ops.qarray import dequantize


def merge(memory: MemoryConfig, model: ModelConfig, frames: int) -> Policy:
    """Merges the most similar pairs until the low-water mark is reached."""
    return Policy(merge_alike, make_budget([memory.low_mark(frames) * model.vectors_per_frame]))


def merge_alike(bank: MemoryBank, budget: Int[Array, "1 ..."]) -> MemoryBank:
    """Merges pairs of vectors, most similar values first, until the bank is within the budget.

    Among the vectors of one place, the first and second are a pair, the third and fourth, and so on. The
    older one of a pair is merged into the newer one, or both stay.
    """
    (low,) = budget
    vector = jnp.arange(bank.capacity)
    held = vector < bank.length[:, None]
    # Sorts vectors by place, in order of time; empty places go last.
    place = jnp.where(held, bank.places, jnp.iinfo(jnp.int32).max)
    order = jnp.argsort(place, axis=1, stable=True)
    ordered = jnp.take_along_axis(place, order, axis=1)
    rank = vector - jax.vmap(lambda x: jnp.searchsorted(x, x))(ordered)
    follows = jnp.pad(ordered[:, 1:] == ordered[:, :-1], ((0, 0), (0, 1)))
    newer = jnp.pad(order[:, 1:], ((0, 0), (0, 1)))
    is_pair = jnp.take_along_axis(held, order, axis=1) & follows & (rank % 2 == 0)
    # Back to the bank's order.
    back = jnp.argsort(order, axis=1)
    is_pair, newer = (jnp.take_along_axis(x, back, axis=1) for x in (is_pair, newer))
    alike = jnp.where(is_pair, likeness(dequantize(bank.values[len(bank.values) // 2]), newer), -jnp.inf)
    excess = jnp.maximum(bank.length[:, None] - low, 0)
    chosen = is_pair & (jnp.argsort(jnp.argsort(-alike, axis=1, stable=True), axis=1) < excess)
    target = jnp.cumsum(held & ~chosen, axis=1) - 1
    target = jnp.where(chosen, jnp.take_along_axis(target, newer, axis=1), target)
    return regroup(bank, jnp.where(held, target, -1), bank.places, most=2)


def likeness(values: Float[Array, "B K S D"], other: Array) -> Float[Array, "B S"]:
    """Cosine similarity, over all heads together, of each vector and another of the same slot."""
    paired = jnp.take_along_axis(values, other[:, None, :, None], axis=2)

    def sums(x):
        return jnp.sum(x, axis=(1, 3))

    lengths = jnp.sqrt(sums(values**2) * sums(paired**2))
    return sums(values * paired) / jnp.maximum(lengths, 1e-30)
