"""The "pyramid" policy: older frames get coarser, the oldest are merged, and none is forgotten.

B slots, S vectors
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moss_jax.config import ConfigError, MemoryConfig, ModelConfig
from moss_jax.memory.bank import MemoryBank
from moss_jax.memory.compaction import frames_of, regroup
from moss_jax.memory.policies.policy import Compact, Policy, make_budget

# Maximum number of levels: whole frames, 1/4 and 1/16 of the grid, one vector.
LEVELS = 4


def pyramid(memory: MemoryConfig, model: ModelConfig, frames: int) -> Policy:
    """Keeps the newest frames whole, older ones at 1/4 of the grid, at 1/16, and as one vector each.

    Raises:
      ConfigError: a level would have to pass on more frames than it holds.
    """
    low = memory.low_mark(frames)
    grids = make_grids(model)
    budget = divide(grids, memory.pyramid_shares, low * model.vectors_per_frame)
    arriving = frames - low
    # A frame moves one level per compaction, so each level must hold all that arrives; the last merges pairs.
    needs = [1] + [arriving] * (len(grids) - 2) + [2 * arriving]
    for grid, room, need in zip(grids, budget, needs, strict=True):
        if room < need:
            raise ConfigError(
                f"a bank of {frames} frames is too small for a pyramid of the shares "
                f"{memory.pyramid_shares}: the level of {vectors_of(grid)} vectors a frame has room for "
                f"{room} frames and needs {need}; raise engine.bank_capacity or that share"
            )
    return Policy(_compaction(grids), make_budget(budget))


def make_grids(model: ModelConfig) -> tuple[int, ...]:
    """Side of the pooled patch grid at each level, whole frames first.

    The last is 0: one vector stands for the whole frame. Levels equal to the previous one are omitted.
    """
    grids = [model.compressor.output_grid(model.vision.grid)]
    while grids[-1] > 1 and len(grids) < LEVELS - 1:
        grids.append(-(-grids[-1] // 2))
    return (*grids, 0)


def vectors_of(grid: int) -> int:
    """Number of vectors of a frame at a level: the class token and the grid, or one."""
    return 1 + grid**2


def divide(grids: tuple[int, ...], shares: tuple[float, ...], room: int) -> list[int]:
    """Divides the room into the number of frames that may stay at each level.

    Args:
      shares: of the room, for each level. Surplus shares go to the last level; if there are fewer shares than
        levels, the last share is divided evenly among the remaining levels.
      room: total number of vectors over all levels.
    """
    own = min(len(shares), len(grids)) - 1  # Levels with a share of their own.
    left = len(grids) - own
    shares = (*shares[:own], *[sum(shares[own:]) / left] * left)
    return [int(share * room) // vectors_of(grid) for grid, share in zip(grids, shares, strict=True)]


@functools.cache
def _compaction(grids: tuple[int, ...]) -> Compact:
    """The compaction function, shared by all pyramids with these levels."""
    return functools.partial(coarsen, grids=grids)


def coarsen(bank: MemoryBank, budget: Int[Array, "levels ..."], *, grids: tuple[int, ...]) -> MemoryBank:
    """Moves the oldest frames of each level over its budget one level down.

    In the last level, neighbouring frames are merged, starting with those that stand for the fewest.

    Args:
      budget: number of frames that may stay at each level, the same for all slots or [levels, B, 1].
      grids: of the levels.
    """
    frames = frames_of(bank)
    sizes = [vectors_of(grid) for grid in grids]
    last = len(grids) - 1
    level = jnp.select([frames.size == size for size in sizes], list(range(last + 1)), last)
    at = [frames.held & (level == i) for i in range(last + 1)]
    held = [jnp.sum(frames.is_first & here, axis=1, keepdims=True) for here in at]  # Frames, [B, 1].
    place, size, moved = bank.places, frames.size, jnp.zeros_like(held[0])
    for i in range(last):
        # Frames of coarser levels are older, so they come first.
        rank = frames.index - sum(held[i + 1 :])
        moved = jnp.clip(held[i] + moved - budget[i], 0, held[i])
        moves = at[i] & (rank < moved)
        place = jnp.where(moves, coarser_place(place, grids[i], grids[i + 1]), place)
        size = jnp.where(moves, sizes[i + 1], size)
    excess = jnp.maximum(held[last] + moved - budget[last], 0)
    is_absorbed = _absorbed(frames.index, at[last], bank.counts, excess)
    # A frame absorbed by the previous one takes no room.
    room = jnp.where(frames.is_first & ~is_absorbed, size, 0)
    start = jnp.cumsum(room, axis=1) - jnp.where(is_absorbed, 1, size)
    most = max(4, sizes[-2])
    return regroup(bank, jnp.where(frames.held, start + place, -1), place, most=most)


def coarser_place(place: Int[Array, "B S"], grid: int, coarser: int) -> Int[Array, "B S"]:
    """Place of a vector in its frame after the grid is pooled; the class token stays first."""
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
    """Whether a one-vector frame merges into the previous one: the `excess` pairs of lowest count do."""
    assert counts is not None
    after = jnp.pad(here[:, 1:], ((0, 0), (0, 1)))
    is_pair = here & after & (rank % 2 == 0)
    weight = counts + jnp.pad(counts[:, 1:], ((0, 0), (0, 1)))
    order = jnp.argsort(jnp.where(is_pair, weight, jnp.inf), axis=1, stable=True)
    chosen = is_pair & (jnp.argsort(order, axis=1) < excess)
    return jnp.pad(chosen[:, :-1], ((0, 0), (1, 0)))
