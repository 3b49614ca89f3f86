"""What the kernels for few queries share: how the keys are cut, the walk over a split, and the second pass.

The vectors of all slots and heads lie in one row in memory, and tiles may start at any multiple of 8 of them:
that is what the copy engine can do with tiles that the tensor core reads.

B slot, T query tokens, R rows of queries, S keys, P splits, K kv heads, C the head's size in whole lines,
Q blocks of queries over all slots
"""

import dataclasses
import functools
import operator

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float

from moss_jax.ops.mosaic_gpu import tiles
from moss_jax.ops.mosaic_gpu.tiles import NEVER

ROWS = 64  # Queries that share a kv head, at most.
LANES = 128  # Threads of a warpgroup, and numbers of a line that the second pass reads.
AT_ONCE = 40  # Splits that the second pass loads before it waits.


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How the keys are cut.

    Attributes:
      block_kv: keys of a tile.
      stages: tiles of K and of V that are on their way at once.
      blocks: splits that are running at once on the whole card, over all slots and heads.
    """

    block_kv: int = 64
    stages: int = 2
    blocks: int = 264

    def __post_init__(self):
        if self.block_kv % 64 or self.block_kv < 64:
            raise ValueError(f"block_kv is a multiple of 64, not {self.block_kv}")
        if self.stages < 1 or self.blocks < 1:
            raise ValueError(f"stages and blocks are at least 1, not {self.stages} and {self.blocks}")

    def splits(self, pairs: int, keys: int) -> int:
        """Into how many pieces the keys of each (slot, kv head) pair are cut."""
        return max(1, min(self.blocks // pairs, pl.cdiv(keys, self.block_kv)))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How queries are cut: into blocks of equal numbers of tokens, at most `ROWS` rows for each kv head.

    The last is filled up with queries that see nothing. Row `t * group + g` of a block is its token `t`.

    Attributes:
      batch, queries: slots, and tokens of each.
      kv_heads, group: and query heads that share one.
    """

    batch: int
    queries: int
    kv_heads: int
    group: int

    @property
    def of_a_slot(self) -> int:
        return pl.cdiv(self.queries, ROWS // self.group)

    @property
    def tokens(self) -> int:
        """Of a block."""
        return pl.cdiv(self.queries, self.of_a_slot)

    @property
    def count(self) -> int:
        """Of all slots."""
        return self.batch * self.of_a_slot

    @property
    def rows(self) -> int:
        """That a block takes in memory; a multiple of 8, so those beyond its tokens' hold anything."""
        return pl.cdiv(self.tokens * self.group, 8) * 8

    def cut(self, x: Array) -> Array:
        """[batch, queries, ...] to [count, tokens, ...]."""
        missing = self.of_a_slot * self.tokens - self.queries
        x = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(self.count, self.tokens, *x.shape[2:])

    def in_rows(self, q: Float[Array, "B T H D"]) -> Float[Array, "Q K R D"]:
        """Queries as the kernel reads them."""
        q = self.cut(q).reshape(self.count, self.tokens, self.kv_heads, self.group, -1).swapaxes(1, 2)
        q = q.reshape(self.count, self.kv_heads, self.tokens * self.group, -1)
        return jnp.pad(q, ((0, 0), (0, 0), (0, self.rows - q.shape[2]), (0, 0)))

    def in_tokens(self, out: Float[Array, "Q tokens K G D"]) -> Float[Array, "B T H D"]:
        """What the queries found, in the order in which they came."""
        heads = self.kv_heads * self.group
        return out.reshape(self.batch, -1, heads, out.shape[-1])[:, : self.queries]


class Split:
    """The walk of one thread block over its split of the keys of one slot and kv head.

    Attributes:
      queries: number of the block of queries, over all slots; `blocks` of them share a slot's keys.
      starts, ends: of each query's range, scalars.
      base: number of this slot's and head's first key among all vectors.
      steps: tiles to visit.
    """

    def __init__(self, start_gmem, end_gmem, *, keys, heads, splits, blocks, block_kv):
        split, head, self.queries = (lax.axis_index(name) for name in ("split", "head", "queries"))
        tokens = range(start_gmem.shape[1])
        self.starts = [jnp.maximum(start_gmem[self.queries, t], 0) for t in tokens]
        self.ends = [jnp.minimum(end_gmem[self.queries, t], keys) for t in tokens]
        self.base = (lax.div(self.queries, blocks) * heads + head) * keys
        self._block_kv = block_kv
        low, self._high = keys, 0
        for first, last in self.ranges:
            low = jnp.where(first < last, jnp.minimum(low, first), low)
            self._high = jnp.where(first < last, jnp.maximum(self._high, last), self._high)
        low = lax.div(self.base + low, 8) * 8 - self.base
        count = pl.cdiv(jnp.maximum(self._high - low, 0), block_kv)
        first_tile, last_tile = lax.div(split * count, splits), lax.div((split + 1) * count, splits)
        self._first = low + first_tile * block_kv
        self.steps = last_tile - first_tile

    @property
    def ranges(self):
        """(start, end) of each query."""
        return list(zip(self.starts, self.ends, strict=True))

    def place(self, step):
        """Where a tile lies among all vectors, and the first key that is its own.

        The last tile of all is moved back to end with the range, so that no more is read; the keys that it
        then shares with its neighbour are not its own.
        """
        own = self._first + step * self._block_kv
        end = pl.cdiv(self.base + self._high, 8) * 8
        at = jnp.maximum(jnp.minimum(self.base + own, end - self._block_kv), 0)
        return pl.multiple_of(at, 8), own

    def whole(self, at):
        """Whether one query sees all keys of the tile that starts at this key."""
        return _any([(first <= at) & (at + self._block_kv <= last) for first, last in self.ranges])

    def used(self, key):
        """Which keys some query sees."""
        return _any([(first <= key) & (key < last) for first, last in self.ranges])

    def bounds(self, query, group):
        """(start, end) of the range of each of these query rows, `group` of which share a token's.

        Scalars if all rows are of one token; vectors of integers compare as unsigned.
        """
        if len(self.ranges) == 1:
            return self.ranges[0]
        first, last = jnp.zeros_like(query), jnp.zeros_like(query)
        for t, (start, end) in enumerate(self.ranges):
            mine = (query >= t * group) & (query < (t + 1) * group)
            first = jnp.where(mine, start, first)
            last = jnp.where(mine, end, last)
        return first, last

    def seen(self, key, own, first, last):
        """Which keys, from the split's own on, lie in the range of their query."""
        if jnp.ndim(first) == 0:
            return (key >= jnp.maximum(first, own)) & (key < last)
        return (key >= jnp.maximum(own, 0)) & (key >= first) & (key < last)


def _any(conditions):
    return functools.reduce(operator.or_, conditions)


def in_a_row(x, block: int, trailing: int = 0):
    """All vectors (`trailing` = 1), or all numbers, one after another; a multiple of 8, at least one tile."""
    x = x.reshape(-1, *x.shape[x.ndim - trailing :])
    size = max(block, pl.cdiv(x.shape[0], 8) * 8)
    return jnp.pad(x, ((0, size - x.shape[0]), *[(0, 0)] * trailing))


def join(
    out: Float[Array, "Q K P R C"],
    top: Float[Array, "Q K P R"],
    total: Float[Array, "Q K P R"],
    tokens: int,
    group: int,
    dtype: DTypeLike,
) -> Float[Array, "Q tokens K group C"]:
    """The splits' sums, each relative to its own largest score, as one attention."""
    Q, K, _, _, C = out.shape
    return plgpu.kernel(
        _join_kernel,
        out_type=jax.ShapeDtypeStruct((Q, tokens, K, group, C), dtype),
        grid=(tokens * group, K, Q),
        grid_names=("row", "head", "queries"),
        compiler_params=tiles.COMPILER_PARAMS,
    )(out, top, total)


def _join_kernel(out_gmem, top_gmem, total_gmem, joined_gmem):
    row, head, queries = (lax.axis_index(name) for name in ("row", "head", "queries"))
    group = joined_gmem.shape[3]
    out = jnp.zeros(joined_gmem.shape[-1:], jnp.float32)
    top, total = jnp.float32(NEVER), jnp.float32(0)
    for first in range(0, out_gmem.shape[2], AT_ONCE):
        # All loads first, so that they are on their way together.
        at = [(queries, head, split, row) for split in range(first, min(first + AT_ONCE, out_gmem.shape[2]))]
        outs = [out_gmem[i] for i in at]
        tops = [top_gmem[i] for i in at]
        totals = [total_gmem[i] for i in at]
        new_top = functools.reduce(jnp.maximum, tops, top)
        shift = jnp.where(new_top == NEVER, 0.0, new_top)
        decay = jnp.exp2(top - shift)
        out, total, top = out * decay, total * decay, new_top
        for part, part_top, part_total in zip(outs, tops, totals, strict=True):
            weight = jnp.exp2(part_top - shift)
            # A split without keys has written zeros.
            out, total = out + part * weight, total + part_total * weight
    out /= jnp.where(total > 0, total, 1.0)
    joined_gmem[queries, lax.div(row, group), head, lax.rem(row, group)] = out.astype(joined_gmem.dtype)
