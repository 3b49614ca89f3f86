"""The definition of the op: plain float32, every score in memory.

B batch/slot, T query tokens, S keys, K kv heads, G query heads per kv head, H = K * G, D head
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.attention.arguments import Arguments


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """The reference takes everything."""
    del arguments, platform
    return None


def attend(a: Arguments) -> Float[Array, "B T H D"]:
    """Computes the op in float32 at the highest matmul precision."""
    B, T, H, D = a.q.shape
    K, S = a.k.shape[1:3]
    start, end = a.bounds
    keys = jnp.arange(S)
    seen = (start[..., None] <= keys) & (keys < end[..., None])  # [B, T, S]
    used = seen.any(axis=1)[:, None, :, None]  # [B, 1, S, 1]
    # What no query sees may be NaN, and 0 * NaN would spoil the sums.
    k = jnp.where(used, _wide(a.k, a.k_scale), 0)
    v = jnp.where(used, _wide(a.v, a.v_scale), 0)
    q = a.q.astype(jnp.float32).reshape(B, T, K, H // K, D)
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("BTKGD,BKSD->BKGTS", q, k) * a.scale
        if a.bias is not None:
            scores += jnp.where(used[:, 0, :, 0], a.bias, 0)[:, None, None, None, :]
        # This is not -inf because a row without keys would then be -inf - -inf = NaN.
        scores = jnp.where(seen[:, None, None], scores, -1e30)
        weights = jnp.where(seen[:, None, None], jax.nn.softmax(scores, axis=-1), 0)
        out = jnp.einsum("BKGTS,BKSD->BTKGD", weights, v)
    return out.reshape(B, T, H, D).astype(a.q.dtype)


def _wide(x: Float[Array, "B K S D"], scale: Float[Array, "B K S"] | None) -> Float[Array, "B K S D"]:
    """What the numbers of K or V stand for, in float32."""
    x = x.astype(jnp.float32)
    return x if scale is None else x * scale[..., None]
