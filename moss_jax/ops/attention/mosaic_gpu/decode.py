"""Few queries over a long bank of keys: one warpgroup for each split of the keys, a second pass to join them.

The rows of a kv head's queries (T tokens times G heads, at most 64) share every tile of K and V that is read:
each is a row of the tensor core's 64-row operand. What takes the time is reading K and V.

B slot, T query tokens, R = T * G rows, S keys, X keys of a tile, P splits, K kv heads, G query heads per kv
head, D head
"""

import dataclasses
import functools
import operator

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moss_jax.ops.attention.arguments import Arguments
from moss_jax.ops.attention.mosaic_gpu import tiles
from moss_jax.ops.attention.mosaic_gpu.tiles import LOG2E, MATRIX, NEVER, PER_COLUMN, PER_ROW

ROWS = 64  # The tensor core's smallest operand.
LANES = 128  # Threads of a warpgroup.
AT_ONCE = 40  # Splits that the second pass loads before it waits.
TINY = 1e-30  # Stands for the scale of a vector of zeros.


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


@functools.partial(jax.jit, static_argnames="config")
def decode(a: Arguments, config: DecodeConfig) -> Float[Array, "B T H D"]:
    """Computes the op for T * G <= 64; forward only."""
    B, T, H, D = a.q.shape
    K, S = a.k.shape[1:3]
    rows = T * H // K
    X = config.block_kv
    splits = config.splits(B * K, S)
    q = a.q.reshape(B, T, K, H // K, D).swapaxes(1, 2).reshape(B, K, rows, D)
    inner = jnp.float16 if a.k.dtype == jnp.float8_e4m3fn else jnp.bfloat16 if a.quantized else a.q.dtype
    if inner != q.dtype:
        # The scale goes in here, so that float16 holds queries of any size that matters.
        q = (q.astype(jnp.float32) * a.scale).astype(inner)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, ROWS - rows), (0, 0)))
    # The vectors of all slots and heads in one row: tiles may start at any multiple of 8 of them.
    bias = None if a.bias is None else jnp.broadcast_to(a.bias[:, None], (B, K, S))
    k, v = (_pad(x.reshape(-1, D), X) for x in (a.k, a.v))
    vectors = [
        None if x is None else _pad(x.astype(jnp.float32).reshape(-1), X)
        for x in (bias, a.k_scale, a.v_scale)
    ]
    start, end = (x.astype(jnp.int32) for x in a.bounds)
    part = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    out, top, total = plgpu.kernel(
        functools.partial(
            _kernel,
            scale=LOG2E * (a.scale if inner == a.q.dtype else 1),
            group=H // K,
            keys=S,
            heads=K,
            splits=splits,
            stages=config.stages,
        ),
        out_type=[
            part((B, K, splits, pl.cdiv(rows, 8) * 8, pl.cdiv(D, LANES) * LANES)),
            part((B, K, splits, ROWS)),
            part((B, K, splits, ROWS)),
        ],
        scratch_types=_scratch(a, config, inner),
        grid=(splits, K, B),
        grid_names=("split", "head", "slot"),
        compiler_params=tiles.COMPILER_PARAMS,
    )(q, k, v, start, end, *vectors)
    out = _join(out, top, total, rows)[..., :D]
    return out.reshape(B, K, T, H // K, D).swapaxes(1, 2).reshape(B, T, H, D).astype(a.q.dtype)


def _scratch(a: Arguments, config: DecodeConfig, inner):
    """Shared memory: the queries, the tiles on their way, and what the tiles make room for at the end."""
    D, X, stages = a.q.shape[-1], config.block_kv, config.stages
    vector = plgpu.SMEM((stages, X), jnp.float32)
    return {
        "q_smem": tiles.tile((ROWS, D), inner),
        "shared": plgpu.RefUnion(
            (tiles.tile((stages, X, D), a.k.dtype), tiles.tile((stages, X, D), a.v.dtype)),
            tiles.tile((ROWS, D), jnp.float32),
        ),
        "wide": (tiles.tile((X, D), inner), tiles.tile((X, D), inner)) if a.quantized else None,
        "vectors": [None if bias is None else vector for bias in (a.bias, a.k_scale, a.v_scale)],
        "stats": (plgpu.SMEM((ROWS,), jnp.float32), plgpu.SMEM((ROWS,), jnp.float32)),
        "barriers": (
            plgpu.Barrier(),
            # One arrival a copy.
            plgpu.Barrier(
                num_arrivals=1 + (a.bias is not None) + (a.k_scale is not None), num_barriers=stages
            ),
            plgpu.Barrier(num_arrivals=1 + (a.v_scale is not None), num_barriers=stages),
        ),
    }


def _kernel(
    q_gmem,
    k_gmem,
    v_gmem,
    start_gmem,
    end_gmem,
    bias_gmem,
    k_scale_gmem,
    v_scale_gmem,
    out_gmem,
    top_gmem,
    total_gmem,
    *,
    q_smem,
    shared,
    wide,
    vectors,
    stats,
    barriers,
    scale,
    group,
    keys,
    heads,
    splits,
    stages,
):
    """One split of the keys of one slot and kv head."""
    split, head, slot = (lax.axis_index(name) for name in ("split", "head", "slot"))
    (k_smem, v_smem), out_smem = shared
    bias_smem, k_scale_smem, v_scale_smem = vectors
    q_barrier, k_barrier, v_barrier = barriers
    _, X, D = k_smem.shape
    T = start_gmem.shape[1]

    plgpu.copy_gmem_to_smem(q_gmem.at[slot, head], q_smem, q_barrier)

    starts = [jnp.maximum(start_gmem[slot, t], 0) for t in range(T)]
    ends = [jnp.minimum(end_gmem[slot, t], keys) for t in range(T)]
    low, high = keys, 0
    for first, last in zip(starts, ends, strict=True):
        low = jnp.where(first < last, jnp.minimum(low, first), low)
        high = jnp.where(first < last, jnp.maximum(high, last), high)
    base = (slot * heads + head) * keys  # of this slot and head among all vectors
    low = lax.div(base + low, 8) * 8 - base
    count = pl.cdiv(jnp.maximum(high - low, 0), X)
    first_tile, last_tile = lax.div(split * count, splits), lax.div((split + 1) * count, splits)
    steps = last_tile - first_tile

    def place(step):
        """Where the tile lies among all vectors, and the first key that is its own.

        The last tile of all is moved back to end with the range, so that no more is read; the keys that it
        then shares with its neighbour are not its own.
        """
        own = low + (first_tile + step) * X
        end = pl.cdiv(base + high, 8) * 8
        return pl.multiple_of(jnp.maximum(jnp.minimum(base + own, end - X), 0), 8), own

    def fetch_k(step):
        ring = lax.rem(step, stages)
        at, _ = place(step)
        plgpu.copy_gmem_to_smem(k_gmem.at[pl.ds(at, X)], k_smem.at[ring], k_barrier.at[ring])
        if bias_smem is not None:
            plgpu.copy_gmem_to_smem(bias_gmem.at[pl.ds(at, X)], bias_smem.at[ring], k_barrier.at[ring])
        if k_scale_smem is not None:
            plgpu.copy_gmem_to_smem(k_scale_gmem.at[pl.ds(at, X)], k_scale_smem.at[ring], k_barrier.at[ring])

    def fetch_v(step):
        ring = lax.rem(step, stages)
        at, _ = place(step)
        plgpu.copy_gmem_to_smem(v_gmem.at[pl.ds(at, X)], v_smem.at[ring], v_barrier.at[ring])
        if v_scale_smem is not None:
            plgpu.copy_gmem_to_smem(v_scale_gmem.at[pl.ds(at, X)], v_scale_smem.at[ring], v_barrier.at[ring])

    for step in range(stages):
        pl.when(step < steps)(functools.partial(fetch_k, step))
        pl.when(step < steps)(functools.partial(fetch_v, step))
    plgpu.barrier_wait(q_barrier)

    def down(vector):
        return tiles.along_columns(vector, (ROWS, X))

    def visit(step, carry):
        out, top, total = carry
        ring = lax.rem(step, stages)
        at, own = place(step)
        at -= base
        key = at + tiles.index((ROWS, X), 1)

        plgpu.barrier_wait(k_barrier.at[ring])
        k_tile = k_smem.at[ring]
        if wide is not None:
            widen(k_smem.at[ring], wide[0])
            k_tile = wide[0]

        scores = tiles.product(q_smem, k_tile.transpose((1, 0))) * scale
        if k_scale_smem is not None:
            scores *= down(plgpu.load(k_scale_smem.at[ring], layout=PER_COLUMN))
        if bias_smem is not None:
            scores += down(plgpu.load(bias_smem.at[ring], layout=PER_COLUMN) * LOG2E)
        pl.when(step + stages < steps)(functools.partial(fetch_k, step + stages))

        plgpu.barrier_wait(v_barrier.at[ring])
        if v_scale_smem is not None:
            # The weights carry the scale of V; dividing by it again gives what the total is made of.
            v_scale = plgpu.load(v_scale_smem.at[ring], layout=PER_COLUMN)
            v_scale = jnp.where(v_scale > TINY, v_scale, TINY)
            scores += down(jnp.log2(v_scale))
        scores = jnp.where(seen(key, own), scores, NEVER)

        new_top = jnp.maximum(top, scores.max(axis=1))
        # A row that has seen no key yet has top -inf, and -inf - -inf would be NaN.
        shift = jnp.where(new_top == NEVER, 0.0, new_top)
        weights = jnp.exp2(scores - tiles.along_rows(shift, scores.shape))
        decay = jnp.exp2(top - shift)
        part = weights if v_scale_smem is None else weights * down(1 / v_scale)
        total = total * decay + part.sum(axis=1)

        v_tile = v_smem.at[ring]
        if wide is not None:
            widen(v_smem.at[ring], wide[1])
            v_tile = wide[1]
        sees_all = [(first <= at) & (at + X <= last) for first, last in zip(starts, ends, strict=True)]
        whole = functools.reduce(operator.or_, sees_all)
        pl.when(jnp.logical_not(whole))(functools.partial(clean, v_tile, at))

        out *= tiles.along_rows(decay, out.shape)
        out += tiles.product(weights.astype(v_tile.dtype), v_tile)
        pl.when(step + stages < steps)(functools.partial(fetch_v, step + stages))
        return out, new_top, total

    def widen(narrow, wide):
        """8 bits to 16, through registers; the scales come in with the scores and the weights."""
        x = plgpu.load(narrow, layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
        wide[...] = plgpu.layout_cast(x.astype(wide.dtype), MATRIX)
        plgpu.commit_smem()

    def seen(key, own):
        """Which (row, key) pairs count."""
        if T == 1:
            return (key >= jnp.maximum(starts[0], own)) & (key < ends[0])
        row = tiles.index((ROWS, X), 0)
        first, last = jnp.zeros_like(row), jnp.zeros_like(row)
        for t, (start, end) in enumerate(zip(starts, ends, strict=True)):
            mine = (row >= t * group) & (row < (t + 1) * group)
            # The larger of two numbers is a scalar's business: vectors of integers compare as unsigned.
            first = jnp.where(mine, jnp.maximum(start, own), first)
            last = jnp.where(mine, end, last)
        return (key >= first) & (key < last)

    def clean(v_tile, at):
        """Zeros the values that no query sees, because 0 * NaN would spoil the sums."""
        key = at + tiles.index((X, D), 0)
        sees = [(first <= key) & (key < last) for first, last in zip(starts, ends, strict=True)]
        used = functools.reduce(operator.or_, sees)
        values = plgpu.load(v_tile, layout=MATRIX)
        v_tile[...] = jnp.where(used, values, jnp.zeros_like(values))
        plgpu.commit_smem()

    start = (
        tiles.full((ROWS, D), 0, MATRIX),
        tiles.full((ROWS,), NEVER, PER_ROW),
        tiles.full((ROWS,), 0, PER_ROW),
    )
    out, top, total = lax.fori_loop(0, steps, visit, start)

    out_smem[...] = out
    for smem, x in zip(stats, (top, total), strict=True):
        smem[...] = x
    plgpu.commit_smem()
    written = pl.ds(0, out_gmem.shape[3])
    plgpu.copy_smem_to_gmem(out_smem.at[written], out_gmem.at[slot, head, split, :, pl.ds(0, D)])
    plgpu.copy_smem_to_gmem(stats[0], top_gmem.at[slot, head, split])
    plgpu.copy_smem_to_gmem(stats[1], total_gmem.at[slot, head, split])
    plgpu.wait_smem_to_gmem(0)


def _join(out: Float[Array, "B K P R C"], top: Float[Array, "B K P R"], total: Float[Array, "B K P R"], rows):
    """The splits' sums, each relative to its own largest score, as one attention; [B, K, rows, C]."""
    B, K, _, _, C = out.shape
    return plgpu.kernel(
        _join_kernel,
        out_type=jax.ShapeDtypeStruct((B, K, rows, C), jnp.float32),
        grid=(rows, K, B),
        grid_names=("row", "head", "slot"),
        compiler_params=tiles.COMPILER_PARAMS,
    )(out, top, total)


def _join_kernel(out_gmem, top_gmem, total_gmem, joined_gmem):
    row, head, slot = (lax.axis_index(name) for name in ("row", "head", "slot"))
    out = jnp.zeros(joined_gmem.shape[-1:], jnp.float32)
    top, total = jnp.float32(NEVER), jnp.float32(0)
    for first in range(0, out_gmem.shape[2], AT_ONCE):
        # All loads first, so that they are on their way together.
        at = [(slot, head, split, row) for split in range(first, min(first + AT_ONCE, out_gmem.shape[2]))]
        outs = [out_gmem[i] for i in at]
        tops = [top_gmem[i] for i in at]
        totals = [total_gmem[i] for i in at]
        new_top = functools.reduce(jnp.maximum, tops, top)
        shift = jnp.where(new_top == NEVER, 0.0, new_top)
        decay = jnp.exp2(top - shift)
        out, total, top = out * decay, total * decay, new_top
        for part, part_top, part_total in zip(outs, tops, totals, strict=True):
            weight = jnp.exp2(part_top - shift)
            # A split without keys has written zeros, of all rows alike.
            out, total = out + part * weight, total + part_total * weight
    joined_gmem[slot, head, row] = out / jnp.where(total > 0, total, 1.0)


def _pad(x, block):
    """Vectors up to a multiple of 8, and to one tile."""
    size = max(block, pl.cdiv(x.shape[0], 8) * 8)
    return jnp.pad(x, ((0, size - x.shape[0]), *[(0, 0)] * (x.ndim - 1)))
