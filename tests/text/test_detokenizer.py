"""The detokenizer: whole characters, in order, as early as possible."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.text import Detokenizer, Tokenizer, TokenizerError

TINY = Tokenizer.moss_tiny()
ID_OF_BYTE = {TINY.token_bytes(i): i for i in range(256)}
CONTROL = sorted(TINY.control_ids)


def byte_ids(data: bytes) -> list[int]:
    return [ID_OF_BYTE[data[i : i + 1]] for i in range(len(data))]


def split_ids(text: str, cuts: list[int]) -> list[int]:
    """Tokens of a text that is cut at some bytes first: learned ones where a piece is text, else bytes."""
    data = text.encode()
    bounds = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    ids = []
    for start, end in itertools.pairwise(bounds):
        piece = data[start:end]
        try:
            ids += TINY.encode(piece.decode())
        except UnicodeDecodeError:
            ids += byte_ids(piece)
    return ids


@st.composite
def token_streams(draw) -> tuple[str, list[int]]:
    """A text, and tokens of it with control tokens anywhere between them."""
    text = draw(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])))
    ids = split_ids(text, draw(st.lists(st.integers(0, 1000))))
    for place, control in draw(st.lists(st.tuples(st.integers(0, 1000), st.sampled_from(CONTROL)))):
        ids.insert(place % (len(ids) + 1), control)
    return text, ids


@settings(deadline=None)
@given(token_streams())
def test_valid_text_is_emitted_without_delay(stream):
    text, ids = stream
    assert TINY.decode(ids) == text
    detokenizer = Detokenizer(TINY)
    printed, pushed = "", b""
    for i in ids:
        printed += detokenizer.push(i)
        pushed += TINY.token_bytes(i)
        assert printed == pushed.decode(errors="ignore")
    assert printed + detokenizer.flush() == text


@settings(deadline=None)
@given(st.binary())
def test_invalid_bytes_are_replaced_only_when_nothing_can_complete_them(data):
    detokenizer = Detokenizer(TINY)
    printed = "".join(map(detokenizer.push, byte_ids(data)))
    # Python's decoder is the reference, except for the replacement of an incomplete end.
    whole = data.decode(errors="replace")
    assert whole in (printed, printed + "\ufffd")
    if whole != printed:
        assert any(can_be_completed(data[-n:]) for n in (1, 2, 3))
    assert detokenizer.flush() == ""


def can_be_completed(tail: bytes) -> bool:
    try:
        tail.decode()
    except UnicodeDecodeError as error:
        return error.start == 0 and error.reason == "unexpected end of data"
    return False


@settings(deadline=None)
@given(st.lists(st.integers(0, 1024)))
def test_any_tokens_decode_as_in_one_go(ids):
    detokenizer = Detokenizer(TINY)
    printed = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    assert TINY.decode(ids) in (printed, printed + "\ufffd")


def test_a_character_waits_for_its_last_byte_across_a_frame():
    first, *rest = byte_ids("🎉".encode())
    detokenizer = Detokenizer(TINY)
    assert [detokenizer.push(i) for i in [first, TINY.special.image, *rest]] == ["", "", "", "", "🎉"]


def test_an_emoji_of_several_code_points_comes_in_pieces():
    detokenizer = Detokenizer(TINY)
    pieces = [detokenizer.push(i) for i in byte_ids("👩‍🚀".encode())]
    assert [piece for piece in pieces if piece] == ["👩", "\u200d", "🚀"]


def test_leading_space_is_kept():
    detokenizer = Detokenizer(TINY)
    assert "".join(map(detokenizer.push, TINY.encode(" being built"))) == " being built"


def test_flush_drops_the_incomplete_end_and_starts_anew():
    detokenizer = Detokenizer(TINY)
    for i in byte_ids(b"ok\xf0\x9f"):
        detokenizer.push(i)
    assert detokenizer.flush() == ""
    assert "".join(map(detokenizer.push, TINY.encode("yes"))) == "yes"


def test_unknown_id_is_refused():
    with pytest.raises(TokenizerError, match="token id 5000 is not in the vocabulary"):
        Detokenizer(TINY).push(5000)
