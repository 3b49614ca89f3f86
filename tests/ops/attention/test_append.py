"""Appending tokens to a KV cache and attending to it: op by op and by the fused kernel, against plain loops.

B slots, R rows, T tokens of a row, K kv heads, G query heads per kv head, D head
"""

import functools

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.attention import exact
from ops.attention.exact import Exact, close

from moss_jax.ops.attention import append
from moss_jax.ops.attention.mosaic_gpu import DecodeConfig
from moss_jax.ops.qarray import DTYPES, dequantize, quantize
from moss_jax.ops.rotary import Rotation

CAPACITY = 40


def append_and_attend(*arrays, **options):
    """Output, keys and values of one call that appends and attends."""
    appended = append(*arrays, **options)
    return appended.attend(appended.keys, appended.values), appended.keys, appended.values


def inputs(T, *, R=2, B=2, K=2, G=2, D=64, places=48, dtype="bfloat16", seed=0):
    """qkv, rotation, keys and values; what the cache has beyond the capacity is NaN."""
    rng = np.random.default_rng(seed)
    qkv, keys, values = (
        np.array(jnp.asarray(rng.standard_normal(shape), dtype))
        for shape in ((R, T, K, G + 2, D), (B, K, places, D), (B, K, places, D))
    )
    angles = rng.uniform(0, 6, (R, T, D // 2)).astype(np.float32)
    keys[:, :, CAPACITY:] = values[:, :, CAPACITY:] = np.nan
    return qkv, Rotation(np.cos(angles), np.sin(angles)), keys, values


def expected(qkv, rotation, keys, values, start, count, slots=None):
    """Output, queries, and keys and values below the capacity, token by token, rounded as they are stored."""
    dtype = qkv.dtype
    R, T, D = *qkv.shape[:2], qkv.shape[-1]
    slots = list(range(R)) if slots is None else list(slots)
    keys, values = keys.copy(), values.copy()

    def rotated(x, r, t):
        a, c = np.split(np.float64(x), 2, axis=-1)
        cos, sin = np.float64(rotation.cos[r, t]), np.float64(rotation.sin[r, t])
        return np.concatenate([a * cos - c * sin, c * cos + a * sin], -1).astype(dtype)

    q = np.stack([[rotated(qkv[r, t, :, :-2], r, t) for t in range(T)] for r in range(R)])
    end = np.zeros((R, T), int)
    for r, slot in enumerate(slots):
        for t in range(count[r]):
            end[r, t] = min(start[r] + t + 1, CAPACITY)
            if start[r] + t < CAPACITY:
                keys[slot, :, start[r] + t] = rotated(qkv[r, t, :, -2], r, t)
                values[slot, :, start[r] + t] = qkv[r, t, :, -1]
    q, keys, values = q.reshape(R, T, -1, D), keys[:, :, :CAPACITY], values[:, :, :CAPACITY]
    out = exact.attend(q, keys[slots], values[slots], None, 0 * end, end, D**-0.5)
    return out, q, keys, values


def check(start, count, T, slots=None, *, implementation=None, config=None, **sizes):
    arrays = inputs(T, R=len(start), **sizes)
    dtype = arrays[0].dtype
    given = jax.tree.map(jnp.asarray, (*arrays, np.int32(start), np.int32(count)))
    call = functools.partial(
        append_and_attend, capacity=CAPACITY, implementation=implementation, config=config
    )
    out, *found = call(*given, slots=None if slots is None else jnp.int32(slots))
    wanted, q, keys, values = expected(*arrays, start, count, slots)
    assert not np.asarray(out)[np.arange(T) >= np.array(count)[:, None]].any()
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


# Rows of three slots: where they begin, tokens appended, T, and their slots.
SLOT_CASES = {
    "one token each, and rows without any": ((5, 7, 0, 0, 31), (1, 1, 0, 0, 1), 1, (2, 0, 0, 0, 1)),
    "one row": ((9,), (1,), 1, (1,)),
    "three chunks of a slot beside rows of one token": (
        (3, 20, 8, 0, 12, 16),
        (1, 1, 4, 0, 4, 2),
        4,
        (2, 0, 1, 0, 1, 1),
    ),
    "chunks in another order": ((12, 0, 8), (3, 4, 4), 4, (0, 2, 0)),
    "beyond the capacity": ((CAPACITY - 6, CAPACITY - 2, CAPACITY + 2), (4, 4, 3), 4, (1, 1, 1)),
}


@pytest.mark.parametrize("case", SLOT_CASES.values(), ids=SLOT_CASES)
def test_rows_with_slots(case):
    check(*case, dtype="float32", B=3)


@pytest.mark.parametrize("case", SLOT_CASES.values(), ids=SLOT_CASES)
def test_kernel_with_slots(case):
    with interpreted.on_gpu():
        check(*case, config=DecodeConfig(), B=3, K=1)


def split(x, chunks):
    """Rows cut into chunks that are rows of their own."""
    return x.reshape(len(x) * chunks, -1, *x.shape[2:])


def test_chunks_of_a_slot_are_one_longer_row():
    qkv, rotation, keys, values = inputs(12, R=1, B=3, dtype="float32")
    start, count, slot = np.int32([7]), np.int32([11]), np.int32([2])
    wanted, q, *cache = expected(qkv, rotation, keys, values, start, count, slot)
    out, *found = append_and_attend(
        *jax.tree.map(jnp.asarray, (split(qkv, 3), Rotation(*(split(x, 3) for x in rotation)), keys, values)),
        np.int32([7, 11, 15]),
        np.int32([4, 4, 3]),
        slots=slot.repeat(3),
        capacity=CAPACITY,
    )
    share = exact.tolerance("float32", q, cache[0], q.shape[-1] ** -0.5, score_eps=2.0**-21)
    close(out.reshape(1, 12, *out.shape[2:]), wanted, share, "output")
    for actual, of in zip(found, cache, strict=True):
        np.testing.assert_allclose(actual[:, :, :CAPACITY], of, rtol=0, atol=2.0**-20 * np.abs(of).max())


@pytest.mark.parametrize("T", [1, 5])
def test_rows_of_slots_in_order_are_rows_without(T):
    """Bit for bit."""
    given = (*inputs(T), np.int32([3, CAPACITY - 2]), np.int32([T, T - 1]))
    given = jax.tree.map(jnp.asarray, given)
    found = [append_and_attend(*given, slots=slots, capacity=CAPACITY) for slots in (None, jnp.arange(2))]
    for x, y in zip(
        *([out, keys[:, :, :CAPACITY], values[:, :, :CAPACITY]] for out, keys, values in found), strict=True
    ):
        np.testing.assert_array_equal(np.float32(x), np.float32(y))


def check_8_bits(stored, start, count, T, slots, *, dtype="float32", config=None, **sizes):
    """Each new vector is quantized alone, all others stay, and tokens attend to what is stored."""
    qkv, rotation, *cache = inputs(T, R=len(start), dtype=dtype, **sizes)
    cache = [quantize(jnp.float32(np.nan_to_num(np.float32(x))), DTYPES[stored], axes=3) for x in cache]
    given = jax.tree.map(jnp.asarray, (qkv, rotation)), (np.int32(start), np.int32(count))
    options = {"slots": None if slots is None else jnp.int32(slots), "capacity": CAPACITY}
    wide = list(map(dequantize, cache))
    out, *found = append_and_attend(*given[0], *cache, *given[1], **options, config=config)
    _, *plain = append_and_attend(*given[0], *wide, *given[1], **options, implementation="xla")
    # A rotated number may be rounded to the other neighbour, in the dtype and then in 8 bits.
    unit = float(jnp.finfo(dtype).eps)
    for before, after, old, new in zip(cache, found, wide, plain, strict=True):
        is_new = (np.asarray(new) != np.asarray(old)).any(axis=-1)[:, :, :CAPACITY]
        stored_alone = quantize(new, after.dtype, axes=3)
        for x, y in ((before, ~is_new), (stored_alone, is_new)):
            scales, numbers = (
                [np.float32(z)[:, :, :CAPACITY][y] for z in pair]
                for pair in ((after.scale, x.scale), (after.values, x.values))
            )
            np.testing.assert_allclose(*scales, rtol=0 if x is before else max(1e-6, unit))
            steps = np.abs(np.subtract(*numbers))
            assert steps.max(initial=0) <= (0 if x is before else 2 if stored == "int8" else 32)
    unused = np.zeros(wide[0].shape, qkv.dtype)
    _, q, *_ = expected(qkv, rotation, unused, unused, start, count, slots)
    token, position = np.arange(T), np.array(start)[:, None] + np.arange(T)
    end = np.where(token < np.array(count)[:, None], np.minimum(position + 1, CAPACITY), 0)
    of_rows = list(range(len(start)) if slots is None else slots)
    keys, values = (np.asarray(dequantize(x))[of_rows, :, :CAPACITY] for x in found)
    scale = q.shape[-1] ** -0.5
    wanted = exact.attend(np.float32(q), keys, values, None, 0 * end, end, scale)
    if dtype == "float32":
        share = exact.tolerance("float32", q, keys, scale, score_eps=2.0**-21)
    else:
        share = exact.tolerance(dtype, q, keys, scale)
        share += 2 * (2 * unit * np.abs(np.float64(q)).max() * np.abs(keys).max() * scale)
    close(out, wanted, share, "output")


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("case", [*((*case, None) for case in CASES), *SLOT_CASES.values()], ids=str)
def test_a_cache_in_8_bits(stored, case):
    check_8_bits(stored, *case, B=2 if case[-1] is None else 3)


EIGHT_BIT_KERNEL = [(*CASES[1], None), (*CASES[4], None), SLOT_CASES["beyond the capacity"]]


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("case", EIGHT_BIT_KERNEL, ids=str)
def test_kernel_in_8_bits(stored, case):
    sizes = {"D": 128, "K": 1, "B": 2 if case[-1] is None else 3}
    with interpreted.on_gpu():
        check_8_bits(stored, *case, dtype="bfloat16", config=DecodeConfig(block_kv=128), places=128, **sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("case", [*((*case, None) for case in CASES), *SLOT_CASES.values()], ids=str)
def test_in_8_bits_on_gpu(stored, case):
    check_8_bits(
        stored,
        *case,
        dtype="bfloat16",
        config=DecodeConfig(block_kv=128),
        D=128,
        places=128,
        B=2 if case[-1] is None else 3,
    )


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


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("case", SLOT_CASES.values(), ids=SLOT_CASES)
def test_slots_on_gpu(case, implementation):
    config = DecodeConfig() if implementation is None else None
    check(*case, implementation=implementation, config=config, B=3, K=8, G=4, D=128)


def test_a_cache_has_a_row_to_spare():
    with pytest.raises(ValueError, match="at least 49 rows, not 48"):
        append_and_attend(*inputs(1), np.int32([0, 0]), np.int32([1, 1]), capacity=48)


def test_rows_that_do_not_fit():
    three, two = np.int32([0, 1, 0]), np.int32([1, 1])
    with pytest.raises(ValueError, match=r"one entry for each of 2 rows; got \(3, 1, 2, 4, 64\)"):
        append_and_attend(*inputs(1, R=3), three, three, capacity=CAPACITY)
    with pytest.raises(ValueError, match=r"each of 3 rows; .* \(3,\) and \(2,\)"):
        append_and_attend(*inputs(1, R=3), three, two, slots=three, capacity=CAPACITY)
    with pytest.raises(ValueError, match=r"an integer a row, \[R\] = \(3,\); got int32 \(2,\)"):
        append_and_attend(*inputs(1, R=3), three, three, slots=two, capacity=CAPACITY)
