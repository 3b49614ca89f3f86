"""The linear map of few rows in Pallas for NVIDIA's Hopper GPUs (Mosaic GPU).

What takes the time is reading the weights, once. Each thread block walks over some tiles of outputs along one
part of the inputs, with copies of the next tiles on their way; XLA adds up the parts.

The operands are swapped, as in attention's `decode_quantized`: weights are the 64 rows that the tensor core
takes, and x the columns, of which it takes as few as 8. Weights go from shared memory through registers
straight into the tensor core.

Everything is multiplied in bfloat16, which holds every number of either 8 bits. So x needs no scale, and
nothing has to look at all of it before the kernel starts.

M rows, C = M rounded up to a multiple of 8, K inputs, X inputs of a tile, N outputs, R outputs of a tile
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moss_jax.ops.linear.arguments import Arguments
from moss_jax.ops.mosaic_gpu import hopper, tiles, upcast
from moss_jax.ops.mosaic_gpu.tiles import MATRIX

ROWS = 64  # Of x, at most.
OUTPUTS = 64  # Of a tile: the rows that the tensor core takes.


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """How the weights are cut.

    Attributes:
      block_k: inputs of a tile.
      stages: tiles that are on their way at once in a thread block.
      part: inputs that a thread block sees, at most; x's are kept in shared memory, and each part of K makes
        sums of its own.
      blocks: thread blocks, at most, unless K has more parts.
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
        """Into how many equal parts K is cut: the fewest that are whole tiles."""
        count = inputs // self.block_k
        return next(n for n in range(1, count + 1) if count % n == 0 and inputs // n <= self.part)

    def tiles_a_block(self, inputs: int, outputs: int) -> int:
        """Tiles of outputs that a thread block computes."""
        return pl.cdiv(outputs // OUTPUTS, max(1, self.blocks // self.splits(inputs)))


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """Why these kernels cannot take the arguments; None if they can."""
    if reason := hopper.unsupported(platform):
        return reason
    x = arguments.x
    if x.dtype != jnp.bfloat16:
        return f"it takes x in bfloat16, not {x.dtype}"
    rows, inputs = x.shape
    if not 0 < rows <= ROWS:
        return f"it takes 1 to {ROWS} rows, not {rows}"
    if inputs % 128 or inputs == 0:
        return f"K = {inputs} is not a multiple of 128"
    if arguments.outputs % OUTPUTS or arguments.outputs == 0:
        return f"N = {arguments.outputs} is not a multiple of {OUTPUTS}"
    return None


def apply(a: Arguments) -> Float[Array, "M N"]:
    """Computes the op; forward only."""
    return few_rows(a, default_config(a))


def default_config(a: Arguments) -> LinearConfig:
    """So that two thread blocks share a multiprocessor."""
    rows = a.x.shape[0]
    return LinearConfig() if rows <= 16 else LinearConfig(stages=5, part=512)


@functools.partial(jax.jit, static_argnames="config")
def few_rows(a: Arguments, config: LinearConfig) -> Float[Array, "M N"]:
    """Computes the op for M <= 64; forward only.

    Under jit so that a model's layers, which call it with the same shapes, have it traced and lowered once.
    """
    rows, inputs = a.x.shape
    C, X = pl.cdiv(rows, 8) * 8, config.block_k
    if inputs % X:
        raise ValueError(f"K = {inputs} is not a multiple of block_k, {X}")
    splits, each = config.splits(inputs), config.tiles_a_block(inputs, a.outputs)
    x = upcast.permute_columns(jnp.pad(a.x, ((0, C - rows), (0, 0))))
    sums = plgpu.kernel(
        functools.partial(_kernel, each=each),
        out_type=jax.ShapeDtypeStruct((splits, 1 if rows == 1 else C, a.outputs), jnp.float32),
        scratch_types={
            "x_smem": tiles.tile((inputs // splits // X, C, X), x.dtype),
            "kernel_smem": tiles.tile((config.stages, OUTPUTS, X), a.kernel.dtype),
            "barriers": (
                # One arrival a copy.
                plgpu.Barrier(num_arrivals=inputs // splits // X),
                plgpu.Barrier(num_barriers=config.stages),
            ),
        },
        grid=(splits, pl.cdiv(a.outputs // OUTPUTS, each)),
        grid_names=("split", "block"),
        # Pallas would put two barriers around every store and one before every copy; `_kernel` says why its
        # own are enough.
        compiler_params=dataclasses.replace(tiles.COMPILER_PARAMS, unsafe_no_auto_barriers=True),
    )(x, a.kernel)
    return a.scaled(sums[:, :rows].sum(axis=0))


def _kernel(x_gmem, kernel_gmem, sums_gmem, *, x_smem, kernel_smem, barriers, each):
    """Some tiles of outputs over one part of the inputs.

    No automatic barriers: `commit_smem` is a barrier of the warpgroup, and a visit to a tile has one. Before
    it, everyone has read the tile into registers; after it, the tile's slot is filled again. Only copies
    write to shared memory, and x's is never filled again.
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
            # A thread then has neighbours along N.
            sums = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)
            sums_gmem.at[split, :, place(tile)].transpose((1, 0))[...] = sums

    lax.fori_loop(0, count, compute, None)
