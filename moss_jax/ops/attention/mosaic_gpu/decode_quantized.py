"""Few queries over a long bank of keys in 8 bits: as `decode`, with the operands of the products swapped.

Keys are the rows of the scores and the queries their columns, because the tensor core takes 64 rows but as
few as 8 columns. K goes from shared memory through registers straight into the tensor core; only V comes
back to shared memory as 16 bits, because its product reads it transposed.

B slot, T query tokens, R = T * G rows of queries, N = R rounded up to a multiple of 8, S keys, X keys of a
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

from moss_jax.ops.attention.arguments import Arguments
from moss_jax.ops.attention.mosaic_gpu.bank import LANES, DecodeConfig, Split, in_a_row, join
from moss_jax.ops.mosaic_gpu import tiles, upcast
from moss_jax.ops.mosaic_gpu.tiles import LOG2E, MATRIX, NEVER, PER_COLUMN, PER_ROW
from moss_jax.ops.mosaic_gpu.upcast import permute_columns

TINY = 1e-30  # Stands for the scale of a vector of zeros.


@functools.partial(jax.jit, static_argnames="config")
def decode_quantized(a: Arguments, config: DecodeConfig) -> Float[Array, "B T H D"]:
    """Computes the op for T * G <= 64, K and V in 8 bits and D of 64 or 128; forward only."""
    B, T, H, D = a.q.shape
    K, S = a.k.shape[1:3]
    rows = T * H // K
    N, X = pl.cdiv(rows, 8) * 8, config.block_kv
    splits = config.splits(B * K, S)
    # float16 holds every number of either 8 bits; the scale goes into q, so that it holds that too.
    q = (a.q.astype(jnp.float32) * a.scale).astype(jnp.float16)
    q = q.reshape(B, T, K, H // K, D).swapaxes(1, 2).reshape(B, K, rows, D)
    q = permute_columns(jnp.pad(q, ((0, 0), (0, 0), (0, N - rows), (0, 0))))
    vectors = [in_a_row(x.astype(jnp.float32), X) for x in (a.k_scale, a.v_scale)]
    bias = None
    if a.bias is not None:
        bias = in_a_row(jnp.broadcast_to(a.bias[:, None].astype(jnp.float32), (B, K, S)), X)
    part = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    out, top, total = plgpu.kernel(
        functools.partial(_kernel, group=H // K, cut={"keys": S, "heads": K, "splits": splits, "blocks": 1}),
        out_type=[part((B, K, splits, D, N)), part((B, K, splits, N)), part((B, K, splits, N))],
        scratch_types={
            "q_smem": tiles.tile((N, D), q.dtype),
            "k_smem": tiles.tile((config.stages, X, D), a.k.dtype),
            "v_smem": tiles.tile((config.stages, X, D), a.v.dtype),
            "wide_smem": tiles.tile((X, D), q.dtype),
            "weights_smem": tiles.tile((N, X), q.dtype),
            # Of k_scale, v_scale and the bias.
            "vectors_smem": plgpu.SMEM((2 + (bias is not None), config.stages, X), jnp.float32),
            "barriers": (
                plgpu.Barrier(),
                # One arrival a copy.
                plgpu.Barrier(num_arrivals=2 + (bias is not None), num_barriers=config.stages),
                plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            ),
        },
        grid=(splits, K, B),
        grid_names=("split", "head", "queries"),
        compiler_params=dataclasses.replace(
            tiles.COMPILER_PARAMS,
            # Pallas would put two around every store and one before every copy; `_kernel` says why its own
            # are enough.
            unsafe_no_auto_barriers=True,
            # Of 8 columns, for the largest score of each; with more columns there are more rounds.
            reduction_scratch_bytes=1024 if N == 8 else 2048,
        ),
    )(q, in_a_row(a.k, X, 1), in_a_row(a.v, X, 1), *vectors, bias, *(x.astype(jnp.int32) for x in a.bounds))
    # The second pass reads whole lines.
    out = jnp.pad(out.swapaxes(-1, -2), (*[(0, 0)] * 4, (0, -D % LANES)))
    out = permute_columns(join(out, top, total, T, H // K, jnp.float32)[..., :D])
    return out.reshape(B, T, H, D).astype(a.q.dtype)


def _kernel(
    q_gmem,
    k_gmem,
    v_gmem,
    k_scale_gmem,
    v_scale_gmem,
    bias_gmem,
    start_gmem,
    end_gmem,
    out_gmem,
    top_gmem,
    total_gmem,
    *,
    q_smem,
    k_smem,
    v_smem,
    wide_smem,
    weights_smem,
    vectors_smem,
    barriers,
    group,
    cut,
):
    """One split of the keys of one slot and kv head.

    No automatic barriers: `commit_smem` is a barrier of the warpgroup, and a visit to a tile has two.
    Before the first, everyone has read the tile of K and has awaited the last visit's product. After it, K's
    slot is filled again, and `wide_smem` and `weights_smem`, which that product read, are written. Before
    the second, everyone has read the tile of V and written those two. After it, V's slot is filled again, and
    the product reads them. No thread reads either of them but through the tensor core.
    """
    split, head, slot = (lax.axis_index(name) for name in ("split", "head", "queries"))
    q_barrier, k_barrier, v_barrier = barriers
    stages, X, D = k_smem.shape
    N = q_smem.shape[0]

    plgpu.copy_gmem_to_smem(q_gmem.at[slot, head], q_smem, q_barrier)
    walk = Split(start_gmem, end_gmem, block_kv=X, **cut)

    def fetch(copies, barrier, step):
        ring = lax.rem(step, stages)
        at, _ = walk.place(step)
        for gmem, smem in copies:
            if gmem is not None:
                plgpu.copy_gmem_to_smem(gmem.at[pl.ds(at, X)], smem.at[ring], barrier.at[ring])

    bias_smem = None if bias_gmem is None else vectors_smem.at[2]
    k_copies = ((k_gmem, k_smem), (k_scale_gmem, vectors_smem.at[0]), (bias_gmem, bias_smem))
    v_copies = ((v_gmem, v_smem), (v_scale_gmem, vectors_smem.at[1]))
    fetch_k = functools.partial(fetch, k_copies, k_barrier)
    fetch_v = functools.partial(fetch, v_copies, v_barrier)

    for step in range(stages):
        pl.when(step < walk.steps)(functools.partial(fetch_k, step))
        pl.when(step < walk.steps)(functools.partial(fetch_v, step))
    plgpu.barrier_wait(q_barrier)

    def visit(step, carry):
        out, top, total = carry
        ring = lax.rem(step, stages)
        at, own = walk.place(step)
        at -= walk.base

        plgpu.barrier_wait(k_barrier.at[ring])
        k = upcast.to_float16(k_smem.at[ring])
        factor = plgpu.load(vectors_smem.at[0, ring], layout=PER_ROW) * LOG2E
        bias = None if bias_smem is None else plgpu.load(bias_smem.at[ring], layout=PER_ROW)
        plgpu.commit_smem()
        pl.when(step + stages < walk.steps)(functools.partial(fetch_k, step + stages))

        scores = tiles.product(k, q_smem.transpose((1, 0)), functools.partial(widen_v, ring, at))

        # The weights carry the scale of V; dividing by it again gives what the total is made of.
        v_scale = plgpu.load(vectors_smem.at[1, ring], layout=PER_ROW)
        v_scale = jnp.where(v_scale > TINY, v_scale, TINY)
        summand = jnp.log2(v_scale) if bias is None else jnp.log2(v_scale) + bias * LOG2E
        scores = scores * tiles.along_rows(factor, scores.shape) + tiles.along_rows(summand, scores.shape)
        bounds = walk.bounds(tiles.index((X, N), 1), group)
        scores = jnp.where(walk.seen(at + tiles.index((X, N), 0), own, *bounds), scores, NEVER)

        new_top = jnp.maximum(top, scores.max(axis=0))
        # A column that has seen no key yet has top -inf, and -inf - -inf would be NaN.
        shift = jnp.where(new_top == NEVER, 0.0, new_top)
        weights = jnp.exp2(scores - tiles.along_columns(shift, scores.shape))
        decay = jnp.exp2(top - shift)
        total *= tiles.along_columns(decay, total.shape)
        total += weights * tiles.along_rows(1 / v_scale, total.shape)

        weights_smem.transpose((1, 0))[...] = weights.astype(weights_smem.dtype)
        plgpu.commit_smem()
        pl.when(step + stages < walk.steps)(functools.partial(fetch_v, step + stages))

        out *= tiles.along_columns(decay, out.shape)
        out += tiles.product(wide_smem.transpose((1, 0)), weights_smem.transpose((1, 0)))
        return out, new_top, total

    def widen_v(ring, at):
        """V to 16 bits, while K is being multiplied; the values that no query sees are zeroed.

        They could be NaN, and 0 * NaN would spoil the sums.
        """
        plgpu.barrier_wait(v_barrier.at[ring])
        v = upcast.to_float16(v_smem.at[ring])
        whole = walk.whole(at)

        @pl.when(whole)
        def _():
            wide_smem[...] = v

        @pl.when(jnp.logical_not(whole))
        def _():
            used = walk.used(at + tiles.index((X, D), 0))
            wide_smem[...] = jnp.where(used, v, jnp.zeros_like(v))

    nothing = (
        tiles.full((D, N), 0, MATRIX),
        tiles.full((N,), NEVER, PER_COLUMN),
        tiles.full((X, N), 0, MATRIX),
    )
    out, top, total = lax.fori_loop(0, walk.steps, visit, nothing)
    out_gmem[slot, head, split] = out
    # Nobody reads this memory any more: the last visit's second barrier has been passed.
    stats = ((top, top_gmem), (total.sum(axis=0), total_gmem))
    for i, (x, _) in enumerate(stats):
        vectors_smem[i, 0, pl.ds(0, N)] = x
    plgpu.commit_smem()
    for i, (_, gmem) in enumerate(stats):
        plgpu.copy_smem_to_gmem(vectors_smem.at[i, 0, pl.ds(0, N)], gmem.at[slot, head, split])
    plgpu.wait_smem_to_gmem(0)
