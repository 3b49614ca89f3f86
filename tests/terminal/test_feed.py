"""Feeding a session from a source of frames: real files, both clocks, and sources that fail."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from moss_jax.config import FrameSampling, SessionConfig
from moss_jax.stream import End, FrameSeen, Session, SessionError, Turn
from moss_jax.terminal.feed import READ_AHEAD, open_session, run_session
from moss_jax.video import Frame, VideoError, sample_file

DEMO = Path(__file__).parents[2] / "assets" / "demo.mp4"


def clip(count: int, fps: float = 1.0):
    return (Frame(np.full((4, 4, 3), i, np.uint8), i / fps) for i in range(count))


def without_wall(events) -> list[dict]:
    return [event.to_dict() | {"wall_time": None} for event in events]


def feeders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "feeder"]


def real_clips(real_data: Path) -> list[Path]:
    return sorted([*real_data.glob("*.mp4"), *real_data.glob("*.avi")])


def test_lockstep_sessions_on_real_files_are_deterministic(make_engine, request):
    try:
        clips = real_clips(request.getfixturevalue("real_data"))
    except pytest.skip.Exception:
        clips = [DEMO]
    engine = make_engine(temperature=1.0, top_k=50)
    config = SessionConfig(tokens_per_second=6)
    spoken = {}
    for path in clips:
        runs = [
            without_wall(
                run_session(
                    Session(engine, config, prompt="What is happening?"),
                    sample_file(path, FrameSampling(fps=1.0)),
                    [(2.5, "And now?")],
                )
            )
            for _ in range(2)
        ]
        assert runs[0] == runs[1]
        assert [e["prompt"] for e in runs[0] if e["type"] == "turn"] == ["What is happening?", "And now?"]
        spoken[path] = "".join(e["text"] for e in runs[0] if e["type"] == "text")
    assert all(spoken.values())
    # The frames matter: no two clips give the same text.
    assert len(set(spoken.values())) == len(clips)


def test_another_seed_gives_other_text(make_engine):
    def talk(seed: int) -> list[dict]:
        engine = make_engine(temperature=1.0, top_k=50, seed=seed)
        return without_wall(run_session(Session(engine, SessionConfig(tokens_per_second=6)), clip(3), []))

    assert talk(0) != talk(1)


def test_prompts_and_frames_enter_in_order_of_time(scripted):
    prompts = [(2.5, "third"), (0.0, "first"), (2.0, "second")]
    events = list(run_session(Session(scripted(), SessionConfig()), clip(4), prompts))
    order = [e.prompt if isinstance(e, Turn) else e.index for e in events if isinstance(e, FrameSeen | Turn)]
    assert order == ["", "first", 0, 1, "second", 2, "third", 3]


def test_a_long_lockstep_source_is_read_only_a_little_ahead(scripted):
    pulled = 0

    def source():
        nonlocal pulled
        for frame in clip(200):
            pulled += 1
            yield frame

    seen = 0
    for event in run_session(Session(scripted(), SessionConfig()), source(), []):
        if isinstance(event, FrameSeen):
            seen += 1
            assert pulled <= seen + READ_AHEAD + 2
    assert seen == 200


def test_realtime_follows_the_timestamps_of_the_source(scripted):
    started = time.monotonic()
    session = Session(scripted(), SessionConfig(clock="realtime"))
    events = list(run_session(session, clip(6, fps=10.0), [(0.25, "What?")]))
    assert time.monotonic() - started >= 0.5
    frames = [e for e in events if isinstance(e, FrameSeen)]
    assert all(e.stream_time >= e.time for e in frames)
    assert [e.prompt for e in events if isinstance(e, Turn)] == ["", "What?"]


def test_an_error_of_the_source_is_raised_after_the_frames_before_it(scripted):
    closed = []

    def source():
        try:
            yield from clip(3)
            raise VideoError("clip.mp4 is damaged after 3 s")
        finally:
            closed.append(True)

    events = []
    with pytest.raises(VideoError, match="damaged after 3 s"):
        events.extend(run_session(Session(scripted(), SessionConfig()), source(), []))
    assert sum(isinstance(e, FrameSeen) for e in events) == 3
    assert not any(isinstance(e, End) for e in events)
    assert closed
    assert not feeders()


@pytest.mark.parametrize("clock", ["lockstep", "realtime"])
def test_leaving_early_ends_the_feeder_and_closes_the_source(scripted, clock):
    closed = []

    def source():
        try:
            yield from clip(1000, fps=1.0)
        finally:
            closed.append(True)

    events = run_session(Session(scripted(), SessionConfig(clock=clock)), source(), [(500.0, "still there?")])
    for event in events:
        if isinstance(event, FrameSeen):
            break
    events.close()
    assert closed
    assert not feeders()


def test_a_full_bank_ends_the_feeder_too(scripted):
    events = list(run_session(Session(scripted(bank_capacity=5), SessionConfig()), clip(1000), []))
    assert events[-1].reason == "bank_capacity"
    assert not feeders()


def test_a_prompt_at_time_0_is_the_first_user_turn(scripted):
    session, later = open_session(scripted(), [(2.0, "second"), (0.0, "first"), (1.0, "third")])
    assert later == [(1.0, "third"), (2.0, "second")]
    events = list(run_session(session, clip(3), later))
    assert [e.prompt for e in events if isinstance(e, Turn)] == ["first", "third", "second"]
    session, later = open_session(scripted(), [(0.5, "later")])
    assert later == [(0.5, "later")]
    assert next(iter(session)).prompt == ""


def test_a_prompt_that_does_not_fit_is_refused_when_the_session_is_opened(scripted):
    with pytest.raises(SessionError, match="the text capacity is 200"):
        open_session(scripted(text_capacity=200), [(1.0, "what " * 300)], system=None)
