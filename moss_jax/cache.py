"""The state of a stream: frozen pytrees, made by `init`, passed in, returned, never mutated.

B stream slots, K kv heads, T tokens, C capacity in tokens, R rows of a buffer, F frames, N vectors a frame,
D head
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int

from moss_jax.config import ModelConfig

# Stands where the bank has no frame: no token comes after it.
NO_POSITION = jnp.iinfo(jnp.int32).max

# Kernels read a text cache of a multiple of so many rows where it lies.
ROWS_MULTIPLE = 128


class CapacityError(ValueError):
    """A slot has no room for what is to be appended."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextCache:
    """Keys and values of the tokens so far, for every self-attention layer.

    Attributes:
      keys, values: one [B, K, R, D] array a layer, in layer order; keys are rotated. R is at least C + 1: a
        slot that stands still or is full writes to row C, which is never read.
      length: tokens held; also the position of the next one.
      capacity: C, tokens that there is room for.
    """

    keys: tuple[Float[Array, "B K R D"], ...]
    values: tuple[Float[Array, "B K R D"], ...]
    length: Int[Array, " B"]
    capacity: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemoryBank:
    """Keys and values of the frames so far, for every cross-attention layer.

    Attributes:
      keys, values: one [B, K, F*N, D] array a layer, frame after frame; keys are rotated and normalised.
      positions: position of each frame's `<|image|>` token, ascending; NO_POSITION where there is no frame.
      length: frames held.
    """

    keys: tuple[Float[Array, "B K FN D"], ...]
    values: tuple[Float[Array, "B K FN D"], ...]
    positions: Int[Array, "B F"]
    length: Int[Array, " B"]

    @property
    def capacity(self) -> int:
        return self.positions.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamState:
    """Everything that the model knows of its streams."""

    text: TextCache
    bank: MemoryBank

    @property
    def slots(self) -> int:
        return self.text.length.shape[0]


def init_state(
    config: ModelConfig, slots: int, *, text_capacity: int, bank_capacity: int, dtype: DTypeLike
) -> StreamState:
    """An empty state.

    Args:
      slots: streams side by side.
      text_capacity: tokens that a slot can hold.
      bank_capacity: frames that a slot can hold.

    Raises:
      CapacityError: a size below 1, or more tokens than the model has positions for.
    """
    for name, size in (("slots", slots), ("text_capacity", text_capacity), ("bank_capacity", bank_capacity)):
        if size < 1:
            raise CapacityError(f"{name} must be at least 1, not {size}")
    decoder = config.decoder
    if text_capacity > decoder.max_positions:
        raise CapacityError(
            f"text_capacity {text_capacity} exceeds the {decoder.max_positions} positions of the model"
        )

    def buffers(layers: int, capacity: int) -> tuple[jax.Array, ...]:
        # One buffer each: donated arrays must not share memory.
        shape = (slots, decoder.num_kv_heads, capacity, decoder.head_dim)
        return tuple(jnp.zeros(shape, dtype) for _ in range(layers))

    self_layers, cross_layers = decoder.num_self_attention_layers, len(decoder.cross_attention_layers)
    vectors = bank_capacity * config.vectors_per_frame
    rows = -(-(text_capacity + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    return StreamState(
        text=TextCache(
            keys=buffers(self_layers, rows),
            values=buffers(self_layers, rows),
            length=jnp.zeros(slots, jnp.int32),
            capacity=text_capacity,
        ),
        bank=MemoryBank(
            keys=buffers(cross_layers, vectors),
            values=buffers(cross_layers, vectors),
            positions=jnp.full((slots, bank_capacity), NO_POSITION, jnp.int32),
            length=jnp.zeros(slots, jnp.int32),
        ),
    )


def write_rows(
    buffer: Float[Array, "B K C D"],
    rows: Float[Array, "B K T D"],
    start: Int[Array, " B"],
    count: Int[Array, " B"],
) -> Float[Array, "B K C D"]:
    """Writes the first `count[b]` of `rows[b]` to `buffer[b]` from `start[b]` on, as far as there is room."""
    slots, _, capacity, _ = buffer.shape
    at = _targets(start, count, rows.shape[2], capacity)
    return buffer.at[jnp.arange(slots)[:, None], :, at].set(
        rows.swapaxes(1, 2).astype(buffer.dtype), mode="drop", unique_indices=True
    )


def write_row(
    buffer: Float[Array, "B K C D"], row: Float[Array, "B K 1 D"], at: Int[Array, " B"]
) -> Float[Array, "B K C D"]:
    """Writes a row to each `buffer[b]` at `at[b]`, which must be there.

    Without a look at what is there now, which would be a program of its own for each of many small writes.
    """
    if len(buffer) == 1:
        return jax.lax.dynamic_update_slice(buffer, row.astype(buffer.dtype), (0, 0, at[0], 0))
    return buffer.at[jnp.arange(len(buffer)), :, at].set(
        row[:, :, 0].astype(buffer.dtype), mode="promise_in_bounds", unique_indices=True
    )


def remember_frames(
    bank: MemoryBank,
    keys: tuple[Float[Array, "B K FN D"], ...],
    values: tuple[Float[Array, "B K FN D"], ...],
    positions: Int[Array, "B F"],
    count: Int[Array, " B"],
) -> MemoryBank:
    """Appends the first `count[b]` of F frames to slot `b`: the policy "full", which keeps every frame."""
    slots, frames = positions.shape
    vectors = bank.keys[0].shape[2] // bank.capacity

    def append(buffers, rows):
        return tuple(
            write_rows(buffer, row, bank.length * vectors, count * vectors)
            for buffer, row in zip(buffers, rows, strict=True)
        )

    at = _targets(bank.length, count, frames, bank.capacity)
    return MemoryBank(
        keys=append(bank.keys, keys),
        values=append(bank.values, values),
        positions=bank.positions.at[jnp.arange(slots)[:, None], at].set(
            positions, mode="drop", unique_indices=True
        ),
        length=jnp.minimum(bank.length + count, bank.capacity),
    )


def frames_visible(
    frame_positions: Int[Array, "B F"], token_positions: Int[Array, "B T"]
) -> Int[Array, "B T"]:
    """How many frames each token sees: frame `f` is visible to the tokens from its own position on."""
    return (frame_positions[:, None, :] <= token_positions[:, :, None]).sum(axis=-1, dtype=jnp.int32)


def check_room(what: str, length: Int[Array, " B"], count: Int[Array, " B"], capacity: int) -> None:
    """Refuses an append that would not fit.

    Only where the numbers are known: inside `jax.jit` what has no room is dropped, and the caller who
    traces keeps count.

    Raises:
      CapacityError: naming the slots and what they hold.
    """
    if isinstance(length, jax.core.Tracer) or isinstance(count, jax.core.Tracer):
        return
    length, count = np.asarray(length), np.asarray(count)
    full = np.flatnonzero((count > 0) & (length + count > capacity))
    if full.size:
        held = ", ".join(f"slot {b} holds {length[b]} and would get {count[b]} more" for b in full)
        raise CapacityError(f"the {what} has room for {capacity}: {held}; make the state with a larger one")


def _targets(start, count, rows, capacity):
    """Where each row goes, [B, T]; rows that are not wanted get places past the end, each its own."""
    row = jnp.arange(rows)
    at = start[:, None] + row
    return jnp.where((row < count[:, None]) & (at < capacity), at, capacity + row)
