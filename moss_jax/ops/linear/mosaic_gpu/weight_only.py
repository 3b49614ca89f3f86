"""Weight-only (W8A16) split-K GEMM of few rows in Pallas for NVIDIA's Hopper GPUs (Mosaic GPU).

It is bound by reading the weights, once. Each thread block walks over tiles of outputs along one split of the
inputs, with TMA copies of the next tiles in flight; XLA adds up the splits. For more than 8 rows the sums of
the splits become too large; `weight_only_gemm` is faster then.

The operands are swapped, as in decode attention over 8 bits: weights are the 64 rows that the tensor core
takes, and x the columns, of which it takes no fewer than 8. Weights go from shared memory through registers,
where they are upcast, straight into the tensor core.

Everything is multiplied in bfloat16, which represents every int8 and float8_e4m3fn exactly. So x needs no
scale, and no pass over x precedes the kernel.

M rows, K inputs, X inputs of a tile, N outputs, R outputs of a tile
"""

# Pallas types layouts, inline instructions and the references of kernels too narrowly.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false
# pyright: reportPrivateImportUsage=false

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Shaped

from moss_jax.ops.linear.base import Arguments
from moss_jax.ops.mosaic_gpu import hopper, tiles, upcast
from moss_jax.ops.mosaic_gpu.tiles import MATRIX

ROWS = 8  # Maximum rows of x: columns of the tensor core.
OUTPUTS = 64  # Per tile: the rows that the tensor core takes.


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiling of a call.

    Attributes:
      block_k: inputs per tile.
      stages: tiles in flight per thread block.
      part: maximum inputs per split; those of x are kept in shared memory.
      blocks: maximum number of thread blocks, unless K has more splits.
    """

    block_k: int = 128
    stages: int = 8
    part: int = 1024
    blocks: int = 264

    def __post_init__(self):
        if self.block_k % 64 or self.block_k < 64:
            raise ValueError(f"block_k is a multiple of 64, not {self.block_k}")
        if self.part < self.block_k:
            raise ValueError(f"part is at least block_k, {self.block_k}, not {self.part}")
        if self.stages < 1 or self.blocks < 1:
            raise ValueError(f"stages and blocks are at least 1, not {self.stages} and {self.blocks}")

    def splits(self, inputs: int) -> int:
        """Number of splits of K: the fewest equal ones made of whole tiles."""
        count = inputs // self.block_k
        return next(n for n in range(1, count + 1) if count % n == 0 and inputs // n <= self.part)

    def tiles_a_block(self, inputs: int, outputs: int) -> int:
        """Number of tiles of outputs per thread block."""
        return pl.cdiv(outputs // OUTPUTS, max(1, self.blocks // self.splits(inputs)))


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """Why this kernel cannot take the arguments; None if it can."""
    if reason := hopper.unsupported(platform) or unsupported_scheme(arguments):
        return reason
    rows, K, N = arguments.shape
    if not 0 < rows <= ROWS:
        return f"it takes 1 to {ROWS} rows, not {rows}"
    if K % 128 or K == 0:
        return f"K = {K} is not a multiple of 128"
    if N % OUTPUTS or N == 0:
        return f"N = {N} is not a multiple of {OUTPUTS}"
    return None


def unsupported_scheme(a: Arguments) -> str | None:
    """Why kernels for 8-bit weights cannot take the arguments, regardless of shapes; None if they can."""
    x = a.x
    if a.weights.scheme != "W8A16":
        return f"it takes weights in 8 bits for inputs in 16 (W8A16), not {a.weights.scheme}"
    if x.dtype != jnp.bfloat16:
        return f"it takes x in bfloat16, not {x.dtype}"
    if a.gelu or a.weights.bias is not None or a.residual is not None:
        return "it has no epilogue"
    return None


def apply(a: Arguments, config: Config | None = None) -> Float[Array, "..."]:
    """Computes the op; forward only."""
    rows, K, _ = a.shape
    assert isinstance(a.x, Array)
    return a.unflatten(few_rows(a.x.reshape(rows, K), a.matrix, a.scale, config or Config(), a.out_dtype))


@functools.partial(jax.jit, static_argnames=("config", "out_dtype"))
def few_rows(
    x: Float[Array, "M K"],
    weights: Shaped[Array, "N K"],
    scale: Float[Array, " N"],
    config: Config,
    out_dtype: DTypeLike,
) -> Float[Array, "M N"]:
    """Computes `x @ weights.T * scale` for M <= 8; forward only.

    Jitted, so that a model's layers, which call it with the same shapes, trace and lower it once.
    """
    (rows, inputs), outputs = x.shape, len(weights)
    X = config.block_k
    if inputs % X:
        raise ValueError(f"K = {inputs} is not a multiple of block_k, {X}")
    splits, each = config.splits(inputs), config.tiles_a_block(inputs, outputs)
    x = upcast.permute_columns(jnp.pad(x, ((0, ROWS - rows), (0, 0))))
    sums = plgpu.kernel(
        functools.partial(_kernel, each=each),
        kernel_name="weight_only",
        out_type=jax.ShapeDtypeStruct((splits, 1 if rows == 1 else ROWS, outputs), jnp.float32),
        scratch_types={
            "x_smem": tiles.tile((inputs // splits // X, ROWS, X), x.dtype),
            "kernel_smem": tiles.tile((config.stages, OUTPUTS, X), weights.dtype),
            "barriers": (
                # One arrival per copy.
                plgpu.Barrier(num_arrivals=inputs // splits // X),
                plgpu.Barrier(num_barriers=config.stages),
            ),
        },
        grid=(splits, pl.cdiv(outputs // OUTPUTS, each)),
        grid_names=("split", "block"),
        # Pallas would put two barriers around every store and one before every copy; `_kernel` documents why
        # its own suffice.
        compiler_params=dataclasses.replace(tiles.COMPILER_PARAMS, unsafe_no_auto_barriers=True),
    )(x, weights)
    return (sums[:, :rows].sum(axis=0) * scale).astype(out_dtype)


def _kernel(x_gmem, kernel_gmem, sums_gmem, *, x_smem, kernel_smem, barriers, each):
    """Computes some tiles of outputs over one split of the inputs.

    No automatic barriers: `commit_smem` is a barrier of the warpgroup, and a visit to a tile has one. Before
    it, all threads have read the tile into registers; after it, the tile's slot is refilled. Only copies
    write to shared memory, and x's is never refilled.
    """
    split, block = lax.axis_index("split"), lax.axis_index("block")
    x_barrier, kernel_barrier = barriers
    stages = kernel_smem.shape[0]
    parts, _, X = x_smem.shape
    outputs = sums_gmem.shape[-1]

    first = block * each
    count = jnp.minimum(each, outputs // OUTPUTS - first)
    steps = count * parts

    def place(tile):
        return pl.ds(pl.multiple_of((first + tile) * OUTPUTS, OUTPUTS), OUTPUTS)

    def inputs(part):
        return pl.ds(pl.multiple_of((split * parts + part) * X, X), X)

    def fetch(step):
        ring = lax.rem(step, stages)
        at = kernel_gmem.at[place(lax.div(step, parts)), inputs(lax.rem(step, parts))]
        plgpu.copy_gmem_to_smem(at, kernel_smem.at[ring], kernel_barrier.at[ring])

    for step in range(stages):
        pl.when(step < steps)(functools.partial(fetch, jnp.int32(step)))
    for part in range(parts):
        plgpu.copy_gmem_to_smem(x_gmem.at[:, inputs(part)], x_smem.at[part], x_barrier)
    plgpu.barrier_wait(x_barrier)

    def visit(tile, part, sums):
        step = tile * parts + part
        ring = lax.rem(step, stages)
        plgpu.barrier_wait(kernel_barrier.at[ring])
        kernel = upcast.to_bfloat16(kernel_smem.at[ring])
        plgpu.commit_smem()
        pl.when(step + stages < steps)(functools.partial(fetch, step + stages))
        return sums + tiles.product(kernel, x_smem.at[part].transpose((1, 0)))

    def compute(tile, _):
        nothing = tiles.full((OUTPUTS, x_gmem.shape[0]), 0, MATRIX)
        sums = lax.fori_loop(0, parts, functools.partial(visit, tile), nothing)
        if sums_gmem.shape[1] == 1:
            # The other columns are zeros.
            sums_gmem[split, 0, place(tile)] = sums.sum(axis=1)
        else:
            # A thread then holds neighbours along N.
            sums = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)
            sums_gmem.at[split, :, place(tile)].transpose((1, 0))[...] = sums

    lax.fori_loop(0, count, compute, None)
