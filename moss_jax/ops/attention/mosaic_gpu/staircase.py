"""Many queries whose ranges differ (the staircase of training, of offline use): forward and backward.

Every thread block takes a block of queries of one head and walks over the tiles of keys that one of them
sees: two warpgroups compute, each on half of the queries, a third keeps tiles of K and V coming. A tile that
all queries see whole is taken as it is, only the others are masked. The backward pass has one kernel that
walks over keys (for q) and one that walks over queries (for k and v, summed over the heads that share them);
both compute the weights again from the stored log-sum-exp (Dao, arXiv 2307.08691).

B batch, T queries, Y queries of a warpgroup's block, S keys, X keys of a tile, K kv heads, G query heads per
kv head, H = K * G, D head
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moss_jax.ops.attention.arguments import Arguments
from moss_jax.ops.mosaic_gpu import tiles
from moss_jax.ops.mosaic_gpu.tiles import LOG2E, MATRIX, NEVER, PER_COLUMN, PER_ROW

MANY = 2**30  # More than any number of keys or queries.
COMPUTING = 2  # warpgroups beside the one that fetches


@dataclasses.dataclass(frozen=True)
class StaircaseConfig:
    """Sizes of the blocks.

    Attributes:
      block_q, block_kv, stages: of the forward pass: queries of a warpgroup, keys of a tile, tiles in flight.
      block_q_dq, block_kv_dq, stages_dq: the same of the backward pass for q.
      block_q_dkv, block_kv_dkv, stages_dkv: of the one for k and v: queries of a tile, keys of a warpgroup.
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
def staircase(a: Arguments, config: StaircaseConfig) -> Float[Array, "B T H D"]:
    """Computes the op; differentiable in q, k, v and bias."""
    T, S = a.q.shape[1], a.k.shape[2]
    rows = math.lcm(COMPUTING * config.block_q, COMPUTING * config.block_q_dq, config.block_q_dkv)
    keys = math.lcm(config.block_kv, config.block_kv_dq, COMPUTING * config.block_kv_dkv)
    q, start, end = (_pad(x, 1, rows) for x in (a.q, *(jnp.clip(x, 0, S) for x in a.bounds)))
    k, v = (_pad(x, 2, keys) for x in (a.k, a.v))
    bias = None if a.bias is None else _pad(a.bias.astype(jnp.float32), 1, keys)
    return _attend(config, a.scale, q, k, v, bias, start, end)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(config, scale, q, k, v, bias, start, end):
    return _forward(config, scale, q, k, v, bias, start, end)[0]


def _forward(config, scale, q, k, v, bias, start, end):
    """The output, and what the backward pass needs of it."""
    B, T, H, D = q.shape
    Y, X, stages = config.block_q, config.block_kv, config.stages
    out, log_total = plgpu.kernel(
        functools.partial(_forward_kernel, scale=scale * LOG2E, group=H // k.shape[1]),
        out_type=[jax.typeof(q), jax.ShapeDtypeStruct((B, H, T), jnp.float32)],
        scratch_types={
            "q_smem": tiles.tile((COMPUTING, Y, D), q.dtype),
            "ring": _ring((X, D), k.dtype, stages, bias),
            "log_total_smem": plgpu.SMEM((COMPUTING, Y), jnp.float32),
            "q_barrier": plgpu.Barrier(num_barriers=COMPUTING),
            "turn": plgpu.Barrier(num_arrivals=COMPUTING),
        },
        **_launch(H, T // Y // COMPUTING, B),
    )(q, k, v, bias, start, end, _blocks_of(start, end, Y), *_used(start, end, k.shape[2]))
    return out, (q, k, v, bias, start, end, out, log_total)


def _backward(config, scale, residuals, d_out):
    q, k, v, bias, start, end, out, log_total = residuals
    B, T, H, D = q.shape
    K, S = k.shape[1:3]
    # Not a dot product, which a GPU may take in TF32.
    mean = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1).swapaxes(1, 2)
    used = _used(start, end, S)

    Y, X, stages = config.block_q_dq, config.block_kv_dq, config.stages_dq
    per_row = plgpu.SMEM((COMPUTING, Y), jnp.float32)
    d_q = plgpu.kernel(
        functools.partial(_d_q_kernel, scale=scale, group=H // K),
        out_type=jax.typeof(q),
        scratch_types={
            "q_smem": tiles.tile((COMPUTING, Y, D), q.dtype),
            "d_out_smem": tiles.tile((COMPUTING, Y, D), q.dtype),
            "per_row": (per_row, per_row),
            "ring": _ring((X, D), k.dtype, stages, bias),
            "q_barrier": plgpu.Barrier(num_arrivals=4, num_barriers=COMPUTING),
        },
        **_launch(H, T // Y // COMPUTING, B),
    )(q, d_out, log_total, mean, k, v, bias, start, end, _blocks_of(start, end, Y), *used)

    Y, X, stages = config.block_q_dkv, config.block_kv_dkv, config.stages_dkv
    blocks = _blocks_of(start, end, Y)
    d_k, d_v, d_bias = plgpu.kernel(
        functools.partial(_d_kv_kernel, scale=scale),
        out_type=[
            jax.typeof(k),
            jax.typeof(v),
            None if bias is None else jax.ShapeDtypeStruct((B, K, S), jnp.float32),
        ],
        scratch_types={
            "k_smem": tiles.tile((COMPUTING, X, D), k.dtype),
            "v_smem": tiles.tile((COMPUTING, X, D), v.dtype),
            "kv_barrier": plgpu.Barrier(num_arrivals=2 + (bias is not None), num_barriers=COMPUTING),
            "bias_smem": None if bias is None else plgpu.SMEM((COMPUTING, X), jnp.float32),
            "ring": _ring((Y, D), q.dtype, stages, both=True),
        },
        **_launch(K, S // X // COMPUTING, B),
    )(k, v, bias, q, d_out, log_total, mean, start, end, blocks, _visitors(blocks, COMPUTING * X, S))
    return d_q, d_k, d_v, None if bias is None else d_bias.sum(axis=1), None, None


_attend.defvjp(_forward, _backward)


def _launch(heads: int, blocks: int, batch: int) -> dict:
    """How the kernels are started: the heads of a block side by side, so that they find its keys in L2."""
    return {
        "grid": (heads, blocks, batch),
        "grid_names": ("head", "block", "batch"),
        "num_threads": COMPUTING + 1,
        "thread_name": "warpgroup",
        "compiler_params": tiles.COMPILER_PARAMS,
    }


def _ring(shape, dtype, stages, bias=None, both=False):
    """Room for two kinds of tiles on their way, the vectors that come with them, and their barriers.

    A bias comes with the first kind; with `both`, a vector with each.
    """
    vector = plgpu.SMEM((stages, shape[0]), jnp.float32)
    with_first, with_second = both or bias is not None, both
    free = plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages)
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
    """Per block of `size` queries the keys that one of them sees, and those that all of them see.

    Returns:
      int32 [B, blocks, 4]: start and end of both. Queries that see nothing are left out of both.
    """
    start, end = (x.reshape(x.shape[0], -1, size) for x in (start, end))
    some = start < end
    return jnp.stack(
        [
            jnp.where(some, start, MANY).min(axis=-1),
            jnp.where(some, end, 0).max(axis=-1),
            jnp.where(some, start, 0).max(axis=-1),
            jnp.where(some, end, MANY).min(axis=-1),
        ],
        axis=-1,
    ).astype(jnp.int32)


def _visitors(blocks, size, keys):
    """Per block of `size` keys the first and last block of queries that sees one of them, [B, blocks, 2]."""
    at = jnp.arange(0, keys, size)[:, None]
    sees = (blocks[:, None, :, 0] < at + size) & (at < blocks[:, None, :, 1])  # [B, key blocks, query blocks]
    number = jnp.arange(blocks.shape[1])
    first = jnp.where(sees, number, MANY).min(axis=-1)
    last = jnp.where(sees, number + 1, 0).max(axis=-1)
    return jnp.stack([first, last], axis=-1).astype(jnp.int32)


def _used(start, end, keys):
    """Which keys some query of the row sees, int32 [B, S], and a stretch of keys all seen, [B, 2]."""
    rows = jnp.arange(start.shape[0])[:, None]
    some = (start < end).astype(jnp.int32)
    steps = (
        jnp.zeros((start.shape[0], keys + 1), jnp.int32).at[rows, start].add(some).at[rows, end].add(-some)
    )
    used = jnp.cumsum(steps[:, :keys], axis=1) > 0
    first = jnp.where(some, start, keys).min(axis=1)
    last = jnp.where(some, end, 0).max(axis=1)
    gap = used.sum(axis=1) < last - first
    stretch = jnp.stack([first, jnp.where(gap, first, last)], axis=1)
    return used.astype(jnp.int32), stretch.astype(jnp.int32)


def _walk(ring, steps, fetch_first, fetch_second):
    """What the fetching warpgroup does: keeps the ring full for `steps` steps."""
    plgpu.set_max_registers(40, action="decrease")
    stages = ring["first"].shape[0]

    def fetch(step):
        slot = lax.rem(step, stages)
        fetch_first(step, slot)
        fetch_second(step, slot)

    for step in range(stages):
        pl.when(step < steps)(functools.partial(fetch, step))

    @pl.loop(stages, steps)
    def _(step):
        slot = lax.rem(step, stages)
        plgpu.barrier_wait(ring["first_free"].at[slot])
        fetch_first(step, slot)
        plgpu.barrier_wait(ring["second_free"].at[slot])
        fetch_second(step, slot)


def _walk_keys(ring, k_gmem, v_gmem, bias_gmem, batch, kv_head, first, steps):
    """Fetches the tiles of K and V from tile `first` on."""
    X = ring["first"].shape[1]

    def fetch_k(step, slot):
        at, ready = pl.ds((first + step) * X, X), ring["first_ready"].at[slot]
        plgpu.copy_gmem_to_smem(k_gmem.at[batch, kv_head, at], ring["first"].at[slot], ready)
        if bias_gmem is not None:
            plgpu.copy_gmem_to_smem(bias_gmem.at[batch, at], ring["first_vector"].at[slot], ready)

    def fetch_v(step, slot):
        at, ready = pl.ds((first + step) * X, X), ring["second_ready"].at[slot]
        plgpu.copy_gmem_to_smem(v_gmem.at[batch, kv_head, at], ring["second"].at[slot], ready)

    _walk(ring, steps, fetch_k, fetch_v)


def _tiles_seen(blocks_gmem, batch, block, X):
    """First tile, and number of tiles, that the queries of a thread block see."""
    parts = [[blocks_gmem[batch, block * COMPUTING + i, j] for j in (0, 1)] for i in range(COMPUTING)]
    first = functools.reduce(jnp.minimum, [part[0] for part in parts]) // X
    last = pl.cdiv(functools.reduce(jnp.maximum, [part[1] for part in parts]), X)
    return first, jnp.maximum(last - first, 0)


def _clean(tile, used_gmem, batch, at, stretch):
    """Zeros the vectors that no query of the row sees, because 0 * NaN would spoil the sums."""
    X, D = tile.shape

    @pl.when((at < stretch[0]) | (stretch[1] < at + X))
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
    start_gmem,
    end_gmem,
    blocks_gmem,
    used_gmem,
    stretch_gmem,
    out_gmem,
    log_total_gmem,
    *,
    q_smem,
    ring,
    log_total_smem,
    q_barrier,
    turn,
    scale,
    group,
):
    head, block, batch = (lax.axis_index(name) for name in ("head", "block", "batch"))
    block = start_gmem.shape[1] // q_smem.shape[1] // COMPUTING - 1 - block  # The longest walks first.
    warpgroup = lax.axis_index("warpgroup")
    (_, Y, D), (stages, X, _) = q_smem.shape, ring["first"].shape
    first, steps = _tiles_seen(blocks_gmem, batch, block, X)

    def take_turns():
        """Waits for the other warpgroup, so that one multiplies while the other does its softmax."""
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(warpgroup < COMPUTING)
    def _():
        plgpu.set_max_registers(232, action="increase")
        number = block * COMPUTING + warpgroup
        mine = pl.ds(number * Y, Y)
        plgpu.copy_gmem_to_smem(q_gmem.at[batch, mine, head], q_smem.at[warpgroup], q_barrier.at[warpgroup])
        start = plgpu.load(start_gmem.at[batch, mine], layout=PER_ROW, optimized=False)
        end = plgpu.load(end_gmem.at[batch, mine], layout=PER_ROW, optimized=False)
        all_see = [blocks_gmem[batch, number, i] for i in (2, 3)]
        stretch = [stretch_gmem[batch, i] for i in (0, 1)]
        plgpu.barrier_wait(q_barrier.at[warpgroup])

        def visit(step, carry):
            out, top, total = carry
            slot, at = lax.rem(step, stages), (first + step) * X
            scores = tiles.product(q_smem.at[warpgroup], ring["first"].at[slot].transpose((1, 0)), take_turns)
            scores *= scale
            if bias_gmem is not None:
                bias = plgpu.load(ring["first_vector"].at[slot], layout=PER_COLUMN)
                scores += tiles.along_columns(bias * LOG2E, scores.shape)
            plgpu.barrier_arrive(ring["first_free"].at[slot])
            scores = _masked(scores, at, start, end, all_see, NEVER)

            new_top = jnp.maximum(top, scores.max(axis=1))
            # A row that has seen no key yet has top -inf, and -inf - -inf would be NaN.
            shift = jnp.where(new_top == NEVER, 0.0, new_top)
            weights = jnp.exp2(scores - tiles.along_rows(shift, scores.shape))
            decay = jnp.exp2(top - shift)
            total = total * decay + weights.sum(axis=1)
            out *= tiles.along_rows(decay, out.shape)
            narrow = weights.astype(v_gmem.dtype)
            out, new_top, total, narrow = lax.optimization_barrier((out, new_top, total, narrow))

            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(ring["second_ready"].at[slot])
            plgpu.barrier_wait(turn)
            _clean(ring["second"].at[slot], used_gmem, batch, at, stretch)

            def next_tile():
                pl.when(step + 1 < steps)(
                    lambda: plgpu.barrier_wait(ring["first_ready"].at[lax.rem(step + 1, stages)])
                )

            out = tiles.add_product(out, narrow, ring["second"].at[slot], next_tile)
            plgpu.barrier_arrive(ring["second_free"].at[slot])
            return out, new_top, total

        pl.when(steps > 0)(lambda: plgpu.barrier_wait(ring["first_ready"].at[0]))
        pl.when(warpgroup == 1)(take_turns)
        nothing = (
            tiles.full((Y, D), 0, MATRIX),
            tiles.full((Y,), NEVER, PER_ROW),
            tiles.full((Y,), 0, PER_ROW),
        )
        out, top, total = lax.fori_loop(0, steps, visit, nothing)
        pl.when(warpgroup == 0)(take_turns)

        seeing = (start < end) & (total > 0)
        total = jnp.where(seeing, total, 1.0)
        share = jnp.where(seeing, 1 / total, 0.0)
        q_smem.at[warpgroup][...] = (out * tiles.along_rows(share, out.shape)).astype(out_gmem.dtype)
        log_total_smem.at[warpgroup][...] = jnp.where(seeing, top + jnp.log2(total), jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], out_gmem.at[batch, mine, head])
        plgpu.copy_smem_to_gmem(log_total_smem.at[warpgroup], log_total_gmem.at[batch, head, mine])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == COMPUTING)
    def _():
        _walk_keys(ring, k_gmem, v_gmem, bias_gmem, batch, lax.div(head, group), first, steps)


def _masked(x, at, start, end, all_see, otherwise):
    """x [queries, keys from `at` on] with `otherwise` where a query doesn't see a key."""

    def mask(x):
        key = at + tiles.index(x.shape, 1)
        seen = (tiles.along_rows(start, x.shape) <= key) & (key < tiles.along_rows(end, x.shape))
        return jnp.where(seen, x, otherwise)

    whole = (all_see[0] <= at) & (at + x.shape[1] <= all_see[1])
    return lax.cond(whole, lambda x: x, mask, x)


def _d_q_kernel(
    q_gmem,
    d_out_gmem,
    log_total_gmem,
    mean_gmem,
    k_gmem,
    v_gmem,
    bias_gmem,
    start_gmem,
    end_gmem,
    blocks_gmem,
    used_gmem,
    stretch_gmem,
    d_q_gmem,
    *,
    q_smem,
    d_out_smem,
    per_row,
    ring,
    q_barrier,
    scale,
    group,
):
    head, block, batch = (lax.axis_index(name) for name in ("head", "block", "batch"))
    block = start_gmem.shape[1] // q_smem.shape[1] // COMPUTING - 1 - block  # The longest walks first.
    warpgroup = lax.axis_index("warpgroup")
    (_, Y, D), (stages, X, _) = q_smem.shape, ring["first"].shape
    first, steps = _tiles_seen(blocks_gmem, batch, block, X)

    @pl.when(warpgroup < COMPUTING)
    def _():
        plgpu.set_max_registers(232, action="increase")
        number = block * COMPUTING + warpgroup
        mine, ready = pl.ds(number * Y, Y), q_barrier.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_gmem.at[batch, mine, head], q_smem.at[warpgroup], ready)
        plgpu.copy_gmem_to_smem(d_out_gmem.at[batch, mine, head], d_out_smem.at[warpgroup], ready)
        for gmem, smem in zip((log_total_gmem, mean_gmem), per_row, strict=True):
            plgpu.copy_gmem_to_smem(gmem.at[batch, head, mine], smem.at[warpgroup], ready)
        start = plgpu.load(start_gmem.at[batch, mine], layout=PER_ROW, optimized=False)
        end = plgpu.load(end_gmem.at[batch, mine], layout=PER_ROW, optimized=False)
        all_see = [blocks_gmem[batch, number, i] for i in (2, 3)]
        stretch = [stretch_gmem[batch, i] for i in (0, 1)]
        plgpu.barrier_wait(ready)
        log_total, mean = (plgpu.load(smem.at[warpgroup], layout=PER_ROW) for smem in per_row)

        def visit(step, d_q):
            slot, at = lax.rem(step, stages), (first + step) * X
            k_tile, v_tile = ring["first"].at[slot], ring["second"].at[slot]
            plgpu.barrier_wait(ring["first_ready"].at[slot])
            plgpu.barrier_wait(ring["second_ready"].at[slot])
            scores, d_weights = tiles.products(
                (q_smem.at[warpgroup], k_tile.transpose((1, 0))),
                (d_out_smem.at[warpgroup], v_tile.transpose((1, 0))),
            )
            plgpu.barrier_arrive(ring["second_free"].at[slot])
            scores *= scale * LOG2E
            if bias_gmem is not None:
                bias = plgpu.load(ring["first_vector"].at[slot], layout=PER_COLUMN)
                scores += tiles.along_columns(bias * LOG2E, scores.shape)
            weights = jnp.exp2(scores - tiles.along_rows(log_total, scores.shape))
            d_scores = weights * (d_weights - tiles.along_rows(mean, scores.shape))
            d_scores = _masked(d_scores, at, start, end, all_see, 0.0)
            _clean(k_tile, used_gmem, batch, at, stretch)
            d_q = tiles.add_product(d_q, d_scores.astype(k_gmem.dtype), k_tile)
            plgpu.barrier_arrive(ring["first_free"].at[slot])
            return d_q

        d_q = lax.fori_loop(0, steps, visit, tiles.full((Y, D), 0, MATRIX))
        q_smem.at[warpgroup][...] = (d_q * scale).astype(d_q_gmem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], d_q_gmem.at[batch, mine, head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == COMPUTING)
    def _():
        _walk_keys(ring, k_gmem, v_gmem, bias_gmem, batch, lax.div(head, group), first, steps)


def _d_kv_kernel(
    k_gmem,
    v_gmem,
    bias_gmem,
    q_gmem,
    d_out_gmem,
    log_total_gmem,
    mean_gmem,
    start_gmem,
    end_gmem,
    blocks_gmem,
    visitors_gmem,
    d_k_gmem,
    d_v_gmem,
    d_bias_gmem,
    *,
    k_smem,
    v_smem,
    kv_barrier,
    bias_smem,
    ring,
    scale,
):
    """Everything is transposed here: keys are the rows, queries the columns."""
    kv_head, block, batch = (lax.axis_index(name) for name in ("head", "block", "batch"))
    warpgroup = lax.axis_index("warpgroup")
    (_, X, D), (stages, Y, _) = k_smem.shape, ring["first"].shape
    first = visitors_gmem[batch, block, 0]
    count = jnp.maximum(visitors_gmem[batch, block, 1] - first, 0)
    group = q_gmem.shape[2] // k_gmem.shape[1]
    steps = group * count

    @pl.when(warpgroup < COMPUTING)
    def _():
        plgpu.set_max_registers(232, action="increase")
        at = (block * COMPUTING + warpgroup) * X
        mine, ready = pl.ds(at, X), kv_barrier.at[warpgroup]
        plgpu.copy_gmem_to_smem(k_gmem.at[batch, kv_head, mine], k_smem.at[warpgroup], ready)
        plgpu.copy_gmem_to_smem(v_gmem.at[batch, kv_head, mine], v_smem.at[warpgroup], ready)
        if bias_gmem is not None:
            plgpu.copy_gmem_to_smem(bias_gmem.at[batch, mine], bias_smem.at[warpgroup], ready)
        plgpu.barrier_wait(ready)
        bias = None if bias_gmem is None else plgpu.load(bias_smem.at[warpgroup], layout=PER_ROW) * LOG2E

        def visit(step, carry):
            d_k, d_v, d_bias = carry
            slot, number = lax.rem(step, stages), first + lax.rem(step, count)
            all_see = [blocks_gmem[batch, number, i] for i in (2, 3)]
            q_tile, d_out_tile = ring["first"].at[slot], ring["second"].at[slot]
            plgpu.barrier_wait(ring["first_ready"].at[slot])
            plgpu.barrier_wait(ring["second_ready"].at[slot])
            scores, d_weights = tiles.products(
                (k_smem.at[warpgroup], q_tile.transpose((1, 0))),
                (v_smem.at[warpgroup], d_out_tile.transpose((1, 0))),
            )
            log_total, mean = (
                plgpu.load(ring[name].at[slot], layout=PER_COLUMN)
                for name in ("first_vector", "second_vector")
            )
            scores *= scale * LOG2E
            if bias is not None:
                scores += tiles.along_rows(bias, scores.shape)
            weights = jnp.exp2(scores - tiles.along_columns(log_total, scores.shape))
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

            whole = (all_see[0] <= at) & (at + X <= all_see[1])
            weights, d_scores = lax.cond(whole, lambda pair: pair, mask, (weights, d_scores))
            if bias is not None:
                d_bias += d_scores.sum(axis=1)
            d_v = tiles.add_product(d_v, weights.astype(q_gmem.dtype), d_out_tile)
            plgpu.barrier_arrive(ring["second_free"].at[slot])
            d_k = tiles.add_product(d_k, d_scores.astype(q_gmem.dtype), q_tile)
            plgpu.barrier_arrive(ring["first_free"].at[slot])
            return d_k, d_v, d_bias

        nothing = tiles.full((X, D), 0, MATRIX)
        no_bias = None if bias is None else tiles.full((X,), 0, PER_ROW)
        d_k, d_v, d_bias = lax.fori_loop(0, steps, visit, (nothing, nothing, no_bias))
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
        def go(step, slot):
            head, number = kv_head * group + lax.div(step, count), first + lax.rem(step, count)
            queries, ready = pl.ds(number * Y, Y), ring[f"{name}_ready"].at[slot]
            plgpu.copy_gmem_to_smem(gmem.at[batch, queries, head], ring[name].at[slot], ready)
            plgpu.copy_gmem_to_smem(
                vector_gmem.at[batch, head, queries], ring[f"{name}_vector"].at[slot], ready
            )

        return go

    @pl.when(warpgroup == COMPUTING)
    def _():
        _walk(ring, steps, fetch(q_gmem, log_total_gmem, "first"), fetch(d_out_gmem, mean_gmem, "second"))


def _pad(x, axis, size):
    """Zeros up to a multiple of `size` along `axis`."""
    more = -x.shape[axis] % size
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])
