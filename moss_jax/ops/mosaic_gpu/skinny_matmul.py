"""Skinny W8A16 matmul for Hopper GPUs (Mosaic GPU): building blocks of kernels for up to 8 rows.

The product is `mma.sync`, which takes both operands from registers: for each warp, 16 rows of weights and 8
columns, the rows of x, all in bfloat16. So x is stored in shared memory unchanged, where `wgmma` would need a
tile of 8 columns. Inputs are summed in the order that suits both operands: a thread loads 16 neighbouring
weights, 16 bytes, and the same inputs of x.

M rows, X inputs of a tile
"""

# Pallas types layouts, inline instructions and the references of kernels too narrowly.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false
# pyright: reportPrivateImportUsage=false

import dataclasses
import math

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from moss_jax.ops.mosaic_gpu import hopper, tiles, upcast
from moss_jax.ops.mosaic_gpu.tiles import MATRIX

C = 8  # Columns of a product: the maximum number of rows of x.
TILE = 64  # Rows per tile of weights, 16 per warp.
THREADS = 128  # Threads per block.
PAD = 8  # Padding elements between rows of x in shared memory, which avoids bank conflicts.
REDUCTION = 128  # Bytes of scratch memory for sums over a block's threads.

# One number per thread; longer vectors in runs of that size.
STRIDED = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)

# Pallas would put two barriers around every store and one before every copy; the kernels document why their
# own suffice.
COMPILER_PARAMS = dataclasses.replace(
    tiles.COMPILER_PARAMS, unsafe_no_auto_barriers=True, reduction_scratch_bytes=REDUCTION
)


@dataclasses.dataclass(frozen=True)
class TileLayout:
    """Register layout of a tile of weights, [64, X] in 8 bits, over a thread block.

    Lane 4 g + p of a warp holds the warp's rows g and g + 8 and, in each group of 4 `run` columns, the `run`
    columns from `run` p on. Its loads are 16 bytes wide, and 8 lanes together read all banks.

    Attributes:
      layout: Pallas's layout.
      run: number of neighbouring columns per thread.
    """

    layout: plgpu.Layout
    run: int


# Warp w has the rows from 16 w on.
BLOCKED = TileLayout(
    plgpu.Layout.TILED(
        plgpu.Tiling(((TILE, 128), (16, 128), (8, 32), (8, 16))),
        warp_dims=(-8,),
        lane_dims=(-2, -5),
        vector_dim=-1,
    ),
    run=32,
)
# Warp w has every fourth row, from w on.
INTERLEAVED = TileLayout(
    plgpu.Layout.TILED(
        plgpu.Tiling(((TILE, 64), (32, 64), (4, 16))), warp_dims=(-2,), lane_dims=(-4, -3), vector_dim=-1
    ),
    run=16,
)


def multiprocessors() -> int:
    """Multiprocessors of the GPU that the kernel will run on; without a GPU, as on an H100 or H200 SXM."""
    return 132 if hopper.compute_capability() is None else jax.devices()[0].core_count


def pitch(rows: int, size: int) -> int:
    """Row stride of x in shared memory, in numbers."""
    return size + (PAD if rows > 1 else 0)


def shared_bytes(*arrays: int, barriers: int) -> int:
    """Shared memory of a block in bytes, given the sizes of its arrays and the number of barriers."""
    # Arrays are aligned to 1024 bytes.
    return sum(pl.cdiv(size, 1024) * 1024 for size in (*arrays, REDUCTION)) + 8 * barriers


def shared_room(blocks: int) -> int:
    """Shared memory per block if `blocks` share a multiprocessor, as `shared_bytes` counts it."""
    return 228 * 1024 // blocks - 1024 - 128


def piece(number, size: int):
    """Slice of piece `number` of an axis split into pieces of one size."""
    return pl.ds(pl.multiple_of(number * size, size), size)


def strided(ref, most: int = 4):
    """Loads a vector, cast to float32, over the block's threads in runs of up to `most` numbers."""
    (size,) = ref.shape
    vec = math.gcd(size // THREADS, most)
    return plgpu.load(ref, layout=plgpu.Layout.WG_STRIDED((size,), vec_size=vec)).astype(jnp.float32)


def threads():
    """[128]: the index of each thread."""
    return plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=STRIDED)


def load(ref, layout: TileLayout):
    """Loads a tile of weights from shared memory, for `multiply`."""
    return plgpu.load(ref, layout=layout.layout, optimized=False)


def multiply(sums, weights, x_ref, start, layout: TileLayout, apart: int = 0):
    """Multiplies each warp's weights with X columns of x and adds the products to its sums.

    Args:
      sums: [64, 8] in MATRIX: warp w has the rows from 16 w on. Columns beyond M repeat the last row of x.
      weights: [64, X] in `layout`.
      x_ref: x in shared memory, [M, inputs and perhaps more].
      start: first column of the first warp.
      apart: offset between the first columns of consecutive warps.
    """
    (rows, pitch), X = x_ref.shape, weights.shape[1]
    selections, widen = upcast.TO_BFLOAT16[weights.dtype.name]
    warp, lane = lax.div(threads(), 32), lax.rem(threads(), 32)
    row = jnp.minimum(lax.div(lane, 4), rows - 1)
    first = row * pitch + start + warp * apart + lax.rem(lane, 4) * layout.run

    @plgpu.inline_mgpu(
        arg_types=(MATRIX, layout.layout, plgpu.RefType(), STRIDED),
        return_type=plgpu.ShapeDtypeStruct((TILE, C), jnp.float32, layout=MATRIX),
    )
    def product(_, sums, weights, x_ref, first):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        words, pair = ir.VectorType.get((4,), i32), ir.VectorType.get((2,), f32)

        def at(vector, index):
            return llvm.extractelement(vector, mgpu.utils.c(index, i32))

        def asm(kind, operands, code, constraints):
            """Emits code with four results; its side effects keep it from moving into divergent code."""
            kinds = llvm.StructType.get_literal([kind] * 4)
            results = llvm.inline_asm(kinds, operands, code, constraints, has_side_effects=True)
            return [llvm.extractvalue(kind, results, [i]) for i in range(4)]

        first = arith.muli(mgpu.utils.bitcast(first.registers.item(), i32), mgpu.utils.c(2, i32))
        base = arith.addi(llvm.ptrtoint(i32, mgpu.utils.memref_ptr(x_ref)), first)

        # [pieces of 4 runs, halves of the rows, 16 bytes of a run]
        narrow = weights.registers.reshape(X // layout.run // 4, 2, layout.run // 16)
        acc = [at(register, i) for register in sums.registers.flat for i in range(2)]
        for i, j in np.ndindex(narrow.shape[0], narrow.shape[2]):
            x = []
            for half in range(2):
                start = 2 * (i * 4 * layout.run + j * 16 + half * 8)
                code = f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4 + {start}];"
                x += asm(i32, [base], code, "=r,=r,=r,=r,r,~{memory}")
            low, high = (mgpu.utils.bitcast(register, words) for register in narrow[i, :, j])
            for word in range(4):
                wide = [
                    llvm.inline_asm(i32, [at(register, word)], widen.format(bytes=selection), "=r,r")
                    for selection in selections
                    for register in (low, high)
                ]
                acc = asm(
                    f32,
                    [*wide, *x[2 * word : 2 * word + 2], *acc],
                    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
                    "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
                )
        registers = np.empty(sums.registers.shape, dtype=object)
        for half, where in enumerate(np.ndindex(registers.shape)):
            registers[where] = llvm.mlir_undef(pair)
            for i in range(2):
                registers[where] = llvm.insertelement(
                    registers[where], acc[2 * half + i], mgpu.utils.c(i, i32)
                )
        return mgpu.FragmentedArray(_registers=registers, _layout=sums.layout, _is_signed=None)

    return product(sums, weights, x_ref, first)
