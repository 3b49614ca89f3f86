"""Appending tokens to a KV cache and attending to it: op by op and by the fused kernel, against plain loops.

B slots, T tokens, K kv heads, G query heads per kv head, D head
"""

import functools

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.attention import exact
from ops.attention.exact import Exact, close

from moss_jax.ops.attention import append_and_attend
from moss_jax.ops.attention.mosaic_gpu import DecodeConfig
from moss_jax.ops.rotary import Rotation

CAPACITY = 40


def inputs(T, *, B=2, K=2, G=2, D=64, rows=48, dtype="bfloat16", seed=0):
    """qkv, rotation, keys and values; the rows beyond the capacity are NaN."""
    rng = np.random.default_rng(seed)
    qkv, keys, values = (
        np.array(jnp.asarray(rng.standard_normal(shape), dtype))
        for shape in ((B, T, K, G + 2, D), (B, K, rows, D), (B, K, rows, D))
    )
    angles = rng.uniform(0, 6, (B, T, D // 2)).astype(np.float32)
    keys[:, :, CAPACITY:] = values[:, :, CAPACITY:] = np.nan
    return qkv, Rotation(np.cos(angles), np.sin(angles)), keys, values


def expected(qkv, rotation, keys, values, start, count):
    """Output, queries, and keys and values below the capacity, token by token, rounded as they are stored."""
    dtype = qkv.dtype
    B, T, D = *qkv.shape[:2], qkv.shape[-1]
    keys, values = keys.copy(), values.copy()

    def rotated(x, b, t):
        a, c = np.split(np.float64(x), 2, axis=-1)
        cos, sin = np.float64(rotation.cos[b, t]), np.float64(rotation.sin[b, t])
        return np.concatenate([a * cos - c * sin, c * cos + a * sin], -1).astype(dtype)

    q = np.stack([[rotated(qkv[b, t, :, :-2], b, t) for t in range(T)] for b in range(B)])
    end = np.zeros((B, T), int)
    for b in range(B):
        for t in range(count[b]):
            end[b, t] = min(start[b] + t + 1, CAPACITY)
            if start[b] + t < CAPACITY:
                keys[b, :, start[b] + t] = rotated(qkv[b, t, :, -2], b, t)
                values[b, :, start[b] + t] = qkv[b, t, :, -1]
    q, keys, values = q.reshape(B, T, -1, D), keys[:, :, :CAPACITY], values[:, :, :CAPACITY]
    return exact.attend(q, keys, values, None, 0 * end, end, D**-0.5), q, keys, values


def check(start, count, T, *, implementation=None, config=None, **sizes):
    arrays = inputs(T, **sizes)
    dtype = arrays[0].dtype
    given = jax.tree.map(jnp.asarray, (*arrays, np.int32(start), np.int32(count)))
    call = functools.partial(
        append_and_attend, capacity=CAPACITY, implementation=implementation, config=config
    )
    out, *found = call(*given)
    wanted, q, keys, values = expected(*arrays, start, count)
    share = exact.tolerance(dtype, q, keys, q.shape[-1] ** -0.5)
    # Rotated in float32, at most about one number of a vector is rounded to the other neighbour.
    unit = float(jnp.finfo(dtype).eps)
    score_error = (
        2 * unit * np.abs(np.float64(q)).max() * np.abs(np.float64(keys)).max() * q.shape[-1] ** -0.5
    )
    close(out, wanted, share + 2 * score_error, "output")
    for what, actual, of in zip(("keys", "values"), found, (keys, values), strict=True):
        of = np.float64(of)
        # A rotated number is a sum of two products, each with a magnitude below its vector's.
        magnitude = np.abs(of) + (np.linalg.norm(of, axis=-1, keepdims=True) if what == "keys" else 0)
        close(actual[:, :, :CAPACITY], Exact(of, magnitude), unit, what)


# Of two slots: tokens held and appended. One stands still, is full, or cannot take all.
CASES = [
    ((3, 0), (1, 1), 1),
    ((17, 5), (1, 0), 1),
    ((CAPACITY, CAPACITY - 1), (1, 1), 1),
    ((0, 30), (3, 5), 5),
    ((CAPACITY - 2, 7), (6, 0), 6),
]


@pytest.mark.parametrize(("start", "count", "T"), CASES)
def test_op_by_op(start, count, T):
    check(start, count, T, dtype="float32")


@pytest.mark.parametrize(("start", "count", "T"), [*CASES[1:3], CASES[4], ((0, 3), (37, 20), 37)])
def test_kernel(start, count, T):
    """The last takes more rows than one block has, and the last block is not full."""
    with interpreted.on_gpu():
        check(start, count, T, config=DecodeConfig())


@pytest.mark.gpu
@pytest.mark.parametrize(("implementation", "T"), [(None, 1), (None, 5), (None, 40), ("xla", 5)])
def test_on_gpu(implementation, T):
    config = DecodeConfig() if implementation is None else None
    hold = functools.partial(check, implementation=implementation, config=config, K=8, G=4, D=128)
    hold((0, CAPACITY - 20), (T, min(T, 3)), T)
    hold((CAPACITY - 1, 2), (T, 0), T)


def test_a_cache_has_a_row_to_spare():
    with pytest.raises(ValueError, match="at least 49 rows, not 48"):
        append_and_attend(*inputs(1), np.int32([0, 0]), np.int32([1, 1]), capacity=48)
