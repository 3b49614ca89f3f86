"""Split-K decode attention over 8-bit K and V, with the operands of both products swapped.

Keys are the rows of the scores and queries their columns, because wgmma takes 64 rows but as few as 8
columns. K goes from shared memory through registers, where it is upcast, straight into the tensor core; only
V returns to shared memory in 16 bits, because its product reads it transposed. If there are several splits, a
second pass combines them, as in `decode`.

B batch/slot, T query tokens, Q blocks of queries over the whole batch, N rows of a block, S keys, X keys of a
tile, P splits, K kv heads, G query heads per kv head, D head
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moss_jax.ops.attention.base import Arguments
from moss_jax.ops.attention.mosaic_gpu.split_k import (
    WGMMA_ROWS,
    DecodeConfig,
    QueryBlocks,
    SplitTiles,
    combine_splits,
    flatten,
)
from moss_jax.ops.mosaic_gpu import tiles, upcast
from moss_jax.ops.mosaic_gpu.tiles import LOG2E, MATRIX, NEG_INF, PER_COLUMN, PER_ROW
from moss_jax.ops.mosaic_gpu.upcast import permute_columns
from moss_jax.ops.qarray import QArray

MIN_SCALE = 1e-30  # Replaces the scale 0 of a vector of zeros.
# Queries per block and kv head, at most. A thread keeps scores, sums and output of a tile and two upcast
# operands, which with 64 columns are more than its registers.
MAX_COLUMNS = 32


@functools.partial(jax.jit, static_argnames="config")
def quantized_decode_attention(a: Arguments, config: DecodeConfig) -> Float[Array, "batch T H D"]:
    """Computes the op for T * G <= 64, K and V in 8 bits and D of 64 or 128; forward only."""
    k, v = a.k, a.v
    assert isinstance(k, QArray)
    assert isinstance(v, QArray)
    batch, T, H, D = a.q.shape
    B, K, S = k.shape[:3]
    blocks = QueryBlocks(batch, T, K, H // K, MAX_COLUMNS)
    Q, N, X = blocks.count, blocks.rows, config.block_kv
    splits = config.splits(Q * K, S)
    # float16 represents every int8 and float8_e4m3fn; with the scale folded into q, scores fit it too.
    q = permute_columns(blocks.pack_rows((a.q.astype(jnp.float32) * a.scale).astype(jnp.float16)))
    vectors = [flatten(x.astype(jnp.float32), X) for x in (k.scale, v.scale)]
    bias = None
    if a.bias is not None:
        bias = flatten(jnp.broadcast_to(a.bias[:, None].astype(jnp.float32), (B, K, S)), X)
    bounds = [blocks.pack(x.astype(jnp.int32)) for x in a.bounds]
    part = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    sizes = {"keys": S, "heads": K, "splits": splits, "blocks": blocks.per_batch_row}
    out, *stats = plgpu.kernel(
        functools.partial(_kernel, group=H // K, sizes=sizes),
        kernel_name="quantized_decode_attention",
        out_type=[part((Q, K, splits, D, N)), *[part((Q, K, splits, N))] * (2 if splits > 1 else 0)],
        scratch_types={
            "q_smem": tiles.tile((N, D), q.dtype),
            "k_smem": tiles.tile((config.stages, X, D), k.dtype),
            "v_smem": tiles.tile((config.stages, X, D), v.dtype),
            "wide_smem": tiles.tile((X, D), q.dtype),
            "weights_smem": tiles.tile((N, X), q.dtype),
            # Scales of K, scales of V, bias.
            "vectors_smem": plgpu.SMEM((2 + (bias is not None), config.stages, X), jnp.float32),
            "barriers": (
                plgpu.Barrier(),
                # One arrival per TMA copy.
                plgpu.Barrier(num_arrivals=2 + (bias is not None), num_barriers=config.stages),
                plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            ),
        },
        grid=(splits, K, Q),
        grid_names=("split", "head", "queries"),
        compiler_params=dataclasses.replace(
            tiles.COMPILER_PARAMS,
            # Automatic ones would be two around every store and one before every copy; `_kernel` explains why
            # its own suffice.
            unsafe_no_auto_barriers=True,
            # For the column maxima, 8 columns a round.
            reduction_scratch_bytes=1024 if N == 8 else 2048,
        ),
    )(q, flatten(k.values, X, 1), flatten(v.values, X, 1), *vectors, bias, a.slots, *bounds)
    out = combine_splits(out.swapaxes(-1, -2), stats, blocks.tokens, H // K, jnp.float32)
    return blocks.unpack(permute_columns(out)).astype(a.q.dtype)


def _kernel(
    q_gmem,
    k_gmem,
    v_gmem,
    k_scale_gmem,
    v_scale_gmem,
    bias_gmem,
    slots_gmem,
    start_gmem,
    end_gmem,
    out_gmem,
    *stats_gmem,
    q_smem,
    k_smem,
    v_smem,
    wide_smem,
    weights_smem,
    vectors_smem,
    barriers,
    group,
    sizes,
):
    """One split of the keys of one slot and kv head.

    No automatic barriers: `commit_smem` is a barrier of the warpgroup, and there are two for each tile.
    Before the first, all threads have read the tile of K and awaited the previous tile's second product.
    After it, K's stage is refilled, and `wide_smem` and `weights_smem`, which that product read, are
    written. Before the second, all threads have read the tile of V and written those two. After it, V's stage
    is refilled, and the product reads them. They are read by the tensor core alone.
    """
    split, head, queries = (lax.axis_index(name) for name in ("split", "head", "queries"))
    q_barrier, k_barrier, v_barrier = barriers
    stages, X, D = k_smem.shape
    N = q_smem.shape[0]

    plgpu.copy_gmem_to_smem(q_gmem.at[queries, head], q_smem, q_barrier)
    split_tiles = SplitTiles(start_gmem, end_gmem, slots_gmem, block_kv=X, **sizes)

    def fetch(copies, barrier, step):
        stage = lax.rem(step, stages)
        at, _ = split_tiles.offset(step)
        for gmem, smem in copies:
            if gmem is not None:
                plgpu.copy_gmem_to_smem(gmem.at[pl.ds(at, X)], smem.at[stage], barrier.at[stage])

    bias_smem = None if bias_gmem is None else vectors_smem.at[2]
    k_copies = ((k_gmem, k_smem), (k_scale_gmem, vectors_smem.at[0]), (bias_gmem, bias_smem))
    v_copies = ((v_gmem, v_smem), (v_scale_gmem, vectors_smem.at[1]))
    fetch_k = functools.partial(fetch, k_copies, k_barrier)
    fetch_v = functools.partial(fetch, v_copies, v_barrier)

    for step in range(stages):
        pl.when(step < split_tiles.steps)(functools.partial(fetch_k, step))
        pl.when(step < split_tiles.steps)(functools.partial(fetch_v, step))
    plgpu.barrier_wait(q_barrier)

    # One number per column, computed once and not for every element of every tile.
    bounds = split_tiles.bounds(tiles.index((WGMMA_ROWS, N), 1), group)
    if jnp.ndim(bounds[0]):
        bounds = [x.astype(jnp.float32).max(axis=0).astype(jnp.int32) for x in bounds]
        bounds = [tiles.along_columns(x, (X, N)) for x in bounds]

    def attend_tile(step, carry):
        out, row_max, row_sum = carry
        stage = lax.rem(step, stages)
        at, own = split_tiles.offset(step)
        at -= split_tiles.base

        plgpu.barrier_wait(k_barrier.at[stage])
        k = upcast.to_float16(k_smem.at[stage])
        score_scale = plgpu.load(vectors_smem.at[0, stage], layout=PER_ROW) * LOG2E
        bias = None if bias_smem is None else plgpu.load(bias_smem.at[stage], layout=PER_ROW)
        plgpu.commit_smem()
        pl.when(step + stages < split_tiles.steps)(functools.partial(fetch_k, step + stages))

        scores = tiles.product(k, q_smem.transpose((1, 0)), functools.partial(upcast_v, stage, at))

        # The weights include the scale of V; the row sum is that of the weights without it.
        v_scale = plgpu.load(vectors_smem.at[1, stage], layout=PER_ROW)
        v_scale = jnp.where(v_scale > MIN_SCALE, v_scale, MIN_SCALE)
        score_bias = jnp.log2(v_scale) if bias is None else jnp.log2(v_scale) + bias * LOG2E
        scores = scores * tiles.along_rows(score_scale, scores.shape) + tiles.along_rows(
            score_bias, scores.shape
        )
        scores = jnp.where(split_tiles.mask(at + tiles.index((X, N), 0), own, *bounds), scores, NEG_INF)

        new_max = jnp.maximum(row_max, scores.max(axis=0))
        # A column that has seen no key yet has maximum -inf, and -inf - -inf would be NaN.
        shift = jnp.where(new_max == NEG_INF, 0.0, new_max)
        weights = jnp.exp2(scores - tiles.along_columns(shift, scores.shape))
        rescale = jnp.exp2(row_max - shift)
        row_sum *= tiles.along_columns(rescale, row_sum.shape)
        row_sum += weights * tiles.along_rows(1 / v_scale, row_sum.shape)

        weights_smem.transpose((1, 0))[...] = weights.astype(weights_smem.dtype)
        plgpu.commit_smem()
        pl.when(step + stages < split_tiles.steps)(functools.partial(fetch_v, step + stages))

        out *= tiles.along_columns(rescale, out.shape)
        out += tiles.product(wide_smem.transpose((1, 0)), weights_smem.transpose((1, 0)))
        return out, new_max, row_sum

    def upcast_v(stage, at):
        """Upcasts V while K is being multiplied, and zeros the values that no query sees.

        They could be NaN, and 0 * NaN would corrupt the sums.
        """
        plgpu.barrier_wait(v_barrier.at[stage])
        v = upcast.to_float16(v_smem.at[stage])
        all_used, contiguous = split_tiles.all_used(at), split_tiles.one_sees_all(at)

        @pl.when(all_used)
        def _():
            wide_smem[...] = v

        def keep(used):
            wide_smem[...] = jnp.where(used(at + tiles.index((X, D), 0)), v, jnp.zeros_like(v))

        # The first is the common case. Comparing each number with the range of each query takes longer than
        # the products.
        pl.when(contiguous & ~all_used)(functools.partial(keep, split_tiles.between))
        pl.when(~contiguous & ~all_used)(functools.partial(keep, split_tiles.used))

    initial = (
        tiles.full((D, N), 0, MATRIX),
        tiles.full((N,), NEG_INF, PER_COLUMN),
        tiles.full((X, N), 0, MATRIX),
    )
    out, row_max, row_sum = lax.fori_loop(0, split_tiles.steps, attend_tile, initial)
    row_sum = row_sum.sum(axis=0)
    if not stats_gmem:
        out_gmem[queries, head, split] = out / tiles.along_columns(
            jnp.where(row_sum > 0, row_sum, 1.0), out.shape
        )
        return
    out_gmem[queries, head, split] = out
    # No thread reads this memory any more: all have passed the last tile's second barrier.
    for i, x in enumerate((row_max, row_sum)):
        vectors_smem[i, 0, pl.ds(0, N)] = x
    plgpu.commit_smem()
    for i, gmem in enumerate(stats_gmem):
        plgpu.copy_smem_to_gmem(vectors_smem.at[i, 0, pl.ds(0, N)], gmem.at[queries, head, split])
    plgpu.wait_smem_to_gmem(0)
