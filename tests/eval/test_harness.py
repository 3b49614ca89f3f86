"""The evaluation harness: which streams share a session, and the engine without vision."""

import dataclasses

import numpy as np
import pytest

from moss_jax.config import SelectionConfig
from moss_jax.eval.harness import Blindfold, play, session_groups
from moss_jax.stream import FrameSeen, FrameUnseen, Row, Turn


@dataclasses.dataclass(frozen=True)
class Prompt:
    time: float
    text: str


@dataclasses.dataclass(frozen=True)
class Stream:
    """A stream of two frames, with a prompt at each of these times."""

    times: tuple[float, ...] = ()

    @property
    def requests(self) -> list[Prompt]:
        return [Prompt(time, f"{time}") for time in self.times]

    def frames(self, size: int) -> np.ndarray:
        return np.zeros((2, size, size, 3), np.uint8)


STREAMS = [Stream((0.5,)), Stream((0.0,)), Stream(), Stream((0.5, 1.5)), Stream((0.0,)), Stream((1.5,))]


def test_streams_with_the_same_first_turn_share_a_session():
    assert list(session_groups(STREAMS, 2)) == [("", [0, 2]), ("", [3, 5]), ("0.0", [1, 4])]
    assert list(session_groups(STREAMS, 3)) == [("", [0, 2, 3]), ("", [5]), ("0.0", [1, 4])]


@pytest.mark.parametrize("slots", [1, 3])
def test_each_stream_gets_the_events_of_its_slot(scripted, slots):
    engines = {count: scripted(slots=count) for count in {1, slots}}
    played = play(engines, STREAMS, image_size=4, tokens_per_second=4)
    for stream, events in zip(STREAMS, played, strict=True):
        assert [event.index for event in events if isinstance(event, FrameSeen)] == [0, 1]
        prompts = [event.prompt for event in events if isinstance(event, Turn)]
        assert [prompt for prompt in prompts if prompt] == [request.text for request in stream.requests]


def test_frames_may_be_selected(scripted):
    selection = SelectionConfig(enabled=True)
    (events,) = play(
        {1: scripted(slots=1)}, [Stream()], image_size=4, tokens_per_second=4, selection=selection
    )
    frames = [type(event) for event in events if isinstance(event, FrameSeen | FrameUnseen)]
    assert frames == [FrameSeen, FrameUnseen]


def test_behind_the_blindfold_the_bank_stays_empty(make_engine, tokenizer, frames):
    engine = make_engine()
    special = tokenizer.special
    row = [Row([special.begin_of_text, special.image], [0])]
    for wrapped, seen in ((engine, 1), (Blindfold(engine), 0)):
        state, _ = wrapped.step(wrapped.start(), row, wrapped.encode(frames[:1]))
        assert np.asarray(state.stream.text.length).tolist() == [2]
        vectors = engine.model_config.vectors_per_frame
        assert np.asarray(state.stream.bank.length).tolist() == [seen * vectors]
