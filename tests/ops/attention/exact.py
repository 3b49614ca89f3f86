"""Attention in float64 NumPy, and bounds of what rounding may do to it.

A result is a sum of products of which each factor is rounded a few times. So its error is at most a small
multiple of the unit roundoff times its magnitude: the same sum over absolute values. The many roundings of an
output's weights are independent, so with many keys most of them cancel out; six standard deviations are
allowed for them.

B batch, T queries, S keys, K kv heads, G query heads per kv head, H = K * G, D head
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moss_jax.ops.attention import Arguments
from moss_jax.ops.qarray import dequantize

# Roundings of a factor: of K and V when they are dequantised, of weights, of gradients of scores and the
# outputs that they are made from, of results. No implementation has more of them.
ROUNDINGS = 8
EPS32 = 2.0**-23
# Hopper's tensor core adds products of numbers in 8 bits with 14 bits.
EPS_FP8_SUM = 2.0**-13


class Exact(NamedTuple):
    """A result, and its magnitude."""

    value: np.ndarray
    magnitude: np.ndarray


def attend(q, k, v, bias, start, end, scale) -> Exact:
    """Attention."""
    return _run(q, k, v, bias, start, end, scale)[0]


def gradients(q, k, v, bias, start, end, scale, d_out) -> tuple[Exact, ...]:
    """Gradients of q, k, v and bias."""
    return _run(q, k, v, bias, start, end, scale, d_out)[1:]


def _run(q, k, v, bias, start, end, scale, d_out=None):
    q, k, v, d_out = (None if x is None else np.float64(x) for x in (q, k, v, d_out))
    bias = np.zeros((len(k), k.shape[2])) if bias is None else np.float64(bias)
    results = out, d_q, d_k, d_v, d_bias = [Exact(0 * x, 0 * x) for x in (q, q, k, v, np.zeros_like(bias))]
    group, key = q.shape[2] // k.shape[1], np.arange(k.shape[2])
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        kv = b, h // group
        # [T, D], [S, D]; a bias of -inf hides a key.
        query, keys, values = q[b, :, h], k[kv], v[kv]
        visible = (start[b, :, None] <= key) & (key < end[b, :, None]) & np.isfinite(bias[b])
        scores = np.where(visible, scale * query @ keys.T + np.where(visible, bias[b], 0), -np.inf)
        largest = scores.max(axis=1, keepdims=True)
        weights = np.exp(scores - np.where(np.isfinite(largest), largest, 0))
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)  # [T, S]
        out.value[b, :, h], out.magnitude[b, :, h] = _weigh(weights, values)
        if d_out is None:
            continue
        d_o = d_out[b, :, h]
        d_weights, size = d_o @ values.T, abs(d_o) @ abs(values).T
        d_scores = weights * (d_weights - (weights * d_weights).sum(axis=1, keepdims=True))
        size = weights * (size + (weights * size).sum(axis=1, keepdims=True))
        for i, (d_s, q_, k_, d_) in enumerate(
            ((d_scores, query, keys, d_o), (size, abs(query), abs(keys), abs(d_o)))
        ):
            d_q[i][b, :, h] = scale * d_s @ k_
            d_k[i][kv] += scale * d_s.T @ q_
            d_v[i][kv] += weights.T @ d_
            d_bias[i][b] += d_s.sum(axis=0)
    return results


def _weigh(weights, values) -> Exact:
    value = weights @ values
    deviation = (weights**2 @ values**2) ** 0.5
    return Exact(value, (abs(value) + 6 * deviation).clip(max=weights @ abs(values)))


@jax.jit
def attend_on_device(a: Arguments) -> Exact:
    """Attention in float32, for more keys than NumPy has time for."""
    (B, T, H, D), K = a.q.shape, a.k.shape[1]
    start, end = (x[:, None, None, :, None] for x in a.bounds)
    q = jnp.float32(a.q).reshape(B, T, K, -1, D).transpose(0, 2, 3, 1, 4)
    own = slice(None) if a.slots is None else a.slots
    k, v = (dequantize(x)[own, :, None] for x in (a.k, a.v))
    with jax.default_matmul_precision("highest"):
        scores = a.scale * q @ k.swapaxes(-1, -2)
        if a.bias is not None:
            scores += a.bias[own, None, None, None, :]
        key = jnp.arange(k.shape[-2])
        visible = (start <= key) & (key < end)
        # Softmax of no key at all is NaN; attention over an empty range is 0.
        weights = jnp.where(visible, jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1), 0)
        found = _weigh(weights, v)
    return Exact(*(x.transpose(0, 3, 1, 2, 4).reshape(B, T, H, D) for x in found))


def tolerance(dtype, q, k, scale, *, score_eps=0.0) -> float:
    """Largest error of a result or a gradient, as a share of its magnitude.

    Args:
      dtype: in which weights and results are rounded.
      score_eps: error of a score as a share of the largest one, if not only that of a sum in float32.
    """
    D, S = q.shape[-1], k.shape[2]
    unit = float(jnp.finfo(dtype).eps) / 2
    # No score is larger than this; the error of a score is a relative error of its weight, and of the sum.
    largest = scale * _longest(q) * _longest(k)
    score = math.sqrt(D) * EPS32 * largest
    score += score_eps * largest
    # Sums over keys, and of d_k and d_v over queries, of which there are fewer or as many.
    return ROUNDINGS * unit + 2 * score + math.sqrt(S) * EPS32


def _longest(x) -> float:
    return float(jnp.linalg.norm(jnp.asarray(x, jnp.float32), axis=-1).max())


def close(actual, exact: Exact, share: float, what: str, *, dtype=None):
    """Holds an array to `share` of the magnitude, and to half a unit of its dtype.

    Args:
      dtype: float8_e4m3fn, to which the result was rounded at the end.
    """
    actual = np.asarray(actual, np.float64)
    assert np.isfinite(actual).all(), what
    # The constant is for float16, in which tens of weights may underflow by 2^-25 each.
    allowed = share * exact.magnitude + 1e-5
    if dtype is not None:
        info = jnp.finfo(dtype)
        allowed += np.maximum(abs(exact.value) + allowed, float(info.tiny)) * float(info.eps) / 2
    error = abs(actual - exact.value)
    assert (error <= allowed).all(), f"{what}: {(error / allowed).max():.2f} times what rounding explains"
