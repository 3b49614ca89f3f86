"""Streams that are rendered and pushed while they play."""

import dataclasses
import threading
import time

import numpy as np
import pytest

from moss_jax.config import MemoryConfig
from moss_jax.eval import feeding
from moss_jax.eval.feeding import LEAD, SEGMENT, Renderer
from moss_jax.eval.harness import open_session, play
from moss_jax.stream import End, FrameSeen, Turn

SECONDS = LEAD + 3 * SEGMENT + 5


@dataclasses.dataclass(frozen=True)
class Prompt:
    time: float
    text: str


@dataclasses.dataclass(frozen=True)
class Stream:
    """A stream whose frames are their seconds, with a prompt at each of these times."""

    times: tuple[float, ...] = ()
    seconds: int = SECONDS

    @property
    def requests(self) -> list[Prompt]:
        return [Prompt(time, f"{time}") for time in self.times]

    def frames(self, size: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        seconds = np.arange(self.seconds, dtype=np.uint8)[start:stop]
        return np.broadcast_to(seconds[:, None, None, None], (len(seconds), size, size, 3))


@dataclasses.dataclass(frozen=True)
class Torn(Stream):
    """A stream that can't be rendered to its end."""

    def frames(self, size: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        if start >= 2 * SEGMENT:
            raise ValueError("the end is missing")
        return super().frames(size, start, stop)


# Two with a first turn, and prompts within segments, between two, and behind the last frame.
STREAMS = [
    Stream((0.5, 15.5, 15.9, 16.0, 100.3)),
    Stream((0.0, 20.25)),
    Stream(),
    Stream((7.1, SECONDS - 0.5)),
    Stream((0.0,)),
]


def renderer(streams, processes=0) -> Renderer:
    return Renderer(streams, seconds=SECONDS, image_size=4, processes=processes)


def talkative(scripted, tokenizer, **settings):
    """An engine of three slots, each of which talks differently much."""
    silence, word = tokenizer.special.silence, tokenizer.encode(" a")[0]
    script = {0: ([word] * 3 + [silence]) * 500, 1: [word] * 300, 2: []}
    return scripted(script, slots=3, **settings)


def without_wall(played):
    return [[dataclasses.replace(event, wall_time=0.0) for event in events] for events in played]


@pytest.mark.parametrize("processes", [0, 1])
def test_streams_fed_while_they_play_give_the_same_events(scripted, tokenizer, processes):
    def run(**renderer):
        steps = []
        engine = talkative(scripted, tokenizer)
        engine.before_step = lambda: steps.append(1)
        played = play({3: engine}, STREAMS, image_size=4, tokens_per_second=4, **renderer)
        return played, sorted(engine.seen), len(steps)

    expected, seen, steps = run()
    with renderer(STREAMS, processes) as rendered:
        played, seen_late, steps_late = run(renderer=rendered)
    assert without_wall(played) == without_wall(expected)
    assert seen_late == seen
    # No stream goes on while another waits for the renderer.
    assert steps_late == steps
    for stream, events in zip(STREAMS, played, strict=True):
        assert [e.index for e in events if isinstance(e, FrameSeen)] == list(range(SECONDS))
        prompts = [e.prompt for e in events if isinstance(e, Turn)]
        assert [prompt for prompt in prompts if prompt] == [f"{time}" for time in stream.times]


def test_the_lead_over_the_slowest_stream_is_bounded(scripted, tokenizer):
    engine = talkative(scripted, tokenizer)
    session = open_session(engine, first_turn="", tokens_per_second=4)
    pushed, seen, ahead = [0] * 3, [0] * 3, []
    push_frame = session.push_frame

    def note(rgb, time, *, slot):
        ahead.append(time - min(seen))
        pushed[slot] += 1
        return push_frame(rgb, time, slot=slot)

    session.push_frame = note
    with renderer(STREAMS[:3]) as rendered:
        for event in feeding.feed(session, rendered, [0, 1, 2], 0):
            if isinstance(event, FrameSeen):
                seen[event.slot] = event.index + 1
                time.sleep(1e-4)  # so that the feeder could run ahead
    assert pushed == [SECONDS] * 3
    # One frame more where the feeder has been told of an event before the test.
    assert max(ahead) <= LEAD + SEGMENT + 1


def test_a_stream_that_ends_early_holds_up_no_other(scripted):
    engine = scripted(slots=2, text_capacity=400, memory=MemoryConfig("window", text="full"))
    streams = [Stream(tuple(t + 0.5 for t in range(100))), Stream()]
    with renderer(streams) as rendered:
        short, whole = play({2: engine}, streams, image_size=4, tokens_per_second=4, renderer=rendered)
    assert [e.reason for e in (*short, *whole) if isinstance(e, End)] == ["text_capacity", "finished"]
    assert sum(isinstance(e, FrameSeen) for e in whole) == SECONDS


def test_frames_that_cannot_be_rendered_end_the_session(scripted):
    streams = [Stream(), Torn()]
    with renderer(streams) as rendered, pytest.raises(ValueError, match="the end is missing"):
        play({2: scripted(slots=2)}, streams, image_size=4, tokens_per_second=4, renderer=rendered)
    assert not [thread for thread in threading.enumerate() if thread.name == "feeder"]


def test_breaking_off_ends_the_feeder(scripted):
    session = open_session(scripted(), first_turn="", tokens_per_second=4)
    with renderer([Stream()]) as rendered:
        events = feeding.feed(session, rendered, [0], 0)
        next(events)
        events.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "feeder"]
