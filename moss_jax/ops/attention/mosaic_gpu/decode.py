"""Split-K decode attention for Hopper GPUs: one warpgroup for each split of the keys.

If there are several, a combine pass follows.

With GQA, up to 64 rows of a kv head's queries (tokens times G heads) share every tile of K and V: they are
the 64 rows of wgmma's left operand. The kernel is bound by the bandwidth of reading K and V. The tokens of a
prompt are several such blocks; blocks that read the same keys are neighbours in the grid, so that all but the
first find them in L2.

B batch/slot, T query tokens, R = T * G rows, S keys, X keys of a tile, P splits, K kv heads, G query heads
per kv head, D head, Q blocks of queries over the whole batch
"""

# Pallas types layouts, inline instructions and the references of kernels too narrowly.
# pyright: reportArgumentType=false

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moss_jax.ops.attention.base import Arguments, KeyRange
from moss_jax.ops.attention.mosaic_gpu.split_k import (
    LANES,
    WGMMA_ROWS,
    DecodeConfig,
    QueryBlocks,
    SplitTiles,
    combine_splits,
    flatten,
)
from moss_jax.ops.mosaic_gpu import tiles
from moss_jax.ops.mosaic_gpu.tiles import LOG2E, MATRIX, NEG_INF, PER_COLUMN, PER_ROW


def decode_attention(a: Arguments, config: DecodeConfig) -> Float[Array, "batch T H D"]:
    """Computes the op for G <= 64 and K and V in q's dtype; forward only."""
    (batch, T, H, _), K = a.q.shape, a.k.shape[1]
    blocks = QueryBlocks(batch, T, K, H // K)
    return decode_blocks(blocks.pack_rows(a.q), a.k, a.v, a.bounds, a.bias, a.slots, a.scale, blocks, config)


@functools.partial(jax.jit, static_argnames=("scale", "blocks", "config"))
def decode_blocks(
    q: Float[Array, "Q K R D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    bounds: KeyRange,
    bias: Float[Array, "B S"] | None,
    slots: Int[Array, " batch"] | None,
    scale: float,
    blocks: QueryBlocks,
    config: DecodeConfig,
) -> Float[Array, "batch T H D"]:
    """Computes the op for queries packed in blocks.

    Jitted, so that a model's layers, which call it with the same shapes, trace and lower it once.
    """
    (Q, K, rows, D), S = q.shape, k.shape[2]
    X, stages = config.block_kv, config.stages
    splits = config.splits(Q * K, S)
    packed = [blocks.pack(x.astype(jnp.int32)) for x in bounds]
    if bias is not None:
        bias = flatten(jnp.broadcast_to(bias[:, None].astype(jnp.float32), k.shape[:3]), X)
    part = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    out, *stats = plgpu.kernel(
        functools.partial(
            _kernel,
            scale=LOG2E * scale,
            group=blocks.group,
            sizes={"keys": S, "heads": K, "splits": splits, "blocks": blocks.per_batch_row},
        ),
        kernel_name="decode_attention",
        out_type=[
            part((Q, K, splits, rows, pl.cdiv(D, LANES) * LANES)),
            *[part((Q, K, splits, WGMMA_ROWS))] * (2 if splits > 1 else 0),
        ],
        scratch_types={
            "q_smem": tiles.tile((WGMMA_ROWS, D), q.dtype),
            # The output reuses the memory of the tiles.
            "shared": plgpu.RefUnion(
                (tiles.tile((stages, X, D), k.dtype), tiles.tile((stages, X, D), v.dtype)),
                tiles.tile((WGMMA_ROWS, D), jnp.float32),
            ),
            "bias_smem": None if bias is None else plgpu.SMEM((stages, X), jnp.float32),
            "stats": (plgpu.SMEM((WGMMA_ROWS,), jnp.float32), plgpu.SMEM((WGMMA_ROWS,), jnp.float32)),
            "barriers": (
                plgpu.Barrier(),
                # One arrival per TMA copy.
                plgpu.Barrier(num_arrivals=1 + (bias is not None), num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
            ),
        },
        # The first axis varies fastest: its blocks run side by side.
        grid=(Q, splits, K) if blocks.per_batch_row > 1 else (splits, K, Q),
        grid_names=("queries", "split", "head") if blocks.per_batch_row > 1 else ("split", "head", "queries"),
        compiler_params=tiles.COMPILER_PARAMS,
    )(q, flatten(k, X, 1), flatten(v, X, 1), bias, slots, *packed)
    return blocks.unpack(combine_splits(out, stats, blocks.tokens, blocks.group, q.dtype)[..., :D])


def _kernel(
    q_gmem,
    k_gmem,
    v_gmem,
    bias_gmem,
    slots_gmem,
    start_gmem,
    end_gmem,
    out_gmem,
    *stats_gmem,
    q_smem,
    shared,
    bias_smem,
    stats,
    barriers,
    scale,
    group,
    sizes,
):
    """One split of the keys of one slot and kv head, for one block of queries."""
    split, head, queries = (lax.axis_index(name) for name in ("split", "head", "queries"))
    (k_smem, v_smem), out_smem = shared
    q_barrier, k_barrier, v_barrier = barriers
    stages, X, D = k_smem.shape

    # Rows past the queries are undefined; no row influences another.
    plgpu.copy_gmem_to_smem(q_gmem.at[queries, head], q_smem.at[pl.ds(0, q_gmem.shape[2])], q_barrier)
    split_tiles = SplitTiles(start_gmem, end_gmem, slots_gmem, block_kv=X, **sizes)

    def fetch_k(step):
        stage, at = lax.rem(step, stages), pl.ds(split_tiles.offset(step)[0], X)
        plgpu.copy_gmem_to_smem(k_gmem.at[at], k_smem.at[stage], k_barrier.at[stage])
        if bias_smem is not None:
            plgpu.copy_gmem_to_smem(bias_gmem.at[at], bias_smem.at[stage], k_barrier.at[stage])

    def fetch_v(step):
        stage, at = lax.rem(step, stages), pl.ds(split_tiles.offset(step)[0], X)
        plgpu.copy_gmem_to_smem(v_gmem.at[at], v_smem.at[stage], v_barrier.at[stage])

    for step in range(stages):
        pl.when(step < split_tiles.steps)(functools.partial(fetch_k, step))
        pl.when(step < split_tiles.steps)(functools.partial(fetch_v, step))
    plgpu.barrier_wait(q_barrier)

    # One number per row, computed once and not for every element of every tile.
    bounds = split_tiles.bounds(tiles.index((WGMMA_ROWS, 8), 0), group)
    if jnp.ndim(bounds[0]):
        bounds = [x.astype(jnp.float32).max(axis=1).astype(jnp.int32) for x in bounds]
        bounds = [tiles.along_rows(x, (WGMMA_ROWS, X)) for x in bounds]

    def attend_tile(step, carry):
        out, row_max, row_sum = carry
        stage = lax.rem(step, stages)
        at, own = split_tiles.offset(step)
        at -= split_tiles.base

        plgpu.barrier_wait(k_barrier.at[stage])
        scores = tiles.product(q_smem, k_smem.at[stage].transpose((1, 0))) * scale
        if bias_smem is not None:
            bias = plgpu.load(bias_smem.at[stage], layout=PER_COLUMN)
            scores += tiles.along_columns(bias * LOG2E, scores.shape)
        pl.when(step + stages < split_tiles.steps)(functools.partial(fetch_k, step + stages))
        scores = jnp.where(
            split_tiles.mask(at + tiles.index((WGMMA_ROWS, X), 1), own, *bounds), scores, NEG_INF
        )

        new_max = jnp.maximum(row_max, scores.max(axis=1))
        # A row that has seen no key yet has maximum -inf, and -inf - -inf would be NaN.
        shift = jnp.where(new_max == NEG_INF, 0.0, new_max)
        weights = jnp.exp2(scores - tiles.along_rows(shift, scores.shape))
        rescale = jnp.exp2(row_max - shift)
        row_sum = row_sum * rescale + weights.sum(axis=1)

        plgpu.barrier_wait(v_barrier.at[stage])
        pl.when(jnp.logical_not(split_tiles.all_used(at)))(
            functools.partial(zero_unused, v_smem.at[stage], at)
        )
        out *= tiles.along_rows(rescale, out.shape)
        out += tiles.product(weights.astype(v_gmem.dtype), v_smem.at[stage])
        pl.when(step + stages < split_tiles.steps)(functools.partial(fetch_v, step + stages))
        return out, new_max, row_sum

    def zero_unused(v_tile, at):
        """Zeros the values that no query sees, because 0 * NaN would corrupt the sums."""
        used = split_tiles.used(at + tiles.index((X, D), 0))
        values = plgpu.load(v_tile, layout=MATRIX)
        v_tile[...] = jnp.where(used, values, jnp.zeros_like(values))
        plgpu.commit_smem()

    initial = (
        tiles.full((WGMMA_ROWS, D), 0, MATRIX),
        tiles.full((WGMMA_ROWS,), NEG_INF, PER_ROW),
        tiles.full((WGMMA_ROWS,), 0, PER_ROW),
    )
    out, row_max, row_sum = lax.fori_loop(0, split_tiles.steps, attend_tile, initial)

    if not stats_gmem:
        out /= tiles.along_rows(jnp.where(row_sum > 0, row_sum, 1.0), out.shape)
    out_smem[...] = out
    for smem, x in zip(stats, (row_max, row_sum), strict=True):
        smem[...] = x
    plgpu.commit_smem()
    written = pl.ds(0, out_gmem.shape[3])
    plgpu.copy_smem_to_gmem(out_smem.at[written], out_gmem.at[queries, head, split, :, pl.ds(0, D)])
    for smem, gmem in zip(stats if stats_gmem else (), stats_gmem, strict=True):
        plgpu.copy_smem_to_gmem(smem, gmem.at[queries, head, split])
    plgpu.wait_smem_to_gmem(0)
