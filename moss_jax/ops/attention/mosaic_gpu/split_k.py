"""Building blocks of the split-K decode kernels: split sizes, the tiles of a split, and the combine pass.

For TMA the vectors of all slots and heads are one array, [vectors, D], and a tile may start at any multiple
of 8 vectors: the rows of a swizzle atom, the unit in which the tensor core reads tiles.

B batch/slot, T query tokens, R rows of queries, S keys, P splits, K kv heads, C head_dim padded to whole
lines of 128, Q blocks of queries over the whole batch
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Shaped

from moss_jax.ops.mosaic_gpu import tiles
from moss_jax.ops.mosaic_gpu.tiles import NEG_INF

WGMMA_ROWS = 64  # Rows of the tensor core's left operand: queries that share a kv head, at most.
LANES = 128  # Threads of a warpgroup, and numbers of a line that the combine pass reads.
PREFETCHED_SPLITS = 40  # Splits that the combine pass loads before it waits.


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Tiling and split of the keys.

    Attributes:
      block_kv: keys per tile.
      stages: depth of the TMA pipeline: tiles of K and of V in flight.
      blocks: target number of thread blocks on the whole GPU, one per split, over all slots and heads.
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
        """Number of key splits for each (block of queries, kv head) pair."""
        return max(1, min(self.blocks // pairs, pl.cdiv(keys, self.block_kv)))


@dataclasses.dataclass(frozen=True)
class QueryBlocks:
    """Queries in equal blocks of tokens, with at most `most` rows per kv head (GQA packing).

    The last block is padded with queries that see nothing. Row `t * group + g` of a block is its token `t`.

    Attributes:
      batch, queries: rows of the batch, and tokens per row.
      kv_heads, group: kv heads, and query heads per kv head.
      most: maximum rows per block and kv head; if the group alone has more, a block is one token.
    """

    batch: int
    queries: int
    kv_heads: int
    group: int
    most: int = WGMMA_ROWS

    @property
    def per_batch_row(self) -> int:
        """Number of blocks per row of the batch."""
        return pl.cdiv(self.queries, max(1, self.most // self.group))

    @property
    def tokens(self) -> int:
        """Number of tokens per block."""
        return pl.cdiv(self.queries, self.per_batch_row)

    @property
    def count(self) -> int:
        """Number of blocks in the whole batch."""
        return self.batch * self.per_batch_row

    @property
    def rows(self) -> int:
        """Rows per block in memory, rounded up to a multiple of 8; those past its tokens are undefined."""
        return pl.cdiv(self.tokens * self.group, 8) * 8

    def pack(self, x: Shaped[Array, "batch T ..."]) -> Shaped[Array, "Q tokens ..."]:
        """Splits the tokens of each row of the batch into blocks."""
        missing = self.per_batch_row * self.tokens - self.queries
        x = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(self.count, self.tokens, *x.shape[2:])

    def pack_rows(self, q: Float[Array, "batch T H D"]) -> Float[Array, "Q K R D"]:
        """Splits queries into blocks of rows, as the kernel reads them."""
        q = self.pack(q).reshape(self.count, self.tokens, self.kv_heads, self.group, -1).swapaxes(1, 2)
        q = q.reshape(self.count, self.kv_heads, self.tokens * self.group, -1)
        return jnp.pad(q, ((0, 0), (0, 0), (0, self.rows - q.shape[2]), (0, 0)))

    def unpack(self, out: Float[Array, "Q tokens K G D"]) -> Float[Array, "batch T H D"]:
        """Reverses the split for outputs."""
        heads = self.kv_heads * self.group
        return out.reshape(self.batch, -1, heads, out.shape[-1])[:, : self.queries]


class SplitTiles:
    """The tiles of a thread block: those of one split of the keys of one slot and kv head.

    Attributes:
      queries: index of the block of queries, over the whole batch, each of whose rows has `blocks`.
      starts, ends: of each query's range, scalars.
      base: index of this slot's and head's first key among all vectors.
      steps: number of tiles.
    """

    def __init__(self, start_gmem, end_gmem, slots_gmem, *, keys, heads, splits, blocks, block_kv):
        split, head, self.queries = (lax.axis_index(name) for name in ("split", "head", "queries"))
        tokens = range(start_gmem.shape[1])
        self.starts = [jnp.maximum(start_gmem[self.queries, t], 0) for t in tokens]
        self.ends = [jnp.minimum(end_gmem[self.queries, t], keys) for t in tokens]
        slot = lax.div(self.queries, blocks)
        if slots_gmem is not None:
            slot = slots_gmem[slot]
        self.base = (slot * heads + head) * keys
        self._block_kv = block_kv
        self._low, self._high = keys, 0
        for first, last in self.ranges:
            self._low = jnp.where(first < last, jnp.minimum(self._low, first), self._low)
            self._high = jnp.where(first < last, jnp.maximum(self._high, last), self._high)
        low = lax.div(self.base + self._low, 8) * 8 - self.base
        count = pl.cdiv(jnp.maximum(self._high - low, 0), block_kv)
        first_tile, last_tile = lax.div(split * count, splits), lax.div((split + 1) * count, splits)
        self._first = low + first_tile * block_kv
        self.steps = last_tile - first_tile

    @property
    def ranges(self):
        """(start, end) of each query."""
        return list(zip(self.starts, self.ends, strict=True))

    def offset(self, step):
        """Offset of a tile among all vectors, and the first key that it owns.

        The very last tile is moved back to end with the range, so that nothing beyond it is read; keys that
        it then shares with the previous tile belong to that tile.
        """
        own = self._first + step * self._block_kv
        end = pl.cdiv(self.base + self._high, 8) * 8
        at = jnp.maximum(jnp.minimum(self.base + own, end - self._block_kv), 0)
        return pl.multiple_of(at, 8), own

    def all_used(self, at):
        """Whether a single query sees the whole tile that starts at this key."""
        return _any([(first <= at) & (at + self._block_kv <= last) for first, last in self.ranges])

    def one_sees_all(self, at):
        """Whether a single query sees whatever any sees of the tile that starts at this key."""
        low, high = jnp.maximum(self._low, at), jnp.minimum(self._high, at + self._block_kv)
        return _any([(first <= low) & (high <= last) for first, last in self.ranges])

    def between(self, key):
        """Which keys lie between the first and the last that some query sees."""
        return (self._low <= key) & (key < self._high)

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

    def mask(self, key, own, first, last):
        """Which keys the tile owns, and are in the range of their query."""
        if jnp.ndim(first) == 0:
            return (key >= jnp.maximum(first, own)) & (key < last)
        return (key >= jnp.maximum(own, 0)) & (key >= first) & (key < last)


def _any(conditions):
    return functools.reduce(operator.or_, conditions)


def flatten(x, block: int, trailing: int = 0):
    """All vectors (`trailing` = 1), or numbers, on one axis, padded to a multiple of 8 and to one tile."""
    x = x.reshape(-1, *x.shape[x.ndim - trailing :])
    size = max(block, pl.cdiv(x.shape[0], 8) * 8)
    return jnp.pad(x, ((0, size - x.shape[0]), *[(0, 0)] * trailing))


def combine_splits(
    out: Float[Array, "Q K P R D"],
    stats: Sequence[Float[Array, "Q K P rows"]],
    tokens: int,
    group: int,
    dtype: DTypeLike,
) -> Float[Array, "Q tokens K group D"]:
    """Combines the splits' unnormalised outputs, each relative to its own row maximum, into attention's.

    Args:
      stats: row maxima and row sums; empty for a single split, whose output is normalised.
    """
    Q, K, _, _, D = out.shape
    if not stats:
        out = out[:, :, 0, : tokens * group].reshape(Q, K, tokens, group, D)
        return out.swapaxes(1, 2).astype(dtype)
    # The combine pass reads whole lines.
    out = jnp.pad(out, (*[(0, 0)] * 4, (0, -D % LANES)))
    return plgpu.kernel(
        _combine_kernel,
        kernel_name="combine_splits",
        out_type=jax.ShapeDtypeStruct((Q, tokens, K, group, out.shape[-1]), dtype),
        grid=(tokens * group, K, Q),
        grid_names=("row", "head", "queries"),
        compiler_params=tiles.COMPILER_PARAMS,
    )(out, *stats)[..., :D]


def _combine_kernel(out_gmem, max_gmem, sum_gmem, combined_gmem):
    row, head, queries = (lax.axis_index(name) for name in ("row", "head", "queries"))
    group = combined_gmem.shape[3]
    out = jnp.zeros(combined_gmem.shape[-1:], jnp.float32)
    row_max, row_sum = jnp.float32(NEG_INF), jnp.float32(0)
    splits = out_gmem.shape[2]
    for first in range(0, splits, PREFETCHED_SPLITS):
        # All loads are issued before the first is awaited.
        at = [(queries, head, split, row) for split in range(first, min(first + PREFETCHED_SPLITS, splits))]
        outs = [out_gmem[i] for i in at]
        maxima = [max_gmem[i] for i in at]
        sums = [sum_gmem[i] for i in at]
        new_max = functools.reduce(jnp.maximum, maxima, row_max)
        shift = jnp.where(new_max == NEG_INF, 0.0, new_max)
        rescale = jnp.exp2(row_max - shift)
        out, row_sum, row_max = out * rescale, row_sum * rescale, new_max
        for part, part_max, part_sum in zip(outs, maxima, sums, strict=True):
            weight = jnp.exp2(part_max - shift)
            # A split without keys wrote zeros.
            out, row_sum = out + part * weight, row_sum + part_sum * weight
    out /= jnp.where(row_sum > 0, row_sum, 1.0)
    combined_gmem[queries, lax.div(row, group), head, lax.rem(row, group)] = out.astype(combined_gmem.dtype)
