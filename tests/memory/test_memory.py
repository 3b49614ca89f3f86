"""The state of a stream: how it starts, what appending does, what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moss_jax.config import moss_video_11b
from moss_jax.memory import (
    NO_POSITION,
    CapacityError,
    check_room,
    init_state,
    keep_tokens,
    remember_frames,
    vectors_visible,
)
from moss_jax.ops.writes import write_rows

B, K, C, T, D = 3, 2, 7, 4, 3

write = jax.jit(write_rows)


@given(
    start=st.lists(st.integers(0, C), min_size=B, max_size=B),
    count=st.lists(st.integers(0, T), min_size=B, max_size=B),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_write_rows_is_a_loop(start, count, dtype):
    rng = np.random.default_rng(0)
    buffer = np.array(jnp.asarray(rng.standard_normal((B, K, C, D)), dtype))
    rows = rng.standard_normal((B, K, T, D)).astype(np.float32)
    expected = buffer.copy()
    for b in range(B):
        for i in range(count[b]):
            if start[b] + i < C:
                expected[b, :, start[b] + i] = rows[b, :, i]
        rows[b, :, count[b] :] = np.nan
    written = write(buffer, rows, np.array(start), np.array(count))
    assert written.dtype == dtype
    np.testing.assert_array_equal(written, expected)


def test_write_rows_takes_more_rows_than_there_is_room_for():
    buffer, rows = jnp.zeros((1, 1, 2, 1)), jnp.ones((1, 1, 5, 1))
    assert write_rows(buffer, rows, np.array([1]), np.array([5])).ravel().tolist() == [0, 1]


@pytest.fixture
def state(small_config):
    return init_state(small_config(), 2, text_capacity=6, bank_capacity=3, dtype="bfloat16")


def test_an_empty_state(state, small_config):
    config = small_config()
    assert [x.shape for x in state.text.keys + state.text.values] == [(2, 2, 128, 8)] * 2
    vectors = 3 * config.vectors_per_frame
    assert (state.slots, state.text.capacity, state.bank.capacity) == (2, 6, vectors)
    assert [x.shape for x in state.bank.keys + state.bank.values] == [(2, 2, vectors, 8)] * 4
    assert {x.dtype for x in state.text.keys + state.bank.values} == {jnp.dtype("bfloat16")}
    assert not state.text.length.any()
    assert not state.bank.length.any()
    assert (state.bank.positions == NO_POSITION).all()
    # Donation needs buffers of their own.
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)


def test_the_state_of_the_released_model():
    make = functools.partial(
        init_state, moss_video_11b(), 1, text_capacity=4096, bank_capacity=256, dtype="bfloat16"
    )
    state = jax.eval_shape(make)
    assert len(state.text.keys) == 32
    assert {x.shape for x in state.text.keys + state.text.values} == {(1, 8, 4096 + 128, 128)}
    assert len(state.bank.keys) == 8
    assert {x.shape for x in state.bank.keys + state.bank.values} == {(1, 8, 25_856, 128)}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 6, 3), "slots must be at least 1, not 0"),
        ((2, 0, 3), "text_capacity must be at least 1, not 0"),
        ((2, 6, -1), "bank_capacity must be at least 1, not -1"),
        ((2, 257, 3), "text_capacity 257 exceeds the 256 positions of the model"),
    ],
)
def test_sizes_that_are_refused(small_config, sizes, message):
    slots, text, bank = sizes
    with pytest.raises(CapacityError, match=message):
        init_state(small_config(), slots, text_capacity=text, bank_capacity=bank, dtype="float32")


def test_frames_are_appended_slot_by_slot(state):
    """Two calls; the second has room for one of the two frames of slot 0."""
    vectors = state.bank.keys[0].shape[2] // 3
    rng = np.random.default_rng(0)
    bank = state.bank
    held = [[], []]
    for positions, count in (([[4, 5], [1, 2]], [2, 1]), ([[8, 9], [3, 6]], [2, 2])):
        rows = rng.integers(1, 100, (2, 2, 2 * vectors, 8)).astype(np.float32)
        bank = remember_frames(
            bank, (rows, rows + 1), (rows + 2, rows + 3), jnp.array(positions), jnp.array(count)
        )
        for b in range(2):
            held[b] += [
                (positions[b][i], rows[b, :, i * vectors : (i + 1) * vectors]) for i in range(count[b])
            ][: 3 - len(held[b])]
    assert bank.length.tolist() == [3 * vectors, 3 * vectors]
    for b in range(2):
        assert bank.positions[b].tolist() == [position for position, _ in held[b] for _ in range(vectors)]
        assert bank.places[b].tolist() == [*range(vectors)] * 3
        frames = np.concatenate([frame for _, frame in held[b]], axis=1)
        for added, buffer in enumerate(bank.keys + bank.values):
            np.testing.assert_array_equal(buffer[b], frames + added)


@pytest.mark.parametrize("slots", [None, [1]])
def test_tokens_in_8_bits_are_evicted_with_their_scales(small_config, slots):
    rng, capacity = np.random.default_rng(0), 9
    text = init_state(
        small_config(), 2, text_capacity=capacity, bank_capacity=1, dtype="float32", text_dtype="int8"
    ).text
    text = jax.tree.map(lambda x: jnp.asarray(rng.integers(1, 99, x.shape)).astype(x.dtype), text)
    text = dataclasses.replace(text, length=jnp.array([8, 9]), position=jnp.array([8, 20]))
    kept = {0: [0, 3, 4], 1: [1, 2, 5, 8]}
    rows = [kept[slot] for slot in slots or kept]
    padded = np.array([row + [0] * (capacity - len(row)) for row in rows])
    length, named = np.array([len(row) for row in rows]), None if slots is None else np.array(slots)
    after = keep_tokens(text, padded, length, slots=named)
    assert after.position.tolist() == [8, 20]
    for slot in range(2):
        stay = kept[slot] if slots is None or slot in slots else range(int(text.length[slot]))
        assert after.length[slot] == len(stay)
        for old, new in zip(text.keys + text.values, after.keys + after.values, strict=True):
            assert new.dtype == "int8"
            for x, y in ((old.values, new.values), (old.scale, new.scale)):
                np.testing.assert_array_equal(y[slot][:, : len(stay)], x[slot][:, np.array(stay)])


append = jax.jit(remember_frames)


@pytest.mark.parametrize(("stored", "merges"), [(None, False), ("int8", False), (None, True)])
@given(data=st.data())
def test_rows_that_name_their_slots_are_appends_one_by_one(small_config, stored, merges, data):
    """Several rows of a slot in one call, slots in any order, and rows without frames among them."""
    config, slots, rows, width = small_config(), 3, 6, 2
    empty = init_state(
        config,
        slots,
        text_capacity=4,
        bank_capacity=4,
        dtype="float32",
        bank_dtype=jnp.int8 if stored else None,
        merges=merges,
    ).bank
    of_rows = np.array(data.draw(st.lists(st.integers(0, slots - 1), min_size=rows, max_size=rows)))
    counts = np.array(data.draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows)))
    before = np.array([counts[:row][of_rows[:row] == of_rows[row]].sum() for row in range(rows)])
    vectors, layers, heads = config.vectors_per_frame, len(empty.keys), empty.keys[0].shape[1]
    shape = 2, layers, rows, heads, width * vectors, 8
    keys, values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    positions = 2 + 3 * np.arange(rows * width, dtype=np.int32).reshape(rows, width)

    found = append(empty, tuple(keys), tuple(values), positions, counts, of_rows, before)
    expected = empty
    for row, slot in enumerate(of_rows):
        # The same row for each of the slots, of which one appends.
        k, v = (np.repeat(x[:, row : row + 1], slots, axis=1) for x in (keys, values))
        count = np.where(np.arange(slots) == slot, counts[row], 0)
        expected = append(expected, tuple(k), tuple(v), np.repeat(positions[row : row + 1], slots, 0), count)
    for one_by_one, at_once in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(at_once, one_by_one)
    totals = np.bincount(of_rows, counts, minlength=slots)
    assert found.length.tolist() == (vectors * np.minimum(totals, 4)).tolist()


def test_no_frame_leaves_the_bank_as_it_is(state):
    vectors = state.bank.keys[0].shape[2] // 3
    rows = (np.full((2, 2, vectors, 8), np.nan, np.float32),) * 2
    bank = remember_frames(state.bank, rows, rows, jnp.array([[4], [7]]), jnp.array([0, 0]))
    for old, new in zip(jax.tree.leaves(state.bank), jax.tree.leaves(bank), strict=True):
        np.testing.assert_array_equal(old, new)


@given(
    frames=st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=2, max_size=2),
    tokens=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=2, max_size=2),
)
def test_a_token_sees_the_frames_up_to_its_own(frames, tokens):
    expected = [
        [sum(frame <= token for frame in row) for token in wanted]
        for row, wanted in zip(frames, tokens, strict=True)
    ]
    visible = vectors_visible(jnp.array(frames), jnp.array(tokens))
    assert visible.tolist() == expected
    assert visible.dtype == jnp.int32


def test_no_token_sees_a_frame_that_is_not_there():
    last = jnp.array([[NO_POSITION - 1]])
    assert vectors_visible(jnp.array([[0, NO_POSITION]], jnp.int32), last).tolist() == [[1]]


def test_check_room():
    check_room("bank", np.array([3, 5]), np.array([2, 0]), 5)
    check_room("bank", np.array([5, 9]), np.array([0, 0]), 5)
    message = (
        "the bank has room for 5: slot 0 holds 4 and would get 2 more, slot 2 holds 5 and would get 1 more"
    )
    with pytest.raises(CapacityError, match=message):
        check_room("bank", np.array([4, 4, 5]), np.array([2, 1, 1]), 5)


def test_check_room_leaves_traced_calls_alone():
    @jax.jit
    def traced(length):
        check_room("bank", length, jnp.ones_like(length), 1)
        return length

    assert traced(jnp.array([7])) == 7
