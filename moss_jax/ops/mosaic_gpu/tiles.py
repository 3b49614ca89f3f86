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

# Two numbers in 8 bits, at the positions in a register that {bytes} tell, as two bfloat16.
WIDEN = {
    # An int8 x is its low 7 bits, minus 128 if its sign bit is set. Below the byte 0x43 the low bits make the
    # bfloat16 of 128 + them, and the sign bit that of 128 or 256: the difference is x.
    "int8": (
        ("0x4140", "0x4342"),
        "{{ .reg .b32 x, low, sign; prmt.b32 x, $1, 0x43434343, {bytes}; and.b32 low, x, 0xff7fff7f; "
        "and.b32 sign, x, 0xff80ff80; sub.bf16x2 $0, low, sign; }}",
    ),
    # Exponent and mantissa, moved to where bfloat16 has the last bits of its exponent and the first of its
    # mantissa, make the number divided by 2^120, which the product with 0x7b80 = 2^120 mends.
    "float8_e4m3fn": (
        ("0x1404", "0x3424"),
        "{{ .reg .b32 x, sign, huge; prmt.b32 x, $1, 0, {bytes}; and.b32 sign, x, 0x80008000; "
        "shr.b32 x, x, 4; and.b32 x, x, 0x07f007f0; or.b32 x, x, sign; mov.b32 huge, 0x7b807b80; "
        "mul.bf16x2 $0, x, huge; }}",
    ),
}

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
