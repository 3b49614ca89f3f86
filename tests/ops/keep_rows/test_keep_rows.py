"""Eviction of rows: each implementation against a loop, bit for bit."""

import functools
import math

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ops.contract import on_cpu, refuses

from moss_jax.ops.keep_rows import KEEP_ROWS, keep_rows
from moss_jax.ops.keep_rows.base import Arguments
from moss_jax.ops.keep_rows.mosaic_gpu import ARRAYS, CHUNK

CAPACITY = 300  # Not a multiple of a chunk.
ROWS = 3 * CHUNK


def inputs(count, *, B=3, K=2, D=64, rows=ROWS, dtype="bfloat16"):
    """Buffers of random bits, as numbers: NaNs among them."""
    bits = np.random.default_rng(0).integers(0, 2**16, (count, B, K, rows, D), np.uint16)
    return list(bits.view(jnp.dtype(dtype)))


def check(kept, slots, *, implementation, buffers, capacity=CAPACITY):
    """Calls with the rows that stay of each slot; other slots, or others' rows, must not change by a bit."""
    padded = np.zeros((len(kept), capacity), np.int32)
    for row, stay in zip(padded, kept, strict=True):
        row[: len(stay)] = stay
    length = np.int32([len(stay) for stay in kept])
    call = functools.partial(keep_rows, implementation=implementation)
    slots = None if slots is None else np.int32(slots)
    with on_cpu(implementation):
        found = call(list(map(jnp.asarray, buffers)), padded, length, slots=slots)
    slots = range(len(kept)) if slots is None else slots
    for x, y in zip(buffers, found, strict=True):
        x, y = (np.asarray(a).view(np.uint16) for a in (x, y))
        for slot, stay in zip(slots, kept, strict=True):
            np.testing.assert_array_equal(y[slot, :, : len(stay)], x[slot][:, stay])
        others = [slot for slot in range(len(x)) if slot not in list(slots)]
        np.testing.assert_array_equal(y[others], x[others])


def dropped(count, *rows):
    return [i for i in range(count) if i not in rows]


# Rows that stay of one slot.
CASES = {
    "none": [],
    "all": dropped(CAPACITY),
    "all but the first": dropped(CAPACITY, 0),
    "all but the last": dropped(CAPACITY, CAPACITY - 1),
    "the last": [CAPACITY - 1],
    "an opening and the end": [*range(140), *range(250, CAPACITY)],
    "every other": list(range(0, CAPACITY, 2)),
    "a chunk": list(range(7, 7 + CHUNK)),
    "one more than a chunk": list(range(150, 151 + CHUNK)),
}


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
@pytest.mark.parametrize("kept", CASES.values(), ids=CASES)
def test_cases(kept, implementation):
    check([kept], [1], implementation=implementation, buffers=inputs(1, K=1))


def test_only_rows_that_stay_have_a_gradient():
    """It is the gather's; rows behind those that stay may contain anything, so theirs doesn't count."""
    kept = np.int32([[1, 4, 5, 0], [0, 2, 3, 7]])
    length = np.int32([3, 4])
    x, weights = np.random.default_rng(1).normal(size=(2, 2, 2, 8, 3)).astype(np.float32)

    def loss(x):
        (new,) = keep_rows([x], kept, length, implementation="xla")
        return jnp.sum(jnp.where((jnp.arange(8) < length[:, None])[:, None, :, None], weights * new**2, 0))

    expected = np.zeros_like(x)
    for slot, count in enumerate(length):
        for new, row in enumerate(kept[slot, :count]):
            expected[slot, :, row] = 2 * weights[slot, :, new] * x[slot, :, row]
    # Products of three numbers in float32.
    np.testing.assert_allclose(jax.grad(loss)(x), expected, rtol=1e-6)


def random_sets(seed, count, capacity=CAPACITY):
    rng = np.random.default_rng(seed)
    return [np.flatnonzero(rng.random(capacity) < share) for share in rng.uniform(0.2, 1, count)]


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
@pytest.mark.parametrize(("slots", "head_dim"), [((2, 0), 64), ((1,), 128), ((1, 2, 0), 32)])
def test_slots_in_any_order(slots, head_dim, implementation):
    buffers = inputs(2, D=head_dim)
    check(random_sets(1, len(slots)), slots, implementation=implementation, buffers=buffers)


def test_all_slots():
    check(random_sets(2, 3), None, implementation="xla", buffers=inputs(2))


@given(shares=st.lists(st.floats(0, 1), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_definition(shares, seed):
    rng = np.random.default_rng(seed)
    kept = [np.flatnonzero(rng.random(20) < share) for share in shares]
    buffers = inputs(1, K=1, D=4, rows=21)
    check(kept, (2, 0, 1), implementation="xla", buffers=buffers, capacity=20)


def test_more_arrays_than_a_launch_takes():
    buffers = inputs(ARRAYS + 1, B=1, K=1)
    check(random_sets(3, 1), [0], implementation="mosaic_gpu", buffers=buffers)


def abstract(count=2, B=2, K=8, R=1152, D=128, dtype="bfloat16", slots=True):
    array = jax.ShapeDtypeStruct
    N = 1 if slots else B
    index = array((N,), "int32")
    buffers = tuple(array((B, K, R, D), dtype) for _ in range(count))
    return Arguments(buffers, array((N, R - 1), "int32"), index, index if slots else None)


def test_choices():
    assert [KEEP_ROWS.choose(abstract(), platform=p) for p in ("cpu", "tpu", "gpu")] == [
        "xla",
        "xla",
        "mosaic_gpu",
    ]
    for sizes, reason in (
        ({"dtype": "float32"}, "it takes bfloat16 and float16, not float32"),
        ({"D": 80}, "it takes heads of 32, 64 and 128, not of 80"),
        ({"R": 1025}, "1025 rows are not a multiple of 128"),
        ({"slots": False}, "it takes slots by number: a call for all may need gradients"),
        ({"count": 0}, "it takes buffers of one shape and dtype, not of 0"),
    ):
        a = abstract(**sizes)
        assert KEEP_ROWS.choose(a, platform="gpu") == "xla"
        with refuses(f"keep_rows implementation 'mosaic_gpu' cannot be used: {reason}"):
            KEEP_ROWS.choose(a, "mosaic_gpu", "gpu")


@pytest.mark.parametrize(("head_dim", "dtype"), [(128, "bfloat16"), (64, "float16"), (32, "bfloat16")])
def test_lowers_for_a_gpu_without_one(head_dim, dtype):
    """The caches of the 11B are few launches of one kernel."""
    a = abstract(64, D=head_dim, dtype=dtype)
    with interpreted.lowering_for("gpu"):
        text = jax.jit(lambda a: KEEP_ROWS(a)).trace(a).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
    assert text.count("call @move") == 64 // ARRAYS


def test_shapes_that_do_not_fit():
    buffers, kept = [jnp.zeros((2, 1, 5, 4))], jnp.zeros((1, 6), int)
    with refuses("a buffer must have at least 6 rows; got (2, 1, 5, 4)"):
        keep_rows(buffers, kept, jnp.zeros(1, int), slots=jnp.zeros(1, int))
    with refuses("length has one entry for each of 1 slots; got (2,)"):
        keep_rows(buffers, kept[:, :5], jnp.zeros(2, int), slots=jnp.zeros(1, int))
    with refuses("without `slots` there must be 1 of them; got (2, 1, 5, 4)"):
        keep_rows(buffers, kept[:, :5], jnp.zeros(1, int))


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
@pytest.mark.parametrize("kept", CASES.values(), ids=CASES)
def test_cases_on_gpu(kept, implementation):
    check([kept], [1], implementation=implementation, buffers=inputs(3))


@pytest.mark.gpu
@pytest.mark.parametrize(("slots", "head_dim"), [((2, 0), 64), ((1,), 32), ((1, 2, 0), 128)])
def test_on_gpu(slots, head_dim):
    """Many heads and arrays, often: a race would show in some."""
    buffers = inputs(2 * ARRAYS + 1, K=8, D=head_dim, rows=1152)
    for seed in range(3):
        kept = random_sets(seed, len(slots), 1030)
        check(kept, slots, implementation="mosaic_gpu", buffers=buffers, capacity=1030)


def test_donated_buffers_are_not_copied(platform):
    del platform
    a = abstract(4)
    program = jax.jit(lambda buffers, *rest: keep_rows(buffers, *rest[:2], slots=rest[2]), donate_argnums=0)
    memory = program.lower(a.buffers, a.kept, a.length, a.slots).compile().memory_analysis()
    size = 2 * math.prod(a.buffers[0].shape)
    assert memory.alias_size_in_bytes == 4 * size
    assert memory.temp_size_in_bytes < 4 * size
