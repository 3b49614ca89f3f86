"""Bias and exact GELU in Pallas for NVIDIA's Hopper GPUs (Mosaic GPU), bound by memory bandwidth.

That requires few instructions per number, here 15: x Phi(x) = max(x, 0) - |x| Phi(-|x|) needs no select
between the sides, ends in one fused multiply-add, and keeps the small relative error of Phi's tail. The bias,
the maximum and |x| are computed in bfloat16, which holds the results, two numbers per instruction.

M rows, N columns
"""

# Pallas types layouts, inline instructions and the references of kernels too narrowly.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false
# pyright: reportPrivateImportUsage=false

import dataclasses
import functools
import math

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector
from jaxtyping import Array, Float

from moss_jax.ops.linear import gelu_base
from moss_jax.ops.linear.gelu_base import Arguments
from moss_jax.ops.mosaic_gpu import hopper, tiles

COLUMNS = 256  # Per block: 16 bytes of bfloat16 for each thread of a warp.

# Each warp of a warpgroup has one row of every 4, each thread vectors of 16 bytes.
ROW_A_WARP = plgpu.Layout.TILED(
    plgpu.Tiling(((4, COLUMNS), (8,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)

# Coefficients of log2 Phi(-a).
LOG2_TAIL = tuple(coefficient * tiles.LOG2E for coefficient in gelu_base.LOG_TAIL)
# From here on Phi(-a) underflows float32; the clamp avoids 0 times infinity.
LARGEST = 14.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiling of a call.

    Attributes:
      rows: per thread block, which is one warpgroup; each thread has `rows / 4` loads of 16 bytes in flight.
    """

    rows: int = 16

    def __post_init__(self):
        if self.rows % 4 or self.rows < 4:
            raise ValueError(f"rows is a multiple of 4, not {self.rows}")


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """Why this kernel cannot take the arguments; None if it can."""
    if reason := hopper.unsupported(platform):
        return reason
    x, bias = arguments.x, arguments.bias
    for y in (x,) if bias is None else (x, bias):
        if y.dtype != jnp.bfloat16:
            return f"it takes bfloat16, not {y.dtype}"
    if x.shape[-1] % COLUMNS or x.shape[-1] == 0:
        return f"N = {x.shape[-1]} is not a multiple of {COLUMNS}"
    if (rows := math.prod(x.shape[:-1])) < Config().rows:
        return f"it takes {Config().rows} rows or more, not {rows}"
    return None


def apply(a: Arguments, config: Config | None = None) -> Float[Array, "... N"]:
    """Computes the op; differentiable."""
    return _differentiable(config or Config(), a)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(config, a):
    return biased_gelu(a, config)


@_differentiable.defjvp
def _jvp(config, primals, tangents):
    """The slope by its definition, apart from the value: together, XLA keeps Phi in float32 for both."""
    (a,), (tangent,) = primals, tangents
    dx = tangent.x if a.bias is None else tangent.x + tangent.bias
    return biased_gelu(a, config), gelu_base.slope(a.biased) * dx


@functools.partial(jax.jit, static_argnames="config")
def biased_gelu(a: Arguments, config: Config) -> Float[Array, "... N"]:
    """Computes the op; forward only.

    Jitted, so that a model's layers, which call it with the same shapes, trace and lower it once.
    """
    x = a.x.reshape(-1, a.x.shape[-1])
    rows, columns = x.shape
    if rows < config.rows:
        raise ValueError(f"{rows} rows are fewer than a block's {config.rows}")
    out = plgpu.kernel(
        functools.partial(_kernel, block=config.rows),
        kernel_name="bias_gelu",
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(pl.cdiv(rows, config.rows), columns // COLUMNS),
        grid_names=("rows", "columns"),
        # Threads share nothing.
        compiler_params=dataclasses.replace(tiles.COMPILER_PARAMS, unsafe_no_auto_barriers=True),
    )(x, *(() if a.bias is None else (a.bias,)))
    return out.reshape(a.x.shape)


def _kernel(x_gmem, *others, block):
    """Body of one block; the last is moved back to end with the rows, so some rows are written twice."""
    *bias_gmem, out_gmem = others
    first = jnp.minimum(lax.axis_index("rows") * block, x_gmem.shape[0] - block)
    columns = pl.ds(pl.multiple_of(lax.axis_index("columns") * COLUMNS, COLUMNS), COLUMNS)
    x = plgpu.load(x_gmem.at[pl.ds(first, block), columns], layout=ROW_A_WARP, optimized=False)
    bias = [plgpu.load(y.at[columns], layout=ROW_A_WARP.reduce(0), optimized=False) for y in bias_gmem]
    for y in bias:  # None or one.
        x = x + plgpu.layout_cast(tiles.along_columns(y, x.shape), ROW_A_WARP)
    above, size = upcast(jnp.maximum(x, 0)), upcast(jnp.minimum(jnp.abs(x), LARGEST))
    out = above - size * jnp.exp2(gelu_base.polynomial(LOG2_TAIL, size))
    out_gmem[pl.ds(first, block), columns] = out.astype(x.dtype)


def upcast(x):
    """Casts bfloat16 to float32 in one instruction per number; the compiler takes three for every two."""

    @plgpu.inline_mgpu(
        arg_types=(ROW_A_WARP,),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=ROW_A_WARP),
    )
    def take(_, x):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()

        def constant(value):
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        registers = np.empty_like(x.registers)
        for at, register in np.ndenumerate(x.registers):
            (size,) = ir.VectorType(register.type).shape
            pairs = mgpu.utils.bitcast(register, ir.VectorType.get((size // 2,), i32))
            numbers = []
            for i in range(size // 2):
                pair = vector.extract(pairs, [], [i])
                numbers += [arith.shli(pair, constant(16)), arith.andi(pair, constant(-(1 << 16)))]
            wide = [vector.broadcast(ir.VectorType.get((1,), f32), arith.bitcast(f32, y)) for y in numbers]
            registers[at] = mgpu.utils.vector_concat(wide)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return take(x)
