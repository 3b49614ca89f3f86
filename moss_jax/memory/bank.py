"""The memory bank: keys and values of the frames, for every cross-attention layer.

B slots, K kv heads, T tokens, F frames, N vectors a frame, D head
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moss_jax.memory.writes import targets, write_rows

# Position of an empty place in the bank: no token comes after it.
NO_POSITION = jnp.iinfo(jnp.int32).max


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

    at = targets(bank.length, count, frames, bank.capacity)
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
    """Number of frames that each token sees: frame `f` is visible to the tokens from its position on."""
    return (frame_positions[:, None, :] <= token_positions[:, :, None]).sum(axis=-1, dtype=jnp.int32)
