"""The policy "pyramid": the older a frame, the coarser; the oldest are merged, and none is forgotten.

B slots, S vectors
"""

import dataclasses
import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moss_jax.config import ConfigError, MemoryConfig, ModelConfig
from moss_jax.memory.bank import MemoryBank
from moss_jax.memory.compaction import frames_of, regroup


@dataclasses.dataclass(frozen=True)
class Level:
    """Frames of one resolution.

    Attributes:
      grid: side of the grid that a frame's patches are pooled to; 0 if one vector stands for the whole frame.
      budget: frames that may stay at this level.
    """

    grid: int
    budget: int

    @property
    def vectors(self) -> int:
        """Vectors of a frame: the class token's and the grid's, or one."""
        return 1 + self.grid**2


def pyramid(memory: MemoryConfig, model: ModelConfig, frames: int):
    """Newest frames whole, older ones at 1/4 of the grid, at 1/16, and at one vector each.

    Raises:
      ConfigError: a level would have to pass on more frames than it holds.
    """
    low = memory.low_mark(frames)
    levels = make_levels(model, memory.pyramid_shares, low * model.vectors_per_frame)
    arriving = frames - low
    # A frame moves by one level a compaction, so each must hold what arrives; at the last, pairs are merged.
    for level, need in zip(levels, [1] + [arriving] * (len(levels) - 2) + [2 * arriving], strict=True):
        if level.budget < need:
            raise ConfigError(
                f"a bank of {frames} frames is too small for a pyramid of the shares "
                f"{memory.pyramid_shares}: the level of {level.vectors} vectors a frame has room for "
                f"{level.budget} frames and needs {need}; raise engine.bank_capacity or that share"
            )
    return functools.partial(coarsen, levels=levels)


def make_levels(model: ModelConfig, shares: tuple[float, ...], room: int) -> tuple[Level, ...]:
    """The levels, whole frames first.

    Args:
      shares: of the room, for each level; those of levels that would be like the one before go to the last.
      room: vectors that all levels have together.
    """
    grids = [model.compressor.output_grid(model.vision.grid)]
    while grids[-1] > 1 and len(grids) < len(shares) - 1:
        grids.append(-(-grids[-1] // 2))
    grids.append(0)
    shares = (*shares[: len(grids) - 1], sum(shares[len(grids) - 1 :]))
    return tuple(
        Level(grid, int(share * room) // (1 + grid**2)) for grid, share in zip(grids, shares, strict=True)
    )


def coarsen(bank: MemoryBank, *, levels: tuple[Level, ...]) -> MemoryBank:
    """Moves the oldest frames of each level that is over its budget one level down.

    Of the last level, neighbouring frames are merged, first those that stand for the fewest.
    """
    frames = frames_of(bank)
    last = len(levels) - 1
    level = jnp.select([frames.size == x.vectors for x in levels], list(range(last + 1)), last)
    at = [frames.held & (level == i) for i in range(last + 1)]
    held = [jnp.sum(frames.is_first & here, axis=1, keepdims=True) for here in at]  # Frames, [B, 1].
    place, size, moved = bank.places, frames.size, jnp.zeros_like(held[0])
    for i in range(last):
        # Frames of coarser levels are older, and so come first.
        rank = frames.index - sum(held[i + 1 :])
        moved = jnp.clip(held[i] + moved - levels[i].budget, 0, held[i])
        moves = at[i] & (rank < moved)
        place = jnp.where(moves, coarser_place(place, levels[i].grid, levels[i + 1].grid), place)
        size = jnp.where(moves, levels[i + 1].vectors, size)
    excess = jnp.maximum(held[last] + moved - levels[last].budget, 0)
    is_absorbed = _absorbed(frames.index, at[last], bank.counts, excess)
    # A frame that is absorbed by the one before takes no room of its own.
    room = jnp.where(frames.is_first & ~is_absorbed, size, 0)
    start = jnp.cumsum(room, axis=1) - jnp.where(is_absorbed, 1, size)
    most = max(4, levels[-2].vectors)
    return regroup(bank, jnp.where(frames.held, start + place, -1), place, most=most)


def coarser_place(place: Int[Array, "B S"], grid: int, coarser: int) -> Int[Array, "B S"]:
    """Place of a vector in its frame after the grid has been pooled; the class token stays the first."""
    if coarser == 0:
        return jnp.zeros_like(place)
    row, column = jnp.divmod(place - 1, grid)
    return jnp.where(place == 0, 0, 1 + row * coarser // grid * coarser + column * coarser // grid)


def _absorbed(
    rank: Int[Array, "B S"],
    here: Array,
    counts: Float[Array, "B S"] | None,
    excess: Int[Array, "B 1"],
) -> Array:
    """Whether a frame of one vector becomes part of the one before: of pairs, the `excess` lightest."""
    assert counts is not None
    after = jnp.pad(here[:, 1:], ((0, 0), (0, 1)))
    is_pair = here & after & (rank % 2 == 0)
    weight = counts + jnp.pad(counts[:, 1:], ((0, 0), (0, 1)))
    order = jnp.argsort(jnp.where(is_pair, weight, jnp.inf), axis=1, stable=True)
    chosen = is_pair & (jnp.argsort(order, axis=1) < excess)
    return jnp.pad(chosen[:, :-1], ((0, 0), (1, 0)))
