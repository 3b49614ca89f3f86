"""Building blocks of the TPU kernels: sizes of tiles, ranges of tiles to visit, operations inside a tile.

B batch, K kv heads, N rows (a query of one head each), S keys, R rows of a tile, X keys of a tile, D head
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

# A register is 8 sublanes of 128 lanes.
LANES = 128

# The grid's last axis runs over the tiles of a range, which share accumulators; the others are independent.
PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"))


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Tiles for few queries: all rows are one tile.

    Attributes:
      block_kv: keys per tile; large, since decode is bound by reading them, and each step has overhead.
    """

    block_kv: int = 1024

    def __post_init__(self):
        _check("block_kv", self.block_kv)

    def sizes(self, rows: "Rows", keys: "Keys") -> tuple[int, int]:
        """R and X."""
        sublanes = 32 // rows.q.dtype.itemsize  # 16-bit numbers are packed two to a sublane.
        return _round_up(rows.q.shape[2], sublanes), min(self.block_kv, _round_up(keys.k.shape[2]))


@dataclasses.dataclass(frozen=True)
class StaircaseConfig:
    """Tiles for many queries.

    Attributes:
      block_q: rows per tile, out of T * G. K and V are read once for each tile of rows.
      block_kv: keys per tile.
    """

    block_q: int = 512
    block_kv: int = 512

    def __post_init__(self):
        _check("block_q", self.block_q)
        _check("block_kv", self.block_kv)

    def sizes(self, rows: "Rows", keys: "Keys") -> tuple[int, int]:
        """R and X."""
        return min(self.block_q, _round_up(rows.q.shape[2])), min(self.block_kv, _round_up(keys.k.shape[2]))


def _check(name: str, size: int) -> None:
    if size <= 0 or size % LANES:
        raise ValueError(f"{name} {size} must be a positive multiple of {LANES}")


def _round_up(size: int, of: int = LANES) -> int:
    return -(-size // of) * of


class Rows(NamedTuple):
    """Queries with the range `start <= s < end` of keys that each sees, (0, 0) for none, and their slots."""

    q: Float[Array, "B K N D"]
    start: Int[Array, "B N"]
    end: Int[Array, "B N"]
    slots: Int[Array, " B"] | None


class Keys(NamedTuple):
    """K, V and per-key vectors, which lie along the lanes: a column would fill one lane of 128."""

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S D"]
    bias: Float[Array, "B 1 1 S"] | None
    k_scale: Float[Array, "B K 1 S"] | None
    v_scale: Float[Array, "B K 1 S"] | None

    def specs(self, spec) -> "Keys":
        """`spec(array, tiled axis)` of each."""
        return Keys(*(spec(x, axis) for x, axis in zip(self, (2, 2, 3, 3, 3), strict=True)))


# ------------------------------------------------------------------------------------- ranges of tiles


class TileRanges(NamedTuple):
    """Ranges of tiles to visit, as scalars prefetched before the data, so that block specs can use them.

    Attributes:
      first, last: a tile of rows visits the tiles of keys `first <= tile < last`.
      every_start, every_end: range of keys that all of its rows see; a tile of keys inside it needs no mask.
      slots: slot whose keys are read; None for slot `b`.
    """

    first: Int[Array, "B row_tiles"]
    last: Int[Array, "B row_tiles"]
    every_start: Int[Array, "B row_tiles"]
    every_end: Int[Array, "B row_tiles"]
    slots: Int[Array, " B"] | None = None

    @classmethod
    def of(
        cls,
        start: Int[Array, "B N"],
        end: Int[Array, "B N"],
        R: int,
        X: int,
        slots: Int[Array, " B"] | None = None,
    ) -> "TileRanges":
        """Computes the tile ranges for these ranges of keys."""
        start, end = (bound.reshape(len(bound), -1, R) for bound in (start, end))
        low = jnp.min(jnp.where(start < end, start, jnp.iinfo(jnp.int32).max), axis=-1)
        high = jnp.max(end, axis=-1)  # 0 if no row of the tile sees a key
        return cls(
            first=jnp.where(high > 0, low // X, 0),
            last=pl.cdiv(high, X),
            every_start=start.max(axis=-1),
            every_end=end.min(axis=-1),
            slots=slots,
        )

    def row_tiles_by_key(self, key_tiles: int) -> tuple[Int[Array, "B key_tiles"], Int[Array, "B key_tiles"]]:
        """The transpose: the range [first, last) of row tiles that visit each tile of keys."""
        tile = jnp.arange(key_tiles)
        in_range = (self.first[..., None] <= tile) & (tile < self.last[..., None])  # [B, N / R, S / X]
        number = jnp.arange(in_range.shape[1])[:, None]
        last = jnp.max(jnp.where(in_range, number + 1, 0), axis=1)
        return jnp.min(jnp.where(in_range, number, last[:, None]), axis=1), last

    def when_in_range(self, at, key_tile, X, body, also=True):
        """Calls `body(masked)` if the tile of rows `at` = (b, tile) visits this tile of X keys."""
        needed = also & (self.first[at] <= key_tile) & (key_tile < self.last[at])
        first_key = key_tile * X
        unmasked = (self.every_start[at] <= first_key) & (first_key + X <= self.every_end[at])
        pl.when(needed & unmasked)(functools.partial(body, masked=False))
        pl.when(needed & ~unmasked)(functools.partial(body, masked=True))


def max_steps(first, last):
    """Length of the longest range, which is a traced grid size."""
    return jnp.maximum(jnp.max(last - first), 1)


def tile_of_step(first, last, step):
    """Tile of a step; clamped to the last one of its range, as an unchanged tile is not fetched again."""
    return jnp.minimum(first + step, jnp.maximum(last - 1, 0))


def spec(size, tile, x, axis, slot=lambda b, *scalars: b):
    """Block spec of `x` [B, K or 1, _, _]: one b or its slot, one head, and the tile `tile` of `axis`."""
    if x is None:
        return None
    shape = [None, None, *x.shape[2:]]
    shape[axis] = size

    def index(b, head, outer, step, *scalars):
        at = [slot(b, *scalars), head if x.shape[1] > 1 else 0, 0, 0]
        at[axis] = tile(b, outer, step, *scalars)
        return tuple(at)

    return pl.BlockSpec(tuple(shape), index)


def specs_by_row(R, X):
    """`spec` for rows and for keys on a grid of (b, head, tile of rows, step of its range)."""

    def key_tile(b, i, step, tile_ranges):
        return tile_of_step(tile_ranges.first[b, i], tile_ranges.last[b, i], step)

    def slot(b, tile_ranges):
        return b if tile_ranges.slots is None else tile_ranges.slots[b]

    row = functools.partial(spec, R, lambda b, i, step, tile_ranges: i)
    return row, functools.partial(spec, X, key_tile, slot=slot)


def pad(x, R, axis, **how):
    """Pads rows to whole tiles. Padding has q = 0 and d_out = 0, and the last row's range."""
    widths = [(0, -x.shape[axis] % R if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, **how)


# ------------------------------------------------------------------------------------- inside a tile


def matmul(x, y, contract):
    """Contracts x and y over the axes `contract`, in float32."""
    # Explicit for 16-bit numbers too: the compiler rejects them at a raised default precision.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def column(row: Float[Array, "1 X"]) -> Float[Array, "X 1"]:
    """Moves a vector from lanes to sublanes: the hardware transposes whole registers."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def row(column: Float[Array, "X 1"]) -> Float[Array, "1 X"]:
    """Moves a vector from sublanes to lanes."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def only(used: Float[Array, "X 1"], x: Float[Array, "X D"]) -> Float[Array, "X D"]:
    """Zeros unused keys: they may be NaN, as may those of the last tile beyond S, and 0 * NaN is NaN."""
    # In float32, because a mask for 16-bit numbers would have to be packed.
    used = jnp.broadcast_to(used, x.shape) > 0
    return jnp.where(used, x.astype(jnp.float32), 0).astype(x.dtype)
