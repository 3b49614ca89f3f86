"""Eviction of rows in Pallas for NVIDIA's Hopper GPUs (Mosaic GPU): a gather in place.

A thread block has one head of one array. It takes the rows that stay in chunks, ascending: it loads a chunk
into registers, waits until all of its threads have, and writes the chunk to its new place. Rows only move
down, `source[i] >= i`, since indices ascend strictly. So what a chunk overwrites, `[begin, begin + CHUNK)`,
is read by no later chunk, whose sources are at `begin + CHUNK` or beyond: only the reads of the chunk itself,
and of those before it, must come first. One barrier for each chunk, between its loads and its stores, is
enough; blocks share no rows.

Chunks in front of the first row that moves, such as those of a pinned opening, are skipped. Rows that stay
where they are, in the first chunk and past the last row in the last one, are written back unchanged.

B slots, N of them compacted, K kv heads, R rows of a buffer, D head
"""

# Pallas types layouts, inline instructions and the references of kernels too narrowly.
# pyright: reportArgumentType=false, reportCallIssue=false

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moss_jax.ops.keep_rows.base import Arguments
from moss_jax.ops.mosaic_gpu import hopper, tiles
from moss_jax.ops.mosaic_gpu.row_gather import gather_rows, row_layout

CHUNK = 128  # Rows per chunk: of 128 numbers, 64 registers per thread, and 32 KB in flight per block.
# Arrays per launch: with 8 heads, one block for almost each of 132 multiprocessors. Their descriptors also
# fit in the 4 KB of a kernel's parameters.
ARRAYS = 16

# The only barrier that is needed is that of `gather`.
COMPILER_PARAMS = dataclasses.replace(tiles.COMPILER_PARAMS, unsafe_no_auto_barriers=True)


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """Why this kernel cannot take the arguments; None if it can."""
    if reason := hopper.unsupported(platform):
        return reason
    if arguments.slots is None:
        return "it takes slots by number: a call for all may need gradients"
    kinds = {(x.shape, x.dtype) for x in arguments.buffers}
    if len(kinds) != 1:
        return f"it takes buffers of one shape and dtype, not of {len(kinds)}"
    (((_, _, rows, head_dim), dtype),) = kinds
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {dtype}"
    if head_dim not in (32, 64, 128):
        return f"it takes heads of 32, 64 and 128, not of {head_dim}"
    if rows % CHUNK:
        return f"{rows} rows are not a multiple of {CHUNK}"
    return None


def apply(a: Arguments) -> tuple[Float[Array, "B K R D"], ...]:
    """Computes the op; forward only."""
    C, R = a.kept.shape[1], a.buffers[0].shape[2]
    row, length = jnp.arange(R, dtype=jnp.int32), a.length.astype(jnp.int32)
    kept = jnp.pad(a.kept.astype(jnp.int32), ((0, 0), (0, R - C)))
    source = jnp.where(row < length[:, None], kept, row)
    begin = jnp.min(jnp.where(source == row, R, row), axis=1) // CHUNK
    end = pl.cdiv(length, CHUNK)
    moved = []
    for group in itertools.batched(a.buffers, ARRAYS):
        moved += move(group, source, begin, end, a.slots)
    return tuple(moved)


@jax.jit
def move(
    buffers: Sequence[Float[Array, "B K R D"]],
    source: Int[Array, "N R"],
    begin: Int[Array, " N"],
    end: Int[Array, " N"],
    slots: Int[Array, " N"],
) -> list[Float[Array, "B K R D"]]:
    """Moves row `source[n, i] >= i` of slot `slots[n]` to row `i`, for chunks from `begin[n]` to `end[n]`.

    Jitted, so that groups of buffers of the same shapes trace and lower it once.
    """
    refs = [jax.new_ref(x) for x in buffers]
    plgpu.kernel(
        _kernel,
        kernel_name="keep_rows",
        out_type=(),
        grid=(len(refs), buffers[0].shape[1], len(source)),
        grid_names=("array", "head", "entry"),
        compiler_params=COMPILER_PARAMS,
    )(source, begin, end, slots, *refs)
    return [jax.freeze(ref) for ref in refs]


def _kernel(source_gmem, begin_gmem, end_gmem, slots_gmem, *buffers_gmem):
    array, head, entry = (lax.axis_index(name) for name in ("array", "head", "entry"))
    slot, begin, end = (x[entry] for x in (slots_gmem, begin_gmem, end_gmem))
    for i, buffer_gmem in enumerate(buffers_gmem):

        @pl.when(array == i)
        def _(buffer_gmem=buffer_gmem):
            rows_gmem = buffer_gmem.at[slot, head]
            layout = row_layout(buffer_gmem.shape[-1], 2)

            def move_chunk(chunk, _):
                to = pl.ds(pl.multiple_of(chunk * CHUNK, CHUNK), CHUNK)
                at = plgpu.load(source_gmem.at[entry, to], layout=layout.reduce(1), optimized=False)
                rows_gmem[to] = gather(rows_gmem, at, layout)

            lax.fori_loop(begin, end, move_chunk, None)


def gather(rows_gmem, at, layout):
    """Loads the rows with these indices; returns when all threads of the block have."""
    return gather_rows(rows_gmem, at, layout, mgpu.utils.warpgroup_barrier)
