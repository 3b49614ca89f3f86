"""FlashAttention-3-style dense self-attention on a fused QKV projection, for the vision encoder.

A persistent, warp-specialised kernel (Shah et al., arXiv 2407.08608). Each thread block takes blocks of
queries of one head one after another. A producer warpgroup issues the TMA copies and runs ahead into the next
block; the consumer warpgroups compute, each on 64 queries. While a tile's scores go through the softmax, the
tensor core computes the previous tile's product of weights and values, and the other warpgroups' tiles. The
warpgroups take turns at issuing products (ping-pong scheduling).

Whole tiles leave a remainder of the keys, which comes first: a tile as small as wgmma allows, moved back to
end with the positions. The keys that it shares with its neighbour are masked, so that only the first tile has
a mask. The last block of queries is moved back too: queries that two blocks share are written twice.

The softmax is not online: a weight is 2^(score - maximum of its row in the first tile), and the maximum is
not updated. float32 and bfloat16 represent weights far above 1, so nothing has to be rescaled, and the
softmax of a tile is short. Where the sum of the weights of a row becomes too large after all, its block is
recomputed with an online softmax after all other blocks of the thread block. (If it is one of two blocks
that share queries, either result may stay; they are rounded differently.)

Lines of 80 numbers don't fill the 128 bytes at which TMA and wgmma are fastest. A head of 80 columns can be
stored in shared memory as 64 columns with a 128-byte swizzle and 16 with a 32-byte swizzle, instead of 80
with a 32-byte swizzle: the TMA then moves 2 pieces per vector, not 5.

Queries and keys may be in float8_e4m3fn, of which wgmma takes twice as many columns at once: 32. Heads of 80
are then padded with 16 columns of zeros in shared memory, which the TMA fills in as out of bounds.

B batch, P positions, H heads, D head, W consumer warpgroups, X keys of a tile, F keys of the first tile
"""

# Pallas types layouts, inline instructions and the references of kernels too narrowly.
# pyright: reportAbstractUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportPrivateImportUsage=false

import dataclasses
import functools

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, DTypeLike, Float

from moss_jax.ops.attention.base import Projection, QuantizedProjection, projection_shape, values_dtype
from moss_jax.ops.mosaic_gpu import tiles
from moss_jax.ops.mosaic_gpu.tiles import LOG2E, MATRIX, NEG_INF, PER_ROW

ROWS = 64  # Queries of a warpgroup: the rows of wgmma's left operand.
SHARED_BYTES = 226 * 1024  # Shared memory of a thread block, without its barriers.
SWIZZLE_ROWS = 8  # Rows of a swizzle atom; numbers of positions are multiples of it.
# Limit of the sums of weights, by the dtype of the values: below it, weights and their products with values
# are far from overflow.
LARGEST_WEIGHT = {"bfloat16": 2.0**96, "float16": 2.0**15}
WGMMA_K = 16  # Keys that a wgmma with values takes at once with a 32-byte swizzle; 64 with one of 128 bytes.

# PTX: whether $1 is set in any thread of the warpgroup, by the named barrier $2.
ANY_THREAD = (
    "{ .reg .pred mine, any; setp.ne.b32 mine, $1, 0; barrier.cta.red.or.pred.aligned any, $2, 128, mine; "
    "selp.b32 $0, 1, 0, any; }"
)

# Registers per consumer thread and per producer thread, by the number of consumers. Their total is what the
# thread block is launched with; requesting more would deadlock.
REGISTERS = {2: (232, 40), 3: (160, 32)}


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """Tiling of a call.

    Attributes:
      warpgroups: consumer warpgroups per thread block, 2 or 3.
      block_kv: keys per tile; a multiple of 64, or of 16 if values of 80 columns are not wide.
      stages: depth of the TMA pipeline: tiles of K and of V in flight, as far as shared memory allows. With
        tiles of 128 keys it allows 4 for heads of up to 80 columns, 2 for 128.
      wide_values: values, like keys, have a 128-byte swizzle for as many columns as fill lines of 128 bytes.
      blocks: maximum number of thread blocks; each takes several blocks of queries one after another.
      largest_weight: a row whose weights sum to more than this is recomputed with an online softmax; None for
        the default of the values' dtype.
    """

    warpgroups: int = 2
    block_kv: int = 128
    stages: int = 4
    wide_values: bool = True
    blocks: int = 132
    largest_weight: float | None = None

    def __post_init__(self):
        if self.warpgroups not in REGISTERS:
            raise ValueError(f"warpgroups is {' or '.join(map(str, REGISTERS))}, not {self.warpgroups}")
        unit = 64 if self.wide_values else 16
        if self.block_kv % unit or not unit <= self.block_kv <= 256:
            raise ValueError(f"block_kv is a multiple of {unit} up to 256, not {self.block_kv}")
        if self.stages < 2 or self.blocks < 1:
            raise ValueError(f"there are 2 stages and 1 block at least, not {self.stages} and {self.blocks}")

    def fitted(self, positions: int, head_dim: int) -> "DenseConfig":
        """Clamps tile sizes to the numbers of queries and keys, and stages to what fits in shared memory."""
        unit = 64 if self.wide_values else 16
        warpgroups = min(self.warpgroups, positions // ROWS)
        block_kv = min(self.block_kv, positions // unit * unit)
        vector = 2 * head_dim  # Bytes in 16 bits; queries and keys in 8 take less.
        stages = (SHARED_BYTES - 2 * warpgroups * ROWS * vector) // (2 * block_kv * vector)
        return dataclasses.replace(
            self, warpgroups=warpgroups, block_kv=block_kv, stages=min(self.stages, max(2, stages))
        )


# For heads of 80 columns, a tenth faster per query if all consumers have work until the end.
THREE_CONSUMERS = DenseConfig(warpgroups=3, block_kv=96, wide_values=False)


def default_config(projection: Projection) -> DenseConfig:
    """The configuration estimated to finish first, by counting blocks."""
    batch, positions, heads, head_dim = projection_shape(projection)

    def time(config: DenseConfig) -> int:
        blocks = batch * heads * pl.cdiv(positions, config.warpgroups * ROWS)
        return pl.cdiv(blocks, config.blocks) * config.warpgroups

    wide = DenseConfig()
    return THREE_CONSUMERS if head_dim == 80 and 0.9 * time(THREE_CONSUMERS) < time(wide) else wide


def unsupported(projection: Projection, out_dtype: jnp.dtype) -> str | None:
    """Why this kernel cannot take the projection, on a capable GPU; None if it can."""
    (_, positions, _, head_dim), dtype = projection_shape(projection), values_dtype(projection)
    least = min(REGISTERS) * ROWS
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {dtype}"
    if isinstance(projection, QuantizedProjection) and projection.qk.dtype != jnp.float8_e4m3fn:
        return f"it takes quantised queries and keys in float8_e4m3fn, not {projection.qk.dtype}"
    if out_dtype not in (dtype, jnp.float8_e4m3fn):
        return f"from {dtype} it makes {dtype} and float8_e4m3fn, not {out_dtype}"
    if head_dim not in (64, 80, 128):
        return f"it takes head_dim 64, 80 and 128, not {head_dim}"
    if positions < least or positions % SWIZZLE_ROWS:
        return f"it takes {least} positions or more, in multiples of {SWIZZLE_ROWS}, not {positions}"
    return None


@functools.partial(jax.jit, static_argnames=("config", "out_dtype"))
def dense_attention(
    projection: Projection, config: DenseConfig, out_dtype: DTypeLike | None = None
) -> Float[Array, "B P H D"]:
    """Computes the op; forward only.

    Args:
      out_dtype: of the results; None for the values' dtype. Results in float8_e4m3fn are rounded, but not
        scaled: the caller divides the values by the scale beforehand.
    """
    (B, P, H, D), dtype = projection_shape(projection), values_dtype(projection)
    out_dtype = jnp.dtype(dtype if out_dtype is None else out_dtype)
    if isinstance(projection, QuantizedProjection):
        # The kernel reads the scale as an array of one number.
        inputs = projection.qk.values, projection.v, projection.qk.scale.reshape(1)
    else:
        inputs = (projection,)
    qk_dtype = inputs[0].dtype
    config = config.fitted(P, D)
    W, X, stages = config.warpgroups, config.block_kv, config.stages
    blocks = min(B * H * pl.cdiv(P, W * ROWS), config.blocks)
    k_parts, v_parts = _parts(D, qk_dtype), _parts(D, dtype, config.wide_values)
    layouts = _buffer, _buffer if _first(P, X) % 64 == 0 else _swizzle32_buffer
    # Lines of 80 bytes cannot be swizzled, but stores to them have no bank conflicts.
    out_buffer = tiles.tile if D * out_dtype.itemsize % 32 == 0 else plgpu.SMEM

    def barrier(arrivals, count):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    def kernel(*refs, **scratch):
        *inputs, out_gmem = refs
        _kernel(inputs, out_gmem, config=config, stride=blocks, **scratch)

    return plgpu.kernel(
        kernel,
        kernel_name="dense_attention",
        out_type=jax.ShapeDtypeStruct((B, P, H, D), out_dtype),
        scratch_types={
            "q_smem": [_buffer((W, ROWS), part, D, qk_dtype) for part in k_parts],
            "k_smem": [_buffer((stages, X), part, D, qk_dtype) for part in k_parts],
            # The same memory in two layouts: that of the first tile, and that of all others.
            "v_smem": plgpu.RefUnion(
                *([buffer((stages, X), part, D, dtype) for part in v_parts] for buffer in layouts)
            ),
            "out_smem": out_buffer((W, ROWS, D), out_dtype),
            # One arrival per TMA copy, or per warpgroup.
            "q_ready": barrier(len(k_parts), W),
            "k_ready": barrier(len(k_parts), stages),
            "v_ready": barrier(len(v_parts), stages),
            "q_free": barrier(1, W),
            "k_free": barrier(W, stages),
            "v_free": barrier(W, stages),
            "turn": barrier(1, W),
            # Whether each block must be recomputed, per warpgroup, and a barrier for when all flags are set.
            "flags": plgpu.SMEM((pl.cdiv(B * H * pl.cdiv(P, W * ROWS), blocks), W), jnp.int32),
            "written": barrier(W, 1),
        },
        grid=(blocks,),
        grid_names=("block",),
        num_threads=W + 1,
        thread_name="warpgroup",
        # `_kernel` explains why its own barriers suffice.
        compiler_params=dataclasses.replace(tiles.COMPILER_PARAMS, unsafe_no_auto_barriers=True),
    )(*inputs)


def _parts(head_dim: int, dtype: jnp.dtype, wide: bool = True) -> list[tuple[int, int]]:
    """(first column, columns) of the pieces that vectors are stored in, in shared memory."""
    weights16 = head_dim % 64
    if not (wide and weights16):
        return [(0, head_dim)]
    # In 8 bits wgmma takes 32 columns at once: those behind the head are zeros.
    return [(0, head_dim - weights16), (head_dim - weights16, 32 if dtype.itemsize == 1 else weights16)]


def _first(positions: int, block_kv: int) -> int:
    """Keys in the first tile: the remainder, rounded up to a multiple of `WGMMA_K`; never 0."""
    missing = -positions % block_kv
    return block_kv - missing // WGMMA_K * WGMMA_K


def _buffer(shape, part, head_dim, dtype):
    """Shared memory for `shape` = (stages, vectors) of a piece's columns.

    A piece of a head of 80 columns must be one line, row-major, since the TMA cannot tile the head by 64
    columns. `_tma_view` is that memory as the TMA takes it, `_wgmma_view` as wgmma does.
    """
    stages, vectors = shape
    width = part[1]
    if width == head_dim:
        return tiles.tile((stages, vectors, width), dtype)
    swizzle = plgpu.SwizzleTransform(width * jnp.dtype(dtype).itemsize)
    return plgpu.SMEM((stages, vectors // 8, 1, 8, width), dtype, transforms=(swizzle,))


def _swizzle32_buffer(shape, part, head_dim, dtype):
    """As much memory as `_buffer`, with a 32-byte swizzle: tiles may have any multiple of `WGMMA_K` keys."""
    columns = 32 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(32))
    return plgpu.SMEM((*shape, part[1]), dtype, transforms=transforms)


def _stage(buffer, stage, vectors):
    """The first `vectors` of a stage."""
    return buffer.at[stage, : vectors // 8 if len(buffer.shape) == 5 else vectors]


def _tma_view(buffer):
    """A stage of `_buffer` as [vectors, columns] for the TMA."""
    return buffer.reshape(buffer.shape[0] * 8, buffer.shape[-1]) if len(buffer.shape) == 4 else buffer


def _wgmma_view(buffer):
    """A stage of `_buffer` as [vectors, columns] for wgmma."""
    if len(buffer.shape) == 2:
        return buffer
    tiling = plgpu.TilingTransform((8, buffer.shape[-1]))
    return dataclasses.replace(buffer, transforms=(*buffer.transforms, tiling.undo(None)))


def _kernel(
    inputs,
    out_gmem,
    *,
    q_smem,
    k_smem,
    v_smem,
    out_smem,
    q_ready,
    k_ready,
    v_ready,
    q_free,
    k_free,
    v_free,
    turn,
    flags,
    written,
    config,
    stride,
):
    """Computes the blocks of queries `block`, `block + stride`, and so on.

    No automatic barriers: tiles of Q, K and V are written by TMA copies alone, after every consumer has
    arrived at the barrier that says they are free, and read by wgmma alone. Only `out_smem` is written by
    threads: after the wait for the last copy out of it, which is a barrier of the warpgroup, and before
    `commit_smem`, which is another, and the next copy.

    The ping-pong barriers pass a turn round the consumers: it can be passed to a warpgroup a second time only
    after all threads of it have awaited it the first time. Its holder waits for a tile of V at most, and the
    stage of that tile was freed before any consumer had the previous turn: with 2 stages or more there is no
    deadlock.
    """
    warpgroup = lax.axis_index("warpgroup")
    quantized = len(inputs) > 1
    (B, P, H, D), dtype = out_gmem.shape, inputs[1 if quantized else 0].dtype
    W, X, stages = config.warpgroups, config.block_kv, config.stages
    F = _first(P, X)
    v_smem, v_first = v_smem
    largest_weight = LARGEST_WEIGHT[str(dtype)] if config.largest_weight is None else config.largest_weight
    # Blocks of queries of a head are neighbours, so that they find its keys in L2.
    blocks, steps = pl.cdiv(P, W * ROWS), pl.cdiv(P, X)
    first = lax.axis_index("block")
    rounds = pl.cdiv(B * H * blocks - first, stride)

    def block_origin(number):
        """Batch row, head, and the first query of a block."""
        number = first + number * stride
        pair, block = lax.div(number, blocks), lax.rem(number, blocks)
        at = pl.multiple_of(jnp.minimum(block * (W * ROWS), P - W * ROWS), SWIZZLE_ROWS)
        return lax.div(pair, H), lax.rem(pair, H), at

    def vectors_of(which, batch, positions, head, columns):
        """Vectors of q (0), k (1) or v (2)."""
        if not quantized:
            return inputs[0].at[batch, positions, which, head, columns]
        qk, v, _ = inputs
        return (
            v.at[batch, positions, head, columns]
            if which == 2
            else qk.at[batch, positions, which, head, columns]
        )

    def fetch(which, batch, head, at, buffers, barrier):
        """Issues the copies of the vectors from `at` on of q (0), k (1) or v (2)."""
        column = 0
        for buffer in map(_tma_view, buffers):
            vectors, width = buffer.shape
            # Out of bounds, the TMA writes zeros. Pallas rejects a slice that is statically out of bounds.
            first = column if column + width <= D else lax.optimization_barrier(jnp.int32(column))
            columns = pl.ds(first, width)
            plgpu.copy_gmem_to_smem(
                vectors_of(which, batch, pl.ds(at, vectors), head, columns), buffer, barrier
            )
            column += width

    def for_each_flagged(process):
        """Recomputes the blocks that a consumer has flagged, with an online softmax."""
        plgpu.barrier_wait(written)

        def recompute_if_flagged(number, before):
            needed = sum(flags[number, i] for i in range(W)) > 0
            pl.when(needed)(lambda: process(number, before))
            return before + needed.astype(jnp.int32)

        lax.fori_loop(0, rounds, recompute_if_flagged, rounds)

    @pl.when(warpgroup == W)
    def _():
        plgpu.set_max_registers(REGISTERS[W][1], action="decrease")

        def process(number, before):
            """The producer: fetches a block; `before` blocks have been processed."""
            batch, head, at = block_origin(number)

            def queries(i):
                pl.when(before > 0)(lambda: plgpu.barrier_wait(q_free.at[i]))
                fetch(0, batch, head, at + i * ROWS, [buffer.at[i] for buffer in q_smem], q_ready.at[i])

            def tile(step, at, vectors, v_smem):
                tiles_before = before * steps + step
                stage = lax.rem(tiles_before, stages)
                for which, buffers, ready, free in (
                    (1, k_smem, k_ready, k_free),
                    (2, v_smem, v_ready, v_free),
                ):
                    pl.when(tiles_before >= stages)(lambda free=free: plgpu.barrier_wait(free.at[stage]))
                    buffers = [_stage(buffer, stage, vectors) for buffer in buffers]
                    fetch(which, batch, head, at, buffers, ready.at[stage])

            for i in range(W):
                queries(i)
            tile(0, P - F, F, v_first)
            lax.fori_loop(
                1, steps, lambda i, _: tile(i, pl.multiple_of((i - 1) * X, SWIZZLE_ROWS), X, v_smem), None
            )

        lax.fori_loop(0, rounds, lambda number, _: process(number, number), None)
        for_each_flagged(process)

    @pl.when(warpgroup < W)
    def _():
        plgpu.set_max_registers(REGISTERS[W][0], action="increase")
        pl.when(warpgroup == W - 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
        q = [_wgmma_view(buffer.at[warpgroup]) for buffer in q_smem]
        scale = D**-0.5 * LOG2E
        if quantized:
            scale *= inputs[2][0]

        def keys(stage, vectors=X):
            return [_wgmma_view(_stage(buffer, stage, vectors)).transpose((1, 0)) for buffer in k_smem]

        def values(stage):
            return [_wgmma_view(_stage(buffer, stage, X)) for buffer in v_smem]

        def first_values(stage):
            return [_wgmma_view(_stage(buffer, stage, F)) for buffer in v_first]

        def await_turn():
            plgpu.barrier_wait(turn.at[warpgroup])

        def pass_turn():
            plgpu.barrier_arrive(turn.at[lax.rem(warpgroup + 1, W)])

        def weights_of(scores, row_max):
            """Weights and their sum."""
            weights = jnp.exp2(scores * scale - tiles.along_rows(row_max, scores.shape))
            return weights, weights.sum(axis=1)

        def online_softmax(scores, row_max):
            """Weights, their sum, the new maximum, and the factor that rescales the old weights."""
            new_max = jnp.maximum(row_max, scores.max(axis=1) * scale)
            return *weights_of(scores, new_max), new_max, jnp.exp2(row_max - new_max)

        def block(number, before, online=False):
            """A consumer: computes a block, with an online softmax or the maximum of the first tile."""
            batch, head, at = block_origin(number)
            start = before * steps

            # The first tile, moved back: keys that it shares with whole tiles are masked.
            stage = lax.rem(start, stages)
            plgpu.barrier_wait(q_ready.at[warpgroup])
            plgpu.barrier_wait(k_ready.at[stage])
            await_turn()
            scores = product(q, keys(stage, F), pass_turn)
            plgpu.barrier_arrive(k_free.at[stage])
            if shared_keys := F + (steps - 1) * X - P:
                # One number per key: finding the column of every score would take divisions by F.
                column = plgpu.broadcasted_iota(jnp.int32, (F,), 0, layout=tiles.PER_COLUMN)
                scores = jnp.where(tiles.along_columns(column, scores.shape) >= shared_keys, scores, NEG_INF)
            weights, row_sum, row_max, _ = online_softmax(scores, tiles.full((ROWS,), NEG_INF, PER_ROW))
            out = tuple(tiles.full((ROWS, tile.shape[1]), 0, MATRIX) for tile in values(stage))

            def wait_for_keys(step):
                stage = lax.rem(start + step, stages)
                pl.when(step < steps)(lambda: plgpu.barrier_wait(k_ready.at[stage]))

            def attend_tile(step, carry, values=values):
                """Scores of a tile, and the previous tile's product of weights and values."""
                out, weights16, row_max, row_sum = carry
                stage, before = lax.rem(start + step, stages), lax.rem(start + step - 1, stages)
                await_turn()

                def between():
                    plgpu.barrier_wait(v_ready.at[before])

                def consume(scores):
                    plgpu.barrier_arrive(k_free.at[stage])
                    result = online_softmax(scores, row_max) if online else weights_of(scores, row_max)
                    result = lax.optimization_barrier(result)
                    # In a branch: otherwise the compiler waits for the second product before the softmax.
                    wait_for_keys(step + 1)
                    return result

                out, (weights, tile_sum, *rescaling) = products(
                    (q, keys(stage)),
                    (out, weights16, values(before)),
                    between,
                    pass_turn,
                    consume,
                    3 if online else 1,
                )
                plgpu.barrier_arrive(v_free.at[before])
                if rescaling:
                    row_max, rescale = rescaling
                    out = tuple(x * tiles.along_rows(rescale, x.shape) for x in out)
                    row_sum *= rescale
                return out, weights.astype(dtype), row_max, row_sum + tile_sum

            wait_for_keys(1)
            carry = out, weights.astype(dtype), row_max, row_sum
            if steps > 1:
                carry = attend_tile(1, carry, first_values)
            out, weights16, _, row_sum = lax.fori_loop(2, steps, attend_tile, carry)
            plgpu.barrier_arrive(q_free.at[warpgroup])

            stage = lax.rem(start + steps - 1, stages)
            plgpu.barrier_wait(v_ready.at[stage])
            last_values = values if steps > 1 else first_values
            out = add_products(out, weights16, last_values(stage))
            plgpu.barrier_arrive(v_free.at[stage])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            inverse = 1 / row_sum
            column = 0
            for x in out:
                columns_smem = out_smem.at[warpgroup, :, pl.ds(column, x.shape[1])]
                columns_smem[...] = (x * tiles.along_rows(inverse, x.shape)).astype(out_smem.dtype)
                column += x.shape[1]
            plgpu.commit_smem()
            rows = pl.ds(pl.multiple_of(at + warpgroup * ROWS, SWIZZLE_ROWS), ROWS)
            plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], out_gmem.at[batch, rows, head])
            if not online:
                flags[number, warpgroup] = any_thread(jnp.where(row_sum < largest_weight, 0, 1))

        lax.fori_loop(0, rounds, lambda number, _: block(number, number), None)
        # Recomputed results overwrite the first ones.
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(written)
        for_each_flagged(functools.partial(block, online=True))
        plgpu.wait_smem_to_gmem(0)


def product(a, b, overlapped):
    """Sum of the pieces' products a @ b; `overlapped` is called once they have been issued."""

    def multiply(acc):
        for x, y in zip(a, b, strict=True):
            plgpu.wgmma(acc, x, y)
        overlapped()
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((a[0].shape[0], b[0].shape[1]), jnp.float32))


def add_products(accs_in, a, b):
    """acc + a @ b for each acc and b."""

    def multiply(accs):
        for acc, y in zip(accs, b, strict=True):
            plgpu.wgmma(acc, a, y)

    return pl.run_state(multiply)(tuple(map(plgpu.ACC.init, accs_in)))


def products(first, second, between, overlapped, consume, vectors):
    """`consume(product(*first))`, overlapped with `add_products(*second)`.

    Args:
      between: called after the first product has been issued.
      overlapped: called after both have been issued.
      consume: returns a matrix and `vectors` vectors of one number a row; does not wait for the second.
    """
    (a, b), (accs_in, c, d) = first, second
    shape = a[0].shape[0], b[0].shape[1]

    def multiply(refs):
        acc, accs, consumed = refs
        for x, y in zip(a, b, strict=True):
            plgpu.wgmma(acc, x, y)
        between()
        for ref, y in zip(accs, d, strict=True):
            plgpu.wgmma(ref, c, y)
        overlapped()
        scores = plgpu.wgmma_accumulator_load(acc, wait_n=len(d))
        for ref, x in zip(consumed, consume(scores), strict=True):
            ref[...] = x

    zeros = tiles.full(shape, 0, MATRIX)
    rows = (tiles.full(shape[:1], 0, PER_ROW),) * vectors
    initial = plgpu.ACC.init(zeros), tuple(map(plgpu.ACC.init, accs_in)), (zeros, *rows)
    _, accs_out, consumed = pl.run_state(multiply)(initial)
    return accs_out, consumed


def any_thread(flags):
    """Whether any of a warpgroup's flags, one per row, is 1; as 1 or 0."""

    @plgpu.inline_mgpu(
        arg_types=(PER_ROW,),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())),
    )
    def any_flag(_, flags):
        i32 = ir.IntegerType.get_signless(32)
        mine = functools.reduce(arith.ori, (mgpu.utils.bitcast(x, i32) for x in flags.registers.flat))
        found = llvm.inline_asm(
            i32,
            [mine, mgpu.utils.warpgroup_barrier_idx(sync=False)],
            ANY_THREAD,
            "=r,r,r,~{memory}",
            has_side_effects=True,
        )
        return mgpu.FragmentedArray.splat(found, shape=(), is_signed=True)

    return any_flag(flags)
