"""Planning of rows: how they are cut, and packed into the steps that there are programs for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moss_jax.stream import PENDING, Row
from moss_jax.stream.rows import (
    FRAME_BUCKETS,
    TOKEN_BUCKETS,
    Encoded,
    Shape,
    features_of,
    first_step,
    pack,
    shapes,
    split_row,
    step_arguments,
    unpack,
)

IMAGE = 1024


def test_frames_of_several_batches_index_their_concatenation():
    batches = [np.full((count, 1, 1), 10.0 * count) + np.arange(count)[:, None, None] for count in (2, 3)]
    first, second = batches
    row = Row([IMAGE, 7, IMAGE, IMAGE], [Encoded(first, 1), None, Encoded(second, 2)])
    rows = {4: row, 1: Row([PENDING]), 2: Row([IMAGE], [Encoded(first, 0)])}
    found, indexed = features_of(rows)
    features = np.concatenate(found)[:, 0, 0]
    shown = {slot: [None if i is None else features[i] for i in r.frames] for slot, r in indexed.items()}
    assert shown == {4: [21.0, None, 32.0], 1: [], 2: [20.0]}
    assert features_of({1: Row([PENDING])})[0] == []


@pytest.mark.parametrize("slots", [1, 5])
def test_arguments_are_packed_into_one_array_as_long_for_any_shape(slots):
    rows = [Row([PENDING]), Row([PENDING, IMAGE, 7], [6], new_turn=True), Row(range(40))]
    packed = []
    for row in rows:
        arguments = step_arguments({slots - 1: row}, slots, IMAGE)
        packed.append(pack(arguments, slots))
        features = np.arange(9, dtype=np.float32)[:, None, None]
        found = unpack(jnp.asarray(packed[-1]), jnp.asarray(features), arguments.shape, slots)
        if arguments.frames is not None:
            np.testing.assert_array_equal(found.frames.features, features[arguments.frames.index])
        assert packed[-1][:slots].tolist() == arguments.takes.tolist() == [0] * (slots - 1) + [1]
        given = [arguments.decode, arguments.chunks, arguments.speaks, arguments.new_turn, arguments.last]
        read = [found.decode, found.chunks, found.speaks, found.new_turn, found.last]
        assert jax.tree.structure(given) == jax.tree.structure(read)
        for x, y in zip(jax.tree.leaves(given), jax.tree.leaves(read), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
    assert len({len(x) for x in packed}) == 1


@pytest.mark.parametrize("framed", [0.0, 0.1, 0.9, 1.0])
def test_tokens_without_frames_are_cut_like_text(framed):
    rng = np.random.default_rng(0)
    frames = [i if rng.random() < framed else None for i in range(700)]
    row = Row([PENDING, *[IMAGE] * 500, 7, 8, *[IMAGE] * 200], frames, new_turn=True)
    pieces = list(split_row(row, IMAGE))
    assert [token for piece in pieces for token in piece.tokens] == row.tokens
    assert [piece.new_turn for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    found = [frame for piece in pieces for frame in piece.frames or [None] * piece.tokens.count(IMAGE)]
    assert found == frames
    for piece in pieces:
        arguments = step_arguments({0: piece}, 1, IMAGE)
        assert arguments.chunks.tokens.shape[1] in TOKEN_BUCKETS
        assert (arguments.frames is None) == (not any(f is not None for f in piece.frames))
    if not framed:
        assert [len(piece.tokens) for piece in pieces] == [320, 320, 63]


def test_where_the_frames_of_a_row_are():
    row = Row([PENDING, IMAGE, 7, IMAGE, IMAGE], [None, 4, 2])
    arguments = step_arguments({0: row}, 1, IMAGE)
    assert arguments.frames.count.tolist() == [2]
    assert arguments.frames.offset[0, :2].tolist() == [3, 4]
    assert arguments.frames.index[0, :2].tolist() == [4, 2]
    assert step_arguments({0: Row([IMAGE], [None])}, 1, IMAGE).frames is None
    # With several slots, a row for each frame.
    arguments = step_arguments({2: row, 0: Row([IMAGE, IMAGE]), 1: Row([9, IMAGE], [6])}, 3, IMAGE)
    assert arguments.frames.count.tolist() == [1, 1, 1, 0]
    assert arguments.frames.slots[:3].tolist() == [2, 2, 1]
    assert arguments.frames.before[:3].tolist() == [0, 1, 0]
    assert arguments.frames.offset[:3].tolist() == [[3], [4], [1]]
    assert arguments.frames.index[:3].tolist() == [[4], [2], [6]]


TOKENS = st.one_of(st.integers(0, 999), st.just(IMAGE))
LENGTHS = st.one_of(st.integers(0, 3), st.integers(0, 40), st.integers(0, 700))


@st.composite
def rows_of_a_slot(draw) -> Row:
    """Text and frames in any mix, or the pending token alone."""
    if draw(st.booleans()):
        return Row([PENDING], new_turn=draw(st.booleans()))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    length, images = draw(LENGTHS), draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    tokens = np.where(rng.random(length) < images, IMAGE, rng.integers(0, 999, length)).tolist()
    tokens = [PENDING] * (draw(st.booleans()) or not tokens) + tokens
    framed = draw(st.sampled_from([0.0, 0.5, 1.0]))
    frames = [int(i) if rng.random() < framed else None for i in rng.permutation(tokens.count(IMAGE))]
    return Row(tokens, frames if any(f is not None for f in frames) else (), draw(st.booleans()))


@st.composite
def rows_of_slots(draw) -> tuple[int, dict[int, Row]]:
    """The number of slots, and rows of some of them, in order of precedence."""
    slots = draw(st.integers(1, 6) | st.just(40))
    order = draw(st.permutations(range(slots)))
    taking_part = order[: draw(st.integers(1, slots))]
    return slots, {slot: draw(rows_of_a_slot()) for slot in taking_part}


def planned(slots, rows) -> list:
    """The rows and the arguments of each of the steps that these rows take."""
    steps, left = [], rows
    while left:
        now, left = first_step(left, slots, IMAGE)
        assert now, "each step appends something"
        steps.append((now, step_arguments(now, slots, IMAGE)))
    return steps


def appended(a) -> dict[int, tuple[list[int], dict[int, int]]]:
    """What the arguments of a step append to each slot: tokens, and frames by the offset of their token."""
    found: dict[int, tuple[list[int], dict[int, int]]] = {}
    at: dict[int, int] = {}
    of_decode = np.zeros(0, int) if a.decode is None else np.arange(a.shape.decode)
    if a.decode is not None and a.decode.slots is not None:
        of_decode = a.decode.slots
    for place, slot in enumerate(of_decode.tolist()):
        if a.decode.count[place]:
            assert slot not in found
            found[slot], at[slot] = (a.decode.tokens[place].tolist(), {}), place
    decode = list(found)
    if a.chunks is not None:
        width = a.chunks.tokens.shape[1]
        of_chunks = np.zeros(1, int) if a.chunks.slots is None else a.chunks.slots
        for chunk, (slot, count) in enumerate(zip(of_chunks.tolist(), a.chunks.count, strict=True)):
            if not count:
                continue
            assert slot not in decode
            tokens, _ = found.setdefault(slot, ([], {}))
            # In order, and each told how many tokens of its slot are in the chunks before.
            assert len(tokens) == (0 if a.chunks.before is None else a.chunks.before[chunk])
            tokens += a.chunks.tokens[chunk, :count].tolist()
            at[slot] = a.shape.decode + chunk * width + count - 1
    if a.frames is not None:
        of_rows = np.zeros(1, int) if a.frames.slots is None else a.frames.slots
        for row, (slot, count) in enumerate(zip(of_rows.tolist(), a.frames.count, strict=True)):
            if not count:
                continue
            frames = found[slot][1]
            assert len(frames) == (0 if a.frames.before is None else a.frames.before[row])
            offsets = a.frames.offset[row, :count].tolist()
            frames |= dict(zip(offsets, a.frames.index[row, :count].tolist(), strict=True))
    assert np.flatnonzero(a.takes).tolist() == sorted(found)
    assert {slot: a.last[slot] for slot in found} == at
    return found


@given(rows_of_slots())
def test_steps_append_every_token_and_frame_once_and_in_order(slots_and_rows):
    slots, rows = slots_and_rows
    tokens = {slot: [] for slot in rows}
    frames = {slot: {} for slot in rows}
    spoke, turned = [], []
    for now, arguments in planned(slots, rows):
        assert arguments.shape in shapes(slots)
        found = appended(arguments)
        assert found.keys() == now.keys()
        for slot, (of_step, placed) in found.items():
            frames[slot] |= {len(tokens[slot]) + offset: frame for offset, frame in placed.items()}
            tokens[slot] += of_step
        spoke += np.flatnonzero(arguments.speaks).tolist()
        turned += np.flatnonzero(arguments.new_turn).tolist()
    assert tokens == {slot: list(row.tokens) for slot, row in rows.items()}
    assert frames == {slot: row.placed(IMAGE) for slot, row in rows.items()}
    # The pending token joins once, and a turn begins once.
    assert sorted(spoke) == sorted(slot for slot, row in rows.items() if row.tokens[0] == PENDING)
    assert sorted(turned) == sorted(slot for slot, row in rows.items() if row.new_turn)


@given(rows_of_slots())
def test_what_a_slot_gets_is_up_to_those_named_before_it(slots_and_rows):
    slots, rows = slots_and_rows
    now, later = first_step(rows, slots, IMAGE)
    assert list(later) == [slot for slot in rows if slot in later]
    for slot, row in rows.items():
        if row.is_decode:
            assert now[slot] == row
            assert slot not in later
    # As if those behind were not there.
    for count in range(1, len(rows) + 1):
        first, _ = first_step({slot: rows[slot] for slot in list(rows)[:count]}, slots, IMAGE)
        assert first == {slot: now[slot] for slot in list(rows)[:count] if slot in now}


def test_a_step_is_of_the_smallest_shape_that_has_room():
    def shape(rows, slots):
        ((_, arguments),) = planned(slots, rows)
        return arguments.shape

    decode, frame = Row([PENDING]), Row([PENDING, IMAGE], [0])
    assert shape({0: decode, 3: decode}, 4) == Shape(4)
    assert shape({0: decode, 3: frame}, 4) == Shape(4, 1, 2, 1)
    assert shape({0: frame, 1: frame, 3: frame}, 4) == Shape(4, 4, 2, 4)
    assert shape({1: Row([1] * 16), 2: decode}, 4) == Shape(4, 4, 16)
    assert shape({1: Row([1, IMAGE, 1], [0]), 2: decode}, 4) == Shape(4, 4, 16, 4)
    assert shape({1: Row([1] * 64), 2: Row([1] * 17)}, 4) == Shape(4, 8, 16, 8)
    assert shape({1: Row([1] * 100), 2: Row([1] * 100)}, 4) == Shape(4, 16, 16, 16)
    assert shape({0: decode}, 1) == Shape(1)
    few, many = dict.fromkeys(range(10), decode), dict.fromkeys(range(11), decode)
    assert shape(few, 40) == Shape(10)
    assert shape(few | {20: frame}, 40) == Shape(10, 1, 2, 1)
    assert shape(many, 40) == Shape(40)
    assert shape(many | {20: frame}, 40) == Shape(40, 1, 2, 1)
    assert shape(many | dict.fromkeys(range(9), frame), 40) == Shape(10, 16, 2, 16)
    assert shape({0: Row([5])}, 1) == Shape(0, 1, 2)


def test_beside_many_slots_a_step_has_few_chunks():
    prompt = Row([PENDING, *[1] * 42])
    steps = planned(40, {0: prompt, 1: prompt, 2: prompt})
    assert [arguments.shape for _, arguments in steps] == [Shape(10, 8, 16, 8), Shape(10, 4, 16)]
    assert [len(now[2].tokens) for now, _ in steps] == [32, 11]


def test_frames_and_prompts_take_turns():
    """Of rows of different widths, those of the first row's; the others come first in the next step."""
    decode, frame, prompt = Row([PENDING]), Row([PENDING, IMAGE], [0]), Row([PENDING, 1, 2])
    steps = planned(8, {0: frame, 1: decode, 2: prompt, 3: frame, 4: prompt})
    assert [(list(now), arguments.shape.width) for now, arguments in steps] == [
        ([0, 1, 3], 2),
        ([2, 4], 16),
    ]


@pytest.mark.parametrize("slots", [2, 8, 40])
def test_all_slots_may_bring_a_frame_at_once(slots):
    steps = planned(slots, {slot: Row([PENDING, IMAGE], [slot]) for slot in range(slots)})
    assert len(steps) == -(-slots // 32)


@pytest.mark.parametrize("lead", [[], [PENDING], [PENDING, 7]], ids=str)
def test_a_row_with_more_frames_than_the_largest_bucket_is_cut(lead):
    row = Row([*lead, *[IMAGE] * 600, 7, 8], range(600))
    pieces = list(split_row(row, IMAGE))
    assert [token for piece in pieces for token in piece.tokens] == row.tokens
    assert [frame for piece in pieces for frame in piece.frames] == list(row.frames)
    for piece in pieces:
        assert len(piece.tokens) <= TOKEN_BUCKETS[-1]
        assert piece.tokens.count(IMAGE) == len(piece.frames) <= FRAME_BUCKETS[-1]
    assert len(pieces) == 3


@pytest.mark.parametrize(
    ("runs", "pieces"),
    [
        ([(1, 0), (0, 1)], [2]),
        ([(2, 0), (0, 1)], [2, 1]),
        ([(0, 1), (3, 0)], [1, 3]),
        ([(13, 0), (0, 3)], [16]),
        ([(14, 0), (0, 3)], [14, 3]),
        ([(5, 0), (0, 3), (4, 0), (0, 4)], [16]),
        ([(5, 0), (0, 3), (4, 0), (0, 5), (60, 0)], [12, 5, 60]),
        ([(5, 0), (0, 256), (40, 0)], [301]),
        ([(5, 0), (0, 256), (60, 0)], [261, 60]),
        ([(400, 0)], [320, 80]),
        ([(321, 0)], [319, 2]),
        ([(0, 257)], [256, 1]),
    ],
    ids=str,
)
def test_where_a_row_is_cut(runs, pieces):
    """Given runs of (text, frames): tokens next to frames share their piece as far as there is room."""
    tokens = [token for text, count in runs for token in [7] * text + [IMAGE] * count]
    row = Row(tokens, range(tokens.count(IMAGE)), new_turn=True)
    found = list(split_row(row, IMAGE))
    assert [len(piece.tokens) for piece in found] == pieces
    assert [piece.new_turn for piece in found] == [True] + [False] * (len(pieces) - 1)
