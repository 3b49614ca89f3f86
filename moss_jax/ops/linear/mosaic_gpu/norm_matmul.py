"""RMSNorm-prologue W8A16 GEMM of up to 8 rows, one kernel in Pallas for NVIDIA's Hopper GPUs (Mosaic GPU).

It is bound by reading the weights, once; what can be saved is the overhead before and after: other launches,
and the round trip of split-K sums through memory. So thread blocks are independent of each other. Each takes
units of 16 outputs over all inputs, and normalises x for itself while the first of its weights are in flight.

A unit's inputs are split into quarters, one for each warp, whose sums are reduced in shared memory. So the
weights are viewed as [4 N, K / 4], of which 64 rows are 16 outputs, in one copy. The norm's factor, one
number per row, is applied in the epilogue, with the scale.

M rows, K inputs, N outputs, X inputs of a tile in each quarter
"""

# Pallas types layouts, inline instructions and the references of kernels too narrowly.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false
# pyright: reportPrivateImportUsage=false

import dataclasses
import functools

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref
from jaxtyping import Array, Float, Shaped

from moss_jax.ops.linear.base import NormArguments
from moss_jax.ops.mosaic_gpu import hopper, skinny_matmul, tiles
from moss_jax.ops.mosaic_gpu.skinny_matmul import (
    INTERLEAVED,
    STRIDED,
    THREADS,
    TILE,
    C,
    multiprocessors,
    piece,
    strided,
)
from moss_jax.ops.mosaic_gpu.tiles import MATRIX

QUARTERS = 4
OUTPUTS = TILE // QUARTERS  # Per unit.


@dataclasses.dataclass(frozen=True)
class Config:
    """Distribution of the weights over thread blocks.

    Attributes:
      multiprocessors: of the GPU.
      each: thread blocks per multiprocessor.
      block_k: inputs per tile, in each quarter.
      stages: tiles in flight per block.
    """

    multiprocessors: int
    each: int
    block_k: int
    stages: int

    @property
    def blocks(self) -> int:
        """Maximum number of thread blocks; every block has a unit."""
        return self.multiprocessors * self.each


def unsupported(arguments: NormArguments, platform: str) -> str | None:
    """Why this kernel cannot take the arguments; None if it can."""
    if reason := hopper.unsupported(platform):
        return reason
    a, x = arguments, arguments.residual.x
    if a.weights.scheme != "W8A16":
        return f"it takes weights in 8 bits for inputs in 16 (W8A16), not {a.weights.scheme}"
    if a.norm.bias is not None or a.weights.bias is not None or a.gelu:
        return "it takes RMS norms, and has no bias or GELU in its epilogue"
    if x.dtype != jnp.bfloat16 or a.out_dtype != jnp.bfloat16:
        return f"it takes and gives bfloat16, not {x.dtype} and {a.out_dtype}"
    rows, K, N = a.shape
    if not 0 < rows <= C:
        return f"it takes 1 to {C} rows, not {rows}"
    if K % (QUARTERS * 128) or K == 0:
        return f"K = {K} is not a multiple of {QUARTERS * 128}"
    if N % OUTPUTS or N == 0:
        return f"N = {N} is not a multiple of {OUTPUTS}"
    try:
        default_config(rows, K)
    except ValueError as error:
        return str(error)
    return None


def apply(a: NormArguments, config: Config | None = None) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Computes the op; forward only."""
    x, linear = a.residual.sum(), a.linear(a.residual.x)
    rows, K, _ = a.shape
    y = few_rows(
        x.reshape(rows, K),
        a.norm.weight,
        linear.matrix,
        linear.scale,
        a.norm.eps,
        config or default_config(rows, K),
    )
    return linear.unflatten(y), x


def default_config(rows: int, K: int) -> Config:
    """As many blocks per multiprocessor as fit with x and two tiles each; the rest goes to more tiles.

    Raises:
      ValueError: shared memory is too small.
    """
    for each, block_k in ((3, 256), (2, 128), (1, 128)):
        if K // QUARTERS % block_k:
            block_k = 128
        room = skinny_matmul.shared_room(each) - shared(rows, K, block_k, stages=0)
        stages = room // (TILE * block_k + 8)  # Each with a barrier.
        if stages >= 2:
            return Config(multiprocessors(), each, block_k, stages)
    raise ValueError(f"{rows} rows of {K} don't fit in shared memory")


def shared(rows: int, K: int, block_k: int, stages: int) -> int:
    """Shared memory of a block in bytes."""
    x, ring, sums = rows * skinny_matmul.pitch(rows, K) * 2, stages * TILE * block_k, TILE * columns(rows) * 4
    return skinny_matmul.shared_bytes(x, ring, sums, barriers=stages)


def columns(rows: int) -> int:
    """Number of columns of the sums that are kept: those that a thread has of a row, or all."""
    return 2 if rows <= 2 else C


@functools.partial(jax.jit, static_argnames=("eps", "config"))
def few_rows(
    x: Float[Array, "M K"],
    norm: Float[Array, " K"],
    weights: Shaped[Array, "N K"],
    scale: Float[Array, " N"],
    eps: float,
    config: Config,
) -> Float[Array, "M N"]:
    """Computes `rmsnorm(x) * norm @ weights.T * scale` for M <= 8; forward only.

    Jitted, so that a model's layers, which call it with the same shapes, trace and lower it once.
    """
    (rows, K), N = x.shape, len(weights)
    if K % (QUARTERS * config.block_k):
        raise ValueError(f"K = {K} does not fall into quarters of tiles of {config.block_k}")
    size, room = shared(rows, K, config.block_k, config.stages), skinny_matmul.shared_room(config.each)
    if size > room:
        raise ValueError(
            f"a block takes {size} bytes of shared memory, and as one of {config.each} it has {room}"
        )
    return plgpu.kernel(
        functools.partial(_kernel, eps=eps, config=config),
        kernel_name="norm_matmul",
        out_type=jax.ShapeDtypeStruct((rows, N), x.dtype),
        scratch_types={
            "x_smem": plgpu.SMEM((rows, skinny_matmul.pitch(rows, K)), jnp.bfloat16),
            "ring_smem": tiles.tile((config.stages, TILE, config.block_k), weights.dtype),
            "sums_smem": plgpu.SMEM((TILE, columns(rows)), jnp.float32),
            "barrier": plgpu.Barrier(num_barriers=config.stages),
        },
        grid=(min(N // OUTPUTS, config.blocks),),
        grid_names=("block",),
        compiler_params=skinny_matmul.COMPILER_PARAMS,
    )(x, norm, weights.reshape(N * QUARTERS, K // QUARTERS), scale)


def _kernel(
    x_gmem, norm_gmem, weights_gmem, scale_gmem, y_gmem, *, x_smem, ring_smem, sums_smem, barrier, eps, config
):
    """Body of one thread block.

    No automatic barriers: `commit_smem` is a barrier of the warpgroup. One lies between the writes to
    `x_smem` and the products. A visit to a tile has one, if a slot is ever refilled: before it, all threads
    have read the tile into registers; after it, its slot is filled. `finish` has one, between the writes to
    `sums_smem` and the reads; the barriers of the next unit's visits precede its writes.
    """
    (rows, K), units = x_gmem.shape, y_gmem.shape[1] // OUTPUTS
    X, stages, cols = config.block_k, config.stages, columns(rows)
    count, blocks = K // QUARTERS // X, min(units, config.blocks)  # Tiles of a unit, thread blocks.
    place = lax.axis_index("block")
    if units > blocks:
        # Blocks adjacent in the order of units share a multiprocessor, so that blocks with one unit more than
        # others are spread evenly over multiprocessors.
        place = lax.rem(place, config.multiprocessors) * config.each + lax.div(place, config.multiprocessors)
    first = lax.div(place * units, blocks)
    mine = lax.div((place + 1) * units, blocks) - first
    end = mine * count

    def fetch(step):
        ring = lax.rem(step, stages)
        source = weights_gmem.at[piece(first + lax.div(step, count), TILE), piece(lax.rem(step, count), X)]
        plgpu.copy_gmem_to_smem(source, ring_smem.at[ring], barrier.at[ring])

    for i in range(stages):
        pl.when(i < end)(functools.partial(fetch, jnp.int32(i)))

    # All loads are issued before any is used, in runs of 16 bytes.
    xs, norm = [strided(x_gmem.at[m], 8) for m in range(rows)], strided(norm_gmem, 8)
    row, factor = lax.rem(skinny_matmul.threads(), cols), tiles.full((THREADS,), 0, STRIDED)
    for m, x in enumerate(xs):
        x_smem[m, pl.ds(0, K)] = (x * norm).astype(x_smem.dtype)
        factor = jnp.where(row == m, lax.rsqrt((x * x).sum() / K + eps), factor)
        # Also separates the uses of scratch memory by two sums.
        plgpu.commit_smem()

    def visit(step, tile, sums):
        ring = lax.rem(step, stages)
        plgpu.barrier_wait(barrier.at[ring])
        weights = skinny_matmul.load(ring_smem.at[ring], INTERLEAVED)
        if count > stages or units > blocks:
            plgpu.commit_smem()
            pl.when(step + stages < end)(functools.partial(fetch, step + stages))
        return skinny_matmul.multiply(sums, weights, x_smem, tile * X, INTERLEAVED, apart=K // QUARTERS)

    def unit(i, _):
        at = piece(first + i, OUTPUTS)
        # Loaded before the weights are awaited.
        scaled = scaled_factor(factor, scale_gmem.at[at], cols)
        sums = tiles.full((TILE, C), 0, MATRIX)
        if count <= 4:
            for tile in range(count):
                sums = visit(i * count + tile, tile, sums)
        else:
            sums = lax.fori_loop(0, count, lambda tile, sums: visit(i * count + tile, tile, sums), sums)
        finish(sums, sums_smem, scaled, y_gmem.at[:, at])

    if units > blocks:
        lax.fori_loop(0, mine, unit, None)
    else:
        unit(jnp.int32(0), None)


def scaled_factor(factor, scale_ref, cols: int):
    """Returns [128]: the factor of thread t times the scale of output t // cols of a unit."""

    @plgpu.inline_mgpu(
        arg_types=(STRIDED, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(factor.shape, factor.dtype, layout=STRIDED),
    )
    def multiply(_, factor, scale_ref):
        def scaled(value, at):
            output = arith.minui(arith.divui(*at, _index(cols)), _index(OUTPUTS - 1))
            return arith.mulf(value, memref.load(scale_ref, [output]))

        return factor.foreach(scaled, create_array=True)

    return multiply(factor, scale_ref)


def finish(sums, sums_ref, factor, y_ref):
    """Reduces the sums of all warps and scales them; thread t has output t // cols of row t % cols."""

    @plgpu.inline_mgpu(arg_types=(MATRIX, plgpu.RefType(), STRIDED, plgpu.RefType()))
    def store(_, sums, sums_ref, factor, y_ref):
        rows, cols = y_ref.type.shape[0], sums_ref.type.shape[1]

        def keep(value, at):
            with mgpu.utils.when(_less(at[1], cols)):
                memref.store(value, sums_ref, at)

        def add(factor, at):
            row, output = arith.remui(*at, _index(cols)), arith.divui(*at, _index(cols))
            with mgpu.utils.when(arith.andi(_less(row, rows), _less(output, OUTPUTS))):
                places = [arith.addi(output, _index(warp * OUTPUTS)) for warp in range(QUARTERS)]
                total, *others = [memref.load(sums_ref, [place, row]) for place in places]
                for other in others:
                    total = arith.addf(total, other)
                y = arith.truncf(y_ref.type.element_type, arith.mulf(total, factor))
                memref.store(y, y_ref, [row, output])

        sums.foreach(keep)
        mgpu.utils.warpgroup_barrier()
        factor.foreach(add)

    store(sums, sums_ref, factor, y_ref)


def _index(value: int):
    return mgpu.utils.c(value, ir.IndexType.get())


def _less(value, than: int):
    return arith.cmpi(arith.CmpIPredicate.ult, value, _index(than))
