"""Building blocks of kernels for Hopper GPUs (Mosaic GPU): swizzled tiles, wgmma, register layouts."""

# Pallas types layouts, inline instructions and the references of kernels too narrowly.
# pyright: reportAbstractUsage=false, reportInvalidTypeForm=false, reportPrivateImportUsage=false

import math
from collections.abc import Callable

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

LOG2E = math.log2(math.e)

# Score of a masked key.
NEG_INF = -jnp.inf

# Register layouts of a warpgroup: wgmma's accumulator, and vectors of one number per row or column of it.
MATRIX = plgpu.Layout.WGMMA
PER_ROW = MATRIX.reduce(1)
PER_COLUMN = MATRIX.reduce(0)


COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def tile(shape: tuple[int, ...], dtype) -> plgpu.SMEM:
    """Shared memory for tiles over the last two axes, tiled and swizzled for TMA and wgmma."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    transforms = (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def product(a, b, overlapped: Callable[[], None] = lambda: None):
    """a @ b by wgmma, in float32; a in registers or shared memory, b in shared memory.

    Args:
      overlapped: called between the issue of the product and the wait for it.
    """

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        overlapped()
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def products(*pairs):
    """a @ b of each pair; all are issued before the first is awaited."""

    def multiply(*accs):
        for acc, (a, b) in zip(accs, pairs, strict=True):
            plgpu.wgmma(acc, a, b)
        return tuple(acc[...] for acc in accs)

    return pl.run_scoped(multiply, *(plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32) for a, b in pairs))


def add_product(acc, a, b, overlapped: Callable[[], None] = lambda: None):
    """acc + a @ b, accumulated in place; `overlapped` as in `product`."""

    def multiply(ref):
        plgpu.wgmma(ref, a, b)
        overlapped()

    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def full(shape: tuple[int, ...], value: float, layout):
    """A float32 array filled with one number, in a register layout."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def index(shape: tuple[int, int], axis: int):
    """The row (axis 0) or column (axis 1) index of every element of a matrix."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)


def along_rows(vector, shape):
    """Broadcasts one number per row along the rows."""
    return lax.broadcast_in_dim(vector, shape, [0])


def along_columns(vector, shape):
    """Broadcasts one number per column along the columns."""
    return lax.broadcast_in_dim(vector, shape, [1])
