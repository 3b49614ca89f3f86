"""Timeline of a session as a PNG: frames along the time axis, prompts and answers below.

The layout is in pixels, x to the right and y downwards.
"""

import dataclasses
import io
import itertools
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.image import FigureImage
from matplotlib.patches import Circle, Rectangle
from matplotlib.transforms import Affine2D
from PIL import Image

from moss_jax.config import ConfigError
from moss_jax.stream import End, Event, FrameSeen, FrameUnseen, Interrupted, Silence, Text, Turn
from moss_jax.terminal.transcript import PROMPT, clock, printable, summary

WIDTH = 1600
LEFT, RIGHT = 32, WIDTH - 32
SECONDS_PER_ROW = 20
# Maximum number of rows; longer sessions get longer rows.
MAX_ROWS = 40
THUMBNAIL = (160, 120)

# Chinese needs a font on the machine; characters without one are drawn as boxes.
CHINESE = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "PingFang SC",
    "Microsoft YaHei",
)
FONTS = ["DejaVu Sans", *(name for name in CHINESE if name in font_manager.get_font_names())]
FONT, LINE = 17, 23
SMALL = 14

# Padding of text in its box, and gap between boxes.
PAD, GAP = 8, 6
# Bounds on the width of a box.
MIN_WIDTH, MAX_WIDTH = 180, 760
# Length in characters at which a prompt is truncated.
MAX_PROMPT = 300
# Marks a frame that arrived in mid-sentence.
MARK = "▪"

PAPER, INK, FAINT, LINES = "#fcfcfa", "#22262b", "#7b828a", "#d5d8db"

Style = Literal["answer", "update", "correction", "frame", "cut", "more", "prompt"]
# A piece of a line.
type Part = tuple[str, Style]
COLOURS: dict[Style, str] = {
    "answer": "#59636e",
    "update": "#2468b0",
    "correction": "#c25a00",
    "frame": "#a9b0b8",
    "cut": "#c62828",
    "more": "#8a929b",
    "prompt": INK,
}
FILLS: dict[Style, str] = {"answer": "#eef0f2", "update": "#e4eef9", "prompt": "#f7ecc6"}

# A correction word after a frame, either first or after a punctuation mark.
CORRECTION = re.compile(
    rf"{MARK}[^{MARK}]*?"
    rf"((?:(?<={MARK})\s*|[-–—,.;:!?…]\s*)(?:(?:wait|actually|sorry|correction)\b|no,))",
    re.IGNORECASE,
)


class Timeline:
    """Collects the frames and the events of a session and draws them.

    Frames and events may be added from different threads.

    Attributes:
      events: those added so far.
    """

    def __init__(self):
        self.events: list[Event] = []
        self._thumbnails: dict[float, Image.Image] = {}

    def add_frame(self, rgb: UInt8[np.ndarray, "H W 3"], time: float) -> None:
        """Keeps a thumbnail of a frame taken at `time` seconds; drawn if an event reports it as seen."""
        thumbnail = Image.fromarray(rgb)
        thumbnail.thumbnail(THUMBNAIL)
        self._thumbnails[float(time)] = thumbnail

    def add(self, event: Event) -> None:
        """Adds an event."""
        self.events.append(event)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the picture as PNG, 1600 pixels wide, atomically.

        Raises:
          ValueError: there are no events.
          OSError: the file cannot be written.
        """
        png = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            FigureCanvasAgg(draw(self.events, self._thumbnails)).print_png(png)
        path = Path(path)
        draft = _draft(path)
        try:
            draft.write_bytes(png.getvalue())
            draft.replace(path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            draft.unlink(missing_ok=True)


def _draft(path: Path) -> Path:
    """Path of the temporary file next to a picture."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def check_path(path: str | os.PathLike) -> None:
    """Checks that a picture can be written to a path.

    Raises:
      ConfigError: the path is not a .png, or its folder is missing or read-only.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"a timeline is written as .png, not as {path.name}")
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder")
        _draft(path).touch()
        _draft(path).unlink()
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


# ---------------------------------------------------------------------------- utterances


@dataclasses.dataclass(frozen=True)
class Run:
    """A text of one style, said at one time."""

    time: float
    text: str
    style: Style


@dataclasses.dataclass
class Utterance:
    """A text of the model between silences or prompts.

    Attributes:
      kind: "answer" for the first in a user turn, "update" for later ones.
      runs: text in the style of its kind, with a mark wherever a frame arrived, and in the style "correction"
        from a correction on.
      end: stream time of its last token, or of the prompt that interrupted it.
      cut: whether a prompt interrupted it.
    """

    kind: Style
    runs: list[Run]
    end: float
    cut: bool = False


def utterances(events: Iterable[Event]) -> list[Utterance]:
    """Groups pieces of text between silences, prompts and the end.

    A correction is recognised by a word such as "wait" between a frame and the next.
    """
    said: list[Utterance] = []
    speaking = False
    kind: Style = "answer"
    frames: list[Run] = []
    for event in events:
        match event:
            case Text() if speaking:
                # A frame after the last token arrived in silence, so its mark waits for more text.
                said[-1].runs += [*frames, Run(event.stream_time, _clean(event.text), said[-1].kind)]
                said[-1].end = event.stream_time
                frames = []
            case Text():
                begin = Run(event.stream_time, _clean(event.text), kind)
                said.append(Utterance(kind, [begin], event.stream_time))
                speaking, kind, frames = True, "update", []
            case FrameSeen():
                frames.append(Run(event.stream_time, MARK, "frame"))
            case Interrupted() if speaking:
                said[-1].end, said[-1].cut = event.stream_time, True
                speaking = False
            case Turn():
                speaking, kind = False, "answer"
            case Silence() | End():
                speaking = False
    for utterance in said:
        utterance.runs = _mark_correction(utterance.runs)
    return said


def _clean(text: str) -> str:
    """Text without line breaks and control characters."""
    return printable(re.sub(r"\s", " ", text))


def _mark_correction(runs: list[Run]) -> list[Run]:
    found = CORRECTION.search("".join(run.text for run in runs))
    if not found:
        return runs
    marked, point = [], found.start(1)
    for run in runs:
        at = max(point, 0)
        point -= len(run.text)
        after: Style = "frame" if run.style == "frame" else "correction"
        marked += [Run(run.time, run.text[:at], run.style), Run(run.time, run.text[at:], after)]
    return [run for run in marked if run.text]


# ---------------------------------------------------------------------------- layout


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle of the picture, in pixels."""

    left: float
    top: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height


def stack(sizes: Sequence[tuple[float, float, float]], *, left: float, right: float, gap: float) -> list[Box]:
    """Places boxes one after the other without overlap, each as high as the previous ones permit.

    Args:
      sizes: (preferred left edge, width, height) of each box, no wider than the space from `left` to `right`.
        A box that would stick out on the right moves left.
    """
    placed: list[Box] = []
    for wanted, width, height in sizes:
        x = max(left, min(wanted, right - width))
        top = 0.0
        for other in sorted(placed, key=lambda box: box.top):
            apart = other.right + gap <= x or x + width + gap <= other.left
            if not apart and other.top < top + height + gap and top < other.bottom + gap:
                top = other.bottom + gap
        placed.append(Box(x, top, width, height))
    return placed


def wrap(runs: Iterable[Part], width: float, measure: Callable[[str], float]) -> list[list[Part]]:
    """Wraps text to lines of at most `width`: between words, and inside words longer than a line.

    Args:
      runs: (text, style) pairs; a word may span several.
      measure: returns the width of a text.

    Returns:
      Lines of such pairs, without leading or trailing spaces.
    """
    words: list[list[Part]] = [[]]
    for text, style in runs:
        for part in re.findall(r" +|[^ ]+", text):
            if part[0] == " ":
                words.append([])
            else:
                words[-1].append((part, style))
    lines: list[list[Part]] = []
    used = math.inf
    for word in filter(None, words):
        fits = sum(measure(text) for text, _ in word) <= width
        pieces: list[list[Part]] = [word]
        if not fits:
            pieces = [[(character, style)] for text, style in word for character in text]
        for index, piece in enumerate(pieces):
            space = "" if index else " "
            needed = sum(measure(text) for text, _ in piece)
            if used + measure(space) + needed > width:
                lines.append(piece)
                used = needed
            else:
                lines[-1] = [*lines[-1], (space, piece[0][1]), *piece]
                used += measure(space) + needed
    return [_joined(line) for line in lines]


def _joined(line: list[Part]) -> list[Part]:
    """Merges neighbours of the same style in a line."""
    joined: list[Part] = []
    for text, style in line:
        if joined and joined[-1][1] == style:
            joined[-1] = joined[-1][0] + text, style
        else:
            joined.append((text, style))
    return joined


# ---------------------------------------------------------------------------- drawing


@dataclasses.dataclass(frozen=True)
class RowSpan:
    """The part of a session in one row, from `start` to `end` in seconds."""

    start: int
    end: int
    is_last: bool

    def holds(self, time: float) -> bool:
        return self.start <= time and (time < self.end or self.is_last)

    @property
    def scale(self) -> float:
        """Pixels of one second."""
        return (RIGHT - LEFT) / (self.end - self.start)

    def x(self, time: float) -> float:
        return LEFT + (min(time, self.end) - self.start) * self.scale


def row_spans(length: float) -> list[RowSpan]:
    """Splits a session of `length` seconds into rows of equal length, in whole seconds."""
    count = min(max(math.ceil(length / SECONDS_PER_ROW), 1), MAX_ROWS)
    seconds = max(math.ceil(length / count), 5)
    count = max(math.ceil(length / seconds), 1)
    return [RowSpan(i * seconds, (i + 1) * seconds, i == count - 1) for i in range(count)]


@dataclasses.dataclass(frozen=True)
class Label:
    """A text in one row; `begin` and `end` are the pixel positions of its time span."""

    kind: Style
    begin: float
    end: float
    runs: list[Run]
    cut: bool = False


def _prompt(turn: Turn, span: RowSpan) -> Label:
    text = _clean(turn.prompt)
    if len(text) > MAX_PROMPT:
        text = f"{text[:MAX_PROMPT]}…"
    x = span.x(turn.stream_time)
    return Label("prompt", x, x, [Run(turn.stream_time, f"{PROMPT} {text}", "prompt")])


def _part(utterance: Utterance, span: RowSpan) -> Label | None:
    """The part of an utterance in a row, with ellipses where it is cut; None if empty."""
    runs = [run for run in utterance.runs if span.holds(run.time)]
    if not runs:
        return None
    begins, ends = runs[0] is utterance.runs[0], runs[-1] is utterance.runs[-1]
    begin = span.x(runs[0].time if begins else span.start)
    end = span.x(utterance.end if ends else span.end)
    shown = [
        *([] if begins else [Run(span.start, "… ", "more")]),
        *runs,
        *([] if ends else [Run(span.end, " …", "more")]),
        *([Run(utterance.end, " — cut", "cut")] if ends and utterance.cut else []),
    ]
    return Label(utterance.kind, begin, end, shown, cut=ends and utterance.cut)


def draw(events: Sequence[Event], thumbnails: Mapping[float, Image.Image]) -> Figure:
    """Draws a session.

    Args:
      events: events of one slot, from the first on.
      thumbnails: thumbnails of frames, by the time at which they were taken.

    Raises:
      ValueError: there are no events.
    """
    if not events:
        raise ValueError("there is nothing to draw: the session has had no events")
    page = _Page(events, thumbnails)
    page.legend()
    for span in row_spans(page.length):
        page.row(span)
    page.footer()
    return page.figure


class _Page:
    """A picture under construction, from top to bottom; `y` is where the next part begins."""

    def __init__(self, events: Sequence[Event], thumbnails: Mapping[float, Image.Image]):
        def of[T](kind: type[T]) -> list[T]:
            return [event for event in events if isinstance(event, kind)]

        self.said = utterances(events)
        self.turns = [turn for turn in of(Turn) if turn.prompt]
        self.silences = of(Silence)
        self.ends = of(End)
        self.frames = [
            (frame.time, thumbnails[frame.time]) for frame in of(FrameSeen) if frame.time in thumbnails
        ]

        times = [event.time for event in events if isinstance(event, FrameSeen | FrameUnseen)]
        self.spacing = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
        self.length = max(event.stream_time for event in events)
        if times:
            self.length = max(self.length, times[-1] + self.spacing)

        # One point is one pixel. The height, and thus the transform of y, is known only at the end.
        self.figure = Figure(dpi=72, facecolor=PAPER)
        self.pixels = Affine2D()
        self.images: list[tuple[FigureImage, int]] = []
        self.y = 28.0
        self._renderer = RendererAgg(1, 1, 72)
        self._widths: dict[tuple[str, float], float] = {}

    def measure(self, text: str, size: float = FONT) -> float:
        """Rendered width of a text."""
        key = text, size
        if key not in self._widths:
            font = font_manager.FontProperties(family=FONTS, size=size)
            self._widths[key] = self._renderer.get_text_width_height_descent(text, font, ismath=False)[0]
        return self._widths[key]

    def row(self, span: RowSpan) -> None:
        """Draws the strip of frames, the time axis, the prompts and the speech."""
        self.strip(span)
        self.axis(span)
        self.prompts(span)
        self.speech(span)
        self.y += 34

    def strip(self, span: RowSpan) -> None:
        """Draws as many frames as fit, evenly chosen, each with its left edge at its time."""
        shown = [(span.x(time), picture) for time, picture in self.frames if span.holds(time)]
        if not shown:
            return
        width = max(picture.width for _, picture in self.frames)
        # Drops frames regularly if they are too dense; the rest shrink a little to fit.
        pitch = width + 4
        if distance := self.spacing * span.scale:
            pitch = min(pitch, distance * math.ceil(0.6 * width / distance))
        factor = min((pitch - 4) / width, 1)
        height = round(factor * max(picture.height for _, picture in self.frames))
        free = 0.0
        for x, picture in shown:
            size = max(round(picture.width * factor), 1), max(round(picture.height * factor), 1)
            x = round(x)
            if x + 1 < free or x + size[0] > WIDTH:
                continue
            free = x + pitch
            y = round(self.y) + height - size[1]
            image = self.figure.figimage(np.asarray(picture.resize(size)), xo=x, origin="upper")
            self.images.append((image, y + size[1]))
        self.y = round(self.y) + height + 6

    def axis(self, span: RowSpan) -> None:
        """Draws ticks at whole seconds, labelled where there is room."""
        end = span.x(self.length)
        self.box(LEFT, self.y, end - LEFT, 1.5, FAINT)
        step = next(s for s in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, math.inf) if s * span.scale >= 70)
        for second in range(span.start, span.end + 1):
            x = span.x(second)
            if x > end + 1:
                break
            labelled = second % step == 0
            if labelled or span.scale > 6:
                self.box(x - 0.5, self.y, 1.5, 8 if labelled else 4, FAINT)
            if labelled and x + 4 + self.measure(clock(second), SMALL) < WIDTH:
                self.text(x + 4, self.y + 16, clock(second), FAINT, SMALL)
        self.y += 28

    def prompts(self, span: RowSpan) -> None:
        labels = [_prompt(turn, span) for turn in self.turns if span.holds(turn.stream_time)]
        if labels:
            self.y = self.labels(labels, self.y) + 8

    def speech(self, span: RowSpan) -> None:
        """Draws a line with bars for speech and dots for silences, and the texts below."""
        y = self.y + 5
        self.box(LEFT, y - 0.5, span.x(self.length) - LEFT, 1, LINES)
        free = 0.0
        for silence in self.silences:
            if span.holds(silence.stream_time) and (x := span.x(silence.stream_time)) >= free:
                self.dot(x, y)
                free = x + 9
        labels = [part for utterance in self.said if (part := _part(utterance, span))]
        for label in labels:
            self.bar(label, y, span)
        self.y = self.labels(labels, y + 5)

    def bar(self, label: Label, y: float, span: RowSpan) -> None:
        """Draws the duration of an utterance, with its correction, arriving frames and interruption."""
        end = max(label.end, label.begin + 5)
        self.box(label.begin, y - 5, end - label.begin, 10, COLOURS[label.kind], layer=3)
        if corrected := [run.time for run in label.runs if run.style == "correction"]:
            x = min(span.x(corrected[0]), end - 4)
            self.box(x, y - 5, end - x, 10, COLOURS["correction"], layer=3)
        for run in label.runs:
            if run.style == "frame":
                self.box(span.x(run.time) - 2, y - 2, 4, 4, PAPER, layer=4)
        if label.cut:
            self.box(end - 2, y - 10, 4, 20, COLOURS["cut"], layer=4)

    def labels(self, labels: list[Label], top: float) -> float:
        """Draws texts in boxes, each with its left edge at its time; returns the bottom of the lowest."""
        texts = [
            self.wrapped(label, follower.begin - GAP if follower else RIGHT)
            for label, follower in itertools.zip_longest(labels, labels[1:])
        ]
        sizes = []
        for label, lines in zip(labels, texts, strict=True):
            width = max((sum(self.measure(text) for text, _ in line) for line in lines), default=0.0)
            width = max(width + 2 * PAD, label.end - label.begin - GAP)
            sizes.append((label.begin, width, LINE * len(lines) + 2 * PAD))
        boxes = stack(sizes, left=LEFT, right=RIGHT, gap=GAP)
        for label, lines, box in zip(labels, texts, boxes, strict=True):
            self.label(label, lines, dataclasses.replace(box, top=top + box.top), top)
        return top + max((box.bottom for box in boxes), default=0.0)

    def label(self, label: Label, lines: list[list[Part]], box: Box, top: float) -> None:
        colour = COLOURS[label.kind]
        self.box(box.left, box.top, box.width, box.height, FILLS[label.kind], layer=2)
        self.box(label.begin, top - 6, 2, box.top - top + 6, colour)
        if box.top > top:
            # The box is far from the line above, so it repeats the duration.
            self.box(label.begin, box.top, label.end - label.begin, 3, colour, layer=3)
        for i, line in enumerate(lines):
            x = box.left + PAD
            for text, style in line:
                y = box.top + PAD + (i + 0.5) * LINE
                self.text(x, y, text, INK if style in FILLS else COLOURS[style])
                x += self.measure(text)

    def wrapped(self, label: Label, limit: float) -> list[list[Part]]:
        """Wraps a label to the room up to `limit`, or wider if the column would be too narrow."""
        total = sum(self.measure(run.text) for run in label.runs)
        lasted, room, edge = (x - label.begin for x in (label.end, limit, RIGHT))
        tall, flat = math.sqrt(3 * LINE * total), math.sqrt(12 * LINE * total)
        if room < max(tall, MIN_WIDTH):
            # Placed below its neighbour, where there is more room up to the edge.
            room = max(tall, min(flat, edge), MIN_WIDTH)
        room = min(room, max(MAX_WIDTH, lasted))
        runs: list[Part] = [(run.text, run.style) for run in label.runs]
        lines = wrap(runs, room - 2 * PAD, self.measure)
        # Then shrunk as far as the number of lines allows, so that no word is left alone in the last line.
        for factor in (0.6, 0.7, 0.8, 0.9):
            narrower = wrap(runs, max(factor * room, lasted - GAP) - 2 * PAD, self.measure)
            if len(narrower) == len(lines):
                return narrower
        return lines

    def legend(self) -> None:
        """Draws the marks that occur, with their meanings."""
        styles = {run.style for utterance in self.said for run in utterance.runs}
        entries: list[tuple[bool, Style | Literal["silence"], str]] = [
            (bool(self.turns), "prompt", "prompt"),
            ("answer" in styles, "answer", "answer"),
            ("update" in styles, "update", "update"),
            ("correction" in styles, "correction", "correction in mid-sentence"),
            ("frame" in styles, "frame", "frame that arrived meanwhile"),
            (any(utterance.cut for utterance in self.said), "cut", "cut by a prompt"),
            (bool(self.silences), "silence", "silence"),
        ]
        x, y = LEFT, self.y
        for occurs, mark, meaning in entries:
            if not occurs:
                continue
            match mark:
                case "prompt":
                    self.box(x, y - 8, 26, 16, FILLS["prompt"])
                    self.text(x + 9, y, PROMPT, INK)
                case "frame":
                    self.box(x, y - 5, 26, 10, COLOURS["answer"])
                    self.box(x + 11, y - 2, 4, 4, PAPER, layer=2)
                    self.text(x + 30, y, MARK, COLOURS["frame"])
                    x += 12
                case "cut":
                    self.box(x, y - 5, 24, 10, COLOURS["answer"])
                    self.box(x + 22, y - 9, 4, 18, COLOURS["cut"], layer=2)
                case "silence":
                    self.box(x, y - 0.5, 26, 1, LINES)
                    self.dot(x + 13, y)
                case _:
                    self.box(x, y - 5, 26, 10, COLOURS[mark])
            self.text(x + 34, y, meaning, FAINT, SMALL)
            x += 34 + self.measure(meaning, SMALL) + 28
        self.y += 26

    def footer(self) -> None:
        """Draws the end of the session, and sets the picture's size."""
        for end in self.ends:
            for line in wrap([(summary(end), "more")], RIGHT - LEFT, lambda text: self.measure(text, SMALL)):
                self.text(LEFT, self.y, line[0][0], FAINT, SMALL)
                self.y += LINE
        height = math.ceil(self.y + 8)
        self.figure.set_size_inches(WIDTH / 72, height / 72)
        self.pixels.scale(1, -1).translate(0, height)
        for image, bottom in self.images:
            image.oy = height - bottom

    def box(self, x: float, y: float, width: float, height: float, colour: str, layer: int = 1) -> None:
        place = {"transform": self.pixels, "zorder": layer}
        self.figure.add_artist(Rectangle((x, y), width, height, color=colour, linewidth=0, **place))

    def dot(self, x: float, y: float) -> None:
        self.figure.add_artist(Circle((x, y), 3, color=FAINT, linewidth=0, transform=self.pixels))

    def text(self, x: float, y: float, text: str, colour: str, size: float = FONT) -> None:
        """Draws one line of text from x, centred on y."""
        font = {"color": colour, "fontsize": size, "family": FONTS}
        # Dollar signs must not start a formula.
        self.figure.text(x, y + 0.35 * size, text, transform=self.pixels, parse_math=False, zorder=5, **font)
