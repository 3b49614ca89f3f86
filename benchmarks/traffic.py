"""Load generator for many live streams, and the latencies that it records."""

import collections
import dataclasses
import itertools
import math
import queue
import random
import statistics
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, Protocol

import numpy as np
from streaming import spread

from moss_jax.stream import End, Event, FrameSeen, Silence, Text, Turn
from moss_jax.stream.events import Failed
from moss_jax.stream.stream import Clock, Stream
from moss_jax.text import chat
from moss_jax.worlds.tabletop import evaluation_stream

EVERY = 5.0  # Seconds from one prompt of a stream to the next.
SHARES = {"quarter": 0.25, "all": 1.0}  # Share of the time that a stream talks.
FEEDERS = 4

# A frame, which may be a file, or a prompt to push, or whether the stream may talk from then on.
type Pushed = np.ndarray | bytes | str | bool


@dataclasses.dataclass(frozen=True)
class Push:
    """An input of stream number `stream` at `at` seconds."""

    at: float
    stream: int
    what: Pushed


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The load of a run: the timed input of all streams.

    Attributes:
      pushes: in order of time.
      talking: which streams may talk at first; None if the model itself decides.
      prompt, system: prompts that each stream is opened with.
    """

    pushes: list[Push]
    talking: list[bool] | None = None
    prompt: str = ""
    system: str | None = None


def random_traffic(
    streams: int,
    share: float,
    seconds: float,
    fps: float,
    pictures: Sequence[np.ndarray] | Sequence[bytes],
    prompt: str,
) -> Traffic:
    """Frames and prompts of streams that each talk for `share` of the time, from their prompts on."""
    rng, pushes, talking = random.Random(0), [], []
    for stream in range(streams):
        frames = itertools.count(rng.random() / fps, 1 / fps)
        for number, at in enumerate(itertools.takewhile(lambda at: at < seconds, frames)):
            pushes.append(Push(at, stream, pictures[(stream + number) % len(pictures)]))
        # Spread evenly, so that the same number talk at any time. The first turn has begun before.
        begin = EVERY * ((stream + rng.random()) / streams - 1)
        talking.append(begin + share * EVERY > 0)
        for at in itertools.takewhile(lambda at: at < seconds, itertools.count(begin, EVERY)):
            if at >= 0:
                pushes += [Push(at, stream, True), Push(at, stream, prompt)]
            if share < 1:
                pushes.append(Push(max(at + share * EVERY, 0.0), stream, False))
    return Traffic(in_order(pushes, seconds), talking, prompt)


def tabletop_traffic(streams: int, seconds: float, size: int) -> Traffic:
    """Frames and prompts of streams of the tabletop world, each at its own phase."""
    rng, pushes = random.Random(0), []
    for number in range(streams):
        world, phase = evaluation_stream(0, number, math.ceil(seconds)), rng.random()
        pushes += [Push(phase + second, number, frame) for second, frame in enumerate(world.frames(size))]
        pushes += [Push(phase + request.time, number, request.text) for request in world.requests]
    return Traffic(in_order(pushes, seconds), system=chat.SYSTEM_PROMPT)


def in_order(pushes: Sequence[Push], seconds: float) -> list[Push]:
    """Returns the pushes before the end, sorted by time."""
    return sorted((push for push in pushes if push.at < seconds), key=lambda push: push.at)


class Voice:
    """Pending latency measurements of one stream."""

    def __init__(self):
        # Push times of the prompts whose turns have not begun, the opening first.
        self.asked = collections.deque([0.0])
        # Frames and turns whose first sample is the next one.
        self.frames: list[float] = []
        self.turns: list[float] = []
        self.last: float | None = None
        self.end: End | None = None


class Listener:
    """Reads the events of all streams, in a separate thread.

    Args:
      clock: clock of the streams.

    Attributes:
      inbox: queue that the scheduler puts events into.
      ttft, frame_to_token, gaps: seconds, each with the time of the event and the slot.
      failures: messages of streams that failed.
    """

    def __init__(self, clock: Clock, streams: int):
        self.inbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self.voices = [Voice() for _ in range(streams)]
        self.ttft, self.frame_to_token, self.gaps = [], [], []
        self.failures: list[str] = []
        self._clock = clock

    @property
    def prompts_waiting(self) -> int:
        """Number of prompts without a token after them."""
        return sum(len(voice.asked) + len(voice.turns) for voice in self.voices)

    def listen(self) -> None:
        """Reads events until None is put."""
        while (event := self.inbox.get()) is not None:
            self.hear(event, self._clock.now())

    def hear(self, event: Event, now: float) -> None:
        """Records an event."""
        voice = self.voices[event.slot]
        match event:
            case Text() | Silence():
                self.frame_to_token += [(now, event.slot, now - at) for at in voice.frames]
                self.ttft += [(now, event.slot, now - at) for at in voice.turns]
                voice.frames, voice.turns = [], []
                is_text = isinstance(event, Text)
                if is_text and voice.last is not None:
                    self.gaps.append((now, event.slot, now - voice.last))
                voice.last = now if is_text else None
            case FrameSeen():
                voice.frames.append(event.time)
            case Turn():
                voice.turns.append(voice.asked.popleft())
            case Failed():
                self.failures.append(event.message)
            case End():
                voice.end = event


class Feeders:
    """Threads that push the input of the streams.

    Args:
      talk_in: sets whether the stream in a slot talks.
      listener: is told when prompts are pushed.
    """

    def __init__(
        self,
        talk_in: Callable[[int, bool], object],
        streams: Sequence[Stream],
        listener: Listener,
        clock: Clock,
    ):
        self._talk_in, self._streams, self._listener, self._clock = talk_in, streams, listener, clock
        self.frames, self.late = 0, 0.0
        self._over = threading.Event()

    def feed(self, pushes: Sequence[Push], until: float) -> None:
        """Pushes everything on schedule; returns at `until` seconds or when a stream ends."""
        mine = [[p for p in pushes if p.stream % FEEDERS == feeder] for feeder in range(FEEDERS)]
        with futures.ThreadPoolExecutor(FEEDERS) as threads:
            fed = [threads.submit(self._feed, some, until) for some in mine]
        counts = [feeder.result() for feeder in fed]
        self.frames, self.late = sum(count for count, _ in counts), max(late for _, late in counts)

    def _feed(self, pushes: Sequence[Push], until: float) -> tuple[int, float]:
        frames, late = 0, 0.0
        for push in pushes:
            if push.at >= until or self._over.wait(max(0.0, push.at - self._clock.now())):
                break
            late = max(late, self._clock.now() - push.at)
            if not self._push(push):
                self._over.set()
                break
            frames += isinstance(push.what, np.ndarray)
        self._over.wait(max(0.0, until - self._clock.now()))
        return frames, late

    def _push(self, push: Push) -> bool:
        stream = self._streams[push.stream]
        if isinstance(push.what, bool):
            self._talk_in(stream.slot, push.what)
            return True
        if isinstance(push.what, str):
            self._listener.voices[stream.slot].asked.append(self._clock.now())
            return stream.push_prompt(push.what)
        return stream.push_frame(push.what)


class Durations(Protocol):
    """Latency samples, each as (time of the event, stream, seconds)."""

    ttft: list[tuple[float, int, float]]
    frame_to_token: list[tuple[float, int, float]]
    gaps: list[tuple[float, int, float]]


def figures_of(heard: Durations, begin: float, end: float) -> dict[str, Any]:
    """Returns the figures of a range of time."""

    def within(noted) -> list[tuple[int, float]]:
        return [(slot, seconds) for at, slot, seconds in noted if begin <= at < end]

    found: dict[str, Any] = {}
    by_slot = collections.defaultdict(list)
    for slot, gap in within(heard.gaps):
        by_slot[slot].append(gap)
    if rates := [len(gaps) / sum(gaps) for gaps in by_slot.values()]:
        found["tok_s"] = {"mean": statistics.mean(rates), "p5": float(np.percentile(rates, 5))}
        found["tokens"] = sum(map(len, by_slot.values()))
    for name in ("ttft", "frame_to_token", "gaps"):
        if values := [1e3 * seconds for _, seconds in within(getattr(heard, name))]:
            found[f"{name.removesuffix('s')}_ms"] = spread(values)
    return found
