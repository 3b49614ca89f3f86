"""Fused RoPE and KV-cache append: one small kernel in front of split-K decode attention.

Rotated queries are written to the rows of `decode`'s blocks, keys and values to the cache, in place.

B slot, T new tokens of each row of the batch, K kv heads, G query heads per kv head, D head, S rows of the
cache, Q blocks of queries, R rows of a block
"""

# Pallas types layouts, inline instructions and the references of kernels too narrowly.
# pyright: reportArgumentType=false

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moss_jax.ops.attention.mosaic_gpu.split_k import QueryBlocks
from moss_jax.ops.mosaic_gpu import tiles
from moss_jax.ops.rotary import Rotation

WARP = 32


@functools.partial(jax.jit, static_argnames=("capacity", "blocks"))
def rotate_and_append(
    qkv: Float[Array, "batch T K group_and_kv D"],
    rotation: Rotation,
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S D"],
    start: Int[Array, " batch"],
    count: Int[Array, " batch"],
    slots: Int[Array, " batch"] | None,
    *,
    capacity: int,
    blocks: QueryBlocks,
) -> tuple[Float[Array, "Q K R D"], Float[Array, "B K S D"], Float[Array, "B K S D"]]:
    """Returns packed queries, and the cache with each row's first `count` tokens appended to its slot.

    Tokens beyond `capacity` are dropped. Rows of a block past those of its tokens are undefined.
    """
    batch, T, K, _, D = qkv.shape
    keys_ref, values_ref = jax.new_ref(keys), jax.new_ref(values)
    q = plgpu.kernel(
        functools.partial(_kernel, blocks=blocks, capacity=capacity),
        out_type=jax.ShapeDtypeStruct((blocks.count, K, blocks.rows, D), qkv.dtype),
        grid=(K, T, batch),
        grid_names=("head", "token", "row"),
        compiler_params=tiles.COMPILER_PARAMS,
    )(qkv, *rotation, start, count, slots, keys_ref, values_ref)
    return q, jax.freeze(keys_ref), jax.freeze(values_ref)


def _kernel(
    qkv_gmem,
    cos_gmem,
    sin_gmem,
    start_gmem,
    count_gmem,
    slots_gmem,
    keys_gmem,
    values_gmem,
    q_gmem,
    *,
    blocks,
    capacity,
):
    """One kv head of one token, computed redundantly by all four warps: it is too little work to split."""
    head, token, row = (lax.axis_index(name) for name in ("head", "token", "row"))
    half = qkv_gmem.shape[-1] // 2
    halves = (pl.ds(0, half), pl.ds(half, half))
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((half,), (half // WARP,))),
        warp_dims=(plgpu.Replicated(4),),
        lane_dims=(-2,),
        vector_dim=-1,
    )

    def load(ref):
        return plgpu.load(ref, layout=layout, optimized=False)

    # All loads are issued before the first is awaited.
    projected = [
        [load(qkv_gmem.at[row, token, head, i, part]) for part in halves] for i in range(blocks.group + 2)
    ]
    cos, sin = (load(gmem.at[row, token]) for gmem in (cos_gmem, sin_gmem))
    at = start_gmem[row] + token
    appended = (token < count_gmem[row]) & (at < capacity)

    def rotated(parts):
        a, b = (x.astype(jnp.float32) for x in parts)
        return [x.astype(qkv_gmem.dtype) for x in (a * cos - b * sin, b * cos + a * sin)]

    *queries, key, value = projected
    block = row * blocks.per_batch_row + lax.div(token, blocks.tokens)
    first = lax.rem(token, blocks.tokens) * blocks.group
    for i, parts in enumerate(queries):
        for part, x in zip(halves, rotated(parts), strict=True):
            q_gmem[block, head, first + i, part] = x

    @pl.when(appended)
    def _():
        slot = row if slots_gmem is None else slots_gmem[row]
        for gmem, parts in ((keys_gmem, rotated(key)), (values_gmem, value)):
            for part, x in zip(halves, parts, strict=True):
                gmem[slot, head, at, part] = x
