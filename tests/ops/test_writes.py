"""Writes to slots that the rows name: a loop, in place."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moss_jax.ops.writes import write_rows

B, R, K, C, T, D = 3, 5, 2, 9, 4, 3  # Slots, runs, kv heads, capacity, rows of a run, head.

write = jax.jit(write_rows)


@given(
    slots=st.lists(st.integers(0, B - 1), min_size=R, max_size=R),
    count=st.lists(st.integers(0, T), min_size=R, max_size=R),
    first=st.integers(0, C),
)
def test_runs_of_slots_are_a_loop(slots, count, first):
    """Runs of a slot follow one another; those that are not written, wherever they begin, change nothing."""
    rng = np.random.default_rng(0)
    buffer = rng.standard_normal((B, K, C, D)).astype(np.float32)
    rows = rng.standard_normal((R, K, T, D)).astype(np.float32)
    expected, end, start = buffer.copy(), [first] * B, []
    for r, slot in enumerate(slots):
        start.append(end[slot])
        end[slot] += count[r]
        for i in range(count[r]):
            if start[r] + i < C:
                expected[slot, :, start[r] + i] = rows[r, :, i]
        rows[r, :, count[r] :] = np.nan
    found = write(buffer, rows, np.int32(start), np.int32(count), np.int32(slots))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("T", [1, 32])
def test_a_donated_buffer_is_not_copied(T, platform):
    del platform
    array = jax.ShapeDtypeStruct
    buffer, rows, number = (
        array((4, 8, 1024, 128), "bfloat16"),
        array((6, 8, T, 128), "bfloat16"),
        array((6,), "int32"),
    )
    program = jax.jit(write_rows, donate_argnums=0).lower(buffer, rows, number, number, number).compile()
    memory, size = program.memory_analysis(), 2 * math.prod(buffer.shape)
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size / 4
