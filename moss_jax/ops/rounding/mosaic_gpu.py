"""Rows in float8_e4m3fn in Pallas for NVIDIA's Hopper GPUs (Mosaic GPU).

Each warp reads a row once and keeps it in registers until its largest number is known; it waits for no other.

M rows, K columns
"""

import dataclasses

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moss_jax.ops import hopper, tiles
from moss_jax.ops.gelu.mosaic_gpu import COLUMNS, ROW_A_WARP, widen
from moss_jax.ops.rounding import xla
from moss_jax.ops.rounding.rounded import Rounded
from moss_jax.ops.rounding.xla import LARGEST, SMALLEST

ROWS = 4  # Of a thread block, one warpgroup.
MAX_COLUMNS = 6144  # A row for which a warp has registers.


def unsupported(x: Float[Array, "M K"], platform: str) -> str | None:
    """Why this kernel cannot take x; None if it can."""
    if reason := hopper.unsupported(platform):
        return reason
    if x.dtype != jnp.bfloat16:
        return f"it takes bfloat16, not {x.dtype}"
    rows, columns = x.shape
    if columns % COLUMNS or not 0 < columns <= MAX_COLUMNS:
        return f"K = {columns} is not a multiple of {COLUMNS} up to {MAX_COLUMNS}"
    if rows < ROWS:
        return f"it takes {ROWS} rows or more, not {rows}"
    return None


@jax.custom_jvp
def apply(x: Float[Array, "M K"]) -> Rounded:
    """Computes the op; its gradients are those of the plain JAX implementation."""
    return one_pass(x)


@apply.defjvp
def _apply_jvp(primals, tangents):
    return jax.jvp(xla.apply, primals, tangents)


@jax.jit
def one_pass(x: Float[Array, "M K"]) -> Rounded:
    """Computes the op; forward only.

    Under jit so that a model's layers, which call it with the same shapes, have it traced and lowered once.
    """
    rounded = plgpu.kernel(
        _kernel,
        out_type=out_type(x.shape),
        grid=(pl.cdiv(len(x), ROWS),),
        grid_names=("block",),
        # Threads share nothing.
        compiler_params=dataclasses.replace(tiles.COMPILER_PARAMS, unsafe_no_auto_barriers=True),
    )(x)
    return Rounded(*rounded)


def out_type(shape: tuple[int, int]) -> Rounded:
    """Shapes and dtypes of rounded rows [M, K]."""
    return Rounded(
        jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn), jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    )


def _kernel(x_gmem, out_gmem, scale_gmem):
    """A block; the last one is moved back to end with the rows, some of which are written twice, alike."""
    rows = pl.ds(jnp.minimum(lax.axis_index("block") * ROWS, x_gmem.shape[0] - ROWS), ROWS)
    x = plgpu.load(x_gmem.at[rows], layout=ROW_A_WARP, optimized=False)
    largest = jnp.abs(x).max(axis=1).astype(jnp.float32)
    inverse = store_scale(largest, scale_gmem.at[rows])
    inverse = plgpu.layout_cast(tiles.along_rows(inverse, x.shape), ROW_A_WARP)
    out_gmem[rows] = (widen(x) * inverse).astype(out_gmem.dtype)


def store_scale(largest, ref):
    """Stores the scale of rows, a number a warp, given their largest sizes; returns its inverse."""
    largest = jnp.maximum(largest, SMALLEST)
    x = largest * (1 / LARGEST)
    if hasattr(plgpu, "store"):
        # JAX 0.12 refuses to, unless told that so few bytes at a time are meant.
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x
    return LARGEST / largest
