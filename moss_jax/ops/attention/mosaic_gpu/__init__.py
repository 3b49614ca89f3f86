"""Attention kernels in Pallas for NVIDIA's Hopper GPUs (Mosaic GPU).

Split-K decode attention (`decode`, `decode_quantized`; `append` is its fused RoPE and KV-cache append),
FlashAttention with a range of keys per query (`staircase`), and dense self-attention straight from a fused
projection (`dense`).

R rows of queries, B batch/slot, T query tokens, S keys, K kv heads, G query heads per kv head, H = K * G,
D head, P positions
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.attention import tuning
from moss_jax.ops.attention.base import (
    AppendArguments,
    Appended,
    Arguments,
    KeyRange,
    SelfAttentionArguments,
    no_gradients,
    no_gradients_by_slot,
)
from moss_jax.ops.attention.mosaic_gpu.append import (
    WARP,
    rotate_and_append,
    rotate_and_append_quantized,
)
from moss_jax.ops.attention.mosaic_gpu.decode import decode_attention, decode_blocks
from moss_jax.ops.attention.mosaic_gpu.decode_quantized import quantized_decode_attention
from moss_jax.ops.attention.mosaic_gpu.dense import DenseConfig, default_config, dense_attention
from moss_jax.ops.attention.mosaic_gpu.dense import unsupported as unsupported_by_dense
from moss_jax.ops.attention.mosaic_gpu.split_k import WGMMA_ROWS, DecodeConfig, QueryBlocks
from moss_jax.ops.attention.mosaic_gpu.staircase import StaircaseConfig, staircase_attention
from moss_jax.ops.dispatch import Unsupported
from moss_jax.ops.mosaic_gpu import hopper
from moss_jax.ops.qarray import QArray

# Number of queries per kv head up to which split-K decode attention is faster: the staircase kernel does not
# split the keys.
MAX_DECODE_ROWS = 4 * WGMMA_ROWS


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """Why these kernels cannot take the arguments; None if they can."""
    if reason := hopper.unsupported(platform, whole=False):
        return reason
    q, k, v = arguments.q, arguments.k, arguments.v
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if k.dtype != v.dtype or not (arguments.quantized or k.dtype == q.dtype):
        names = ", ".join(x.dtype.name for x in (q, k, v))
        return f"q, k and v must have one dtype, or k and v be quantised alike, not {names}"
    unit = 64 if arguments.quantized else 16
    if q.shape[-1] % unit or q.shape[-1] > 128:
        return f"head_dim {q.shape[-1]} is not a multiple of {unit} up to 128, as wgmma's tiles are"
    if arguments.quantized and arguments.group_rows > WGMMA_ROWS:
        return (
            f"it takes K and V in {k.dtype} for at most {WGMMA_ROWS} queries a kv head, "
            f"not {arguments.group_rows}"
        )
    return None


def apply(a: Arguments, config: DecodeConfig | StaircaseConfig | None = None) -> Float[Array, "R T H D"]:
    """Computes the op; differentiable in q, k, v and bias without slots, if K and V are not quantised.

    Args:
      config: selects the kernel, by its class, and its tiling; None for the faster kernel as tuned.

    Raises:
      Unsupported: the config's kernel cannot take the arguments.
    """
    if config is None:
        few = a.group_rows <= MAX_DECODE_ROWS and a.q.shape[2] // a.k.shape[1] <= WGMMA_ROWS
        config = _decode_config(a) if few else _staircase_config(a)
    if isinstance(config, DecodeConfig):
        return _decode(config, a.scale, a.q, a.k, a.v, a.bias, *a.bounds, a.slots)
    if a.quantized:
        raise Unsupported(f"the staircase kernel takes K and V in q's dtype, not in {a.k.dtype}")
    return staircase_attention(a, config)


def unsupported_self_attention(a: SelfAttentionArguments, platform: str) -> str | None:
    """Why the dense kernel cannot take a fused projection; None if it can."""
    if reason := hopper.unsupported(platform, whole=False):
        return reason
    if a.attention not in (None, "mosaic_gpu"):
        return f"{a.attention} is asked for"
    return unsupported_by_dense(a.projection, a.out_dtype)


def self_attention(a: SelfAttentionArguments, config: DenseConfig | None = None) -> Float[Array, "B P H D"]:
    """Attention of every position to every position; forward only."""
    return dense_attention(a.projection, config or default_config(a.projection), a.out_dtype)


def unsupported_append(a: AppendArguments, platform: str) -> str | None:
    """Why the fused append kernel cannot take the arguments; None if it can."""
    if reason := hopper.unsupported(platform):
        return reason
    if a.attention not in (None, "mosaic_gpu"):
        return f"{a.attention} is asked for"
    following = a.following
    if reason := unsupported(following, platform):
        return reason
    (_, _, H, D), K = following.q.shape, a.keys.shape[1]
    if following.group_rows > MAX_DECODE_ROWS or H // K > WGMMA_ROWS:
        return f"it takes at most {MAX_DECODE_ROWS} queries a kv head, not {following.group_rows}"
    if D % (2 * WARP):
        return f"head_dim {D} is not a multiple of {2 * WARP}, a warp's pairs"
    if following.quantized and D != 4 * WARP:
        return f"to a cache in {a.keys.dtype} it appends vectors of {4 * WARP} numbers, not of {D}"
    return None


def append(a: AppendArguments, config: DecodeConfig | None = None) -> Appended:
    """Fused RoPE, append to the cache, and attention; forward only."""
    following = a.following
    (R, T, H, D), K = following.q.shape, a.keys.shape[1]
    if isinstance(a.keys, QArray):
        assert isinstance(a.values, QArray)
        q, k, v = rotate_and_append_quantized(
            a.qkv, a.rotation, a.keys, a.values, a.start, a.count, a.slots, capacity=a.capacity
        )
        q, config = q.reshape(R, T, H, D), config or _decode_config(following)

        def attend_quantized(keys, values):
            given = Arguments(q, keys, values, a.key_range, None, following.scale, slots=a.slots)
            return quantized_decode_attention(given, config)

        return Appended(k, v, attend_quantized)
    blocks = QueryBlocks(R, T, K, H // K)
    q, k, v = rotate_and_append(
        a.qkv, a.rotation, a.keys, a.values, a.start, a.count, a.slots, capacity=a.capacity, blocks=blocks
    )
    config = config or _decode_config(following)

    def attend(keys, values):
        return decode_blocks(q, keys, values, a.key_range, None, a.slots, following.scale, blocks, config)

    return Appended(k, v, attend)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decode(config, scale, q, k, v, bias, start, end, slots):
    a = Arguments(q, k, v, KeyRange(start, end), bias, scale, slots=slots)
    return (quantized_decode_attention if a.quantized else decode_attention)(a, config)


def _decode_forward(config, scale, *arrays):
    return _decode(config, scale, *arrays), arrays


def _decode_backward(config, scale, arrays, d_out):
    """Backward pass of decode attention, computed by the staircase kernel."""
    del config
    q, k, v, bias, start, end, slots = arrays
    if isinstance(k, QArray):
        raise no_gradients(k.dtype)
    if slots is not None:
        raise no_gradients_by_slot()

    def many(q, k, v, bias):
        a = Arguments(q, k, v, KeyRange(start, end), bias, scale)
        return staircase_attention(a, _staircase_config(a))

    return *jax.vjp(many, q, k, v, bias)[1](d_out), None, None, None


_decode.defvjp(_decode_forward, _decode_backward)


def _decode_config(a: Arguments) -> DecodeConfig:
    return _tuned("decode", DecodeConfig(block_kv=128 if a.quantized else 64), a)


def _staircase_config(a: Arguments) -> StaircaseConfig:
    return _tuned("staircase", StaircaseConfig(), a)


def _tuned(kernel: str, default, a: Arguments):
    kind = jax.devices()[0].device_kind
    shape: Any = tuning.shape_of(a)
    return tuning.lookup(f"mosaic_gpu.{kernel}", default, kind, **shape)
