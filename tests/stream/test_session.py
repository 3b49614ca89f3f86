"""The live loop: when input enters the context, which events are reported, and the edge cases."""

import dataclasses
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.config import SessionConfig
from moss_jax.stream import (
    NOT_FINITE,
    PENDING,
    Counters,
    End,
    FrameSeen,
    Interrupted,
    NotAsked,
    Session,
    SessionError,
    Silence,
    Text,
    Turn,
)
from moss_jax.text import chat

SILENCE, EOT, IMAGE = 1021, 1020, 1024


def numbered(count: int):
    """Frames that the scripted engine identifies by their number."""
    return [np.full((4, 4, 3), i, np.uint8) for i in range(count)]


def words(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)


def lockstep(engine, *, frames=0, prompts=(), tps=4, tail=1.0, system="Watch.", prompt="") -> Session:
    """A lockstep session with a frame a second; all input is pushed."""
    config = SessionConfig(clock="lockstep", tokens_per_second=tps, tail_seconds=tail)
    session = Session(engine, config, system=system, prompt=prompt)
    timed = [(float(i), 1, frame) for i, frame in enumerate(numbered(frames))]
    for at, is_frame, item in sorted([*timed, *((t, 0, p) for t, p in prompts)], key=lambda x: x[:2]):
        (session.push_frame if is_frame else session.push_prompt)(item, at)
    session.finish()
    return session


def kinds(events) -> list[str]:
    return [event.type for event in events]


def without_wall(events) -> list[dict]:
    return [event.to_dict() | {"wall_time": None} for event in events]


# ------------------------------------------------------------------------------------ the dialogue


def test_a_silent_stream_alternates_frames_and_silence(scripted, tokenizer):
    engine = scripted()
    events = list(lockstep(engine, frames=4))
    assert kinds(events) == ["turn", "silence", *["frame", "silence"] * 4, "end"]
    assert [e.stream_time for e in events if isinstance(e, FrameSeen)] == pytest.approx([0.25, 1, 2, 3])
    assert [e.time for e in events if isinstance(e, FrameSeen)] == [0, 1, 2, 3]
    opening = chat.opening(tokenizer, system="Watch.")
    assert engine.state.context == [[*opening, *[SILENCE, IMAGE] * 4]]
    assert engine.seen == [0, 1, 2, 3]
    assert events[-1].reason == "finished"
    assert events[-1].counters == Counters(frames=4, silences=5)


def test_the_first_prompt_can_be_the_first_turn(scripted, tokenizer):
    engine = scripted()
    events = list(lockstep(engine, frames=1, prompt="What is this?"))
    assert events[0] == dataclasses.replace(events[0], prompt="What is this?")
    assert engine.state.context[0][:-2] == chat.opening(tokenizer, system="Watch.", prompt="What is this?")
    assert events[-1].counters.prompts == 1


def test_a_frame_enters_at_the_next_token_while_the_model_talks(scripted, tokenizer):
    said = words(tokenizer, "the red card is on the left of the table")[:6]
    engine = scripted([SILENCE, *said, SILENCE])
    events = list(lockstep(engine, frames=3, tps=4))
    opening = chat.opening(tokenizer, system="Watch.")
    # Silence before frame 0; three tokens until second 1, because the opening's silence took a quarter of
    # second 0 already.
    first, second = said[:3], said[3:]
    assert engine.state.context[0] == [*opening, SILENCE, IMAGE, *first, IMAGE, *second, SILENCE, IMAGE]
    spoken = "".join(e.text for e in events if isinstance(e, Text))
    assert spoken == tokenizer.decode(said)
    # The event of the second frame comes in the middle of the text.
    reported = [e.type for e in events if isinstance(e, Text | FrameSeen)]
    second_frame = reported.index("frame", reported.index("text"))
    assert "text" in reported[second_frame:]


def test_no_more_tokens_follow_a_frame_than_a_second_holds(scripted, tokenizer):
    (word,) = words(tokenizer, " the")
    for tps in (1, 3, 8):
        events = list(lockstep(scripted([word] * 500), frames=5, tps=tps))
        after: list[int] = []
        for event in events:
            if isinstance(event, FrameSeen):
                after.append(0)
            elif isinstance(event, Text) and after:
                after[-1] += 1
        assert max(after) == tps
        assert after[1:] == [tps] * 4


def test_an_answer_goes_on_for_the_tail_and_no_longer(scripted, tokenizer):
    (word,) = words(tokenizer, " the")
    # At 4 tokens a second. The first was the silence before the frame, and the step that appends a frame
    # samples a token whatever the tail.
    for tail, expected in ((0.0, 1), (1.0, 3), (2.5, 9)):
        events = list(lockstep(scripted([SILENCE, *[word] * 100]), frames=1, tps=4, tail=tail))
        assert sum(isinstance(e, Text) for e in events) == expected
        assert isinstance(events[-1], End)


def test_an_interrupting_prompt_keeps_what_was_said_in_the_context(scripted, tokenizer):
    said = words(tokenizer, "the red card is on the left of the table and nothing else is there")
    answer = words(tokenizer, "yes")
    engine = scripted([SILENCE, *said[:7], *answer, SILENCE])
    events = list(lockstep(engine, frames=4, prompts=[(1.9, "And now?")], tps=4))
    (cut,) = [e for e in events if isinstance(e, Interrupted)]
    assert cut.said == "".join(e.text for e in events[: events.index(cut)] if isinstance(e, Text))
    (turn,) = [e for e in events if isinstance(e, Turn) and e.prompt]
    assert events.index(turn) == events.index(cut) + 1
    context = engine.state.context[0]
    opening = chat.opening(tokenizer, system="Watch.")
    cut_at = context.index(EOT, len(opening))
    before = [t for t in context[len(opening) : cut_at] if t not in (SILENCE, IMAGE)]
    assert before == said[:7]
    assert context[cut_at:][: len(chat.interjection(tokenizer, "And now?"))] == chat.interjection(
        tokenizer, "And now?"
    )
    assert events[-1].counters.interruptions == 1


def test_two_prompts_at_one_instant_cut_an_answer_once(scripted, tokenizer):
    said = words(tokenizer, "the red card is on the left of the table")
    engine = scripted([SILENCE, *said])
    events = list(lockstep(engine, frames=2, prompts=[(0.9, "And now?"), (0.9, "Or then?")], tps=8))
    assert [e.type for e in events if isinstance(e, Interrupted | Turn)][1:] == [
        "interrupted",
        "turn",
        "turn",
    ]
    assert events[-1].counters.interruptions == 1


def test_half_a_character_of_a_cut_answer_is_not_completed_by_the_next(scripted, tokenizer):
    first, *rest = tokenizer.encode("☃")
    engine = scripted([first, *rest, *words(tokenizer, "yes"), SILENCE])
    events = list(lockstep(engine, frames=2, prompts=[(0.25, "And now?")], tps=4))
    assert [e.said for e in events if isinstance(e, Interrupted)] == [""]
    assert "☃" not in "".join(e.text for e in events if isinstance(e, Text))


def test_the_repetition_penalty_starts_afresh_with_each_prompt_alone(scripted, monkeypatch):
    engine, rows = scripted([5, 6, 7, SILENCE]), []
    step = engine.step

    def recording(state, these, features=None):
        rows.append(these[0])
        return step(state, these, features)

    monkeypatch.setattr(engine, "step", recording)
    list(lockstep(engine, frames=3, prompts=[(0.25, "And now?"), (2.0, "And then?")]))
    assert [row.new_turn for row in rows] == [EOT in row.tokens for row in rows]
    assert sum(row.new_turn for row in rows) == 3
    assert len(rows) > 4


def test_a_prompt_after_silence_interrupts_nothing(scripted, tokenizer):
    engine = scripted([SILENCE, *words(tokenizer, "yes"), SILENCE])
    events = list(lockstep(engine, frames=4, prompts=[(2.5, "Anything?")]))
    assert not [e for e in events if isinstance(e, Interrupted)]
    context = engine.state.context[0]
    at = context.index(EOT, len(chat.opening(tokenizer, system="Watch.")))
    assert context[at - 1] == SILENCE


def test_at_one_instant_the_prompt_comes_before_the_frame(scripted, tokenizer):
    engine = scripted()
    session = Session(engine, SessionConfig(tokens_per_second=4), system=None)
    frame = numbered(3)
    session.push_frame(frame[0], 0.0)
    session.push_frame(frame[1], 2.0)
    session.push_prompt("Now?", 2.0)
    session.finish()
    events = list(session)
    assert kinds(events)[-4:] == ["turn", "frame", "silence", "end"]
    question = [SILENCE, *chat.interjection(tokenizer, "Now?"), IMAGE]
    assert engine.state.context[0][-len(question) :] == question


def test_an_end_of_turn_becomes_a_silence(scripted, tokenizer):
    engine = scripted([EOT, *words(tokenizer, "yes"), EOT])
    events = list(lockstep(engine, frames=3))
    opening = chat.opening(tokenizer, system="Watch.")
    assert EOT not in engine.state.context[0][len(opening) :]
    assert engine.state.context[0][len(opening)] == SILENCE
    assert kinds(events).count("silence") == 4


def test_text_events_hold_whole_characters(scripted, tokenizer):
    snowman = tokenizer.encode("☃")
    assert len(snowman) > 1
    whole = list(lockstep(scripted([*snowman, SILENCE]), frames=2, tps=8))
    assert [e.text for e in whole if isinstance(e, Text)] == ["☃"]
    broken = list(lockstep(scripted([snowman[0], SILENCE]), frames=2, tps=8))
    assert not [e for e in broken if isinstance(e, Text)]


def test_events_are_plain_data(scripted, tokenizer):
    engine = scripted([*words(tokenizer, "red card"), SILENCE])
    events = list(lockstep(engine, frames=2, prompts=[(0.5, "What?")], tps=2))
    assert {e.type for e in events} == {"turn", "frame", "text", "silence", "interrupted", "end"}
    for event in events:
        data = event.to_dict()
        assert next(iter(data)) == "type"
        assert data["stream_time"] >= 0
        assert data["wall_time"] >= 0
    assert events[-1].to_dict()["counters"]["frames"] == 2
    walls = [e.wall_time for e in events]
    assert walls == sorted(walls)
    streams = [e.stream_time for e in events]
    assert streams == sorted(streams)


# ------------------------------------------------------------------------------------ the edges


def test_a_full_bank_ends_the_stream_after_the_frames_that_fit(scripted):
    engine = scripted(bank_capacity=3)
    session = lockstep(engine, frames=6)
    events = list(session)
    assert events[-1].reason == "bank_capacity"
    assert events[-1].counters.frames == 3
    assert engine.seen == [0, 1, 2]
    assert session.push_frame(numbered(1)[0], 9.0) is False


def test_a_full_text_cache_ends_the_stream_after_the_tokens_that_fit(scripted, tokenizer):
    (word,) = words(tokenizer, " the")
    opening = len(chat.opening(tokenizer, system="Watch."))
    engine = scripted([word] * 100, text_capacity=opening + 10)
    events = list(lockstep(engine, frames=3, tps=100))
    assert events[-1].reason == "text_capacity"
    assert len(engine.state.context[0]) == opening + 10


def test_a_prompt_that_no_longer_fits_ends_the_stream_before_it(scripted, tokenizer):
    opening = len(chat.opening(tokenizer, system=None))
    engine = scripted(text_capacity=opening + 12)
    session = lockstep(engine, frames=4, prompts=[(2.5, "What do you see now?")], system=None)
    events = list(session)
    assert events[-1].reason == "text_capacity"
    assert not [e for e in events if isinstance(e, Turn) and e.prompt]
    assert [(e.prompt, e.time) for e in events if isinstance(e, NotAsked)] == [("What do you see now?", 2.5)]
    assert EOT not in engine.state.context[0][opening:]


@pytest.mark.parametrize("clock", ["lockstep", "realtime"])
def test_prompts_behind_the_frame_that_found_no_room_are_named(scripted, clock):
    """In realtime they were taken from the inbox together."""
    engine = scripted(bank_capacity=2)
    session = Session(engine, SessionConfig(clock=clock), system=None)
    for i, frame in enumerate(numbered(4)):
        session.push_prompt(f"question {i}", i / 10)
        session.push_frame(frame, i / 10)
    session.push_prompt("last", 0.3)
    session.finish()
    *events, end = session
    assert end.reason == "bank_capacity"
    assert (end.counters.frames, end.counters.prompts) == (2, 3)
    assert [e.prompt for e in events if isinstance(e, Turn) and e.prompt] == [
        f"question {i}" for i in range(3)
    ]
    assert [(e.prompt, e.time) for e in events[-2:] if isinstance(e, NotAsked)] == [
        ("question 3", 0.3),
        ("last", 0.3),
    ]


def test_prompts_that_wait_when_the_stream_is_stopped_are_named(scripted):
    session = lockstep(scripted(), frames=3, prompts=[(0.5, "first"), (2.5, "third"), (1.5, "second")])
    events = []
    for event in session:
        events.append(event)
        if isinstance(event, Turn) and event.prompt:
            session.stop()
    assert [e.prompt for e in events if isinstance(e, NotAsked)] == ["second", "third"]
    assert kinds(events)[-3:] == ["not_asked", "not_asked", "end"]
    assert events[-1].reason == "stopped"


@pytest.mark.parametrize("clock", ["lockstep", "realtime"])
def test_logits_that_are_not_finite_end_the_stream(scripted, clock):
    """With the token before; in realtime the next step has been dispatched by then."""
    engine = scripted([5, 6, NOT_FINITE, 7, 8, SILENCE])
    session = Session(engine, SessionConfig(clock=clock, tokens_per_second=4, tail_seconds=60.0), system=None)
    if clock == "lockstep":
        session.push_prompt("And now?", 5.0)
    session.finish()
    *events, end = session
    assert (end.reason, end.counters.tokens) == ("not_finite", 2)
    assert sum(isinstance(e, Text) for e in events) == 2
    assert [e.prompt for e in events if isinstance(e, NotAsked)] == ["And now?"] * (clock == "lockstep")


def test_a_frame_whose_memory_is_reused_is_seen_as_it_was(scripted):
    buffer = np.zeros((4, 4, 3), np.uint8)
    engine = scripted()
    session = Session(engine, SessionConfig(), system=None)
    for i in range(8):
        buffer[:] = i
        session.push_frame(buffer, float(i))
    session.finish()
    list(session)
    assert engine.seen == list(range(8))


def test_a_prompt_longer_than_the_capacity_is_refused_and_the_session_goes_on(scripted, tokenizer):
    engine = scripted(text_capacity=200)
    session = Session(engine, SessionConfig(), system=None)
    with pytest.raises(SessionError, match="the text capacity is 200"):
        session.push_prompt("what " * 300, 0.0)
    session.push_frame(numbered(1)[0], 0.0)
    session.finish()
    assert list(session)[-1].counters == Counters(frames=1, silences=2)
    with pytest.raises(SessionError, match="the text capacity is 200"):
        Session(engine, SessionConfig(), system=None, prompt="what " * 300)


def test_a_prompt_must_leave_room_for_a_token_that_answers(scripted, tokenizer):
    length = len(chat.interjection(tokenizer, "What?"))
    Session(scripted(text_capacity=length + 1), system=None).check_prompt("What?")
    with pytest.raises(SessionError, match=f"takes {length} tokens and its answer at least 1"):
        Session(scripted(text_capacity=length), system=None).check_prompt("What?")


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_a_bad_frame_is_refused_and_the_session_goes_on(scripted, frame):
    session = Session(scripted(), SessionConfig())
    with pytest.raises(SessionError, match=r"uint8 RGB \[height, width, 3\]"):
        session.push_frame(frame, 0.0)
    session.finish()
    assert list(session)[-1].reason == "finished"


@pytest.mark.parametrize("at", [-1.0, float("nan"), float("inf"), None])
def test_a_bad_time_is_refused(scripted, at):
    session = Session(scripted(), SessionConfig(clock="lockstep"))
    with pytest.raises(SessionError, match="time"):
        session.push_prompt("hello", at)


def test_an_unknown_slot_is_refused(scripted):
    with pytest.raises(SessionError, match="no slot 1; the session has 1"):
        Session(scripted(), SessionConfig()).push_prompt("hello", 0.0, slot=1)


def test_a_running_lockstep_session_refuses_times_out_of_order(scripted):
    session = Session(scripted(), SessionConfig(clock="lockstep"))
    for i, frame in reversed(list(enumerate(numbered(3)))):
        session.push_frame(frame, float(i))
    events = iter(session)
    next(events)
    with pytest.raises(SessionError, match="in order of time: 1 s came after 2 s"):
        session.push_prompt("late", 1.0)
    session.finish()
    assert list(events)[-1].counters.frames == 3


def test_a_session_is_iterated_once(scripted):
    session = lockstep(scripted(), frames=1)
    list(session)
    with pytest.raises(SessionError, match="iterated once"):
        list(session)


def test_pushes_return_false_once_iteration_has_ended(scripted):
    session = Session(scripted(), SessionConfig())
    session.push_frame(numbered(1)[0], 0.0)
    events = iter(session)
    next(events)
    events.close()
    assert session.push_prompt("hello?", 1.0) is False


@pytest.mark.parametrize("how", ["finish", "stop"])
def test_nothing_is_taken_once_the_input_is_declared_over(scripted, how):
    engine = scripted()
    session = Session(engine, SessionConfig(), system=None)
    assert session.push_frame(numbered(1)[0], 0.0) is True
    getattr(session, how)()
    assert session.push_frame(numbered(2)[1], 1.0) is False
    assert session.push_prompt("hello?", 1.0) is False
    events = list(session)
    assert not [e for e in events if isinstance(e, NotAsked) or (isinstance(e, Turn) and e.prompt)]
    assert engine.seen == [0] * (how == "finish")


def test_a_frame_without_a_time_was_taken_now(scripted):
    session = Session(scripted(), SessionConfig(clock="realtime"))
    watcher = Watcher(session)
    watcher.wait_for(Silence)
    before = session.now()
    session.push_frame(numbered(1)[0])
    after = session.now()
    watcher.wait_for(FrameSeen)
    session.stop()
    watcher.join(60)
    (seen,) = [e for e in watcher.events if isinstance(e, FrameSeen)]
    assert 0 < before <= seen.time <= after


def test_a_failing_step_ends_the_session(scripted):
    engine = scripted()

    def fail():
        raise RuntimeError("out of memory")

    engine.before_step = fail
    session = Session(engine, SessionConfig())
    with pytest.raises(RuntimeError, match="out of memory"):
        list(session)
    assert session.push_prompt("hello?", 1.0) is False


# ------------------------------------------------------------------------------------ wall clock, threads


class Watcher(threading.Thread):
    """Iterates a session in a thread and keeps its events."""

    def __init__(self, session: Session):
        super().__init__(daemon=True)
        self.session, self.events, self.arrived = session, [], threading.Condition()
        self.start()

    def run(self):
        for event in self.session:
            with self.arrived:
                self.events.append(event)
                self.arrived.notify_all()

    def wait_for(self, kind, count=1):
        def enough():
            return sum(isinstance(e, kind) for e in self.events) >= count

        with self.arrived:
            assert self.arrived.wait_for(enough, timeout=60), f"no {count} of {kind} in {self.events}"


def test_realtime_drops_the_oldest_waiting_frames_and_never_a_prompt(scripted):
    engine = scripted(text_capacity=8192)
    session = Session(engine, SessionConfig(clock="realtime", inbox_frames=4))
    for i, frame in enumerate(numbered(20)):
        session.push_frame(frame, i / 10)
        session.push_prompt(f"question {i}", i / 10)
    session.finish()
    events = list(session)
    assert engine.seen == [16, 17, 18, 19]
    assert events[-1].counters.frames_dropped == 16
    assert events[-1].counters.frames == 4
    assert [e.prompt for e in events if isinstance(e, Turn) and e.prompt] == [
        f"question {i}" for i in range(20)
    ]


def test_lockstep_drops_nothing(scripted):
    session = Session(scripted(), SessionConfig(clock="lockstep", inbox_frames=2))
    for i, frame in enumerate(numbered(30)):
        session.push_frame(frame, float(i))
    session.finish()
    counters = list(session)[-1].counters
    assert (counters.frames, counters.frames_dropped) == (30, 0)


def test_a_parked_session_costs_no_cpu_and_wakes_at_once(scripted):
    session = Session(scripted(), SessionConfig(clock="realtime"))
    watcher = Watcher(session)
    watcher.wait_for(Silence)
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.1
    session.push_frame(numbered(1)[0])
    watcher.wait_for(Silence, 2)
    session.stop()
    watcher.join(60)
    assert watcher.events[-1].reason == "stopped"


def test_realtime_speaks_until_something_happens(scripted, tokenizer):
    (word,) = words(tokenizer, " the")
    engine = scripted([word] * 100_000, text_capacity=10**6)
    session = Session(engine, SessionConfig(clock="realtime"))
    watcher = Watcher(session)
    watcher.wait_for(Text, 20)
    session.push_prompt("stop that")
    watcher.wait_for(Interrupted)
    session.push_frame(numbered(1)[0])
    watcher.wait_for(FrameSeen)
    session.stop()
    watcher.join(60)
    (cut,) = [e for e in watcher.events if isinstance(e, Interrupted)]
    spoken = [e for e in watcher.events[: watcher.events.index(cut)] if isinstance(e, Text)]
    assert cut.said == " the" * len(spoken)


def test_a_speculative_step_past_the_end_of_an_answer_leaves_no_trace(scripted, tokenizer):
    """The next step is dispatched before the silence is known; eot is appended as silence."""
    said = words(tokenizer, "a red cup")
    engine = scripted([SILENCE, *said, SILENCE, *said, EOT], text_capacity=10**4)
    rows = []
    step = engine.step

    def recording(state, these, features=None):
        rows.append(these[0])
        return step(state, these, features)

    engine.step = recording
    watcher = Watcher(session := Session(engine, SessionConfig(clock="realtime"), system=None))
    for count in (1, 2, 3):
        watcher.wait_for(Silence, count)
        session.push_frame(numbered(1)[0])
    watcher.wait_for(Silence, 4)
    session.finish()
    watcher.join(60)
    opening = chat.opening(tokenizer, system=None)
    silent, talking = [SILENCE, IMAGE], [SILENCE, IMAGE, *said]
    context = engine.state.context[0]
    # The last silence may be in the context or still pending.
    assert context[: len(context) - (context[-1] == SILENCE)] == [*opening, *talking, *talking, *silent]
    assert [type(e) for e in watcher.events if isinstance(e, Text | Silence)] == [
        *[Silence, *[Text] * len(said)] * 2,
        Silence,
        Silence,
    ]
    counters = watcher.events[-1].counters
    assert (counters.tokens, counters.silences, counters.frames) == (2 * len(said), 4, 3)
    # It was dispatched: it appended the silence that ended the answer, so the next row begins without it.
    assert [row.tokens[0] for row in rows if IMAGE in row.tokens][1:] == [IMAGE, IMAGE]


def test_finish_lets_a_realtime_answer_go_on_for_the_tail(scripted, tokenizer):
    (word,) = words(tokenizer, " the")
    for said, tail in (([word] * 5 + [SILENCE], 60.0), ([word] * 10**5, 0.0)):
        session = Session(scripted(said), SessionConfig(clock="realtime", tail_seconds=tail), system=None)
        session.finish()
        events = list(session)
        spoken = [e for e in events if isinstance(e, Text)]
        assert len(spoken) == (5 if tail else 1)
        assert events[-1].reason == "finished"


def test_many_threads_push_at_once_and_nothing_is_lost(scripted):
    engine = scripted(slots=3, text_capacity=100_000, bank_capacity=10_000)
    session = Session(engine, SessionConfig(clock="realtime", inbox_frames=10_000))
    watcher = Watcher(session)

    def push(slot: int):
        for i in range(50):
            session.push_frame(numbered(1)[0], slot=slot)
            if i % 10 == 0:
                session.push_prompt(f"{i}", slot=slot)

    pushers = [threading.Thread(target=push, args=(slot,)) for slot in (0, 1, 2) for _ in range(3)]
    for thread in pushers:
        thread.start()
    for thread in pushers:
        thread.join()
    session.finish()
    watcher.join(60)
    ends = [e for e in watcher.events if isinstance(e, End)]
    assert sorted(e.slot for e in ends) == [0, 1, 2]
    assert all(e.counters.frames == 150 and e.counters.prompts == 15 for e in ends)
    assert len(engine.seen) == 450


def test_lockstep_does_not_depend_on_when_things_are_pushed(scripted, tokenizer):
    said = [*words(tokenizer, "the red card is on the left"), SILENCE] * 4
    prompts = [(2.0, "What?"), (3.5, "Where?")]
    expected = without_wall(lockstep(scripted(said), frames=6, prompts=prompts))
    rng = np.random.default_rng(0)
    for _ in range(3):
        session = Session(
            scripted(said), SessionConfig(tokens_per_second=4, tail_seconds=1.0), system="Watch."
        )
        watcher = Watcher(session)
        timed = [(float(i), 1, frame) for i, frame in enumerate(numbered(6))]
        for at, is_frame, item in sorted([*timed, *((t, 0, p) for t, p in prompts)], key=lambda x: x[:2]):
            time.sleep(rng.uniform(0, 0.02))
            (session.push_frame if is_frame else session.push_prompt)(item, at)
        session.finish()
        watcher.join(60)
        assert without_wall(watcher.events) == expected


# ------------------------------------------------------------------------------------ with a real engine


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_k": 50, "repetition_penalty": 1.3}])
def test_slots_of_one_session_say_what_they_say_alone(make_engine, frames, sampling):
    scripts = {
        0: [(0.0, frames[0]), (1.0, frames[1]), (1.5, "What?"), (2.0, frames[2])],
        1: [(0.0, "Look!"), (0.3, frames[3]), (0.9, frames[4]), (3.0, "And?"), (3.0, frames[5])],
    }
    config = SessionConfig(tokens_per_second=5)

    def run(engine, slots: dict[int, int]) -> dict[int, list[dict]]:
        session = Session(engine, config)
        for slot, script in slots.items():
            for at, item in scripts[script]:
                push = session.push_prompt if isinstance(item, str) else session.push_frame
                push(item, at, slot=slot)
        session.finish()
        events: dict[int, list[dict]] = {slot: [] for slot in slots}
        for event in without_wall(session):
            events[event.pop("slot")].append(event)
        return events

    together = run(make_engine(slots=2, **sampling), {0: 0, 1: 1})
    for script in scripts:
        assert together[script] == run(make_engine(**sampling), {0: script})[0]
        assert any(e["type"] == "text" for e in together[script])


def test_features_that_are_not_finite_end_their_slot_alone(make_engine, frames, monkeypatch):
    engine = make_engine(slots=2)
    encode = engine.encode

    def run(damaged: int | None) -> dict[int, list[dict]]:
        def encode_damaged(these):
            bad = np.array([damaged is not None and np.array_equal(x, frames[damaged]) for x in these])
            features = encode(these)
            bad = np.pad(bad, (0, len(features) - len(bad)))
            return jnp.where(bad[:, None, None], jnp.nan, features)

        monkeypatch.setattr(engine, "encode", encode_damaged)
        session = Session(engine, SessionConfig(tokens_per_second=5), prompt="What?")
        for second in range(4):
            for slot in range(2):
                session.push_frame(frames[4 * slot + second], float(second), slot=slot)
        session.push_prompt("And now?", 3.0, slot=1)
        session.finish()
        events: dict[int, list[dict]] = {0: [], 1: []}
        for event in without_wall(session):
            events[event["slot"]].append(event)
        return events

    whole, cut = run(None), run(4 + 2)
    assert cut[0] == whole[0]
    until = next(i for i, e in enumerate(cut[1]) if e["type"] == "frame" and e["index"] == 2)
    assert cut[1][: until + 1] == whole[1][: until + 1]
    not_asked, end = cut[1][until + 1 :]
    assert (not_asked["type"], not_asked["prompt"]) == ("not_asked", "And now?")
    assert (end["reason"], end["counters"]["frames"]) == ("not_finite", 3)


@dataclasses.dataclass
class Step:
    """The tokens that a session appended, pending ones resolved, and the logits after them."""

    tokens: list[int]
    logits: np.ndarray


@pytest.fixture
def recorded(make_engine, monkeypatch):
    """An engine, and the list of the steps that a session takes on it."""
    engine, steps, pending = make_engine(), [], [None]
    step = engine.step

    def recording(state, rows, features=None):
        state, sampled = step(state, rows, features)
        tokens = [pending[0] if token == PENDING else token for token in rows[0].tokens]
        steps.append(Step(tokens, np.asarray(sampled.logits[0])))
        pending[0] = int(sampled.tokens[0])
        return state, sampled

    monkeypatch.setattr(engine, "step", recording)
    return engine, steps


def context_until(steps: list[Step], last: int) -> list[int]:
    return [token for step in steps[: last + 1] for token in step.tokens]


def test_a_frame_pushed_while_the_model_talks_is_seen_by_the_next_token(recorded, one_pass, frames):
    engine, steps = recorded
    session = Session(engine, SessionConfig(clock="realtime"), system=None, prompt="What is this?")
    session.push_frame(frames[0])
    pushed_after = None
    for event in session:
        if isinstance(event, Text) and pushed_after is None and len(steps) > 4:
            pushed_after = len(steps)
            session.push_frame(frames[1])
        if pushed_after and len(steps) >= pushed_after + 3:
            session.stop()
    assert [IMAGE in step.tokens for step in steps[pushed_after - 1 :][:3]] == [False, True, False]
    for at in (pushed_after, pushed_after + 1):
        context = context_until(steps, at)
        seen = one_pass(context, frames[:2])[-1]
        unseen = one_pass(context, [frames[0], frames[7]])[-1]
        np.testing.assert_allclose(steps[at].logits, seen, atol=1e-3)
        assert np.abs(steps[at].logits - unseen).max() > 0.01


@pytest.mark.parametrize("perception_async", [False, True])
def test_the_logits_of_a_realtime_session_are_those_of_one_pass(
    make_engine, one_pass, frames, perception_async, monkeypatch
):
    """Prompts and frames arrive at any moment; frames are encoded by the loop or the perception thread."""
    engine = make_engine(perception_device=jax.devices()[0] if perception_async else None)
    rows, step = [], engine.step
    for count in (1, 8):
        engine.encode(
            frames[:count]
        )  # Compiled now, or the text cache fills before the first frame is encoded.

    def recording(state, these, features=None):
        state, sampled = step(state, these, features)
        rows.append((these[0], int(sampled.tokens[0]), np.asarray(sampled.logits[0])))
        return state, sampled

    monkeypatch.setattr(engine, "step", recording)
    watcher = Watcher(session := Session(engine, SessionConfig(clock="realtime"), system=None))
    for i, frame in enumerate(frames[:6]):
        session.push_frame(frame)
        if i % 3 == 1:
            session.push_prompt("What now?")
        watcher.wait_for(FrameSeen, i + 1)
        time.sleep(0.01 * i)
    session.stop()
    watcher.join(60)
    context, pending = [], None
    for row, sampled, _ in rows:
        context += [pending if token == PENDING else token for token in row.tokens]
        pending = sampled
    assert context.count(IMAGE) == 6
    np.testing.assert_allclose(rows[-1][-1], one_pass(context, frames[:6])[-1], atol=1e-3)
    assert watcher.events[-1].counters.frames == 6


def test_a_failing_perception_thread_ends_the_session(make_engine, frames, monkeypatch):
    engine = make_engine(perception_device=jax.devices()[0])

    def fail(frames):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(engine, "encode", fail)
    session = Session(engine, SessionConfig(clock="realtime"), system=None)
    session.push_frame(frames[0])
    with pytest.raises(RuntimeError, match="no memory left"):
        list(session)
    assert not session.push_frame(frames[1])


def test_the_logits_after_an_interruption_are_those_of_one_pass(recorded, one_pass, frames):
    """Over the whole dialogue, the cut answer included."""
    engine, steps = recorded
    session = Session(engine, SessionConfig(tokens_per_second=6), system=None)
    session.push_frame(frames[0], 0.0)
    session.push_prompt("And now?", 0.8)
    session.push_frame(frames[1], 1.0)
    session.finish()
    events = list(session)
    (cut,) = [e for e in events if isinstance(e, Interrupted)]
    context = context_until(steps, len(steps))
    question = chat.interjection(engine.tokenizer, "And now?")
    at = next(i for i in range(len(context)) if context[i : i + len(question)] == question)
    opening = len(chat.opening(engine.tokenizer, system=None))
    assert cut.said
    assert engine.tokenizer.decode(context[opening:at]).startswith(cut.said)
    np.testing.assert_allclose(steps[-1].logits, one_pass(context, frames[:2])[-1], atol=1e-3)
