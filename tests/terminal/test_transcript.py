"""Output on a terminal: the transcript and JSON."""

import io
import json

import pytest
from rich.console import Console

from moss_jax.stream import (
    Counters,
    End,
    FrameSeen,
    FramesSkipped,
    FrameUnseen,
    Interrupted,
    NearCapacity,
    NotAsked,
    Silence,
    Text,
    Turn,
    TurnLimit,
)
from moss_jax.terminal.transcript import print_json, print_transcript, printable


def at(kind, when, **fields):
    return kind(stream_time=when, wall_time=when / 10, **fields)


STORY = [
    at(Turn, 0, prompt=""),
    at(Silence, 0),
    at(FrameSeen, 0, index=0, time=0.0),
    at(Silence, 0),
    at(FrameSeen, 1, index=1, time=1.0),
    at(Silence, 1),
    at(Turn, 61.5, prompt="What is there?"),
    at(Text, 61.5, text="A red"),
    at(FrameSeen, 62, index=2, time=62.0),
    at(Text, 62, text=" card"),
    at(Interrupted, 62.2, said="A red card"),
    at(Turn, 62.2, prompt="And now?"),
    at(Text, 62.2, text="Nothing."),
    at(Silence, 62.5),
    at(End, 63, reason="finished", counters=Counters(frames=3, silences=4, tokens=5, interruptions=1)),
]


def transcript(events, width=100, **options) -> str:
    out = io.StringIO()
    print_transcript(events, Console(file=out, width=width, highlight=False, **options))
    return out.getvalue()


def test_a_transcript_line_by_line():
    assert transcript(STORY).splitlines() == [
        "  0:00  · · · ",
        "  1:01  › What is there?",
        "  1:01  A red▫ card — cut",
        "  1:02  › And now?",
        "  1:02  Nothing.",
        "  1:02  · ",
        "",
        "end of the stream · 3 frames, 5 tokens of text, 4 silences, 1 interruption · 6.3 s",
    ]


def test_frames_that_the_model_is_not_shown_are_counted():
    unseen = [
        at(FrameUnseen, 62, index=i, time=62.0, reason=reason) for i, reason in enumerate(("still", "rate"))
    ]
    counters = Counters(frames=1, frames_still=1, frames_rate=2)
    story = [at(Text, 61, text="A red"), *unseen, at(Text, 62, text=" card")]
    assert transcript([*story, at(End, 63, reason="finished", counters=counters)]).splitlines() == [
        "  1:01  A red card",
        "",
        "end of the stream · 1 frame, 1 frame still, 2 frames above the rate · 6.3 s",
    ]


def test_frames_that_cannot_be_decoded_have_a_line():
    story = [
        at(Text, 61, text="A red"),
        at(FramesSkipped, 62, time=61.5, count=3),
        at(Text, 62, text=" card"),
        at(FramesSkipped, 63, time=62.9, count=1),
        STORY[-1],
    ]
    assert transcript(story).splitlines()[:4] == [
        "  1:01  A red",
        "  1:02  3 frames from 1:01 on cannot be decoded",
        "  1:02   card",
        "  1:03  1 frame at 1:02 cannot be decoded",
    ]
    out = io.StringIO()
    print_json(story[1:2], out)
    event = {"type": "skipped", "slot": 0, "stream_time": 62, "wall_time": 6.2, "time": 61.5, "count": 3}
    assert json.loads(out.getvalue()) == event


def test_long_text_wraps_between_words_with_the_margin():
    pieces = [at(Text, 0, text=f"{word} ") for word in ["several"] * 30]
    lines = transcript([*pieces, STORY[-1]], width=40).partition("\n\n")[0].splitlines()
    assert len(lines) > 5
    assert all(len(line) <= 40 for line in lines)
    assert all(line.startswith(" " * 8) for line in lines[1:])
    assert " ".join(" ".join(lines).split()[1:]) == " ".join(["several"] * 30)


def test_wide_characters_count_two_columns():
    shown = transcript([at(Text, 0, text="桌上有卡片 " * 8), STORY[-1]], width=40).partition("\n\n")[0]
    assert [line.count("桌上有卡片") for line in shown.splitlines()] == [3, 3, 2]


def test_control_characters_are_not_printed():
    assert printable("a\x1b[2Jb\x07c\nd\u202ee") == "a[2Jbc\nde"
    assert "\x1b" not in transcript([at(Text, 0, text="\x1b]0;title\x07x"), STORY[-1]])
    assert "[bold]" in transcript([at(Turn, 0, prompt="[bold]what[/bold]"), STORY[-1]])


@pytest.mark.parametrize(
    "text",
    [
        "می\u200cخواهم",  # ZWNJ between the parts of a Persian word
        "क्\u200dष",  # ZWJ asks for the half form in Devanagari
        "👩\u200d👩\u200d👧 ❤\ufe0f 1\ufe0f\u20e3",  # ZWJ and variation selectors of emoji
        "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # a flag by tag characters
        "e\u0301 \u0643\u064e שָׁלוֹם",  # combining marks
        "C++\u200e \u200f!\u061c",  # bidi marks
        "กา\u200bแฟ un\u00adseen a\u2060b",  # places where a line may be broken, or may not
        "\u0600\u0661\u06dd",  # Arabic signs above numbers
    ],
)
def test_invisible_characters_that_spelling_needs_are_printed(text):
    assert printable(text) == text
    pieces = [at(Text, 0, text=c) for c in text]
    assert transcript([*pieces, STORY[-1]]).splitlines()[0] == f"  0:00  {text}"


def test_no_control_character_is_printed():
    controls = [*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0))]
    bidi = [*"\u202a\u202b\u202c\u202d\u202e", *"\u2066\u2067\u2068\u2069"]
    assert printable("".join([*controls, *bidi])) == " \n"
    assert printable("a\tb\r\nc") == "a b\nc"


def test_a_prompt_that_was_never_asked_is_named_with_its_time():
    late = at(NotAsked, 256, prompt="What is \x1b[2J there?", time=400.0)
    end = at(End, 256, reason="bank_capacity", counters=Counters(frames=256))
    assert transcript([at(Silence, 255), late, end]).splitlines()[:2] == [
        "  4:15  · ",
        "  6:40  › What is [2J there? — never asked",
    ]


def test_an_end_by_logits_that_are_not_finite_says_so():
    end = at(End, 1, reason="not_finite", counters=Counters())
    assert "the model's logits are not finite" in transcript([end])


@pytest.mark.parametrize("reason", ["text_capacity", "bank_capacity"])
def test_an_end_by_capacity_names_the_setting(reason):
    end = at(End, 1, reason=reason, counters=Counters(frames_dropped=2))
    assert f"engine.{reason}" in transcript([end])
    assert "2 frames dropped" in transcript([end])


def test_json_is_one_object_per_event():
    out = io.StringIO()
    print_json(STORY, out)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["type"] for line in lines] == [event.type for event in STORY]
    assert lines[7] == {"type": "text", "slot": 0, "stream_time": 61.5, "wall_time": 6.15, "text": "A red"}
    assert lines[-1]["counters"]["interruptions"] == 1


def test_limits_are_told_where_they_cut():
    limit = at(TurnLimit, 3, tokens=2)
    near = at(NearCapacity, 4, setting="bank_capacity", left=2, capacity=20)
    lines = transcript([at(Text, 3, text="a b"), limit, at(Silence, 3), near]).splitlines()
    assert lines == [
        "  0:03  a b — cut after 2 tokens",
        "  0:03  · ",
        "  0:04  2 of engine.bank_capacity = 20 left",
    ]
