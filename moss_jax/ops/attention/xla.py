"""FlashAttention in plain JAX for any platform: blockwise online softmax, or one block for few scores.

The blockwise form keeps a running maximum and sum for each row (Rabe & Staats, arXiv 2112.05682; Dao et al.,
arXiv 2205.14135), skips the blocks before the first and after the last key that any query sees, and
recomputes the scores in its backward pass, so memory grows with T + S instead of T * S.

R rows of queries, B batch/slot, T query tokens, S keys, X a block of keys, K kv heads, G query heads per kv
head, D head
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.attention.base import Arguments, no_gradients, read_slots
from moss_jax.ops.attention.residuals import tag
from moss_jax.ops.qarray import QArray, dequantize


@dataclasses.dataclass(frozen=True)
class XlaConfig:
    """Block size.

    Attributes:
      max_scores: maximum number of scores per block; by default 128 MiB of float32.
      min_block: minimum number of keys per block.
    """

    max_scores: int = 2**25
    min_block: int = 128

    def block_size(self, rows: int, keys: int) -> int:
        """Keys per block such that `rows` rows of scores stay within `max_scores`; all keys if they fit."""
        if rows * keys <= self.max_scores:
            return keys
        return min(keys, max(self.min_block, self.max_scores // rows // self.min_block * self.min_block))


def apply(a: Arguments, config: XlaConfig | None = None) -> Float[Array, "R T H D"]:
    """Computes the op; differentiable in q, k, v and bias."""
    R, T, H, D = a.q.shape
    K, S = a.k.shape[1:3]
    q = a.q.reshape(R, T, K, H // K, D)
    block = (config or XlaConfig()).block_size(R * H * T, S)
    return _attend(block, a.scale, q, a.k, a.v, a.bias, *a.bounds, a.slots).reshape(R, T, H, D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(block, scale, q, k, v, bias, start, end, slots):
    return _forward(block, scale, q, k, v, bias, start, end, slots)[0]


def _forward(block, scale, q, k, v, bias, start, end, slots):
    """Returns the output, and the residuals for the backward pass."""
    R, T, K, G, D = q.shape

    def attend_block(first, carry):
        row_max, row_sum, out = carry
        scores, _, v_block, _, _ = _block(first, block, scale, q, k, v, bias, start, end, slots)
        new_max = jnp.maximum(row_max, scores.max(axis=-1))
        # A row that has seen no key yet has maximum -inf, and -inf - -inf would be NaN.
        shift = jnp.where(jnp.isneginf(new_max), 0, new_max)
        weights = jnp.exp(scores - shift[..., None])
        rescale = jnp.exp(row_max - shift)
        part = jnp.einsum(
            "RKGTX,RKXD->RKGTD", weights.astype(v_block.dtype), v_block, preferred_element_type=jnp.float32
        )
        return new_max, row_sum * rescale + weights.sum(axis=-1), out * rescale[..., None] + part

    carry = (
        jnp.full((R, K, G, T), -jnp.inf, jnp.float32),
        jnp.zeros((R, K, G, T), jnp.float32),
        jnp.zeros((R, K, G, T, D), jnp.float32),
    )
    row_max, row_sum, out = _over_blocks(block, k.shape[2], start, end, attend_block, carry)
    out = (out / jnp.where(row_sum > 0, row_sum, 1)[..., None]).transpose(0, 3, 1, 2, 4).astype(q.dtype)
    log_sum = jnp.where(row_sum > 0, row_max + jnp.log(jnp.where(row_sum > 0, row_sum, 1)), jnp.inf)
    out, log_sum = tag(out, log_sum)
    return out, (q, k, v, bias, start, end, slots, out, log_sum)


def _backward(block, scale, residuals, d_out):
    q, k, v, bias, start, end, slots, out, log_sum = residuals
    if isinstance(k, QArray):
        raise no_gradients(k.dtype)
    d_out = d_out.astype(jnp.float32).transpose(0, 2, 3, 1, 4)  # [R, K, G, T, D]
    mean = (d_out * out.astype(jnp.float32).transpose(0, 2, 3, 1, 4)).sum(axis=-1)
    q32 = q.astype(jnp.float32)

    def differentiate_block(first, carry):
        d_q, d_k, d_v, d_bias = carry
        scores, k_block, v_block, at, visible = _block(first, block, scale, q, k, v, bias, start, end, slots)
        k_block = jnp.where(visible.any(axis=1)[:, None, :, None], k_block, 0).astype(jnp.float32)
        weights = jnp.exp(scores - log_sum[..., None])  # [R, K, G, T, X]
        d_weights = jnp.einsum("RKGTD,RKXD->RKGTX", d_out, v_block.astype(jnp.float32))
        d_scores = weights * (d_weights - mean[..., None])
        d_q += scale * jnp.einsum("RKGTX,RKXD->RTKGD", d_scores, k_block)
        d_k = _add_at(d_k, at, scale * jnp.einsum("RKGTX,RTKGD->RKXD", d_scores, q32), slots, axis=2)
        d_v = _add_at(d_v, at, jnp.einsum("RKGTX,RKGTD->RKXD", weights, d_out), slots, axis=2)
        if bias is not None:
            d_bias = _add_at(d_bias, at, d_scores.sum(axis=(1, 2, 3)), slots, axis=1)
        return d_q, d_k, d_v, d_bias

    carry = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.zeros(k.shape, jnp.float32),
        jnp.zeros(v.shape, jnp.float32),
        None if bias is None else jnp.zeros(bias.shape, jnp.float32),
    )
    d_q, d_k, d_v, d_bias = _over_blocks(block, k.shape[2], start, end, differentiate_block, carry)
    d_bias = None if bias is None else d_bias.astype(bias.dtype)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), d_bias, None, None, None


_attend.defvjp(_forward, _backward)


def _over_blocks(block, num_keys, start, end, body, carry):
    """Folds `body(first key, carry)` over the blocks that some query sees."""
    if block == num_keys:
        return body(0, carry)
    some = start < end
    first = jnp.min(jnp.where(some, start, num_keys)) // block
    last = -(-jnp.max(jnp.where(some, end, 0)) // block)
    return jax.lax.fori_loop(first, last, lambda i, c: body(i * block, c), carry)


def _block(first, block, scale, q, k, v, bias, start, end, slots):
    """Scores, keys, values, offset and visibility of each row's keys [first, first + block).

    The last block is moved back to end with the keys; those that it then shares with its neighbour are
    masked. Masked keys have score -inf, and values that no query sees are zero, so that 0 * NaN cannot arise.
    """
    at = jnp.minimum(first, k.shape[2] - block)
    k, v = (_vectors(x, at, block, q.dtype, slots) for x in (k, v))
    keys = at + jnp.arange(block)
    visible = (jnp.maximum(start, first)[..., None] <= keys) & (keys < end[..., None])  # [R, T, X]
    scores = scale * jnp.einsum("RTKGD,RKXD->RKGTX", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        block_bias = read_slots(jax.lax.dynamic_slice_in_dim(bias, at, block, axis=1), slots)
        scores += block_bias[:, None, None, None, :]
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    return scores, k, jnp.where(visible.any(axis=1)[:, None, :, None], v, 0), at, visible


def _vectors(x, at, block, dtype, slots):
    """`block` keys or values of each row from `at` on; dequantised to `dtype` if they are a QArray."""

    def cut(x):
        return read_slots(jax.lax.dynamic_slice_in_dim(x, at, block, axis=2), slots)

    if not isinstance(x, QArray):
        return cut(x)
    return dequantize(QArray(cut(x.values), cut(x.scale)), dtype)


def _add_at(x, at, update, slots, axis):
    """Adds what each row contributes to its slot from `at` on."""
    old = jax.lax.dynamic_slice_in_dim(x, at, update.shape[axis], axis)
    new = old + update if slots is None else old.at[slots].add(update)
    return jax.lax.dynamic_update_slice_in_dim(x, new, at, axis)
