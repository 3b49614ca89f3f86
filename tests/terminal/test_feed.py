"""Feeding a session from a source of frames: real files, both clocks, and sources that fail."""

import itertools
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest

from moss_jax.config import ConfigError, FrameSampling, SelectionConfig, SessionConfig
from moss_jax.stream import (
    Counters,
    End,
    FrameSeen,
    FramesSkipped,
    FrameUnseen,
    NotAsked,
    Session,
    SessionError,
    Turn,
)
from moss_jax.terminal.feed import READ_AHEAD, adapt_rate, open_session, report_skipped, run_session
from moss_jax.video import Frame, VideoError, sample_file, sample_live

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


@pytest.mark.parametrize("clock", ["lockstep", "realtime"])
def test_frames_that_the_model_is_not_shown_are_read_only_a_little_ahead(scripted, clock):
    """At 20 frames a second more come too early than the reader may be ahead."""
    pulled, told = 0, []

    def source():
        nonlocal pulled
        for i in range(60):
            pulled += 1
            yield Frame(np.full((4, 4, 3), 200 * (i >= 50), np.uint8), i / 20)

    selection = SelectionConfig(enabled=True, max_fps=4.0)
    session = Session(scripted(), SessionConfig(clock=clock, selection=selection))
    for event in run_session(session, source(), [(2.0, "What?")]):
        if isinstance(event, FrameSeen | FrameUnseen):
            told.append(event)
            assert clock == "realtime" or pulled <= len(told) + READ_AHEAD + 2
    assert [event.index for event in told] == list(range(60))
    assert [event.index for event in told if isinstance(event, FrameSeen)] == [0, 50]
    still = [event.time for event in told if isinstance(event, FrameUnseen) and event.reason == "still"]
    assert still == pytest.approx([0.9, 1.9, 2.9], abs=0.1)


def test_a_source_is_sampled_at_the_highest_rate_that_selection_takes():
    sampling = FrameSampling(fps=2.0)
    for selection in (SelectionConfig(), SelectionConfig(enabled=True), SelectionConfig(max_fps=8.0)):
        config = SessionConfig(selection=selection)
        assert adapt_rate(config, sampling) == (config, sampling)
    config = SessionConfig(tokens_per_second=7, selection=SelectionConfig(enabled=True, max_fps=8.0))
    config, sampling = adapt_rate(config, sampling)
    assert (config.tokens_per_second, config.selection.fps, sampling.fps) == (7, 2.0, 8.0)
    with pytest.raises(
        ConfigError, match=r"^selection\.max_fps must be a number from fps 9 on, or None; got 8"
    ):
        adapt_rate(config, FrameSampling(fps=9.0))


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


@pytest.fixture(scope="module")
def long_video(tmp_path_factory) -> Path:
    """A frame a second for 420 s."""
    path = tmp_path_factory.mktemp("videos") / "long.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width = stream.height = 64
        for i in range(420):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), i % 256, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_a_stream_ends_where_its_file_ends(scripted):
    session = Session(scripted(bank_capacity=512), SessionConfig(), system=None)
    events = list(run_session(session, sample_file(DEMO, FrameSampling(fps=10)), []))
    assert [e.time for e in events if isinstance(e, FrameSeen)] == pytest.approx(np.arange(300) / 10)
    assert events[-1].reason == "finished"


def test_a_late_prompt_is_asked_about_the_frame_before_it(scripted, long_video):
    session = Session(scripted(bank_capacity=512), SessionConfig(), system=None)
    events = list(run_session(session, sample_file(long_video, FrameSampling()), [(400.0, "And now?")]))
    (turn,) = [e for e in events if isinstance(e, Turn) and e.prompt]
    assert turn.stream_time == 400
    *_, newest = [e.time for e in events[: events.index(turn)] if isinstance(e, FrameSeen)]
    assert newest == 399
    assert events[-1].counters.frames == 420


def test_a_prompt_after_the_bank_is_full_is_never_asked(scripted, long_video):
    session = Session(scripted(bank_capacity=256), SessionConfig(), system=None)
    prompts = [(100.0, "What?"), (400.0, "And now?"), (410.0, "And then?")]
    events = list(run_session(session, sample_file(long_video, FrameSampling()), prompts))
    assert [e.prompt for e in events if isinstance(e, Turn) and e.prompt] == ["What?"]
    assert [e.time for e in events if isinstance(e, FrameSeen)] == list(range(256))
    *_, first, second, end = events
    assert (end.reason, end.counters.prompts) == ("bank_capacity", 1)
    assert [(e.type, e.prompt, e.time) for e in (first, second)] == [
        ("not_asked", "And now?", 400.0),
        ("not_asked", "And then?", 410.0),
    ]


@pytest.mark.parametrize("clock", ["lockstep", "realtime"])
def test_a_prompt_after_the_end_of_the_source_is_never_asked(scripted, clock):
    """The last frame is shown for its duration, or for as long as the one before it."""
    for duration, end in ((None, 0.4), (0.3, 0.6), (0.0, 0.3)):
        frames = [*clip(3, fps=10.0), Frame(np.zeros((4, 4, 3), np.uint8), 0.3, duration)]
        prompts = [(0.15, "a"), (end, "b"), (end + 0.05, "c"), (500.0, "d")]
        session = Session(scripted(), SessionConfig(clock=clock, tail_seconds=0.0), system=None)
        events = list(run_session(session, frames, prompts))
        assert [e.prompt for e in events if isinstance(e, Turn) and e.prompt] == ["a", "b"]
        assert [e.prompt for e in events[-3:-1] if isinstance(e, NotAsked)] == ["c", "d"]
        assert events[-1].reason == "finished"


def test_a_prompt_may_come_at_the_very_end_of_a_file(scripted):
    """The newest sample is 6 s old then."""
    session = Session(scripted(), SessionConfig(), system=None)
    frames = sample_file(DEMO, FrameSampling(fps=1 / 8))
    events = list(run_session(session, frames, [(30.0, "at the end"), (33.0, "too late")]))
    assert [e.prompt for e in events if isinstance(e, Turn | NotAsked)] == ["", "at the end", "too late"]


def test_the_prompts_behind_an_error_of_the_source_are_named(scripted):
    def source():
        yield from clip(2)
        raise VideoError("clip.mp4 is damaged after 2 s")

    events = []
    with pytest.raises(VideoError, match="damaged"):
        events.extend(run_session(Session(scripted(), SessionConfig()), source(), [(9.0, "And now?")]))
    assert [e.prompt for e in events if isinstance(e, NotAsked)] == ["And now?"]


@pytest.mark.parametrize("fps", [1.0, 3.0])
def test_a_source_may_fill_one_buffer_again_and_again(scripted, fps):
    """As `cap.read(buffer)` of a camera does; at 3 fps each of its frames is sampled three times."""
    buffer = np.zeros((4, 4, 3), np.uint8)

    def camera():
        for i in range(8):
            buffer[:] = i
            yield Frame(buffer, float(i))

    engine = scripted()
    session = Session(engine, SessionConfig(), system=None)
    list(run_session(session, sample_live(camera(), FrameSampling(fps=fps)), []))
    repeats = itertools.chain.from_iterable([i] * int(fps) for i in range(8))
    assert engine.seen == list(repeats)[: int(7 * fps) + 1]
    engine = scripted()
    list(run_session(Session(engine, SessionConfig(), system=None), camera(), []))
    assert engine.seen == list(range(8))


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


# ------------------------------------------------------------------- frames that cannot be decoded


def seen(*times: float, reason="finished") -> list:
    stamp = {"slot": 2, "wall_time": 9.0}
    events = [FrameSeen(**stamp, stream_time=t + 0.25, index=i, time=t) for i, t in enumerate(times)]
    return [*events, End(**stamp, stream_time=8.0, reason=reason, counters=Counters())]


def told(events, skipped) -> list:
    """Times of the frames, and (time, count) of the skipped ones before them."""
    out = []
    for event in report_skipped(events, skipped):
        if isinstance(event, FramesSkipped):
            out.append((event.time, event.count))
        elif isinstance(event, FrameSeen):
            out.append(event.time)
    return out


def test_skipped_frames_are_told_before_the_next_frame():
    skipped = [0.2, 0.4, 1.0, 2.5, 3.1]
    assert told(seen(0.0, 1.0, 2.0, 3.0), skipped) == [
        0.0,
        (0.2, 2),
        1.0,
        (1.0, 1),
        2.0,
        (2.5, 1),
        3.0,
        (3.1, 1),
    ]
    assert told(seen(0.0, 1.0), []) == [0.0, 1.0]
    event = next(e for e in report_skipped(seen(0.0, 1.0), skipped) if isinstance(e, FramesSkipped))
    assert (event.slot, event.stream_time, event.wall_time) == (2, 1.25, 9.0)


def test_skipped_frames_that_are_read_ahead_are_not_told_when_a_stream_is_cut():
    """How far the reader was ahead is chance."""
    assert told(seen(0.0, 1.0, reason="bank_capacity"), [0.2, 1.5, 2.0]) == [0.0, (0.2, 1), 1.0]


def test_skipped_frames_of_a_file_are_told_in_a_live_session(scripted, tmp_path):
    with av.open(str(DEMO)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    data, wrecks = DEMO.read_bytes(), [packets[i] for i in (30, len(packets) - 1)]
    for wreck in wrecks:
        data = data.replace(bytes(wreck), bytes(wreck.size))
    (tmp_path / "damaged.mp4").write_bytes(data)
    bad = sorted(float(wreck.pts * wreck.time_base) for wreck in wrecks)

    def run() -> list[dict]:
        skipped = []
        frames = sample_file(tmp_path / "damaged.mp4", FrameSampling(fps=1), skipped.append)
        return without_wall(
            report_skipped(run_session(Session(scripted(), SessionConfig()), frames, []), skipped)
        )

    events = run()
    assert [(e["time"], e["count"]) for e in events if e["type"] == "skipped"] == [
        (pytest.approx(time), 1) for time in bad
    ]
    assert events[-2]["type"] == "skipped"
    assert [e["time"] for e in events if e["type"] == "frame"] == list(range(30))
    assert events == run()
