"""The memory bank: keys and values of past frames, for every cross-attention layer.

B slots, R rows, K kv heads, T tokens, F frames, S vectors, D head
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moss_jax.ops.qarray import QArray, quantize
from moss_jax.ops.writes import write_rows

# Position of an empty place in the bank, greater than that of any token.
NO_POSITION = jnp.iinfo(jnp.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemoryBank:
    """Keys and values of the vectors in memory, for every cross-attention layer, in order of position.

    A frame has any number of vectors, which share its position. What a token sees is a prefix of the bank.

    Attributes:
      keys, values: one [B, K, S, D] array per layer, QArrays if the bank is stored in 8 bits; keys are
        rotated and normalised.
      positions: of each vector, that of its frame's `<|image|>` token; ascending, NO_POSITION in empty
        places.
      places: index of each vector in its frame, in the compressor's order.
      counts: number of vectors that each vector stands for, whose logarithm is added to its attention scores;
        None if nothing is ever merged.
      length: number of vectors.
    """

    keys: tuple[Float[Array, "B K S D"] | QArray, ...]
    values: tuple[Float[Array, "B K S D"] | QArray, ...]
    positions: Int[Array, "B S"]
    places: Int[Array, "B S"]
    counts: Float[Array, "B S"] | None
    length: Int[Array, " B"]

    @property
    def capacity(self) -> int:
        """Capacity of a slot in vectors."""
        return self.positions.shape[1]

    @property
    def bias(self) -> Float[Array, "B S"] | None:
        """Attention bias of each vector: the logarithm of its count; None without counts."""
        # Empty places are masked by range, but their logarithm must still be finite.
        return None if self.counts is None else jnp.log(jnp.maximum(self.counts, 1))


def remember_frames(
    bank: MemoryBank,
    keys: tuple[Float[Array, "R K FN D"], ...],
    values: tuple[Float[Array, "R K FN D"], ...],
    positions: Int[Array, "R F"],
    count: Int[Array, " R"],
    slots: Int[Array, " R"] | None = None,
    before: Int[Array, " R"] | None = None,
) -> MemoryBank:
    """Appends the first `count[r]` of F frames of each row to a slot; frames beyond the capacity are dropped.

    Args:
      keys, values: of each layer, frame after frame, all with the same number of vectors.
      positions: of the frames; not before those in the bank.
      slots: slot of each row; None if row `b` belongs to slot `b`.
      before: number of frames that earlier rows append to the same slot; None if there are none.
    """
    rows, frames = positions.shape
    vectors = keys[0].shape[2] // frames
    count = count * vectors
    start = bank.length if slots is None else bank.length[slots]
    if before is not None:
        start = start + before * vectors

    def append(buffers, rows):
        return tuple(
            jax.tree.map(
                lambda old, new: write_rows(old, new, start, count, slots),
                buffer,
                quantize(row, buffer.dtype, axes=3) if isinstance(buffer, QArray) else row,
            )
            for buffer, row in zip(buffers, rows, strict=True)
        )

    def write(old: Array, new: Array) -> Array:
        """Writes one number per vector, [R, FN], to [B, S]."""
        return write_rows(old[:, None], new[:, None], start, count, slots)[:, 0]

    added = count if slots is None else jnp.zeros_like(bank.length).at[slots].add(count)
    return MemoryBank(
        keys=append(bank.keys, keys),
        values=append(bank.values, values),
        positions=write(bank.positions, jnp.repeat(positions, vectors, axis=1)),
        places=write(bank.places, jnp.tile(jnp.arange(vectors, dtype=jnp.int32), (rows, frames))),
        counts=None if bank.counts is None else write(bank.counts, jnp.ones((rows, frames * vectors))),
        length=jnp.minimum(bank.length + added, bank.capacity),
    )


def vectors_visible(positions: Int[Array, "B S"], token_positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Number of vectors that each token sees: those whose position is not after its own.

    Args:
      positions: of vectors, or of frames to count frames.
    """
    return (positions[:, None, :] <= token_positions[:, :, None]).sum(axis=-1, dtype=jnp.int32)
