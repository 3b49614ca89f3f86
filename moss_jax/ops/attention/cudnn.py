"""cuDNN's fused FlashAttention, for full or causal attention.

B batch/slot, T query tokens, S keys, K kv heads, H query heads, D head
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.attention.base import Arguments
from moss_jax.ops.qarray import QArray


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """Why cuDNN cannot take these arguments; None if it can."""
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, and this is {platform}"
    if arguments.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {arguments.q.dtype}"
    if {arguments.k.dtype, arguments.v.dtype} != {arguments.q.dtype}:
        return f"q, k and v must have one dtype, not {arguments.q.dtype} and {arguments.k.dtype}"
    if arguments.kv_range is not None:
        return "it has no range of keys per query"
    if arguments.slots is not None:
        return "each of its rows reads keys and values of its own, not those of a slot that it names"
    if arguments.bias is not None:
        return "a bias per key would have to be materialised for all queries"
    queries, keys = arguments.q.shape[1], arguments.k.shape[2]
    if queries % 2 or keys % 2:
        return f"its backward pass needs even numbers of queries and keys, not {queries} and {keys}"
    head_dim = arguments.q.shape[-1]
    if head_dim % 8 or head_dim > 128:
        return f"head_dim {head_dim} is not a multiple of 8 up to 128"
    return None


def apply(a: Arguments) -> Float[Array, "B T H D"]:
    """Computes the op with `jax.nn.dot_product_attention`."""
    assert not isinstance(a.k, QArray)
    assert not isinstance(a.v, QArray)
    return jax.nn.dot_product_attention(
        a.q,
        a.k.swapaxes(1, 2),
        a.v.swapaxes(1, 2),
        scale=a.scale,
        is_causal=a.causal,
        implementation="cudnn",
    )
