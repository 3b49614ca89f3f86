"""Compaction: the primitive by which all policies shrink a memory bank.

B slots, K kv heads, S vectors, M vectors that become one, D head
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from moss_jax.memory.bank import NO_POSITION, MemoryBank
from moss_jax.ops.merge_rows import merge_rows
from moss_jax.ops.qarray import QArray

# Target of a vector that is dropped.
FORGET = -1


class Frames(NamedTuple):
    """Per-vector description of the frames in a bank, [B, S] each; empty places belong to no frame.

    Attributes:
      index: of each vector's frame, 0 for the oldest.
      size: number of vectors in that frame.
      is_first: whether it is the first vector of its frame.
      held: whether the place holds a vector.
    """

    index: Int[Array, "B S"]
    size: Int[Array, "B S"]
    is_first: Bool[Array, "B S"]
    held: Bool[Array, "B S"]


def frames_of(bank: MemoryBank) -> Frames:
    """Finds the frames of a bank: runs of vectors that share a position."""
    held = jnp.arange(bank.capacity) < bank.length[:, None]
    before = jnp.pad(bank.positions[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    is_first = held & (bank.positions != before)
    index = jnp.cumsum(is_first, axis=1, dtype=jnp.int32) - 1
    sizes = jax.vmap(lambda index, held: jnp.zeros_like(index).at[index].add(held, mode="drop"))(
        index, held.astype(jnp.int32)
    )
    return Frames(index, jnp.take_along_axis(sizes, index, axis=1, mode="clip"), is_first, held)


class Groups(NamedTuple):
    """Mapping between old vectors and the new ones that they are merged into.

    Attributes:
      target: index of the new vector that each vector becomes part of; S for one that is dropped.
      source: indices of the vectors that each new vector is made of.
      count: number of vectors that each new vector is made of; 0 where there is none.
    """

    target: Int[Array, "B S"]
    source: Int[Array, "M B S"]
    count: Int[Array, "B S"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def weighted_sum(
    x: Float[Array, "B K S D"], weights: Float[Array, "M B #K S"], groups: Groups, dtype: DTypeLike
):
    """The weighted sum of each group, computed in float32; the weights have no gradient."""
    return merge_rows(x, weights, groups.source, groups.count, out_dtype=dtype)


def _weighted_sum_forward(x, weights, groups, dtype):
    return weighted_sum(x, weights, groups, dtype), (jnp.zeros((), x.dtype), weights, groups)


def _weighted_sum_backward(dtype, saved, d_sums):
    # A vector is in at most one group, so its gradient is a gather; the automatic gradient of a gather would
    # be a scatter.
    del dtype
    like, weights, (target, source, _) = saved
    S = target.shape[1]
    at = jnp.minimum(target, S - 1)
    member = jnp.take_along_axis(source, at[None], axis=2)
    number = jnp.argmax(member == jnp.arange(S), axis=0)  # Index of each vector in its group.
    # [M, B, K, S] to the weight of each vector, [B, K, S].
    share = jnp.take_along_axis(weights, at[None, :, None], axis=3)
    share = jnp.take_along_axis(
        share, jnp.broadcast_to(number[None, :, None], (1, *share.shape[1:])), axis=0
    )[0]
    share = jnp.where(target[:, None] < S, share, 0)
    d_x = share[..., None] * jnp.take_along_axis(d_sums, at[:, None, :, None], axis=2)
    return d_x.astype(like.dtype), None, None


weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


def regroup(
    bank: MemoryBank, target: Int[Array, "B S"], places: Int[Array, "B S"], *, most: int
) -> MemoryBank:
    """Replaces each group of vectors that share a target by their mean.

    The mean is weighted by the number of vectors that each already stands for, so a vector is always the mean
    of what was appended, however often it has been merged. It gets the position of the newest of them.

    Args:
      target: index of the new vector that each vector becomes part of, or FORGET. The targets in use are
        0, 1, … without a gap, in the order of the newest vectors that they are made of.
      places: of the new vectors in their frames, at the index of each vector that becomes part of them.
      most: maximum number of vectors merged into one.
    """
    S = bank.capacity
    held = jnp.arange(S) < bank.length[:, None]
    target = jnp.where(held & (target >= 0), target, S)
    length = jnp.max(jnp.where(target < S, target + 1, 0), axis=1)
    # Ascending targets are groups side by side; new vector `i` is made of the vectors order[first[i] + m].
    order = jnp.argsort(target, axis=1, stable=True)
    ordered = jnp.take_along_axis(target, order, axis=1)
    first = jax.vmap(lambda ordered: jnp.searchsorted(ordered, jnp.arange(S + 1)))(ordered)
    member = first[:, :-1] + jnp.arange(most)[:, None, None]  # [M, B, S]
    is_member = member < first[:, 1:]
    # Padded with the first of the group: an index of some vector.
    member = jnp.minimum(jnp.where(is_member, member, first[:, :-1]), S - 1)
    source = jnp.take_along_axis(order[None], member, axis=2)

    def pick(x):
        return jnp.take_along_axis(x[None], source, axis=2)

    counts = jnp.where(is_member, 1 if bank.counts is None else pick(bank.counts), 0)
    total = jnp.sum(counts, axis=0)
    # XLA multiplies by the reciprocal of a broadcast divisor, and c * (1 / c) is not always 1: single vectors
    # would drift, compaction after compaction.
    share = jnp.where(counts == total, 1, counts / jnp.maximum(total, 1))
    shares = jnp.where(is_member, share, 0).astype(jnp.float32)[:, :, None]  # [M, B, 1, S]
    exists = jnp.arange(S) < length[:, None]
    groups = Groups(target, source, jnp.where(exists, jnp.sum(is_member, axis=0), 0))

    def merged(x: Float[Array, "B K S D"] | QArray) -> Float[Array, "B K S D"] | QArray:
        if not isinstance(x, QArray):
            return weighted_sum(x, shares, groups, x.dtype)
        # The mean of the scales is large enough for the mean of the vectors, and a single vector stays exact.
        # The scale of the actual maximum would take a second pass.
        scales = jnp.take_along_axis(x.scale[None], source[:, :, None], axis=3)
        scales = jnp.where(is_member[:, :, None], shares * scales, 0)
        scale = jnp.sum(scales, axis=0)
        # Without the barrier, XLA recomputes them for each element of a vector.
        weights = jax.lax.optimization_barrier(scales / jnp.where(scale > 0, scale, 1))
        return QArray(weighted_sum(x.values, weights, groups, x.dtype), scale)

    newest = jnp.max(jnp.where(is_member, pick(bank.positions), -1), axis=0)
    return dataclasses.replace(
        bank,
        keys=tuple(map(merged, bank.keys)),
        values=tuple(map(merged, bank.values)),
        positions=jnp.where(exists, newest, NO_POSITION).astype(jnp.int32),
        places=jnp.where(exists, pick(places)[0], 0),
        counts=None if bank.counts is None else jnp.where(exists, total, 0),
        length=length.astype(jnp.int32),
    )
