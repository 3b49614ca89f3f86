"""Attention in plain JAX, for any platform: whole when its scores are small, else block by block of keys.

The blockwise form keeps a running maximum and sum (Rabe & Staats, arXiv 2112.05682; Dao et al., arXiv
2205.14135), visits only the blocks between the first and the last key that any query sees, and recomputes
the scores in its backward pass, so memory grows with T + S instead of T * S.

B batch/slot, T query tokens, S keys, X a block of keys, K kv heads, G query heads per kv head, D head
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.attention.arguments import QUANTIZED, Arguments, no_gradients

# Scores held at once, in numbers: 128 MiB of float32.
MAX_SCORES = 2**25
MIN_BLOCK = 128


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """XLA takes everything."""
    del arguments, platform
    return None


def attend(a: Arguments) -> Float[Array, "B T H D"]:
    """Computes the op; differentiable in q, k, v and bias."""
    B, T, H, D = a.q.shape
    K, S = a.k.shape[1:3]
    q = a.q.reshape(B, T, K, H // K, D)
    scales = (a.k_scale, a.v_scale)
    out = _attend(block_size(B * H * T, S), a.scale, q, a.k, a.v, scales, a.bias, *a.bounds)
    return out.reshape(B, T, H, D)


def block_size(rows: int, keys: int) -> int:
    """Keys of a block so that `rows` rows of scores stay within `MAX_SCORES`; `keys` if all of them do."""
    if rows * keys <= MAX_SCORES:
        return keys
    return min(keys, max(MIN_BLOCK, MAX_SCORES // rows // MIN_BLOCK * MIN_BLOCK))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(block, scale, q, k, v, scales, bias, start, end):
    return _forward(block, scale, q, k, v, scales, bias, start, end)[0]


def _forward(block, scale, q, k, v, scales, bias, start, end):
    """The output, and what the backward pass needs of it."""
    B, T, K, G, D = q.shape

    def visit(first, carry):
        top, total, out = carry
        scores, _, v_block, _, _ = _block(first, block, scale, q, k, v, scales, bias, start, end)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        # A row that has seen no key yet has top -inf, and -inf - -inf would be NaN.
        shift = jnp.where(jnp.isneginf(new_top), 0, new_top)
        weights = jnp.exp(scores - shift[..., None])
        decay = jnp.exp(top - shift)
        part = jnp.einsum(
            "BKGTX,BKXD->BKGTD", weights.astype(v_block.dtype), v_block, preferred_element_type=jnp.float32
        )
        return new_top, total * decay + weights.sum(axis=-1), out * decay[..., None] + part

    carry = (
        jnp.full((B, K, G, T), -jnp.inf, jnp.float32),
        jnp.zeros((B, K, G, T), jnp.float32),
        jnp.zeros((B, K, G, T, D), jnp.float32),
    )
    top, total, out = _over_blocks(block, k.shape[2], start, end, visit, carry)
    out = (out / jnp.where(total > 0, total, 1)[..., None]).transpose(0, 3, 1, 2, 4).astype(q.dtype)
    log_total = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1)), jnp.inf)
    return out, (q, k, v, bias, start, end, out, log_total)


def _backward(block, scale, residuals, d_out):
    if residuals[1].dtype.name in QUANTIZED:
        raise no_gradients(residuals[1].dtype)
    q, k, v, bias, start, end, out, log_total = residuals
    d_out = d_out.astype(jnp.float32).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, D]
    mean = (d_out * out.astype(jnp.float32).transpose(0, 2, 3, 1, 4)).sum(axis=-1)
    q32 = q.astype(jnp.float32)

    def visit(first, carry):
        d_q, d_k, d_v, d_bias = carry
        scores, k_block, v_block, at, seen = _block(
            first, block, scale, q, k, v, (None, None), bias, start, end
        )
        k_block = jnp.where(seen.any(axis=1)[:, None, :, None], k_block, 0).astype(jnp.float32)
        weights = jnp.exp(scores - log_total[..., None])  # [B, K, G, T, X]
        d_weights = jnp.einsum("BKGTD,BKXD->BKGTX", d_out, v_block.astype(jnp.float32))
        d_scores = weights * (d_weights - mean[..., None])
        d_q += scale * jnp.einsum("BKGTX,BKXD->BTKGD", d_scores, k_block)
        d_k = _add_at(d_k, at, scale * jnp.einsum("BKGTX,BTKGD->BKXD", d_scores, q32), axis=2)
        d_v = _add_at(d_v, at, jnp.einsum("BKGTX,BKGTD->BKXD", weights, d_out), axis=2)
        if bias is not None:
            d_bias = _add_at(d_bias, at, d_scores.sum(axis=(1, 2, 3)), axis=1)
        return d_q, d_k, d_v, d_bias

    carry = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.zeros(k.shape, jnp.float32),
        jnp.zeros(v.shape, jnp.float32),
        None if bias is None else jnp.zeros(bias.shape, jnp.float32),
    )
    d_q, d_k, d_v, d_bias = _over_blocks(block, k.shape[2], start, end, visit, carry)
    d_bias = None if bias is None else d_bias.astype(bias.dtype)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), (None, None), d_bias, None, None


_attend.defvjp(_forward, _backward)


def _over_blocks(block, num_keys, start, end, visit, carry):
    """Folds `visit(first key, carry)` over the blocks that some query sees."""
    if block == num_keys:
        return visit(0, carry)
    some = start < end
    first = jnp.min(jnp.where(some, start, num_keys)) // block
    last = -(-jnp.max(jnp.where(some, end, 0)) // block)
    return jax.lax.fori_loop(first, last, lambda i, c: visit(i * block, c), carry)


def _block(first, block, scale, q, k, v, scales, bias, start, end):
    """Scores, keys, values, place and visibility of the keys [first, first + block).

    The last block is moved back to end with the keys; those that it then shares with its neighbour count as
    unseen. Unseen keys have score -inf, and values that no query sees are zero, so that 0 * NaN cannot arise.
    """
    at = jnp.minimum(first, k.shape[2] - block)
    k, v = (_vectors(x, s, at, block, q.dtype) for x, s in zip((k, v), scales, strict=True))
    keys = at + jnp.arange(block)
    seen = (jnp.maximum(start, first)[..., None] <= keys) & (keys < end[..., None])  # [B, T, X]
    scores = scale * jnp.einsum("BTKGD,BKXD->BKGTX", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        scores += jax.lax.dynamic_slice_in_dim(bias, at, block, axis=1)[:, None, None, None, :]
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    return scores, k, jnp.where(seen.any(axis=1)[:, None, :, None], v, 0), at, seen


def _vectors(x, scale, at, block, dtype):
    """`block` keys or values from `at` on, in `dtype` if they are stored with scales."""
    x = jax.lax.dynamic_slice_in_dim(x, at, block, axis=2)
    if scale is None:
        return x
    scale = jax.lax.dynamic_slice_in_dim(scale, at, block, axis=2)
    return (x.astype(jnp.float32) * scale[..., None]).astype(dtype)


def _add_at(x, at, update, axis):
    old = jax.lax.dynamic_slice_in_dim(x, at, update.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(x, old + update, at, axis)
