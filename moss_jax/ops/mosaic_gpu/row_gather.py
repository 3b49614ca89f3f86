"""Gathers of whole rows from memory into registers, 16 bytes a load (Mosaic GPU)."""

# Pallas types layouts, inline instructions and the references of kernels too narrowly.
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Callable

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

VECTOR_BYTES = 16  # Per load.


def row_layout(head_dim: int, itemsize: int):
    """Register layout of rows of `head_dim` numbers: neighbouring lanes have neighbouring vectors of a row.

    A warp has some whole rows, those of all warps are neighbours, and a thread has every so many.
    """
    vector = VECTOR_BYTES // itemsize
    rows = 32 * vector // head_dim
    return plgpu.Layout.TILED(
        plgpu.Tiling(((4 * rows, head_dim), (rows, head_dim), (rows, vector))),
        warp_dims=(-6,),
        lane_dims=(-2, -3),
        vector_dim=-1,
    )


def gather_rows(rows_gmem, at, layout, loaded: Callable[[], None] = lambda: None):
    """Loads the rows with these indices.

    Args:
      rows_gmem: [R, D].
      at: indices, in `layout.reduce(1)`.
      layout: from `row_layout`.
      loaded: called behind the loads, in the code of the kernel.
    """
    shape, dtype = (*at.shape, rows_gmem.shape[-1]), jnp.dtype(rows_gmem.dtype)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), layout.reduce(1)),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=layout),
    )
    def load(_, rows, at):
        i32, registers_of = ir.IntegerType.get_signless(32), layout.to_mgpu()
        kind = ir.MemRefType(rows.type)
        (pitch, _), _ = kind.get_strides_and_offset()
        # LLVM has no vectors of 8-bit floats.
        stored = ir.IntegerType.get_signless(8) if dtype.itemsize == 1 else kind.element_type
        size = VECTOR_BYTES // dtype.itemsize
        vector, wanted = (ir.VectorType.get((size,), element) for element in (stored, kind.element_type))
        base = mgpu.utils.memref_ptr(rows)
        # All vectors of a thread have one place in their rows.
        _, column = next(iter(registers_of.thread_idxs(shape)))
        column = arith.index_cast(i32, column)
        registers = np.empty(registers_of.registers_shape(shape), dtype=object)
        for i, row in zip(np.ndindex(registers.shape), at.registers.flat, strict=True):
            row = arith.muli(mgpu.utils.bitcast(row, i32), mgpu.utils.c(pitch, i32))
            address = mgpu.utils.getelementptr(base, [arith.addi(row, column)], stored)
            x = llvm.load(vector, address)
            registers[i] = x if vector == wanted else mgpu.utils.bitcast(x, wanted)
        loaded()
        is_signed = True if jnp.issubdtype(dtype, jnp.integer) else None
        return mgpu.FragmentedArray(_registers=registers, _layout=registers_of, _is_signed=is_signed)

    return load(rows_gmem, at)
