"""Appending tokens to a cache and attending to them: in steps and by the kernel, against plain loops.

B slots, T tokens, K kv heads, G query heads per kv head, D head
"""

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.attention.test_contract import TOLERANCE

from moss_jax.ops.attention import append_and_attend
from moss_jax.ops.rotary import Rotation

CAPACITY = 40


def inputs(T, *, B=2, K=2, G=2, D=64, rows=48, dtype="bfloat16", seed=0):
    """qkv, rotation, keys and values; what lies beyond the capacity is NaN."""
    rng = np.random.default_rng(seed)
    qkv, keys, values = (
        np.array(jnp.asarray(rng.standard_normal(shape), dtype))
        for shape in ((B, T, K, G + 2, D), (B, K, rows, D), (B, K, rows, D))
    )
    angles = rng.uniform(0, 6, (B, T, D // 2)).astype(np.float32)
    keys[:, :, CAPACITY:] = values[:, :, CAPACITY:] = np.nan
    return qkv, Rotation(np.cos(angles), np.sin(angles)), keys, values


def expected(qkv, by, keys, values, start, count):
    """In float64, a token at a time."""
    qkv, keys, values = (np.float64(np.float32(x)) for x in (qkv, keys, values))
    B, T, K, N, D = qkv.shape
    out = np.zeros((B, T, K, N - 2, D))

    def rotated(x, b, t):
        a, c = np.split(x, 2, axis=-1)
        return np.concatenate([a * by.cos[b, t] - c * by.sin[b, t], c * by.cos[b, t] + a * by.sin[b, t]], -1)

    for b in range(B):
        for t in range(count[b]):
            end = min(start[b] + t + 1, CAPACITY)
            if start[b] + t < CAPACITY:
                keys[b, :, start[b] + t] = rotated(qkv[b, t, :, -2], b, t)
                values[b, :, start[b] + t] = qkv[b, t, :, -1]
            for k in range(K):
                scores = rotated(qkv[b, t, k, :-2], b, t) @ keys[b, k, :end].T / np.sqrt(D)
                weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
                out[b, t, k] = weights / weights.sum(axis=-1, keepdims=True) @ values[b, k, :end]
    return out.reshape(B, T, -1, D), keys, values


def check(implementation, start, count, T, **sizes):
    dtype = sizes.get("dtype", "bfloat16")
    arrays = inputs(T, **sizes)
    start, count = np.int32(start), np.int32(count)
    given = jax.tree.map(jnp.asarray, (*arrays, start, count))
    found = append_and_attend(*given, capacity=CAPACITY, implementation=implementation)
    exact = expected(*arrays, start, count)
    tolerance = TOLERANCE[dtype][0]
    for what, actual, wanted in zip(("attended", "keys", "values"), found, exact, strict=True):
        actual = np.float64(np.float32(actual))
        if what != "attended":
            # What lies beyond the capacity is anyone's.
            actual, wanted = actual[:, :, :CAPACITY], wanted[:, :, :CAPACITY]
        np.testing.assert_allclose(actual, wanted, atol=tolerance, rtol=tolerance, err_msg=what)


# Of two slots: tokens held and appended. One stands still, is full, or has no room for all.
CASES = [
    ((3, 0), (1, 1), 1),
    ((17, 5), (1, 0), 1),
    ((CAPACITY, CAPACITY - 1), (1, 1), 1),
    ((0, 30), (3, 5), 5),
    ((CAPACITY - 2, 7), (6, 0), 6),
]


@pytest.mark.parametrize(("start", "count", "T"), CASES)
def test_in_steps(start, count, T):
    check("xla", start, count, T, dtype="float32")


@pytest.mark.parametrize(("start", "count", "T"), [*CASES, ((0, 3), (37, 20), 37)])
def test_kernel(start, count, T):
    """The last takes more rows than one block has, and the last block is not full."""
    with interpreted.on_gpu():
        check("mosaic_gpu", start, count, T)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 2, 4, 16, 40, 64])
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "xla"])
def test_on_gpu(implementation, T):
    check(implementation, (0, CAPACITY - 20), (T, min(T, 3)), T, K=8, G=4, D=128)
    check(implementation, (CAPACITY - 1, 2), (T, 0), T, K=8, G=4, D=128)


def test_a_cache_has_a_row_to_spare():
    with pytest.raises(ValueError, match="at least 49 rows, not 48"):
        append_and_attend(*inputs(1), np.int32([0, 0]), np.int32([1, 1]), capacity=48)
