"""The timeline: how events are grouped, and that no text overlaps or is cut off."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from PIL import Image

from moss_jax.config import ConfigError
from moss_jax.stream import Counters, End, FrameSeen, Interrupted, Silence, Text, Turn
from moss_jax.terminal.timeline import (
    COLOURS,
    FILLS,
    FONT,
    LEFT,
    MAX_ROWS,
    RIGHT,
    THUMBNAIL,
    WIDTH,
    Timeline,
    check_path,
    draw,
    row_spans,
    stack,
    utterances,
    wrap,
)


def at(kind, when, **fields):
    return kind(stream_time=when, wall_time=when / 10, **fields)


def say(when, *tokens, step=0.125):
    return [at(Text, when + step * i, text=token) for i, token in enumerate(tokens)]


def frame(when, index=0):
    return at(FrameSeen, when, index=index, time=float(when))


def end(when):
    return at(End, when, reason="finished", counters=Counters(frames=3))


TABLETOP = [
    at(Turn, 0, prompt=""),
    at(Silence, 0),
    frame(0),
    at(Silence, 0),
    at(Turn, 0.5, prompt="What number is on the card?"),
    *say(0.5, "It", " is", " a", " 7", "."),
    frame(1),
    at(Silence, 1.125),
    frame(2),
    *say(2, "Now", " it", " is", " 5", "."),
    at(Silence, 2.75),
    at(Turn, 3.5, prompt="What else?"),
    *say(3.5, "There", " is", " a", " red"),
    frame(4),
    *say(4, " -", " wait", ", now", " a", " blue"),
    frame(5),
    *say(5, " ball"),
    at(Interrupted, 5.1, said="There is a red - wait, now a blue ball"),
    at(Turn, 5.1, prompt="Tell me when it leaves."),
    *say(5.1, "Okay", "."),
    end(6),
]


def picture(size=(24, 32)):
    return np.full((*size, 3), (178, 136, 96), np.uint8)


def recorded(events, size=(24, 32)) -> Timeline:
    timeline = Timeline()
    for event in events:
        if isinstance(event, FrameSeen):
            timeline.add_frame(picture(size), event.time)
        timeline.add(event)
    return timeline


# ------------------------------------------------------------------------------ utterances


def test_utterances_are_answers_updates_and_cut_answers():
    found = [
        (u.kind, "".join(run.text for run in u.runs), u.runs[0].time, u.end, u.cut)
        for u in utterances(TABLETOP)
    ]
    assert found == [
        ("answer", "It is a 7.", 0.5, 1.0, False),
        ("update", "Now it is 5.", 2, 2.5, False),
        ("answer", "There is a red▪ - wait, now a blue▪ ball", 3.5, 5.1, True),
        ("answer", "Okay.", 5.1, 5.225, False),
    ]


def test_a_correction_begins_where_it_is_said():
    runs = utterances(TABLETOP)[2].runs
    styles = [(style, "".join(r.text for r in group)) for style, group in itertools.groupby(runs, styled)]
    assert styles == [
        ("answer", "There is a red"),
        ("frame", "▪"),
        ("answer", " "),
        ("correction", "- wait, now a blue"),
        ("frame", "▪"),
        ("correction", " ball"),
    ]
    assert next(run.time for run in runs if run.style == "correction") == 4


def styled(run):
    return run.style


@pytest.mark.parametrize(
    ("before", "after", "corrected"),
    [
        ("It is a 7", " - wait, now it is 5.", "- wait, now it is 5."),
        ("It is a 7", " Wait, it is 5.", " Wait, it is 5."),
        ("It is a", " 7. No, a 5.", ". No, a 5."),
        ("It is a", " 7, sorry, 5.", ", sorry, 5."),
        ("It is a 7", ", no doubt.", ""),
        ("It is a 7", " and they wait.", ""),
        ("Wait, it is", " a 7.", ""),
    ],
)
def test_only_what_follows_a_frame_can_be_a_correction(before, after, corrected):
    (said,) = utterances([*say(0, before), frame(1), *say(1, after)])
    assert "".join(run.text for run in said.runs if run.style == "correction") == corrected


def test_control_characters_are_not_drawn():
    (said,) = utterances(say(0, "a\x1b[2J\n", "b\u202e\tc"))
    assert [run.text for run in said.runs] == ["a[2J ", "b c"]


# ----------------------------------------------------------------------------- layout


def overlap(a, b, slack=0.0):
    """Whether two (left, top, right, bottom) share more than their edges."""
    return min(a[2], b[2]) - max(a[0], b[0]) > slack and min(a[3], b[3]) - max(a[1], b[1]) > slack


sizes = st.tuples(st.floats(-50, 1200), st.floats(1, 1000), st.floats(1, 300))


@given(st.lists(sizes, max_size=25))
def test_boxes_never_overlap(wanted):
    boxes = stack(wanted, left=0, right=1000, gap=6)
    places = [(b.left, b.top, b.left + b.width + 6, b.top + b.height + 6) for b in boxes]
    assert not any(overlap(a, b, 1e-6) for a, b in itertools.combinations(places, 2))
    for (left, width, height), box in zip(wanted, boxes, strict=True):
        assert (box.width, box.height) == (width, height)
        assert box.left >= 0
        assert box.right <= 1000 + 1e-6
        if 0 <= left <= 1000 - width:
            assert box.left == left


def test_a_box_goes_as_high_as_there_is_room():
    boxes = stack([(0, 100, 20), (50, 100, 20), (120, 30, 20), (200, 10, 20)], left=0, right=300, gap=5)
    assert [b.top for b in boxes] == [0, 25, 0, 0]


@given(
    st.lists(
        st.tuples(st.text(st.sampled_from("ab  字"), max_size=30), st.sampled_from(["answer", "frame"])),
        max_size=12,
    ),
    st.integers(3, 40),
)
def test_lines_hold_all_of_the_text_in_the_width(runs, width):
    lines = wrap(runs, width, len)
    assert all(sum(len(text) for text, _ in line) <= width for line in lines)
    kept = [(c, style) for line in lines for text, style in line for c in text if c != " "]
    assert kept == [(c, style) for text, style in runs for c in text if c != " "]


def test_words_stay_whole_where_they_fit():
    lines = wrap([("one t", "answer"), ("wo three", "correction"), (" fourteen", "correction")], 9, len)
    assert lines == [
        [("one t", "answer"), ("wo", "correction")],
        [("three", "correction")],
        [("fourteen", "correction")],
    ]


@pytest.mark.parametrize("length", [0, 0.1, 5, 12.06, 20, 20.5, 41, 300, 801, 36000])
def test_rows_cover_the_session(length):
    rows = row_spans(length)
    assert len(rows) <= MAX_ROWS
    assert rows[0].start == 0
    assert all(a.end == b.start for a, b in itertools.pairwise(rows))
    assert rows[-1].start <= length <= rows[-1].end
    assert sum(row.holds(length) for row in rows) == 1


# --------------------------------------------------------------------------------- drawing


def long_session():
    """300 s, some 60 utterances of all lengths, prompts in between."""
    rng = random.Random(1)
    words = [
        "the",
        "red",
        "ball",
        "square",
        "card",
        "shows",
        "number",
        "five",
        "on",
        "left",
        "gone",
        "covered",
    ]
    events = [at(Turn, 0, prompt="Tell me everything.")]
    for second in range(300):
        events.append(frame(second, second))
        if second % 31 == 30:
            events.append(at(Turn, second + 0.1, prompt=" ".join(rng.choices(words, k=rng.choice([2, 20])))))
        if rng.random() < 0.2:
            said = [f" {word}" for word in rng.choices(words, k=rng.choice([1, 5, 14, 40]))]
            events += say(second + 0.2, *said, step=0.01)
        events.append(at(Silence, second + 0.7))
    return [*events, end(300)]


def endless_talk():
    """Three rows of odd tokens at 32 a second, cut by a long prompt at the very end."""
    rng = random.Random(2)
    odd = [
        " plate",
        "gre",
        "\x07",
        " 桌上有卡片",
        " $x^{",
        "é",
        " 🙂",
        "\n",
        "�",
        "\\frac",
        "W" * 60,
        " the",
    ]
    talk = [say(second, *rng.choices(odd, k=32), step=1 / 32) for second in range(45)]
    events = [event for second, said in enumerate(talk) for event in (frame(second, second), *said)]
    return [*events, at(Interrupted, 45, said=""), at(Turn, 45, prompt="Stop." * 200), end(45.1)]


def offline():
    """All of the answer at one instant, at the end of the axis."""
    frames = [frame(second, second) for second in range(12)]
    words = [" The", " video", " shows", " a", " table", "."] * 80
    return [*frames, at(Turn, 11, prompt="Describe the video."), *say(11, *words, step=0.0), end(11)]


SESSIONS = {
    "tabletop": TABLETOP,
    "long": long_session(),
    "endless": endless_talk(),
    "offline": offline(),
    "image": [at(Turn, 0, prompt=""), frame(0), *say(0, "A", " four", "."), end(0)],
    "nothing but the end": [end(0)],
}


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", SESSIONS)
def test_no_text_overlaps_another_or_leaves_its_box(name):
    figure = draw(SESSIONS[name], {})
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [(text, text.get_window_extent(renderer)) for text in figure.texts]
    places = sorted((e.x0, e.y0, e.x1, e.y1) for _, e in texts)
    for i, a in enumerate(places):
        for b in itertools.takewhile(lambda b, a=a: b[0] < a[2], places[i + 1 :]):
            assert not overlap(a, b, slack=1.5), (a, b)
    width, height = canvas.get_width_height()
    assert width == WIDTH
    boxes = [
        patch.get_window_extent(renderer)
        for patch in figure.artists
        if isinstance(patch, Rectangle) and to_hex(patch.get_facecolor()) in FILLS.values()
    ]
    boxes = [box for box in boxes if box.height > 2 * FONT]
    assert not any(overlap(a.extents, b.extents, 1e-3) for a, b in itertools.combinations(boxes, 2))
    assert all(box.x0 >= LEFT - 1e-3 and box.x1 <= RIGHT + 1e-3 and box.y0 >= 0 for box in boxes)
    for text, place in texts:
        assert place.x0 >= 0
        assert place.x1 <= width
        assert place.y0 >= 0
        assert place.y1 <= height
        if text.get_fontsize() == FONT and place.y1 < height - 50:
            inside = (b.x0 <= place.x0 and place.x1 <= b.x1 and b.y0 <= place.y0 for b in boxes)
            assert any(inside), text.get_text()


def bars(figure, style):
    patches = [p for p in figure.artists if isinstance(p, Rectangle) and p.zorder > 2]
    return [p for p in patches if to_hex(p.get_facecolor()) == COLOURS[style]]


def test_durations_corrections_and_cuts_are_drawn_at_their_time():
    figure = draw(TABLETOP, {})
    scale = (RIGHT - LEFT) / 6
    (update,) = bars(figure, "update")
    assert update.get_x() == LEFT + 2 * scale
    assert update.get_width() == pytest.approx(0.5 * scale)
    (correction,) = bars(figure, "correction")
    assert correction.get_x() == LEFT + 4 * scale
    assert correction.get_x() + correction.get_width() == pytest.approx(LEFT + 5.1 * scale)
    (cut,) = bars(figure, "cut")
    assert cut.get_x() + cut.get_width() / 2 == pytest.approx(LEFT + 5.1 * scale)


def test_an_answer_is_beside_the_one_that_its_prompt_cut():
    cut = say(0, *["word "] * 40)
    events = [
        *cut,
        at(Interrupted, 5, said=""),
        at(Turn, 5, prompt="And?"),
        *say(5, *["word "] * 40),
        end(10),
    ]
    first, second = (p for p in draw(events, {}).artists if to_hex(p.get_facecolor()) == FILLS["answer"])
    assert first.get_y() == second.get_y()
    assert second.get_x() == LEFT + (RIGHT - LEFT) / 2


def test_an_utterance_over_two_rows_has_ellipses():
    talk = [event for k in range(25) for event in say(k, f" word{k}")]
    texts = [text.get_text() for text in draw([*talk, end(25)], {}).texts]
    assert "".join(t for t in texts if "word" in t).split() == [f"word{k}" for k in range(25)]
    assert sum("…" in text for text in texts) == 2


def test_seen_frames_are_drawn_evenly_at_their_times():
    events = [*(frame(second, second) for second in range(40)), end(40)]
    timeline = recorded(events, size=(1080, 1920))
    timeline.add_frame(picture(), 99.0)
    assert max(t.size for t in timeline._thumbnails.values()) <= THUMBNAIL
    figure = draw(timeline.events, timeline._thumbnails)
    scale = (RIGHT - LEFT) / 20
    assert [image.ox for image in figure.images] == [round(LEFT + 2 * k * scale) for k in range(10)] * 2
    one_row = recorded(TABLETOP, size=(24, 32))
    assert len(draw(one_row.events, one_row._thumbnails).images) == 5


# ------------------------------------------------------------------------------------ the file


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SESSIONS)
def test_a_session_becomes_a_png(name, tmp_path):
    path = tmp_path / "session.png"
    recorded(SESSIONS[name]).save(path)
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width == WIDTH
        assert 50 < image.height < 6000
    assert [file.name for file in tmp_path.iterdir()] == ["session.png"]


def test_a_picture_is_written_atomically(tmp_path, monkeypatch):
    path = tmp_path / "session.png"
    path.write_bytes(b"the one before")
    write = Path.write_bytes

    def full(self, data):
        write(self, data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        recorded(TABLETOP).save(path)
    assert path.read_bytes() == b"the one before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_session_without_events_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        Timeline().save(tmp_path / "session.png")
    assert not list(tmp_path.iterdir())


def test_paths_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.iterdir())
    for name, why in [
        ("session.jpg", "as .png"),
        ("session", "as .png"),
        ("folder.png", "is a folder"),
        ("nowhere/session.png", "No such file"),
        ("file/session.png", "Not a directory"),
        ("x" * 300 + ".png", "File name too long"),
        ("x" * 250 + ".png", "File name too long"),  # that of the draft
    ]:
        with pytest.raises(ConfigError, match=why):
            check_path(tmp_path / name)
    check_path(tmp_path / "session.PNG")
    assert sorted(tmp_path.iterdir()) == before
