"""The forward pass over segments of long streams: the verbs of a live stream, with gradients.

B rows, K segments, T tokens of a segment, F frames of a segment, N vectors a frame, D width
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from moss_jax.config import ConfigError, MemoryConfig, ModelConfig, SegmentsConfig
from moss_jax.data.batch import Segments
from moss_jax.memory import NO_POSITION, MemoryBank, StreamState, TextCache, init_state, keep_tokens
from moss_jax.memory.policies import Compact, Policy, make_policy
from moss_jax.nn import MossVideo
from moss_jax.ops.qarray import DTYPES, dequantize, quantize


@dataclasses.dataclass(frozen=True)
class RowMemory:
    """The memory configuration of some rows.

    Attributes:
      compact: the policy, run before a segment that does not fit.
      room: largest number of vectors in use with which another segment fits.
      dtype: storage dtype that keys and values are rounded to; None for no rounding.
    """

    compact: Policy
    room: int
    dtype: jnp.dtype | None


def make_memories(segments: SegmentsConfig, model: ModelConfig) -> tuple[RowMemory, ...]:
    """Creates the memories that the rows of a batch cycle through.

    Raises:
      ConfigError: a policy is unknown or never makes room, or its bank is too small.
    """

    def make(policy: str, frames: int, dtype: str) -> RowMemory:
        # A compaction frees room for a whole segment. The data evicts text, not these settings.
        low = (frames - segments.frames) / frames
        memory = MemoryConfig(policy, low_water=low, text_recent=low / 2)
        try:
            compact = make_policy(memory, model, frames)
        except ConfigError as error:
            raise ConfigError(f"segments.memories has {(policy, frames, dtype)}: {error}") from error
        if compact is None:
            raise ConfigError(f"segments.memories has {policy!r}, which makes no room for another segment")
        room = memory.low_mark(frames) * model.vectors_per_frame
        return RowMemory(compact, room, DTYPES.get(dtype))

    return tuple(make(*memory) for memory in segments.memories)


def empty_memory(segments: SegmentsConfig, model: ModelConfig, rows: int, dtype: DTypeLike) -> StreamState:
    """Creates the empty memory that rows start with."""
    return init_state(
        model,
        rows,
        text_capacity=max(segments.text_capacities),
        bank_capacity=max(frames for _, frames, _ in segments.memories),
        dtype=dtype,
        merges=True,
    )


def run_segments(
    model: MossVideo,
    memory: StreamState,
    tokens: Int[Array, "B KT"],
    features: Float[Array, "B KF N D"],
    frame_positions: Int[Array, "B KF"],
    segments: Segments,
    memories: Sequence[RowMemory],
) -> tuple[Float[Array, "B KT D"], StreamState]:
    """Returns the hidden states of segments that continue the streams of a memory, and the updated memory.

    Args:
      memory: carried over from the previous segments; gradients are stopped.
      frame_positions: index of each frame's token in its row, KT for absent frames.
      memories: memory configurations that the rows cycle through.
    """
    B, KT = tokens.shape
    K = segments.lengths.shape[1]
    T = KT // K
    # Row `b` has memory `b` modulo their number, so that each device of a mesh has rows of all.
    memories = [memories[b % len(memories)] for b in range(B)]

    def split(x):  # [B, K ...] to [K, B, ...]
        return x.reshape(B, K, -1, *x.shape[2:]).swapaxes(0, 1)

    offsets = split(frame_positions) - jnp.arange(K, dtype=jnp.int32)[:, None, None] * T
    per_segment = jax.tree.map(lambda x: jnp.asarray(x).swapaxes(0, 1), segments)

    def run(memory: StreamState, segment):
        tokens, features, offsets, changes = segment
        text, bank = _begin(memory, changes.begins)
        text = keep_tokens(text, changes.kept, changes.kept_length)
        text = dataclasses.replace(text, position=text.position + changes.skipped)
        bank = _make_room(bank, memories)
        positions = text.position[:, None] + offsets
        state = model.remember(StreamState(text, bank), features, positions, mask=offsets < T)
        state = dataclasses.replace(state, bank=_round(state.bank, memories))
        hidden, state = model.decoder.decode(state, tokens, changes.lengths)
        return state, hidden

    xs = split(tokens), split(features), offsets, per_segment
    memory, hidden = jax.lax.scan(run, jax.lax.stop_gradient(memory), xs)
    return hidden.swapaxes(0, 1).reshape(B, KT, -1), jax.lax.stop_gradient(memory)


def _begin(memory: StreamState, begins: Bool[Array, " B"]) -> tuple[TextCache, MemoryBank]:
    """Resets the memory of the rows that begin a new stream."""
    text, bank = memory.text, memory.bank

    def empty(x, value=0):
        return jnp.where(begins.reshape(-1, *(1,) * (x.ndim - 1)), value, x)

    text = dataclasses.replace(text, length=empty(text.length), position=empty(text.position))
    bank = dataclasses.replace(
        bank,
        positions=empty(bank.positions, NO_POSITION),
        counts=None if bank.counts is None else empty(bank.counts),
        length=empty(bank.length),
    )
    return text, bank


def _make_room(bank: MemoryBank, memories: Sequence[RowMemory]) -> MemoryBank:
    """Compacts the banks in which another segment would not fit.

    Rows of one policy are compacted together, as they differ only in their budgets: a compaction is a hundred
    small kernels, whatever the number of rows.

    Args:
      memories: of each row.
    """
    by_policy: dict[Compact, list[int]] = {}
    for row, memory in enumerate(memories):
        by_policy.setdefault(memory.compact.compact, []).append(row)
    parts = []
    for compact, rows in by_policy.items():
        budgets = np.stack([memories[row].compact.budget for row in rows], axis=1)
        parts.append(compact(_rows(bank, rows), jnp.asarray(budgets[:, :, None])))
    order = np.argsort(list(itertools.chain.from_iterable(by_policy.values()))).tolist()
    compacted = _rows(jax.tree.map(lambda *x: jnp.concatenate(x), *parts), order)
    full = bank.length > np.array([memory.room for memory in memories])
    return jax.tree.map(
        lambda new, old: jnp.where(full.reshape(-1, *(1,) * (old.ndim - 1)), new, old), compacted, bank
    )


def _rows(bank: MemoryBank, rows: Sequence[int]) -> MemoryBank:
    """Picks rows, each of which at most once."""
    index = np.array(rows)
    return jax.tree.map(
        # The hints spare the gradient a scatter with atomic sums.
        lambda x: x.at[index].get(unique_indices=True, mode="promise_in_bounds"),
        bank,
    )


def _round(bank: MemoryBank, memories: Sequence[RowMemory]) -> MemoryBank:
    """Rounds keys and values as storing them in 8 bits would, with straight-through gradients.

    Args:
      memories: of each row.
    """
    # In order: all processes must trace the same program.
    dtypes = dict.fromkeys(memory.dtype for memory in memories if memory.dtype is not None)

    def rounded(x):
        exact = stored = jax.lax.stop_gradient(x)
        for dtype in dtypes:
            has = np.array([memory.dtype == dtype for memory in memories])[:, None, None, None]
            stored = jnp.where(has, dequantize(quantize(exact, dtype, axes=3), x.dtype), stored)
        return x + (stored - exact)

    return dataclasses.replace(
        bank, keys=tuple(map(rounded, bank.keys)), values=tuple(map(rounded, bank.values))
    )
