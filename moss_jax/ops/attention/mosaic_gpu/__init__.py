"""Attention in Pallas for NVIDIA's Hopper GPUs (Mosaic GPU): few queries over a long bank, many queries, and
all positions of a fused projection.

B batch/slot, T query tokens, S keys, K kv heads, G query heads per kv head, H = K * G, D head,
P positions
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moss_jax.ops.attention import tuning
from moss_jax.ops.attention.arguments import Arguments, KeyRange, Projection, no_gradients
from moss_jax.ops.attention.mosaic_gpu.append import WARP, rotate_and_append
from moss_jax.ops.attention.mosaic_gpu.bank import ROWS, Blocks, DecodeConfig
from moss_jax.ops.attention.mosaic_gpu.decode import decode, decode_blocks
from moss_jax.ops.attention.mosaic_gpu.decode_quantized import decode_quantized
from moss_jax.ops.attention.mosaic_gpu.dense import default_config, dense
from moss_jax.ops.attention.mosaic_gpu.dense import unsupported as unsupported_by_dense
from moss_jax.ops.attention.mosaic_gpu.staircase import StaircaseConfig, staircase
from moss_jax.ops.mosaic_gpu import hopper
from moss_jax.ops.rotary import Rotation

# Queries that share a kv head, up to which the kernel for few queries is the faster: the other one walks the
# keys without splitting them.
BANK_ROWS = 4 * ROWS


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
        return f"head_dim {q.shape[-1]} is not a multiple of {unit} up to 128, the tensor core's tiles"
    if arguments.quantized and _rows(arguments) > ROWS:
        return f"it takes K and V in {k.dtype} for at most {ROWS} queries a kv head, not {_rows(arguments)}"
    return None


def attend(a: Arguments) -> Float[Array, "B T H D"]:
    """Computes the op; differentiable in q, k, v and bias if K and V are not quantised."""
    group = a.q.shape[2] // a.k.shape[1]
    if _rows(a) > BANK_ROWS or group > ROWS:
        return staircase(a, _config("staircase", StaircaseConfig(), a))
    config = _config("decode", DecodeConfig(block_kv=128 if a.quantized else 64), a)
    return _decode(config, a.scale, a.q, a.k, a.v, a.bias, *a.bounds, a.k_scale, a.v_scale)


def unsupported_projection(projection: Projection, out_dtype: jnp.dtype, platform: str) -> str | None:
    """Why no kernel here can take a fused projection as it lies; None if one can."""
    return hopper.unsupported(platform, whole=False) or unsupported_by_dense(projection, out_dtype)


def attend_projection(projection: Projection, out_dtype: jnp.dtype) -> Float[Array, "B P H D"]:
    """Attention of every position to every position; forward only."""
    return dense(projection, default_config(projection), out_dtype)


def unsupported_append(a: Arguments, platform: str) -> str | None:
    """Why no kernel here can append tokens before they attend; None if one can.

    Args:
      a: the attention that follows, whose q need have no more than a shape and a dtype.
    """
    if reason := unsupported(a, platform):
        return reason
    if a.quantized:
        return f"it appends in q's dtype, not in {a.k.dtype}"
    if _rows(a) > BANK_ROWS or a.q.shape[2] // a.k.shape[1] > ROWS:
        return f"it takes at most {BANK_ROWS} queries a kv head, not {_rows(a)}"
    if a.q.shape[-1] % (2 * WARP):
        return f"head_dim {a.q.shape[-1]} is not a multiple of {2 * WARP}, a warp's pairs"
    return None


def append_and_attend(
    qkv: Float[Array, "B T K G+2 D"],
    by: Rotation,
    a: Arguments,
    start: Int[Array, " B"],
    count: Int[Array, " B"],
    capacity: int,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B K S D"], Float[Array, "B K S D"]]:
    """Appends keys and values and attends to them; forward only. Of `a`, q need have only a shape."""
    (B, T, H, _), K = a.q.shape, a.k.shape[1]
    blocks = Blocks(B, T, K, H // K)
    q, k, v = rotate_and_append(qkv, by, a.k, a.v, start, count, capacity=capacity, blocks=blocks)
    config = _config("decode", DecodeConfig(), a)
    return decode_blocks(q, k, v, a.bounds, None, a.scale, blocks, config), k, v


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decode(config, scale, q, k, v, bias, start, end, k_scale, v_scale):
    a = Arguments(q, k, v, KeyRange(start, end), bias, scale, causal=False, k_scale=k_scale, v_scale=v_scale)
    return (decode_quantized if a.quantized else decode)(a, config)


def _decode_forward(config, scale, *arrays):
    return _decode(config, scale, *arrays), arrays


def _decode_backward(config, scale, arrays, d_out):
    """Through the other kernel, which has a backward pass."""
    del config
    q, k, v, bias, start, end, k_scale, _ = arrays
    if k_scale is not None:
        raise no_gradients(k.dtype)

    def many(q, k, v, bias):
        a = Arguments(q, k, v, KeyRange(start, end), bias, scale, causal=False)
        return staircase(a, _config("staircase", StaircaseConfig(), a))

    return *jax.vjp(many, q, k, v, bias)[1](d_out), None, None, None, None


_decode.defvjp(_decode_forward, _decode_backward)


def _config(kernel: str, default, a: Arguments):
    kind = jax.devices()[0].device_kind
    return tuning.lookup(f"mosaic_gpu.{kernel}", default, kind, **tuning.shape_of(a))


def _rows(a: Arguments) -> int:
    """Queries that share a kv head."""
    return a.q.shape[1] * a.q.shape[2] // a.k.shape[1]
