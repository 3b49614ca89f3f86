"""Shared harness of the evaluations: plays streams of a world to an engine, one in each of its slots.

Sessions run in lockstep, so the output of a model depends only on the streams and the weights.
"""

import collections
import dataclasses
import math
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from moss_jax.config import SelectionConfig, SessionConfig
from moss_jax.eval.feeding import Renderer, feed
from moss_jax.stream import EngineLike, Event, Row, Sampled, Session
from moss_jax.worlds.base import TimedPrompt, WorldStream

# Tokens that an answer may still take after the end of a stream.
TAIL_TOKENS = 48
EVERY_FRAME = SelectionConfig(enabled=False)


def play(
    engines: Mapping[int, EngineLike],
    streams: Sequence[WorldStream],
    *,
    image_size: int,
    tokens_per_second: int,
    selection: SelectionConfig = EVERY_FRAME,
    renderer: Renderer | None = None,
) -> list[list[Event]]:
    """Plays streams in live sessions, as many at a time as there are slots.

    Args:
      engines: by number of slots; a single stream goes to the smallest, several go to the largest.
      streams: the streams with their timed prompts.
      image_size: side of the frames, in pixels.
      tokens_per_second: speed of speech.
      selection: which frames are shown to the model.
      renderer: a renderer of the same streams, to render and push frames while they play; None renders and
        pushes all frames of a session in advance. The events are the same.

    Returns:
      The events of each stream, in the order of `streams`.
    """
    events: list[list[Event]] = [[] for _ in streams]
    for first_turn, group in session_groups(streams, max(engines)):
        engine = engines[max(engines) if len(group) > 1 else min(engines)]
        session = open_session(
            engine, first_turn=first_turn, tokens_per_second=tokens_per_second, selection=selection
        )
        for slot in range(len(group), engine.config.slots):
            session.finish(slot)
        # The session was opened with the first turn.
        begin = int(bool(first_turn))
        if renderer is None:
            for slot, index in enumerate(group):
                push(session, slot, streams[index].frames(image_size), streams[index].requests[begin:])
            session.finish()
            found: Iterable[Event] = session
        else:
            found = feed(session, renderer, group, begin)
        for event in found:
            # Slots beyond the group have no stream.
            if event.slot < len(group):
                events[group[event.slot]].append(event)
    return events


def session_groups(streams: Sequence[WorldStream], slots: int) -> Iterator[tuple[str, list[int]]]:
    """Groups streams into sessions: at most `slots` streams each, all with the same first user turn.

    Yields:
      The first turn and the indices of the streams.
    """
    by_first_turn: dict[str, list[int]] = collections.defaultdict(list)
    for index, stream in enumerate(streams):
        by_first_turn[first_turn_of(stream)].append(index)
    for first_turn, indices in by_first_turn.items():
        for begin in range(0, len(indices), slots):
            yield first_turn, indices[begin : begin + slots]


def first_turn_of(stream: WorldStream) -> str:
    """The prompt at time 0, which opens the dialogue; empty if there is none."""
    return stream.requests[0].text if stream.requests and not stream.requests[0].time else ""


def open_session(
    engine: EngineLike,
    *,
    first_turn: str,
    tokens_per_second: int,
    selection: SelectionConfig = EVERY_FRAME,
) -> Session:
    """Opens a lockstep session into which streams with this first turn can be pushed, one a slot."""
    config = SessionConfig(
        clock="lockstep",
        tokens_per_second=tokens_per_second,
        tail_seconds=TAIL_TOKENS / tokens_per_second,
        selection=selection,
    )
    return Session(engine, config, prompt=first_turn)


def push(
    session: Session,
    slot: int,
    frames: Iterable[UInt8[np.ndarray, "H W 3"]],
    requests: Iterable[TimedPrompt],
) -> None:
    """Pushes all frames and requests of a stream."""
    for second, rgb in enumerate(frames):
        session.push_frame(rgb, float(second), slot=slot)
    for request in requests:
        session.push_prompt(request.text, request.time, slot=slot)


class Blindfold:
    """An engine without vision: a frame leaves its `<|image|>` in the text, and the bank stays empty."""

    def __init__(self, engine: EngineLike):
        self._engine = engine
        self.config, self.tokenizer = engine.config, engine.tokenizer
        self.perception_device = engine.perception_device
        self.start = engine.start

    def encode(self, frames: Sequence[np.ndarray]) -> Float[np.ndarray, "F 0"]:
        """Returns zero-width features, one for each frame."""
        return np.empty((len(frames), 0), np.float32)

    def distance(self, *_: Any) -> float:
        """Returns infinity: frames without features are never alike."""
        return math.inf

    def step(self, state: Any, rows: Sequence[Row | None], features: Any = None) -> tuple[Any, Sampled]:
        """Steps the engine with the frames removed from the rows."""
        blind = [row and dataclasses.replace(row, frames=(), compact=None) for row in rows]
        return self._engine.step(state, blind)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    return {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")} | {
        "python": platform.python_version()
    }
