"""Planning of rows: how they are cut to the buckets."""

import numpy as np
import pytest

from moss_jax.stream import PENDING, Row
from moss_jax.stream.rows import FRAME_BUCKETS, TOKEN_BUCKETS, split_row, step_arguments

IMAGE = 1024


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
        tokens, _, _, padded, index = step_arguments([piece], IMAGE)
        assert tokens.shape[1] in TOKEN_BUCKETS
        assert (padded is None) == (index is None) == (not any(f is not None for f in piece.frames))
    if not framed:
        assert [len(piece.tokens) for piece in pieces] == [320, 320, 63]


def test_where_the_frames_of_a_row_are():
    rows = [Row([PENDING, IMAGE, 7, IMAGE, IMAGE], [None, 4, 2]), None, Row([IMAGE, IMAGE])]
    arguments = step_arguments(rows, IMAGE)
    assert arguments.frames.count.tolist() == [2, 0, 0]
    assert arguments.frames.offset[0, :2].tolist() == [3, 4]
    assert arguments.feature_index[0, :2].tolist() == [4, 2]
    assert step_arguments([Row([IMAGE], [None])], IMAGE).frames is None


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
