"""Terminal output of a stream: a transcript for people, or one JSON object per event."""

import json
import re
import unicodedata
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console
from rich.text import Text as Styled

from moss_jax.stream import (
    End,
    Event,
    FrameSeen,
    FramesSkipped,
    Interrupted,
    NearCapacity,
    NotAsked,
    Silence,
    Text,
    Turn,
    TurnLimit,
)

# Width of the margin for a stream time such as " 12:34  ".
MARGIN = 8
PROMPT = "›"
SILENCE = "·"
FRAME_WHILE_SPEAKING = "▫"

# Bidirectional embeddings, overrides and isolates (UAX #9), which last until they are closed.
BIDI_CONTROLS = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))

ENDINGS = {
    "finished": "end of the stream",
    "stopped": "stopped",
    "text_capacity": "the text capacity is used up; engine.text_capacity sets it",
    "bank_capacity": "the memory bank is full; engine.bank_capacity sets it",
    "not_finite": "the model's logits are not finite; check its weights and their dtype",
    "token_limit": "the answer is cut at its limit; max_tokens of answer_offline sets it",
}


def print_json(events: Iterable[Event], out: TextIO) -> None:
    """Writes and flushes one JSON object per line, in ASCII unless the file accepts any character."""
    ensure_ascii = "utf" not in (out.encoding or "utf-8").lower()
    for event in events:
        out.write(json.dumps(event.to_dict(), ensure_ascii=ensure_ascii) + "\n")
        out.flush()


def print_transcript(events: Iterable[Event], console: Console) -> None:
    """Writes a transcript, event by event.

    Each line begins with the stream time and belongs to one speaker. A dot is a silence, and a small square
    in the text is a frame that the model sees while it is talking.
    """
    printer = TranscriptPrinter(console)
    try:
        for event in events:
            printer.add(event)
    finally:
        # Leaves no open line if the stream breaks off.
        printer.end_line()


class TranscriptPrinter:
    """Writes a transcript and keeps track of the cursor."""

    def __init__(self, console: Console):
        self._console = console
        self._column = 0
        # The kind of open line: "text", "silence", "turn", or empty for none.
        self._line = ""

    def add(self, event: Event) -> None:
        """Writes one event."""
        match event:
            case Turn():
                if event.prompt:
                    self._start("turn", event.stream_time)
                    self._write(f"{PROMPT} {printable(event.prompt)}", "bold cyan")
                    self.end_line()
            case FrameSeen():
                if self._line == "text":
                    self._write(FRAME_WHILE_SPEAKING, "dim cyan")
            case FramesSkipped():
                self._start("skipped", event.stream_time)
                when = clock(event.time)
                frames = f"1 frame at {when}" if event.count == 1 else f"{event.count} frames from {when} on"
                self._write(f"{frames} cannot be decoded", "dim red")
                self.end_line()
            case Text():
                if self._line != "text":
                    self._start("text", event.stream_time)
                self._write(printable(event.text))
            case Silence():
                if self._line != "silence":
                    self._start("silence", event.stream_time)
                self._write(f"{SILENCE} ", "dim")
            case Interrupted():
                self._write(" — cut", "dim red")
                self.end_line()
            case TurnLimit():
                self._write(f" — cut after {event.tokens} tokens", "dim red")
                self.end_line()
            case NearCapacity():
                self._start("near", event.stream_time)
                self._write(f"{event.left} of engine.{event.setting} = {event.capacity} left", "dim red")
                self.end_line()
            case NotAsked():
                self._start("turn", event.time)
                self._write(f"{PROMPT} {printable(event.prompt)}", "dim cyan")
                self._write(" — never asked", "dim red")
                self.end_line()
            case End():
                self.end_line()
                self._console.print(Styled(f"\n{summary(event)}", style="dim"))

    def _start(self, line: str, stream_time: float) -> None:
        self.end_line()
        self._line = line
        self._print(Styled(f"{clock(stream_time):>{MARGIN - 2}}  ", style="dim"))
        self._column = MARGIN

    def _write(self, text: str, style: str = "") -> None:
        """Writes text word by word and wraps it, indented by the margin."""
        for word in re.findall(r"\n|[^\S\n]+|\S+", text):
            width = Styled(word).cell_len
            if word == "\n" or (self._column + width > self._console.width and self._column > MARGIN):
                self._print(Styled("\n" + " " * MARGIN))
                self._column = MARGIN
                if word.isspace():
                    continue
            self._print(Styled(word, style=style))
            self._column += width

    def end_line(self) -> None:
        """Ends the open line, if any."""
        if self._column:
            self._console.print()
        self._column, self._line = 0, ""

    def _print(self, text: Styled) -> None:
        self._console.print(text, end="", soft_wrap=True)
        self._console.file.flush()


def clock(seconds: float) -> str:
    """Formats stream time as minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def summary(end: End) -> str:
    """Formats the reason and counters of an end on one line."""
    c = end.counters
    counts = [
        (c.frames, "frame", "frames"),
        (c.frames_dropped, "frame dropped", "frames dropped"),
        (c.frames_still, "frame still", "frames still"),
        (c.frames_alike, "frame alike", "frames alike"),
        (c.frames_rate, "frame above the rate", "frames above the rate"),
        (c.tokens, "token of text", "tokens of text"),
        (c.silences, "silence", "silences"),
        (c.interruptions, "interruption", "interruptions"),
    ]
    parts = [f"{n} {one if n == 1 else many}" for n, one, many in counts if n]
    return f"{ENDINGS[end.reason]} · {', '.join(parts)} · {end.wall_time:.1f} s"


def printable(text: str) -> str:
    """Removes control characters, with which a model could send escape codes to the terminal.

    Line breaks stay, tabs become spaces, and invisible characters that spelling needs stay too: joiners,
    variation selectors, direction marks. Only controls that reorder the text after them are removed.
    """
    return "".join(
        c
        for c in text.replace("\t", " ")
        if c == "\n" or not (unicodedata.category(c) == "Cc" or c in BIDI_CONTROLS)
    )
