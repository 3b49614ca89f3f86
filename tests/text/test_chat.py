"""The chat template."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.text import SYSTEM_PROMPT, Tokenizer, chat, header, interjection, offline_opening, opening

TINY = Tokenizer.moss_tiny()
ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def user(content: str) -> str:
    return f"<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>"


def system(content: str) -> str:
    return f"<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>"


def marked(text: str) -> list[int]:
    return TINY.encode_marked(text)


def test_opening_without_a_prompt():
    expected = marked("<|begin_of_text|>" + system("Watch.") + user("") + ASSISTANT)
    assert opening(TINY, system="Watch.") == expected


def test_opening_with_a_prompt_and_without_system():
    expected = marked("<|begin_of_text|>" + user("What number is on the card?") + ASSISTANT)
    for nothing in (None, "", " \n"):
        assert opening(TINY, system=nothing, prompt="What number is on the card?") == expected


def test_contents_are_stripped():
    stripped = opening(TINY, system="Watch.", prompt="Where is it?")
    assert opening(TINY, system="\n Watch.\t", prompt="  Where is it?\n\n") == stripped
    assert interjection(TINY, " Now? ") == interjection(TINY, "Now?")


def test_silence_in_the_system_prompt_is_a_control_token():
    assert opening(TINY, system=SYSTEM_PROMPT).count(TINY.special.silence) == 1
    expected = marked("<|begin_of_text|>" + system(SYSTEM_PROMPT) + user("") + ASSISTANT)
    assert opening(TINY, system=SYSTEM_PROMPT) == expected


def test_interjection_ends_the_reply_and_asks():
    assert interjection(TINY, "And now?") == marked("<|eot_id|>" + user("And now?") + ASSISTANT)


def test_offline_opening_puts_the_frames_before_the_text():
    expected = marked("<|begin_of_text|>" + system("S") + user("<|image|>" * 3 + "What is it?") + ASSISTANT)
    assert offline_opening(TINY, system="S", num_frames=3, prompt=" What is it?") == expected
    with pytest.raises(ValueError, match="num_frames must not be negative, but is -1"):
        offline_opening(TINY, system=None, num_frames=-1, prompt="")


HOSTILE = st.lists(st.sampled_from(list(TINY.special.by_text())) | st.text(max_size=4)).map("".join)


@settings(deadline=None)
@given(HOSTILE)
def test_a_prompt_adds_no_control_token(prompt):
    def control(ids):
        return [i for i in ids if i in TINY.control_ids]

    assert control(opening(TINY, system="S", prompt=prompt)) == control(opening(TINY, system="S"))
    assert control(interjection(TINY, prompt)) == control(interjection(TINY, ""))
    offline = offline_opening(TINY, system=None, num_frames=2, prompt=prompt)
    assert offline.count(TINY.special.image) == 2


@settings(deadline=None)
@given(HOSTILE)
def test_a_system_prompt_adds_no_control_token_but_silence(text):
    ids = opening(TINY, system=f"S{text}S")
    added = [i for i in ids if i in TINY.control_ids and i != TINY.special.silence]
    assert added == [i for i in opening(TINY, system="S") if i in TINY.control_ids]
    assert ids.count(TINY.special.silence) == text.count("<|silence|>")


@settings(deadline=None)
@given(st.text().map(str.strip))
def test_the_header_never_merges_with_the_content(content):
    assert TINY.encode("\n\n" + content) == header(TINY, "user")[-1:] + TINY.encode(content)


def test_content_has_frames_at_their_places():
    """White space around it goes, and that behind leading frames."""
    image, encode = TINY.special.image, TINY.encode
    content = functools.partial(chat.content, TINY, "user")
    assert content([None, "\n", None, " A cat? \n"]) == [image, image, *encode("A cat?")]
    assert content([" This: ", None, " or that? ", None]) == [
        *encode("This: "),
        image,
        *encode(" or that? "),
        image,
    ]
    assert content(["<|image|>"]) == encode("<|image|>") != [image]
    assert content([" ", "\n"]) == content([]) == []
    assert chat.content(TINY, "system", ["<|silence|>"]) == [TINY.special.silence]
