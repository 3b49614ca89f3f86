"""Sessions that show the model a part of the frames: which, what enters the context, and what is told."""

import dataclasses
import itertools
import threading
import time

import jax
import numpy as np
import pytest
from stream.test_session import Watcher, words

from moss_jax.config import MemoryConfig, SelectionConfig, SessionConfig
from moss_jax.stream import (
    PENDING,
    Counters,
    End,
    FrameSeen,
    FrameUnseen,
    Row,
    Session,
    SessionError,
    Silence,
    Text,
)
from moss_jax.text import chat

SILENCE, IMAGE = 1021, 1024
ON = SelectionConfig(enabled=True, max_gap=1000)


def level(value: int) -> np.ndarray:
    """A frame that the scripted engine identifies by its brightness; 100 apart is a change."""
    return np.full((4, 4, 3), value, np.uint8)


def open_session(engine, frames, *, selection=ON, prompts=(), every=1.0, **settings) -> Session:
    """A lockstep session with frames of these levels, or arrays; all input is pushed."""
    config = SessionConfig(**({"tokens_per_second": 4, "selection": selection} | settings))
    session = Session(engine, config, system=None)
    for at, text in prompts:
        session.push_prompt(text, at)
    for i, frame in enumerate(frames):
        session.push_frame(level(frame) if isinstance(frame, int) else frame, i * every)
    session.finish()
    return session


def of(events, *kinds):
    return [event for event in events if isinstance(event, kinds)]


def without_wall(events) -> list[dict]:
    return [event.to_dict() | {"wall_time": None} for event in events]


def told(events) -> list[tuple[int, str]]:
    """Number of each frame, and why the model is not shown it."""
    frames = of(events, FrameSeen, FrameUnseen)
    return [(e.index, e.reason if isinstance(e, FrameUnseen) else "seen") for e in frames]


# ------------------------------------------------------------------------------------ still frames


def test_of_a_still_frame_its_token_alone_enters(scripted, tokenizer):
    engine = scripted()
    events = list(open_session(engine, [0, 0, 1, 200, 201, 200]))
    assert engine.seen == [0, 200]
    assert told(events) == list(enumerate(["seen", "still", "still", "seen", "still", "still"]))
    opening = chat.opening(tokenizer, system=None)
    assert engine.state.context == [[*opening, *[SILENCE, IMAGE] * 6]]
    assert events[-1].counters == Counters(frames=2, frames_still=4, silences=7)
    unseen = of(events, FrameUnseen)[0]
    assert list(unseen.to_dict()) == ["type", "slot", "stream_time", "wall_time", "index", "time", "reason"]
    assert (unseen.type, unseen.stream_time, unseen.time) == ("unseen", 1.0, 1.0)


def test_at_a_still_frame_the_model_may_speak(scripted, tokenizer):
    said = words(tokenizer, "the red card")[:3]
    engine = scripted([SILENCE, SILENCE, *said, SILENCE])
    events = list(open_session(engine, [0, 0, 0]))
    first = next(i for i, e in enumerate(events) if isinstance(e, Text))
    assert isinstance(events[first - 1], FrameUnseen)
    assert events[first - 1].index == 1
    assert "".join(e.text for e in of(events, Text)) == tokenizer.decode(said)


def test_frames_are_compared_with_the_one_that_was_encoded_last(scripted):
    """A scene that changes slowly is seen again and again, though no two frames in a row differ much."""
    rng = np.random.default_rng(0)
    wall = rng.integers(80, 120, (32, 32, 3), dtype=np.uint8)

    def shown(k: int) -> np.ndarray:
        frame = wall.copy()
        frame[10:16, 10:16] = 60 + 6 * k
        return frame

    events = list(open_session(scripted(), [shown(k) for k in range(20)], selection=ON))
    seen = [e.index for e in of(events, FrameSeen)]
    assert 4 <= len(seen) <= 10
    assert max(b - a for a, b in itertools.pairwise(seen)) <= 6


def test_a_still_stream_is_looked_at_now_and_then(scripted):
    selection = dataclasses.replace(ON, max_gap=5.0)
    events = list(open_session(scripted(), [7] * 13, selection=selection))
    assert [e.index for e in of(events, FrameSeen)] == [0, 5, 10]


@pytest.mark.parametrize("clock", ["lockstep", "realtime"])
def test_without_selection_every_event_is_as_it_was(scripted, tokenizer, clock):
    """Whatever the other settings."""
    said = [*words(tokenizer, "the red card is on the left"), SILENCE] * 4
    off = SelectionConfig(min_change=1.0, min_distance=9.0, max_gap=99.0, max_fps=1.0)
    found = []
    for selection in (SelectionConfig(), off):
        session = open_session(
            scripted(said), [9] * 6, selection=selection, prompts=[(2.0, "What?"), (3.5, "Where?")]
        )
        found.append(without_wall(session))
    assert found[0] == found[1]
    assert [e["index"] for e in found[0] if e["type"] == "frame"] == list(range(6))
    assert not [e for e in found[0] if e["type"] == "unseen"]


def test_still_frames_take_no_room_in_the_bank(scripted):
    engine = scripted(bank_capacity=3)
    events = list(open_session(engine, [0, 0, 0, 200, 200, 200, 0, 0, 0]))
    assert events[-1].reason == "finished"
    assert engine.seen == [0, 200, 0]
    events = list(open_session(scripted(bank_capacity=3), [0, 0, 200, 200, 0, 0, 200]))
    assert (events[-1].reason, events[-1].counters.frames) == ("bank_capacity", 3)


def test_a_full_bank_is_compacted_for_the_frames_that_are_remembered(scripted):
    memory = MemoryConfig("window", low_water=0.75)
    frames = [200 * (i // 3 % 2) for i in range(120)]
    engine = scripted(bank_capacity=8, memory=memory)
    events = list(open_session(engine, frames))
    assert events[-1].counters.frames == 40
    assert engine.compactions == (40 - 8 + 1) // 2


def test_a_lockstep_session_that_selects_takes_frames_in_order_of_time(scripted):
    session = Session(scripted(), SessionConfig(selection=ON), system=None)
    session.push_prompt("And now?", 9.0)
    session.push_frame(level(0), 2.0)
    with pytest.raises(SessionError, match="selects frames takes them in order of time: 1 s came after 2 s"):
        session.push_frame(level(0), 1.0)
    session.push_frame(level(0), 3.0)
    session.finish()
    assert told(session) == [(0, "seen"), (1, "still")]


def test_a_frame_whose_memory_is_reused_is_compared_as_it_was(scripted):
    buffer, engine = level(0), scripted()
    session = Session(engine, SessionConfig(selection=ON), system=None)
    for i, value in enumerate([0, 200, 200, 0]):
        buffer[:] = value
        session.push_frame(buffer, float(i))
    session.finish()
    assert told(session) == list(enumerate(["seen", "seen", "still", "seen"]))
    assert engine.seen == [0, 200, 0]


def test_slots_are_selected_on_their_own(scripted):
    engine = scripted(slots=2)
    session = Session(engine, SessionConfig(selection=ON), system=None)
    for i in range(4):
        session.push_frame(level(0), float(i), slot=0)
        session.push_frame(level(200 * (i % 2)), float(i), slot=1)
    session.finish()
    ends = {e.slot: e.counters for e in session if isinstance(e, End)}
    assert (ends[0].frames, ends[0].frames_still) == (1, 3)
    assert (ends[1].frames, ends[1].frames_still) == (4, 0)


def test_lockstep_does_not_depend_on_when_frames_are_pushed(scripted, tokenizer):
    said = [*words(tokenizer, "the red card is on the left"), SILENCE] * 4
    selection = dataclasses.replace(ON, max_fps=4.0)
    levels = [0, 0, 0, 200, 0, 0, 0, 0, 200, 200, 0, 0, 0, 0, 0, 0, 0, 0, 0, 200]
    prompts = [(2.0, "What?"), (3.5, "Where?")]
    expected = without_wall(
        open_session(scripted(said), levels, selection=selection, prompts=prompts, every=0.25)
    )
    rng = np.random.default_rng(0)
    for _ in range(3):
        config = SessionConfig(tokens_per_second=4, selection=selection)
        watcher = Watcher(session := Session(scripted(said), config, system=None))
        timed = [(i / 4, 1, level(x)) for i, x in enumerate(levels)] + [(t, 0, p) for t, p in prompts]
        for at, is_frame, item in sorted(timed, key=lambda x: x[:2]):
            time.sleep(rng.uniform(0, 0.01))
            (session.push_frame if is_frame else session.push_prompt)(item, at)
        session.finish()
        watcher.join(60)
        assert without_wall(watcher.events) == expected


# ------------------------------------------------------------------------------------ the rate


def test_frames_above_the_rate_leave_no_trace_but_an_event(scripted, tokenizer):
    engine = scripted()
    selection = dataclasses.replace(ON, max_fps=4.0)
    levels = [0, 0, 0, 0, 0, 200, 200, 0, 0, 0, 0, 0]
    events = list(open_session(engine, levels, selection=selection, every=0.25))
    reasons = ["seen", *["rate"] * 3, "still", "seen", "rate", "seen", "still", *["rate"] * 3]
    assert told(events) == list(enumerate(reasons))
    entered = len([reason for reason in reasons if reason != "rate"])
    opening = chat.opening(tokenizer, system=None)
    assert engine.state.context == [[*opening, *[SILENCE, IMAGE] * entered]]
    counters = events[-1].counters
    assert (counters.frames, counters.frames_still, counters.frames_rate) == (3, 2, 7)
    assert counters.silences == 1 + entered
    times = [e.stream_time for e in events]
    assert times == sorted(times)


def test_frames_above_the_rate_do_not_slow_an_answer(scripted, tokenizer):
    (word,) = words(tokenizer, " the")
    selection = dataclasses.replace(ON, max_fps=4.0)
    counts = []
    for every, config in ((1.0, ON), (0.25, selection), (0.1, selection)):
        session = open_session(
            scripted([word] * 500),
            [0] * round(5 / every),
            every=every,
            selection=config,
            tokens_per_second=6,
            tail_seconds=0.0,
        )
        at = [e.stream_time for e in of(session, Text)]
        counts.append([sum(second <= t < second + 1 for t in at) for second in range(1, 4)])
    assert counts[0] == counts[1] == counts[2]


def test_frames_above_the_rate_take_no_place_in_the_queue(scripted):
    session = Session(
        scripted(),
        SessionConfig(clock="realtime", inbox_frames=2, selection=dataclasses.replace(ON, max_fps=2.0)),
        system=None,
    )
    for i in range(20):
        session.push_frame(level(0 if i < 10 else 200), i / 30)
    session.finish()
    *events, end = session
    assert (end.counters.frames, end.counters.frames_rate, end.counters.frames_dropped) == (2, 18, 0)
    assert [index for index, reason in told(events) if reason == "seen"] == [0, 10]
    assert [index for index, _ in told(events)] == list(range(20))


def test_a_talking_realtime_session_tells_of_frames_above_the_rate(scripted, tokenizer):
    (word,) = words(tokenizer, " the")
    selection = dataclasses.replace(ON, max_fps=1.0)
    session = Session(
        scripted([word] * 10**5, text_capacity=10**6),
        SessionConfig(clock="realtime", selection=selection),
        system=None,
    )
    watcher = Watcher(session)
    for i in range(40):
        session.push_frame(level(200 * (i % 2)), i / 100)
        watcher.wait_for(Text, i)
    while len(told(watcher.events)) < 40:
        time.sleep(0.005)
    session.stop()
    watcher.join(60)
    assert told(watcher.events) == [(0, "seen"), *((i, "rate") for i in range(1, 40))]
    assert watcher.events[-1].counters.frames_rate == 39


# ------------------------------------------------------------------------------------ the queue


def test_a_full_queue_drops_frames_that_are_not_shown_first(scripted):
    session = Session(scripted(), SessionConfig(clock="realtime", inbox_frames=3, selection=ON), system=None)
    for i, value in enumerate([0, 0, 200, 200, 0, 0, 0, 0]):
        session.push_frame(level(value), i / 10)
    session.finish()
    *events, end = session
    assert [e.time for e in of(events, FrameSeen)] == [0.0, 0.2, 0.4]
    assert (end.counters.frames_dropped, end.counters.frames_still) == (5, 0)


def test_what_frames_are_compared_with_stays_in_the_queue(scripted):
    """Of frames that differ the oldest is dropped, and a still one never takes the place of its model."""
    engine = scripted()
    session = Session(engine, SessionConfig(clock="realtime", inbox_frames=1, selection=ON), system=None)
    for i, value in enumerate([0, 200, 200, 201]):
        session.push_frame(level(value), i / 10)
    session.finish()
    *_, end = session
    assert engine.seen == [200]
    assert (end.counters.frames, end.counters.frames_dropped) == (1, 3)


def test_many_threads_may_push(scripted):
    engine = scripted(text_capacity=10**5)
    selection = ON
    config = SessionConfig(clock="realtime", inbox_frames=10**4, selection=selection)
    watcher = Watcher(session := Session(engine, config, system=None))
    pushers = [
        threading.Thread(target=lambda: [session.push_frame(level(9)) for _ in range(50)]) for _ in range(4)
    ]
    for thread in pushers:
        thread.start()
    for thread in pushers:
        thread.join()
    session.finish()
    watcher.join(60)
    counters = watcher.events[-1].counters
    assert (counters.frames, counters.frames_still) == (1, 199)
    assert [index for index, _ in told(watcher.events)] == list(range(200))


# ------------------------------------------------------------------------------------ features alike


def test_a_frame_with_features_like_the_last_is_not_remembered(scripted, tokenizer):
    engine = scripted()
    selection = SelectionConfig(enabled=True, min_change=0.0, min_distance=0.1)
    events = list(open_session(engine, [0, 10, 20, 30, 40, 50, 200], selection=selection))
    assert engine.seen == [0, 30, 200]
    reasons = ["seen", "alike", "alike", "seen", "alike", "alike", "seen"]
    assert told(events) == list(enumerate(reasons))
    assert events[-1].counters == Counters(frames=3, frames_alike=4, silences=8)
    opening = chat.opening(tokenizer, system=None)
    assert engine.state.context == [[*opening, *[SILENCE, IMAGE] * 7]]


def test_frames_of_one_row_are_compared_in_order(scripted):
    engine = scripted(bank_capacity=8, memory=MemoryConfig("window", low_water=0.75))
    selection = SelectionConfig(enabled=True, min_change=0.0, min_distance=0.1)
    session = Session(engine, SessionConfig(clock="realtime", selection=selection), system=None)
    for i, value in enumerate([0, 10, 90, 100, 95, 180]):
        session.push_frame(level(value), i / 10)
        if i == 2:
            session.push_prompt("And now?", 0.2)
    session.finish()
    events = list(session)
    assert engine.seen == [0, 90, 180]
    assert told(events) == list(enumerate(["seen", "alike", "seen", "alike", "alike", "seen"]))
    assert engine.compactions == 0


def test_alike_frames_take_no_room_in_the_bank(scripted):
    selection = SelectionConfig(enabled=True, min_change=0.0, min_distance=0.1)
    frames = [200 * (i // 3 % 2) for i in range(120)]
    engine = scripted(bank_capacity=8, memory=MemoryConfig("window", low_water=0.75))
    events = list(open_session(engine, frames, selection=selection))
    assert (events[-1].counters.frames, events[-1].counters.frames_alike) == (40, 80)
    assert engine.compactions <= (40 - 8 + 1) // 2 + 1


# ------------------------------------------------------------------------------------ with a real engine


def recording(engine, monkeypatch):
    """The rows of a session, each with its sampled token and the logits."""
    steps, step = [], engine.step

    def watched(state, rows, features=None):
        state, sampled = step(state, rows, features)
        steps.append((rows[0], int(sampled.tokens[0]), np.asarray(sampled.logits[0])))
        return state, sampled

    monkeypatch.setattr(engine, "step", watched)
    return steps


def resolved(steps) -> list[int]:
    """The tokens of the context."""
    context, pending = [], None
    for row, sampled, _ in steps:
        context += [pending if token == PENDING else token for token in row.tokens]
        pending = sampled
    return context


@pytest.fixture(scope="module")
def one_pass_at(model):
    """Logits of a whole sequence whose frames are at given positions."""
    from flax import nnx

    from moss_jax.video import preprocess

    graph, params = nnx.split(model)
    vision = model.config.vision

    @jax.jit
    def run(params, tokens, frames, positions):
        pixels = preprocess(
            frames, image_size=vision.image_size, mean=vision.image_mean, std=vision.image_std
        )
        return nnx.merge(graph, params)(tokens, pixels[None], positions)[0]

    def one_pass_at(tokens, frames, positions):
        size, most = 512, 8
        padded = np.zeros((1, size), np.int32)
        padded[0, : len(tokens)] = tokens
        at = np.full((1, most), size)
        at[0, : len(frames)] = positions
        stack = np.zeros((most, *frames[0].shape), np.uint8)
        stack[: len(frames)] = frames
        return np.asarray(run(params, padded, stack, at))[: len(tokens)]

    return one_pass_at


@pytest.mark.parametrize("min_distance", [None, 1e-6])
def test_the_law_holds_with_image_tokens_without_frames(
    make_engine, one_pass_at, frames, monkeypatch, min_distance
):
    """A session gives the logits of one pass over its tokens and the frames that were shown."""
    engine = make_engine()
    steps = recording(engine, monkeypatch)
    shown = [frames[k] for k in (0, 0, 1, 1, 1, 2, 0)]
    selection = dataclasses.replace(ON, min_distance=min_distance, min_change=0.0 if min_distance else 0.08)
    session = open_session(engine, shown, selection=selection, prompts=[(2.5, "What?")], tokens_per_second=5)
    events = list(session)
    reason = "alike" if min_distance else "still"
    reasons = ["seen", reason, "seen", reason, reason, "seen", "seen"]
    assert told(events) == list(enumerate(reasons))
    context = resolved(steps)
    tokens = [i for i, token in enumerate(context) if token == IMAGE]
    positions = [at for at, why in zip(tokens, reasons, strict=True) if why == "seen"]
    expected = one_pass_at(context, [frames[k] for k in (0, 1, 2, 0)], positions)
    end = 0
    for row, _, logits in steps:
        end += len(row.tokens)
        if end > positions[0]:
            np.testing.assert_allclose(logits, expected[end - 1], atol=1e-3)


def test_rows_of_any_mix_give_the_logits_of_one_pass(make_engine, one_pass_at, frames):
    """Tokens with and without frames in one row, cut to pieces or not."""
    engine = make_engine()
    features = engine.encode(frames[:4])
    rows = [
        Row([1015, IMAGE, IMAGE, *range(30)], [None, 0]),
        Row([IMAGE], [None]),
        Row([PENDING, IMAGE, 7, IMAGE, IMAGE, 8], [1, None, 2]),
        Row([PENDING, *range(90), IMAGE, IMAGE], [None, 3]),
        Row([PENDING, IMAGE, IMAGE]),
    ]
    state, context, positions, pending = engine.start(), [], [], None
    for row in rows:
        state, sampled = engine.step(state, [row], features)
        at = [len(context) + i for i, token in enumerate(row.tokens) if token == IMAGE]
        positions += [p for p, frame in zip(at, row.frames, strict=False) if frame is not None]
        context += [pending if token == PENDING else token for token in row.tokens]
        pending = int(sampled.tokens[0])
        expected = one_pass_at(context, frames[: len(positions)], positions)[-1]
        np.testing.assert_allclose(sampled.logits[0], expected, atol=1e-3)
    vectors = engine.model_config.vectors_per_frame
    assert int(state.stream.bank.length[0]) == 4 * vectors


def test_identical_frames_have_no_distance(make_engine, frames):
    engine = make_engine()
    features = engine.encode([frames[0], frames[1], frames[0]])
    assert engine.distance(features, 0, features, 2) < 1e-3
    assert engine.distance(features, 0, features, 1) > 0.1


@pytest.mark.parametrize("perception_async", [False, True])
def test_a_realtime_session_that_selects_gives_the_logits_of_one_pass(
    make_engine, one_pass_at, frames, monkeypatch, perception_async
):
    engine = make_engine(perception_device=jax.devices()[0] if perception_async else None)
    engine.encode(frames[:1])
    steps = recording(engine, monkeypatch)
    config = SessionConfig(clock="realtime", selection=ON)
    watcher = Watcher(session := Session(engine, config, system=None))
    order = [0, 0, 1, 1, 2, 2]
    for count, k in enumerate(order, 1):
        session.push_frame(frames[k])
        while len(told(watcher.events)) < count:
            time.sleep(0.005)
    session.stop()
    watcher.join(60)
    assert told(watcher.events) == list(enumerate(["seen", "still"] * 3))
    context = resolved(steps)
    positions = [i for i, token in enumerate(context) if token == IMAGE][::2]
    expected = one_pass_at(context, frames[:3], positions)[-1]
    np.testing.assert_allclose(steps[-1][-1], expected, atol=1e-3)
    assert len(of(watcher.events, Silence, Text)) > 0
