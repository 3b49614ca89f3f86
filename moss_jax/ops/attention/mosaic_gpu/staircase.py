"""FlashAttention for Hopper GPUs with a range of keys per query (the staircase mask of training and prefill).

Warp-specialised, forward and backward. Each thread block takes a block of queries of one head and visits the
tiles of keys that one of them sees, with an online softmax: two consumer warpgroups compute, each on half of
the queries, and alternate between softmax and wgmma (ping-pong); a producer warpgroup keeps the TMA pipeline
of K and V full. Only tiles that some query sees in part are masked. The backward pass has one kernel over
keys (for q) and one over queries (for k and v, summed over the heads that share them); both recompute the
weights from the stored log-sum-exp (Dao, arXiv 2307.08691).

R rows of queries, B batch/slot, T queries, Y queries of a warpgroup's block, S keys, X keys of a tile,
K kv heads, G query heads per kv head, H = K * G, D head
"""

# Pallas types layouts, inline instructions and the references of kernels too narrowly.
# pyright: reportArgumentType=false

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moss_jax.ops.attention.base import Arguments, no_gradients_by_slot
from moss_jax.ops.attention.residuals import tag
from moss_jax.ops.mosaic_gpu import tiles
from moss_jax.ops.mosaic_gpu.tiles import LOG2E, MATRIX, NEG_INF, PER_COLUMN, PER_ROW

INFINITE = 2**30  # More than any number of keys or queries.
CONSUMERS = 2  # Number of consumer warpgroups, in addition to the producer.


@dataclasses.dataclass(frozen=True)
class StaircaseConfig:
    """Tiling of the forward and backward passes.

    Attributes:
      block_q, block_kv, stages: forward pass: queries per warpgroup, keys per tile, pipeline stages.
      block_q_dq, block_kv_dq, stages_dq: the same for the backward pass of q.
      block_q_dkv, block_kv_dkv, stages_dkv: backward pass of k and v: queries per tile, keys per warpgroup,
        pipeline stages.
    """

    block_q: int = 64
    block_kv: int = 128
    stages: int = 2
    block_q_dq: int = 64
    block_kv_dq: int = 64
    stages_dq: int = 2
    block_q_dkv: int = 64
    block_kv_dkv: int = 64
    stages_dkv: int = 2

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, unit = getattr(self, field.name), 64 if field.name.startswith("block") else 1
            if value < unit or value % unit:
                raise ValueError(f"{field.name} is a multiple of {unit}, not {value}")


@functools.partial(jax.jit, static_argnames="config")
def staircase_attention(a: Arguments, config: StaircaseConfig) -> Float[Array, "R T H D"]:
    """Computes the op for K and V in q's dtype; differentiable in q, k, v and bias without slots."""
    T, S = a.q.shape[1], a.k.shape[2]
    rows = math.lcm(CONSUMERS * config.block_q, CONSUMERS * config.block_q_dq, config.block_q_dkv)
    keys = math.lcm(config.block_kv, config.block_kv_dq, CONSUMERS * config.block_kv_dkv)
    q, start, end = (_pad(x, 1, rows) for x in (a.q, *(jnp.clip(x, 0, S) for x in a.bounds)))
    k, v = (_pad(x, 2, keys) for x in (a.k, a.v))
    bias = None if a.bias is None else _pad(a.bias.astype(jnp.float32), 1, keys)
    return _attend(config, a.scale, q, k, v, bias, start, end, a.slots)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(config, scale, q, k, v, bias, start, end, slots):
    return _forward(config, scale, q, k, v, bias, start, end, slots)[0]


def _forward(config, scale, q, k, v, bias, start, end, slots):
    """Returns the output, and the residuals for the backward pass."""
    R, T, H, D = q.shape
    Y, X, stages = config.block_q, config.block_kv, config.stages
    out, log_sum = plgpu.kernel(
        functools.partial(_forward_kernel, scale=scale * LOG2E, group=H // k.shape[1]),
        kernel_name="staircase_forward",
        out_type=[jax.typeof(q), jax.ShapeDtypeStruct((R, H, T), jnp.float32)],
        scratch_types={
            "q_smem": tiles.tile((CONSUMERS, Y, D), q.dtype),
            "tma": _pipeline((X, D), k.dtype, stages, bias),
            "log_sum_smem": plgpu.SMEM((CONSUMERS, Y), jnp.float32),
            "q_barrier": plgpu.Barrier(num_barriers=CONSUMERS),
            "turn": plgpu.Barrier(num_arrivals=CONSUMERS),
        },
        **_launch(H, T // Y // CONSUMERS, R),
    )(q, k, v, bias, slots, start, end, _blocks_of(start, end, Y), *_used(start, end, k.shape[2]))
    out, log_sum = tag(out, log_sum)
    return out, (q, k, v, bias, start, end, slots, out, log_sum)


def _backward(config, scale, residuals, d_out):
    q, k, v, bias, start, end, slots, out, log_sum = residuals
    if slots is not None:
        raise no_gradients_by_slot()
    B, T, H, D = q.shape
    K, S = k.shape[1:3]
    # Not a dot product, which a GPU may take in TF32.
    mean = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1).swapaxes(1, 2)
    used = _used(start, end, S)

    Y, X, stages = config.block_q_dq, config.block_kv_dq, config.stages_dq
    per_row = plgpu.SMEM((CONSUMERS, Y), jnp.float32)
    d_q = plgpu.kernel(
        functools.partial(_d_q_kernel, scale=scale, group=H // K),
        kernel_name="staircase_d_q",
        out_type=jax.typeof(q),
        scratch_types={
            "q_smem": tiles.tile((CONSUMERS, Y, D), q.dtype),
            "d_out_smem": tiles.tile((CONSUMERS, Y, D), q.dtype),
            "per_row": (per_row, per_row),
            "tma": _pipeline((X, D), k.dtype, stages, bias),
            "q_barrier": plgpu.Barrier(num_arrivals=4, num_barriers=CONSUMERS),
        },
        **_launch(H, T // Y // CONSUMERS, B),
    )(q, d_out, log_sum, mean, k, v, bias, start, end, _blocks_of(start, end, Y), *used)

    Y, X, stages = config.block_q_dkv, config.block_kv_dkv, config.stages_dkv
    blocks = _blocks_of(start, end, Y)
    d_k, d_v, d_bias = plgpu.kernel(
        functools.partial(_d_kv_kernel, scale=scale),
        kernel_name="staircase_d_kv",
        out_type=[
            jax.typeof(k),
            jax.typeof(v),
            None if bias is None else jax.ShapeDtypeStruct((B, K, S), jnp.float32),
        ],
        scratch_types={
            "k_smem": tiles.tile((CONSUMERS, X, D), k.dtype),
            "v_smem": tiles.tile((CONSUMERS, X, D), v.dtype),
            "kv_barrier": plgpu.Barrier(num_arrivals=2 + (bias is not None), num_barriers=CONSUMERS),
            "bias_smem": None if bias is None else plgpu.SMEM((CONSUMERS, X), jnp.float32),
            "tma": _pipeline((Y, D), q.dtype, stages, both=True),
        },
        **_launch(K, S // X // CONSUMERS, B),
    )(k, v, bias, q, d_out, log_sum, mean, start, end, blocks, _query_blocks_of(blocks, CONSUMERS * X, S))
    return d_q, d_k, d_v, None if bias is None else d_bias.sum(axis=1), None, None, None


_attend.defvjp(_forward, _backward)


def _launch(heads: int, blocks: int, batch: int) -> dict:
    """Launch parameters; heads of a block are adjacent in the grid, so that they share its keys in L2."""
    return {
        "grid": (heads, blocks, batch),
        "grid_names": ("head", "block", "batch"),
        "num_threads": CONSUMERS + 1,
        "thread_name": "warpgroup",
        "compiler_params": tiles.COMPILER_PARAMS,
    }


def _pipeline(shape, dtype, stages, bias=None, both=False):
    """Buffers and barriers of the TMA pipeline for two kinds of tiles and their vectors.

    A bias is loaded with the first kind; with `both`, a vector is loaded with each.
    """
    vector = plgpu.SMEM((stages, shape[0]), jnp.float32)
    with_first, with_second = both or bias is not None, both
    free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
    return {
        "first": tiles.tile((stages, *shape), dtype),
        "second": tiles.tile((stages, *shape), dtype),
        "first_vector": vector if with_first else None,
        "second_vector": vector if with_second else None,
        "first_ready": plgpu.Barrier(num_arrivals=1 + with_first, num_barriers=stages),
        "second_ready": plgpu.Barrier(num_arrivals=1 + with_second, num_barriers=stages),
        "first_free": free,
        "second_free": free,
    }


def _blocks_of(start, end, size):
    """Key ranges seen by any query, and by all queries, of each block of `size`.

    Returns:
      int32 [B, blocks, 4]: start and end of both ranges. Queries that see nothing are ignored.
    """
    start, end = (x.reshape(x.shape[0], -1, size) for x in (start, end))
    some = start < end
    return jnp.stack(
        [
            jnp.where(some, start, INFINITE).min(axis=-1),
            jnp.where(some, end, 0).max(axis=-1),
            jnp.where(some, start, 0).max(axis=-1),
            jnp.where(some, end, INFINITE).min(axis=-1),
        ],
        axis=-1,
    ).astype(jnp.int32)


def _query_blocks_of(blocks, size, keys):
    """Range of the blocks of queries that see keys of each block of `size`, [B, blocks, 2]."""
    at = jnp.arange(0, keys, size)[:, None]
    sees = (blocks[:, None, :, 0] < at + size) & (at < blocks[:, None, :, 1])  # [B, key blocks, query blocks]
    number = jnp.arange(blocks.shape[1])
    first = jnp.where(sees, number, INFINITE).min(axis=-1)
    last = jnp.where(sees, number + 1, 0).max(axis=-1)
    return jnp.stack([first, last], axis=-1).astype(jnp.int32)


def _used(start, end, keys):
    """Mask of the keys that any query of the row sees, int32 [B, S], and a range of seen keys, [B, 2]."""
    rows = jnp.arange(start.shape[0])[:, None]
    some = (start < end).astype(jnp.int32)
    steps = (
        jnp.zeros((start.shape[0], keys + 1), jnp.int32).at[rows, start].add(some).at[rows, end].add(-some)
    )
    used = jnp.cumsum(steps[:, :keys], axis=1) > 0
    first = jnp.where(some, start, keys).min(axis=1)
    last = jnp.where(some, end, 0).max(axis=1)
    gap = used.sum(axis=1) < last - first
    dense_span = jnp.stack([first, jnp.where(gap, first, last)], axis=1)
    return used.astype(jnp.int32), dense_span.astype(jnp.int32)


def _produce(tma, steps, fetch_first, fetch_second):
    """The producer warpgroup: keeps the TMA pipeline full for `steps` steps."""
    plgpu.set_max_registers(40, action="decrease")
    stages = tma["first"].shape[0]

    def fetch(step):
        stage = lax.rem(step, stages)
        fetch_first(step, stage)
        fetch_second(step, stage)

    for step in range(stages):
        pl.when(step < steps)(functools.partial(fetch, step))

    @pl.loop(stages, steps)
    def _(step):
        stage = lax.rem(step, stages)
        plgpu.barrier_wait(tma["first_free"].at[stage])
        fetch_first(step, stage)
        plgpu.barrier_wait(tma["second_free"].at[stage])
        fetch_second(step, stage)


def _produce_keys(tma, k_gmem, v_gmem, bias_gmem, slot, kv_head, first, steps):
    """The producer warpgroup, for tiles of a slot's K and V from tile `first` on."""
    X = tma["first"].shape[1]

    def fetch_k(step, stage):
        at, ready = pl.ds((first + step) * X, X), tma["first_ready"].at[stage]
        plgpu.copy_gmem_to_smem(k_gmem.at[slot, kv_head, at], tma["first"].at[stage], ready)
        if bias_gmem is not None:
            plgpu.copy_gmem_to_smem(bias_gmem.at[slot, at], tma["first_vector"].at[stage], ready)

    def fetch_v(step, stage):
        at, ready = pl.ds((first + step) * X, X), tma["second_ready"].at[stage]
        plgpu.copy_gmem_to_smem(v_gmem.at[slot, kv_head, at], tma["second"].at[stage], ready)

    _produce(tma, steps, fetch_k, fetch_v)


def _tile_range(blocks_gmem, batch, block, X):
    """First tile and number of tiles that the queries of a thread block see."""
    parts = [[blocks_gmem[batch, block * CONSUMERS + i, j] for j in (0, 1)] for i in range(CONSUMERS)]
    first = functools.reduce(jnp.minimum, [part[0] for part in parts]) // X
    last = pl.cdiv(functools.reduce(jnp.maximum, [part[1] for part in parts]), X)
    return first, jnp.maximum(last - first, 0)


def _zero_unused(tile, used_gmem, batch, at, dense_span):
    """Zeros the vectors that no query of the row sees, because 0 * NaN would corrupt the sums."""
    X, D = tile.shape

    @pl.when((at < dense_span[0]) | (dense_span[1] < at + X))
    def _():
        used = plgpu.load(used_gmem.at[batch, pl.ds(at, X)], layout=PER_ROW, optimized=False)
        vectors = plgpu.load(tile, layout=MATRIX)
        seen = tiles.along_rows(used, (X, D)) > 0
        tile[...] = jnp.where(seen, vectors, jnp.zeros_like(vectors))
        plgpu.commit_smem()


def _forward_kernel(
    q_gmem,
    k_gmem,
    v_gmem,
    bias_gmem,
    slots_gmem,
    start_gmem,
    end_gmem,
    blocks_gmem,
    used_gmem,
    dense_span_gmem,
    out_gmem,
    log_sum_gmem,
    *,
    q_smem,
    tma,
    log_sum_smem,
    q_barrier,
    turn,
    scale,
    group,
):
    head, block, batch = (lax.axis_index(name) for name in ("head", "block", "batch"))
    block = (
        start_gmem.shape[1] // q_smem.shape[1] // CONSUMERS - 1 - block
    )  # The blocks with most tiles first.
    warpgroup = lax.axis_index("warpgroup")
    (_, Y, D), (stages, X, _) = q_smem.shape, tma["first"].shape
    first, steps = _tile_range(blocks_gmem, batch, block, X)

    def alternate():
        """Ping-pong: one warpgroup issues its products while the other computes its softmax."""
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        number = block * CONSUMERS + warpgroup
        mine = pl.ds(number * Y, Y)
        plgpu.copy_gmem_to_smem(q_gmem.at[batch, mine, head], q_smem.at[warpgroup], q_barrier.at[warpgroup])
        start = plgpu.load(start_gmem.at[batch, mine], layout=PER_ROW, optimized=False)
        end = plgpu.load(end_gmem.at[batch, mine], layout=PER_ROW, optimized=False)
        seen_by_all = [blocks_gmem[batch, number, i] for i in (2, 3)]
        dense_span = [dense_span_gmem[batch, i] for i in (0, 1)]
        plgpu.barrier_wait(q_barrier.at[warpgroup])

        def attend_tile(step, carry):
            out, row_max, row_sum = carry
            stage, at = lax.rem(step, stages), (first + step) * X
            k_tile, v_tile = tma["first"].at[stage], tma["second"].at[stage]
            scores = tiles.product(q_smem.at[warpgroup], k_tile.transpose((1, 0)), alternate)
            scores *= scale
            if bias_gmem is not None:
                bias = plgpu.load(tma["first_vector"].at[stage], layout=PER_COLUMN)
                scores += tiles.along_columns(bias * LOG2E, scores.shape)
            plgpu.barrier_arrive(tma["first_free"].at[stage])
            scores = _masked(scores, at, start, end, seen_by_all, NEG_INF)

            new_max = jnp.maximum(row_max, scores.max(axis=1))
            # A row that has seen no key yet has maximum -inf, and -inf - -inf would be NaN.
            shift = jnp.where(new_max == NEG_INF, 0.0, new_max)
            weights = jnp.exp2(scores - tiles.along_rows(shift, scores.shape))
            rescale = jnp.exp2(row_max - shift)
            row_sum = row_sum * rescale + weights.sum(axis=1)
            out *= tiles.along_rows(rescale, out.shape)
            weights16 = weights.astype(v_gmem.dtype)
            out, new_max, row_sum, weights16 = lax.optimization_barrier((out, new_max, row_sum, weights16))

            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(tma["second_ready"].at[stage])
            plgpu.barrier_wait(turn)
            _zero_unused(v_tile, used_gmem, batch, at, dense_span)

            def next_tile():
                ready = tma["first_ready"]
                pl.when(step + 1 < steps)(lambda: plgpu.barrier_wait(ready.at[lax.rem(step + 1, stages)]))

            out = tiles.add_product(out, weights16, v_tile, next_tile)
            plgpu.barrier_arrive(tma["second_free"].at[stage])
            return out, new_max, row_sum

        pl.when(steps > 0)(lambda: plgpu.barrier_wait(tma["first_ready"].at[0]))
        pl.when(warpgroup == 1)(alternate)
        initial = (
            tiles.full((Y, D), 0, MATRIX),
            tiles.full((Y,), NEG_INF, PER_ROW),
            tiles.full((Y,), 0, PER_ROW),
        )
        out, row_max, row_sum = lax.fori_loop(0, steps, attend_tile, initial)
        pl.when(warpgroup == 0)(alternate)

        sees_any = (start < end) & (row_sum > 0)
        row_sum = jnp.where(sees_any, row_sum, 1.0)
        inverse = jnp.where(sees_any, 1 / row_sum, 0.0)
        q_smem.at[warpgroup][...] = (out * tiles.along_rows(inverse, out.shape)).astype(out_gmem.dtype)
        log_sum_smem.at[warpgroup][...] = jnp.where(sees_any, row_max + jnp.log2(row_sum), jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], out_gmem.at[batch, mine, head])
        plgpu.copy_smem_to_gmem(log_sum_smem.at[warpgroup], log_sum_gmem.at[batch, head, mine])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == CONSUMERS)
    def _():
        slot = batch if slots_gmem is None else slots_gmem[batch]
        _produce_keys(tma, k_gmem, v_gmem, bias_gmem, slot, lax.div(head, group), first, steps)


def _masked(x, at, start, end, seen_by_all, otherwise):
    """x [queries, keys from `at` on], with `otherwise` where a query does not see a key."""

    def mask(x):
        key = at + tiles.index(x.shape, 1)
        seen = (tiles.along_rows(start, x.shape) <= key) & (key < tiles.along_rows(end, x.shape))
        return jnp.where(seen, x, otherwise)

    unmasked = (seen_by_all[0] <= at) & (at + x.shape[1] <= seen_by_all[1])
    return lax.cond(unmasked, lambda x: x, mask, x)


def _d_q_kernel(
    q_gmem,
    d_out_gmem,
    log_sum_gmem,
    mean_gmem,
    k_gmem,
    v_gmem,
    bias_gmem,
    start_gmem,
    end_gmem,
    blocks_gmem,
    used_gmem,
    dense_span_gmem,
    d_q_gmem,
    *,
    q_smem,
    d_out_smem,
    per_row,
    tma,
    q_barrier,
    scale,
    group,
):
    head, block, batch = (lax.axis_index(name) for name in ("head", "block", "batch"))
    block = (
        start_gmem.shape[1] // q_smem.shape[1] // CONSUMERS - 1 - block
    )  # The blocks with most tiles first.
    warpgroup = lax.axis_index("warpgroup")
    (_, Y, D), (stages, X, _) = q_smem.shape, tma["first"].shape
    first, steps = _tile_range(blocks_gmem, batch, block, X)

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        number = block * CONSUMERS + warpgroup
        mine, ready = pl.ds(number * Y, Y), q_barrier.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_gmem.at[batch, mine, head], q_smem.at[warpgroup], ready)
        plgpu.copy_gmem_to_smem(d_out_gmem.at[batch, mine, head], d_out_smem.at[warpgroup], ready)
        for gmem, smem in zip((log_sum_gmem, mean_gmem), per_row, strict=True):
            plgpu.copy_gmem_to_smem(gmem.at[batch, head, mine], smem.at[warpgroup], ready)
        start = plgpu.load(start_gmem.at[batch, mine], layout=PER_ROW, optimized=False)
        end = plgpu.load(end_gmem.at[batch, mine], layout=PER_ROW, optimized=False)
        seen_by_all = [blocks_gmem[batch, number, i] for i in (2, 3)]
        dense_span = [dense_span_gmem[batch, i] for i in (0, 1)]
        plgpu.barrier_wait(ready)
        log_sum, mean = (plgpu.load(smem.at[warpgroup], layout=PER_ROW) for smem in per_row)

        def attend_tile(step, d_q):
            stage, at = lax.rem(step, stages), (first + step) * X
            k_tile, v_tile = tma["first"].at[stage], tma["second"].at[stage]
            plgpu.barrier_wait(tma["first_ready"].at[stage])
            plgpu.barrier_wait(tma["second_ready"].at[stage])
            scores, d_weights = tiles.products(
                (q_smem.at[warpgroup], k_tile.transpose((1, 0))),
                (d_out_smem.at[warpgroup], v_tile.transpose((1, 0))),
            )
            plgpu.barrier_arrive(tma["second_free"].at[stage])
            scores *= scale * LOG2E
            if bias_gmem is not None:
                bias = plgpu.load(tma["first_vector"].at[stage], layout=PER_COLUMN)
                scores += tiles.along_columns(bias * LOG2E, scores.shape)
            weights = jnp.exp2(scores - tiles.along_rows(log_sum, scores.shape))
            d_scores = weights * (d_weights - tiles.along_rows(mean, scores.shape))
            d_scores = _masked(d_scores, at, start, end, seen_by_all, 0.0)
            _zero_unused(k_tile, used_gmem, batch, at, dense_span)
            d_q = tiles.add_product(d_q, d_scores.astype(k_gmem.dtype), k_tile)
            plgpu.barrier_arrive(tma["first_free"].at[stage])
            return d_q

        d_q = lax.fori_loop(0, steps, attend_tile, tiles.full((Y, D), 0, MATRIX))
        q_smem.at[warpgroup][...] = (d_q * scale).astype(d_q_gmem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], d_q_gmem.at[batch, mine, head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == CONSUMERS)
    def _():
        _produce_keys(tma, k_gmem, v_gmem, bias_gmem, batch, lax.div(head, group), first, steps)


def _d_kv_kernel(
    k_gmem,
    v_gmem,
    bias_gmem,
    q_gmem,
    d_out_gmem,
    log_sum_gmem,
    mean_gmem,
    start_gmem,
    end_gmem,
    blocks_gmem,
    query_blocks_gmem,
    d_k_gmem,
    d_v_gmem,
    d_bias_gmem,
    *,
    k_smem,
    v_smem,
    kv_barrier,
    bias_smem,
    tma,
    scale,
):
    """Gradients of K, V and bias. Scores are transposed: keys are the rows, queries the columns."""
    kv_head, block, batch = (lax.axis_index(name) for name in ("head", "block", "batch"))
    warpgroup = lax.axis_index("warpgroup")
    (_, X, D), (stages, Y, _) = k_smem.shape, tma["first"].shape
    first = query_blocks_gmem[batch, block, 0]
    count = jnp.maximum(query_blocks_gmem[batch, block, 1] - first, 0)
    group = q_gmem.shape[2] // k_gmem.shape[1]
    steps = group * count

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        at = (block * CONSUMERS + warpgroup) * X
        mine, ready = pl.ds(at, X), kv_barrier.at[warpgroup]
        plgpu.copy_gmem_to_smem(k_gmem.at[batch, kv_head, mine], k_smem.at[warpgroup], ready)
        plgpu.copy_gmem_to_smem(v_gmem.at[batch, kv_head, mine], v_smem.at[warpgroup], ready)
        if bias_gmem is not None:
            plgpu.copy_gmem_to_smem(bias_gmem.at[batch, mine], bias_smem.at[warpgroup], ready)
        plgpu.barrier_wait(ready)
        bias = None if bias_gmem is None else plgpu.load(bias_smem.at[warpgroup], layout=PER_ROW) * LOG2E

        def attend_tile(step, carry):
            d_k, d_v, d_bias = carry
            stage, number = lax.rem(step, stages), first + lax.rem(step, count)
            seen_by_all = [blocks_gmem[batch, number, i] for i in (2, 3)]
            q_tile, d_out_tile = tma["first"].at[stage], tma["second"].at[stage]
            plgpu.barrier_wait(tma["first_ready"].at[stage])
            plgpu.barrier_wait(tma["second_ready"].at[stage])
            scores, d_weights = tiles.products(
                (k_smem.at[warpgroup], q_tile.transpose((1, 0))),
                (v_smem.at[warpgroup], d_out_tile.transpose((1, 0))),
            )
            log_sum, mean = (
                plgpu.load(tma[name].at[stage], layout=PER_COLUMN)
                for name in ("first_vector", "second_vector")
            )
            scores *= scale * LOG2E
            if bias is not None:
                scores += tiles.along_rows(bias, scores.shape)
            weights = jnp.exp2(scores - tiles.along_columns(log_sum, scores.shape))
            d_scores = weights * (d_weights - tiles.along_columns(mean, scores.shape))

            def mask(pair):
                queries = pl.ds(number * Y, Y)
                start, end = (
                    plgpu.load(gmem.at[batch, queries], layout=PER_COLUMN, optimized=False)
                    for gmem in (start_gmem, end_gmem)
                )
                key = at + tiles.index((X, Y), 0)
                seen = (tiles.along_columns(start, (X, Y)) <= key) & (key < tiles.along_columns(end, (X, Y)))
                return tuple(jnp.where(seen, x, 0.0) for x in pair)

            unmasked = (seen_by_all[0] <= at) & (at + X <= seen_by_all[1])
            weights, d_scores = lax.cond(unmasked, lambda pair: pair, mask, (weights, d_scores))
            if bias is not None:
                d_bias += d_scores.sum(axis=1)
            d_v = tiles.add_product(d_v, weights.astype(q_gmem.dtype), d_out_tile)
            plgpu.barrier_arrive(tma["second_free"].at[stage])
            d_k = tiles.add_product(d_k, d_scores.astype(q_gmem.dtype), q_tile)
            plgpu.barrier_arrive(tma["first_free"].at[stage])
            return d_k, d_v, d_bias

        zeros = tiles.full((X, D), 0, MATRIX)
        no_bias = None if bias is None else tiles.full((X,), 0, PER_ROW)
        d_k, d_v, d_bias = lax.fori_loop(0, steps, attend_tile, (zeros, zeros, no_bias))
        k_smem.at[warpgroup][...] = (d_k * scale).astype(d_k_gmem.dtype)
        v_smem.at[warpgroup][...] = d_v.astype(d_v_gmem.dtype)
        if bias is not None:
            bias_smem.at[warpgroup][...] = d_bias
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_smem.at[warpgroup], d_k_gmem.at[batch, kv_head, mine])
        plgpu.copy_smem_to_gmem(v_smem.at[warpgroup], d_v_gmem.at[batch, kv_head, mine])
        if bias is not None:
            plgpu.copy_smem_to_gmem(bias_smem.at[warpgroup], d_bias_gmem.at[batch, kv_head, mine])
        plgpu.wait_smem_to_gmem(0)

    def fetch(gmem, vector_gmem, name):
        def go(step, stage):
            head, number = kv_head * group + lax.div(step, count), first + lax.rem(step, count)
            queries, ready = pl.ds(number * Y, Y), tma[f"{name}_ready"].at[stage]
            plgpu.copy_gmem_to_smem(gmem.at[batch, queries, head], tma[name].at[stage], ready)
            plgpu.copy_gmem_to_smem(
                vector_gmem.at[batch, head, queries], tma[f"{name}_vector"].at[stage], ready
            )

        return go

    @pl.when(warpgroup == CONSUMERS)
    def _():
        _produce(tma, steps, fetch(q_gmem, log_sum_gmem, "first"), fetch(d_out_gmem, mean_gmem, "second"))


def _pad(x, axis, size):
    """Zeros up to a multiple of `size` along `axis`."""
    more = -x.shape[axis] % size
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])
