"""What kernels for Hopper GPUs (Mosaic GPU) share: tiles in shared memory, products on the tensor core."""

import math
from collections.abc import Callable

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

LOG2E = math.log2(math.e)

# Score of an unseen key.
NEVER = -jnp.inf

# Where a warpgroup keeps a matrix, one number a row of it, and one number a column.
MATRIX = plgpu.Layout.WGMMA
PER_ROW = MATRIX.reduce(1)
PER_COLUMN = MATRIX.reduce(0)


COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def tile(shape: tuple[int, ...], dtype) -> plgpu.SMEM:
    """Shared memory whose last two axes are laid out as the tensor core reads them."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    transforms = (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def product(a, b, meanwhile: Callable[[], None] = lambda: None):
    """a @ b in float32; a in registers or shared memory, b in shared memory.

    `meanwhile` is done while the tensor core works.
    """

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        meanwhile()
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def products(*pairs):
    """a @ b of each pair, at once."""

    def multiply(*accs):
        for acc, (a, b) in zip(accs, pairs, strict=True):
            plgpu.wgmma(acc, a, b)
        return tuple(acc[...] for acc in accs)

    return pl.run_scoped(multiply, *(plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32) for a, b in pairs))


def add_product(total, a, b, meanwhile: Callable[[], None] = lambda: None):
    """total + a @ b, in place."""

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        meanwhile()

    return pl.run_state(multiply)(plgpu.ACC.init(total))


def full(shape: tuple[int, ...], value: float, layout):
    """A float32 array of one number, kept as `layout` says."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def index(shape: tuple[int, int], axis: int):
    """The row (axis 0) or column (axis 1) number of every element of a matrix."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)


def along_rows(vector, shape):
    """One number a row, for every element of the row."""
    return lax.broadcast_in_dim(vector, shape, [0])


def along_columns(vector, shape):
    """One number a column, for every element of the column."""
    return lax.broadcast_in_dim(vector, shape, [1])
