"""Few queries over a long bank of keys: a warpgroup for each split of the keys, a second pass to join them.

Up to 64 rows of a kv head's queries (tokens times G heads) share every tile of K and V that is read: each is
a row of the tensor core's 64-row operand. What takes the time is reading K and V. The tokens of a prompt are
several such blocks; those that read the same keys run side by side, so memory is read for the first alone.

B slot, T query tokens, R = T * G rows, S keys, X keys of a tile, P splits, K kv heads, G query heads per kv
head, D head, Q blocks of queries over all slots
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moss_jax.ops.attention.arguments import Arguments, KeyRange
from moss_jax.ops.attention.mosaic_gpu.bank import LANES, ROWS, Blocks, DecodeConfig, Split, in_a_row, join
from moss_jax.ops.mosaic_gpu import tiles
from moss_jax.ops.mosaic_gpu.tiles import LOG2E, MATRIX, NEVER, PER_COLUMN, PER_ROW


def decode(a: Arguments, config: DecodeConfig) -> Float[Array, "B T H D"]:
    """Computes the op for G <= 64 and K and V in q's dtype; forward only."""
    (B, T, H, _), K = a.q.shape, a.k.shape[1]
    blocks = Blocks(B, T, K, H // K)
    return decode_blocks(blocks.in_rows(a.q), a.k, a.v, a.bounds, a.bias, a.scale, blocks, config)


@functools.partial(jax.jit, static_argnames=("scale", "blocks", "config"))
def decode_blocks(
    q: Float[Array, "Q K R D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    bounds: KeyRange,
    bias: Float[Array, "B S"] | None,
    scale: float,
    blocks: Blocks,
    config: DecodeConfig,
) -> Float[Array, "B T H D"]:
    """The op, given queries in blocks.

    Under jit so that a model's layers, which call it with the same shapes, have it traced and lowered once.
    """
    (Q, K, rows, D), S = q.shape, k.shape[2]
    X, stages = config.block_kv, config.stages
    splits = config.splits(Q * K, S)
    bounds = [blocks.cut(x.astype(jnp.int32)) for x in bounds]
    if bias is not None:
        bias = in_a_row(jnp.broadcast_to(bias[:, None].astype(jnp.float32), k.shape[:3]), X)
    part = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    out, top, total = plgpu.kernel(
        functools.partial(
            _kernel,
            scale=LOG2E * scale,
            group=blocks.group,
            cut={"keys": S, "heads": K, "splits": splits, "blocks": blocks.of_a_slot},
        ),
        out_type=[
            part((Q, K, splits, rows, pl.cdiv(D, LANES) * LANES)),
            part((Q, K, splits, ROWS)),
            part((Q, K, splits, ROWS)),
        ],
        scratch_types={
            "q_smem": tiles.tile((ROWS, D), q.dtype),
            # At the end, the output takes the place of the tiles.
            "shared": plgpu.RefUnion(
                (tiles.tile((stages, X, D), k.dtype), tiles.tile((stages, X, D), v.dtype)),
                tiles.tile((ROWS, D), jnp.float32),
            ),
            "bias_smem": None if bias is None else plgpu.SMEM((stages, X), jnp.float32),
            "stats": (plgpu.SMEM((ROWS,), jnp.float32), plgpu.SMEM((ROWS,), jnp.float32)),
            "barriers": (
                plgpu.Barrier(),
                # One arrival a copy.
                plgpu.Barrier(num_arrivals=1 + (bias is not None), num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
            ),
        },
        # The first axis is that of neighbours in time.
        grid=(Q, splits, K) if blocks.of_a_slot > 1 else (splits, K, Q),
        grid_names=("queries", "split", "head") if blocks.of_a_slot > 1 else ("split", "head", "queries"),
        compiler_params=tiles.COMPILER_PARAMS,
    )(q, in_a_row(k, X, 1), in_a_row(v, X, 1), bias, *bounds)
    return blocks.in_tokens(join(out, top, total, blocks.tokens, blocks.group, q.dtype)[..., :D])


def _kernel(
    q_gmem,
    k_gmem,
    v_gmem,
    bias_gmem,
    start_gmem,
    end_gmem,
    out_gmem,
    top_gmem,
    total_gmem,
    *,
    q_smem,
    shared,
    bias_smem,
    stats,
    barriers,
    scale,
    group,
    cut,
):
    """One split of the keys of one slot and kv head, for one block of queries."""
    split, head, queries = (lax.axis_index(name) for name in ("split", "head", "queries"))
    (k_smem, v_smem), out_smem = shared
    q_barrier, k_barrier, v_barrier = barriers
    stages, X, D = k_smem.shape

    # The rows beyond hold anything, and each finds its own.
    plgpu.copy_gmem_to_smem(q_gmem.at[queries, head], q_smem.at[pl.ds(0, q_gmem.shape[2])], q_barrier)
    walk = Split(start_gmem, end_gmem, block_kv=X, **cut)

    def fetch_k(step):
        ring, at = lax.rem(step, stages), pl.ds(walk.place(step)[0], X)
        plgpu.copy_gmem_to_smem(k_gmem.at[at], k_smem.at[ring], k_barrier.at[ring])
        if bias_smem is not None:
            plgpu.copy_gmem_to_smem(bias_gmem.at[at], bias_smem.at[ring], k_barrier.at[ring])

    def fetch_v(step):
        ring, at = lax.rem(step, stages), pl.ds(walk.place(step)[0], X)
        plgpu.copy_gmem_to_smem(v_gmem.at[at], v_smem.at[ring], v_barrier.at[ring])

    for step in range(stages):
        pl.when(step < walk.steps)(functools.partial(fetch_k, step))
        pl.when(step < walk.steps)(functools.partial(fetch_v, step))
    plgpu.barrier_wait(q_barrier)

    # One number a row, found once and not for every element of every tile.
    bounds = walk.bounds(tiles.index((ROWS, 8), 0), group)
    if jnp.ndim(bounds[0]):
        bounds = [x.astype(jnp.float32).max(axis=1).astype(jnp.int32) for x in bounds]
        bounds = [tiles.along_rows(x, (ROWS, X)) for x in bounds]

    def visit(step, carry):
        out, top, total = carry
        ring = lax.rem(step, stages)
        at, own = walk.place(step)
        at -= walk.base

        plgpu.barrier_wait(k_barrier.at[ring])
        scores = tiles.product(q_smem, k_smem.at[ring].transpose((1, 0))) * scale
        if bias_smem is not None:
            bias = plgpu.load(bias_smem.at[ring], layout=PER_COLUMN)
            scores += tiles.along_columns(bias * LOG2E, scores.shape)
        pl.when(step + stages < walk.steps)(functools.partial(fetch_k, step + stages))
        scores = jnp.where(walk.seen(at + tiles.index((ROWS, X), 1), own, *bounds), scores, NEVER)

        new_top = jnp.maximum(top, scores.max(axis=1))
        # A row that has seen no key yet has top -inf, and -inf - -inf would be NaN.
        shift = jnp.where(new_top == NEVER, 0.0, new_top)
        weights = jnp.exp2(scores - tiles.along_rows(shift, scores.shape))
        decay = jnp.exp2(top - shift)
        total = total * decay + weights.sum(axis=1)

        plgpu.barrier_wait(v_barrier.at[ring])
        pl.when(jnp.logical_not(walk.whole(at)))(functools.partial(clean, v_smem.at[ring], at))
        out *= tiles.along_rows(decay, out.shape)
        out += tiles.product(weights.astype(v_gmem.dtype), v_smem.at[ring])
        pl.when(step + stages < walk.steps)(functools.partial(fetch_v, step + stages))
        return out, new_top, total

    def clean(v_tile, at):
        """Zeros the values that no query sees, because 0 * NaN would spoil the sums."""
        used = walk.used(at + tiles.index((X, D), 0))
        values = plgpu.load(v_tile, layout=MATRIX)
        v_tile[...] = jnp.where(used, values, jnp.zeros_like(values))
        plgpu.commit_smem()

    nothing = (
        tiles.full((ROWS, D), 0, MATRIX),
        tiles.full((ROWS,), NEVER, PER_ROW),
        tiles.full((ROWS,), 0, PER_ROW),
    )
    out, top, total = lax.fori_loop(0, walk.steps, visit, nothing)

    out_smem[...] = out
    for smem, x in zip(stats, (top, total), strict=True):
        smem[...] = x
    plgpu.commit_smem()
    written = pl.ds(0, out_gmem.shape[3])
    plgpu.copy_smem_to_gmem(out_smem.at[written], out_gmem.at[queries, head, split, :, pl.ds(0, D)])
    plgpu.copy_smem_to_gmem(stats[0], top_gmem.at[queries, head, split])
    plgpu.copy_smem_to_gmem(stats[1], total_gmem.at[queries, head, split])
    plgpu.wait_smem_to_gmem(0)
