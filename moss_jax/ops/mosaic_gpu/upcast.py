"""Upcasts of int8 and float8_e4m3fn to 16 bits in registers, for tensor-core products with 8-bit operands.

A warpgroup loads an 8-bit tile in `UPCAST_LAYOUT`, where a thread has 4 neighbouring columns, 32 bits in all.
After the upcast, its registers are reinterpreted as a tile in the layout of wgmma's left operand, where a
thread has 2 columns of each half of a block of 16. No data moves between threads; instead the columns come
out permuted, and the other operand of the product is permuted in the same way (`permute_columns`).
"""

# Pallas types layouts, inline instructions and the references of kernels too narrowly.
# pyright: reportCallIssue=false

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Float

from moss_jax.ops.mosaic_gpu.tiles import MATRIX

UPCAST_LAYOUT = plgpu.Layout.WGMMA_UPCAST_2X

# PTX that upcasts two 8-bit numbers of a register to two bfloat16: by dtype, the byte selectors of prmt for
# the lower and the upper two, and the instructions.
TO_BFLOAT16 = {
    # An int8 x is its low 7 bits, minus 128 if its sign bit is set. Below the byte 0x43 the low bits make the
    # bfloat16 of 128 + them, and the sign bit that of 128 or 256: the difference is x.
    "int8": (
        ("0x4140", "0x4342"),
        "{{ .reg .b32 x, low, sign; prmt.b32 x, $1, 0x43434343, {bytes}; and.b32 low, x, 0xff7fff7f; "
        "and.b32 sign, x, 0xff80ff80; sub.bf16x2 $0, low, sign; }}",
    ),
    # Exponent and mantissa, moved to where bfloat16 has the last bits of its exponent and the first of its
    # mantissa, make the number divided by 2^120; the product with 0x7b80 = 2^120 undoes the division.
    "float8_e4m3fn": (
        ("0x1404", "0x3424"),
        "{{ .reg .b32 x, sign, huge; prmt.b32 x, $1, 0, {bytes}; and.b32 sign, x, 0x80008000; "
        "shr.b32 x, x, 4; and.b32 x, x, 0x07f007f0; or.b32 x, x, sign; mov.b32 huge, 0x7b807b80; "
        "mul.bf16x2 $0, x, huge; }}",
    ),
}

FLIP_SIGNS = 0x80808080 - 2**32


def permute_columns(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Permutes columns to the order in which `to_float16` and `to_bfloat16` return those of a tile.

    In each block of 16, bits 1 and 3 of the index are swapped; the permutation is its own inverse.
    """
    return x.reshape(*x.shape[:-1], -1, 2, 2, 2, 2).swapaxes(-4, -2).reshape(x.shape)


def to_float16(ref):
    """Loads an 8-bit tile as float16 in the layout of `MATRIX`, with permuted columns."""
    x = plgpu.load(ref, layout=UPCAST_LAYOUT, optimized=False)
    if x.dtype != jnp.int8:
        x = x.astype(jnp.float16)

        def pairs(register):
            return [mgpu.utils.vector_slice(register, slice(i, i + 2)) for i in (0, 2)]

        return _as_matrix(x, jnp.float16, pairs)
    return _as_matrix(x, jnp.float16, _int8_to_float16)


def to_bfloat16(ref):
    """Loads an 8-bit tile as bfloat16 in the layout of `MATRIX`, with permuted columns."""
    x = plgpu.load(ref, layout=UPCAST_LAYOUT, optimized=False)
    selectors, code = TO_BFLOAT16[x.dtype.name]

    def pairs(register):
        i32, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
        for selector in selectors:
            upcast = llvm.inline_asm(
                i32, [mgpu.utils.bitcast(register, i32)], code.format(bytes=selector), "=r,r"
            )
            yield mgpu.utils.bitcast(upcast, pair)

    return _as_matrix(x, jnp.bfloat16, pairs)


def load_in_order(ref):
    """Loads an 8-bit tile in the layout of `MATRIX`, for `as_bfloat16`.

    A thread loads 2 neighbouring columns at once, half as many as `to_bfloat16` does, and columns stay in
    order.
    """
    return plgpu.load(ref, layout=MATRIX, optimized=False)


def as_bfloat16(x):
    """Upcasts an 8-bit tile in the layout of `MATRIX` to bfloat16."""
    (selector, _), code = TO_BFLOAT16[x.dtype.name]

    @plgpu.inline_mgpu(
        arg_types=(MATRIX,),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.dtype(jnp.bfloat16), layout=MATRIX),
    )
    def take(_, x):
        i16, i32 = ir.IntegerType.get_signless(16), ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        registers = np.empty_like(x.registers)
        for at, register in np.ndenumerate(x.registers):
            narrow = arith.extui(i32, mgpu.utils.bitcast(register, i16))
            upcast = llvm.inline_asm(i32, [narrow], code.format(bytes=selector), "=r,r")
            registers[at] = mgpu.utils.bitcast(upcast, pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return take(x)


def _as_matrix(x, dtype, pairs):
    """Reinterprets registers of x in `UPCAST_LAYOUT`, each split in two by `pairs`, as a tile in `MATRIX`."""

    @plgpu.inline_mgpu(
        arg_types=(UPCAST_LAYOUT,), return_type=plgpu.ShapeDtypeStruct(x.shape, dtype, layout=MATRIX)
    )
    def take(_, x):
        layout = MATRIX.to_mgpu()
        registers = np.empty(layout.registers_shape(x.shape), dtype=object)
        for at, register in np.ndenumerate(x.registers):
            for half, pair in enumerate(pairs(register)):
                registers[at[0], at[1] * 2 + half, *at[2:-1]] = pair
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return take(x)


def _int8_to_float16(register):
    """Four int8 as two pairs of float16.

    With its sign bit flipped, an int8 x is the byte x + 128; with 0x64 as the upper byte it is the float16
    1024 + x + 128.
    """
    i32 = ir.IntegerType.get_signless(32)
    flipped = arith.xori(mgpu.utils.bitcast(register, i32), arith.constant(i32, FLIP_SIGNS))
    pairs = [
        llvm.inline_asm(
            i32,
            [flipped],
            f"{{ .reg .b32 x, y; prmt.b32 x, $1, 0x64646464, {selector}; mov.b32 y, 0x64806480; "
            "sub.f16x2 $0, x, y; }",
            "=r,r",
        )
        for selector in ("0x4140", "0x4342")
    ]
    return [mgpu.utils.bitcast(pair, ir.VectorType.get((2,), ir.F16Type.get())) for pair in pairs]
