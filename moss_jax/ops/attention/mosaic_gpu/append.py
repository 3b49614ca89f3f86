"""Fused RoPE and KV-cache append: one small kernel in front of split-K decode attention.

Rotated queries are written to the rows of `decode`'s blocks, keys and values to the cache, in place. In front
of `decode_quantized` queries stay in order, and keys and values are quantized.

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
from moss_jax.ops.qarray import QArray
from moss_jax.ops.rotary import Rotation

WARP = 32
# Added to a float32 below 2^22, this leaves no room for a fraction.
ROUND = 1.5 * 2.0**23


@functools.partial(jax.jit, static_argnames="capacity")
def rotate_and_append_quantized(
    qkv: Float[Array, "batch T K group_and_kv D"],
    rotation: Rotation,
    keys: QArray,
    values: QArray,
    start: Int[Array, " batch"],
    count: Int[Array, " batch"],
    slots: Int[Array, " batch"] | None,
    *,
    capacity: int,
) -> tuple[Float[Array, "batch T K G D"], QArray, QArray]:
    """Returns rotated queries, and the cache with each row's first `count` tokens appended to its slot.

    Tokens beyond `capacity` are dropped. D is 128.
    """
    batch, T, K, group_and_kv, D = qkv.shape
    # Halves on an axis of their own, in which the kernel computes them.
    cache = [
        x for part in (keys, values) for x in (part.values.reshape(*part.shape[:3], 2, D // 2), part.scale)
    ]
    refs = [jax.new_ref(x) for x in cache]
    q = plgpu.kernel(
        functools.partial(_quantized_kernel, capacity=capacity),
        kernel_name="quantized_append",
        out_type=jax.ShapeDtypeStruct((batch, T, K, group_and_kv - 2, D), qkv.dtype),
        grid=(K, T, batch),
        grid_names=("head", "token", "row"),
        compiler_params=tiles.COMPILER_PARAMS,
    )(qkv, *rotation, start, count, slots, *refs)
    k, k_scale, v, v_scale = (jax.freeze(ref) for ref in refs)
    return q, QArray(k.reshape(keys.shape), k_scale), QArray(v.reshape(values.shape), v_scale)


def _quantized_kernel(
    qkv_gmem,
    cos_gmem,
    sin_gmem,
    start_gmem,
    count_gmem,
    slots_gmem,
    keys_gmem,
    key_scales_gmem,
    values_gmem,
    value_scales_gmem,
    q_gmem,
    *,
    capacity,
):
    """One kv head of one token. A half warp has one half of a key, and loads both."""
    head, token, row = (lax.axis_index(name) for name in ("head", "token", "row"))
    shape = keys_gmem.shape[-2:]
    half = shape[1]
    halves = (pl.ds(0, half), pl.ds(half, half))
    layout = plgpu.Layout.TILED(
        plgpu.Tiling((shape, (2 * half // WARP,))),
        warp_dims=(plgpu.Replicated(4),),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )

    def load(ref):
        return plgpu.load(ref, layout=layout.reduce(0), optimized=False)

    projected = [
        [load(qkv_gmem.at[row, token, head, i, part]) for part in halves] for i in range(qkv_gmem.shape[3])
    ]
    cos, sin = (load(gmem.at[row, token]) for gmem in (cos_gmem, sin_gmem))
    at = start_gmem[row] + token

    *queries, key, value = projected
    for i, parts in enumerate(queries):
        for part, x in zip(halves, _rotated(parts, cos, sin), strict=True):
            q_gmem[row, token, head, i, part] = x

    @pl.when((token < count_gmem[row]) & (at < capacity))
    def _():
        slot = row if slots_gmem is None else slots_gmem[row]
        is_first = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) == 0
        for gmem, scales_gmem, parts in (
            (keys_gmem, key_scales_gmem, _rotated(key, cos, sin)),
            (values_gmem, value_scales_gmem, value),
        ):
            a, b = (
                plgpu.layout_cast(lax.broadcast_in_dim(x.astype(jnp.float32), shape, [1]), layout)
                for x in parts
            )
            numbers, scale = _quantized(jnp.where(is_first, a, b), gmem.dtype)
            gmem[slot, head, at] = numbers
            scales_gmem[slot, head, at] = scale


def _rotated(halves, cos, sin):
    """The halves of a vector after RoPE, in their dtype."""
    a, b = (x.astype(jnp.float32) for x in halves)
    return [x.astype(halves[0].dtype) for x in (a * cos - b * sin, b * cos + a * sin)]


def _quantized(x, dtype):
    """A vector in 8 bits, and its scale; as `qarray.quantize`."""
    floating = jnp.issubdtype(dtype, jnp.floating)
    limit = float(jnp.finfo(dtype).max if floating else jnp.iinfo(dtype).max)
    largest = jnp.max(jnp.max(jnp.abs(x), axis=1))
    scale = jnp.maximum(largest / limit, float(jnp.finfo(jnp.float32).tiny))
    x = x / scale
    if not floating:
        # To the nearest integer, and halves to the even one.
        x = ((x + ROUND) - ROUND).astype(jnp.int32)
    return x.astype(dtype), scale


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
        kernel_name="append",
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

    *queries, key, value = projected
    block = row * blocks.per_batch_row + lax.div(token, blocks.tokens)
    first = lax.rem(token, blocks.tokens) * blocks.group
    for i, parts in enumerate(queries):
        for part, x in zip(halves, _rotated(parts, cos, sin), strict=True):
            q_gmem[block, head, first + i, part] = x

    @pl.when(appended)
    def _():
        slot = row if slots_gmem is None else slots_gmem[row]
        for gmem, parts in ((keys_gmem, _rotated(key, cos, sin)), (values_gmem, value)):
            for part, x in zip(halves, parts, strict=True):
                gmem[slot, head, at, part] = x
