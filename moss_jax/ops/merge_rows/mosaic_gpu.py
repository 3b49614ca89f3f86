"""Merging of rows in Pallas for NVIDIA's Hopper GPUs (Mosaic GPU): weighted sums of gathered rows.

A thread block has a chunk of new rows of one head. Most new rows are made of one row, and few of many: each
chunk gathers only as many times as its largest row needs, where XLA gathers the whole buffer M times.

B slots, K kv heads, S rows of a buffer, M rows that become one, D head
"""

# Pallas types layouts, inline instructions and the references of kernels too narrowly.
# pyright: reportArgumentType=false, reportCallIssue=false

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int, Num

from moss_jax.ops.merge_rows.base import Arguments
from moss_jax.ops.mosaic_gpu import hopper, tiles
from moss_jax.ops.mosaic_gpu.row_gather import gather_rows, row_layout

CHUNK = 64  # New rows per thread block: of 128 numbers, 64 sums per thread.
# Added to a float32 below 2^22, this leaves no room for a fraction.
ROUND = 1.5 * 2.0**23

# Registers and memory that no other thread writes: there is nothing to wait for.
COMPILER_PARAMS = dataclasses.replace(tiles.COMPILER_PARAMS, unsafe_no_auto_barriers=True)


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """Why this kernel cannot take the arguments; None if it can."""
    if reason := hopper.unsupported(platform):
        return reason
    x = arguments.x
    (_, _, S, D), dtype = x.shape, jnp.dtype(x.dtype)
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.int8, jnp.float8_e4m3fn):
        return f"it takes bfloat16, float16, int8 and float8_e4m3fn, not {dtype}"
    if arguments.out_dtype != dtype:
        return f"its result has the dtype of x, {dtype}, not {arguments.out_dtype}"
    if D not in (32, 64, 128):
        return f"it takes heads of 32, 64 and 128, not of {D}"
    if S < CHUNK:
        return f"it takes {CHUNK} rows and more, not {S}"
    return None


def apply(a: Arguments) -> Num[Array, "B K S D"]:
    """Computes the op; forward only."""
    source, count = a.source.astype(jnp.int32), a.count.astype(jnp.int32)
    most = count[:, chunk_starts(count.shape[1])[:, None] + jnp.arange(CHUNK)].max(axis=2)
    return merge(a.x, a.weights, source, count, most)


def chunk_starts(S: int) -> Int[Array, " C"]:
    """First row of each chunk; the last one is moved back to end with the rows."""
    return jnp.minimum(jnp.arange(pl.cdiv(S, CHUNK)) * CHUNK, S - CHUNK)


@jax.jit
def merge(
    x: Num[Array, "B K S D"],
    weights: Float[Array, "M B #K S"],
    source: Int[Array, "M B S"],
    count: Int[Array, "B S"],
    most: Int[Array, "B C"],
) -> Num[Array, "B K S D"]:
    """Computes the op, given the largest count of each chunk.

    Jitted, so that layers, which call it with the same shapes, trace and lower it once.
    """
    B, K, S, _ = x.shape
    return plgpu.kernel(
        functools.partial(_kernel, S=S),
        kernel_name="merge_rows",
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(pl.cdiv(S, CHUNK), K, B),
        grid_names=("chunk", "head", "slot"),
        compiler_params=COMPILER_PARAMS,
    )(x, weights, source, count, most)


def _kernel(x_gmem, weights_gmem, source_gmem, count_gmem, most_gmem, merged_gmem, *, S):
    chunk, head, slot = (lax.axis_index(name) for name in ("chunk", "head", "slot"))
    dtype, shape = jnp.dtype(x_gmem.dtype), (CHUNK, x_gmem.shape[-1])
    layout = row_layout(shape[1], dtype.itemsize)
    here = pl.ds(jnp.minimum(chunk * CHUNK, S - CHUNK), CHUNK)
    of_weights = head if weights_gmem.shape[2] > 1 else 0

    def load(ref):
        return plgpu.load(ref, layout=layout.reduce(1), optimized=False)

    def along_rows(vector):
        return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, [0]), layout)

    count = along_rows(load(count_gmem.at[slot, here]))

    def add(m, sums):
        x = widen(gather_rows(x_gmem.at[slot, head], load(source_gmem.at[m, slot, here]), layout))
        part = x * along_rows(load(weights_gmem.at[m, slot, of_weights, here]))
        # Not by a weight of 0: the row could be NaN.
        return sums + jnp.where(m < count, part, 0.0)

    sums = lax.fori_loop(0, most_gmem[slot, chunk], add, tiles.full(shape, 0, layout))
    merged_gmem[slot, head, here] = narrow(sums, dtype)


def widen(x):
    """Upcasts numbers of 8 or 16 bits to float32."""
    return (x.astype(jnp.float16) if x.dtype == jnp.float8_e4m3fn else x).astype(jnp.float32)


def narrow(x: Float[Array, "..."], dtype: DTypeLike):
    """Rounds float32; to integers, the nearest, and halves to the even one."""
    if jnp.issubdtype(dtype, jnp.integer):
        x = ((x + ROUND) - ROUND).astype(jnp.int32)
    return x.astype(dtype)
