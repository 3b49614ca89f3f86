"""Corrections in a text that comes in pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moss_jax.serving.responses import Corrections, sentence_start

WORDS = " - wait, "


@given(st.lists(st.sampled_from([" - wait, ", " -", " ", "- w", "ait, ", "wait", ", ", "a", "-"])))
def test_nothing_is_lost_and_corrections_are_found(pieces):
    corrections = Corrections(WORDS)
    found = [part for piece in pieces for part in corrections.feed(piece)]
    text = "".join(pieces)
    assert "".join(part for part, _ in found) + corrections.flush() == text
    assert sum(is_correction for _, is_correction in found) == text.count(WORDS)
    assert all(part == WORDS for part, is_correction in found if is_correction)


def test_nothing_is_held_where_there_is_no_word_for_it():
    assert list(Corrections("").feed("a - wait, b")) == [("a - wait, b", False)]


@pytest.mark.parametrize(
    ("said", "start"),
    [
        ("The cat is red", 0),
        ("It is grey. The cat is red", 12),
        ("Is it? Yes", 7),
        ("The cat is red - wait, the cat is blue", 23),
        ("The cat is red - wait, blue. Now it", 29),
    ],
)
def test_a_correction_takes_back_the_sentence_in_progress(said, start):
    assert sentence_start(said, WORDS) == start
