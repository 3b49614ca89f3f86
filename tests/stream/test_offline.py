"""Offline use: the whole clip first, then the answer."""

import numpy as np
import pytest

from moss_jax.config import MemoryConfig
from moss_jax.stream import (
    NOT_FINITE,
    PENDING,
    Compaction,
    End,
    FrameSeen,
    Row,
    SessionError,
    Text,
    Turn,
    answer_offline,
)
from moss_jax.text import Detokenizer, chat
from moss_jax.video import Frame

SILENCE, EOT = 1021, 1020
WINDOW = MemoryConfig("window", low_water=0.75, text_recent=0.4)


def clip(count: int) -> list[Frame]:
    return [Frame(np.full((4, 4, 3), i % 256, np.uint8), float(i)) for i in range(count)]


def test_all_frames_come_before_the_question(scripted, tokenizer):
    said = tokenizer.encode("A red card.")
    engine = scripted([*said, EOT])
    events = list(answer_offline(engine, clip(19), "What is it?", system="Look."))
    opening = chat.offline_opening(tokenizer, system="Look.", num_frames=19, prompt="What is it?")
    # The last step was dispatched before the end was known.
    assert engine.state.context[0] == [*opening, *said, SILENCE]
    assert engine.seen == list(range(19))
    assert [e.index for e in events if isinstance(e, FrameSeen)] == list(range(19))
    assert "".join(e.text for e in events if isinstance(e, Text)) == "A red card."
    assert [type(e) for e in events[19:20]] == [Turn]
    assert isinstance(events[-1], End)
    assert (events[-1].reason, events[-1].counters.tokens) == ("finished", len(said))


def test_a_long_clip_is_appended_in_chunks(scripted, tokenizer):
    """The tokens before it go with the first, the question with the last, which samples the answer."""
    engine, steps = scripted({0: [9, 9, 5, EOT]}, bank_capacity=600), []
    engine.before_step = lambda: steps.append(len(engine.state.context[0]))
    events = list(answer_offline(engine, clip(600), "What is it?"))
    opening = chat.offline_opening(tokenizer, system=None, num_frames=600, prompt="What is it?")
    begin = opening.index(tokenizer.special.image)
    assert steps[:4] == [0, begin + 256, begin + 512, len(opening)]
    assert engine.state.context[0] == [*opening, 5, SILENCE]
    assert engine.seen == [i % 256 for i in range(600)]
    assert [e.index for e in events if isinstance(e, FrameSeen)] == list(range(600))


def test_the_answer_ends_at_max_tokens_or_at_the_text_capacity(scripted, tokenizer):
    limited = list(answer_offline(scripted([5] * 100), clip(2), "What?", max_tokens=7))[-1]
    assert (limited.reason, limited.counters.tokens) == ("token_limit", 7)
    opening = chat.offline_opening(tokenizer, system=None, num_frames=2, prompt="What?")
    engine = scripted([5] * 100, text_capacity=len(opening) + 4)
    end = list(answer_offline(engine, clip(2), "What?"))[-1]
    assert (end.reason, end.counters.tokens) == ("text_capacity", 4)
    engine = scripted([5] * 100, text_capacity=len(opening) + 4)
    end = list(answer_offline(engine, clip(2), "What?", max_tokens=4))[-1]
    assert (end.reason, end.counters.tokens) == ("token_limit", 4)
    with pytest.raises(SessionError, match="text capacity"):
        answer_offline(scripted(text_capacity=len(opening)), clip(2), "What?")
    assert len(engine.state.context[0]) <= len(opening) + 4


def test_logits_that_are_not_finite_end_the_answer(scripted):
    *events, end = answer_offline(scripted([5, 6, NOT_FINITE, 7, 8, EOT]), clip(2), "What?")
    assert (end.reason, end.counters.tokens) == ("not_finite", 2)
    assert sum(isinstance(e, Text) for e in events) == 2
    *_, end = answer_offline(scripted([NOT_FINITE]), clip(2), "What?")
    assert (end.reason, end.counters.tokens) == ("not_finite", 0)


def test_the_end_of_its_turn_ends_an_answer(make_engine, frames, tokenizer, monkeypatch):
    engine = make_engine()
    monkeypatch.setattr(engine, "allowed", np.arange(tokenizer.vocab_size) == EOT)
    *_, end = answer_offline(engine, [Frame(frames[0], 0.0)], "What?", max_tokens=5)
    assert (end.reason, end.counters.tokens) == ("finished", 0)


@pytest.mark.parametrize(
    ("frames", "prompt", "message"),
    [
        (0, "What?", "no frame"),
        (11, "What?", "the clip has 11 frames; the bank has room for 10"),
        (3, "what " * 200, "more than the text capacity of 100"),
    ],
)
def test_input_that_does_not_fit_is_refused_before_iteration(scripted, frames, prompt, message):
    engine = scripted(text_capacity=100, bank_capacity=10)
    with pytest.raises(SessionError, match=message):
        answer_offline(engine, clip(frames), prompt)


def test_the_answer_does_not_depend_on_how_the_clip_is_chunked(make_engine, frames, tokenizer):
    engine = make_engine()
    shown = [Frame(frame, float(i)) for i, frame in enumerate(frames[:10])]
    events = list(answer_offline(engine, shown, "What is it?", max_tokens=5))
    opening = chat.offline_opening(tokenizer, system=None, num_frames=10, prompt="What is it?")
    state, said = engine.start(), []
    state, sampled = engine.step(state, [Row(opening, range(10))], engine.encode(frames[:10]))
    for _ in range(5):
        token = int(sampled.tokens[0])
        if token == SILENCE:
            break
        said.append(token)
        state, sampled = engine.step(state, [Row([PENDING])])
    detokenizer = Detokenizer(tokenizer)
    assert [e.text for e in events if isinstance(e, Text)] == [t for t in map(detokenizer.push, said) if t]
    assert events[-1].counters.tokens == len(said) > 0


def recorded(engine, monkeypatch) -> list[tuple[Row, np.ndarray]]:
    """The rows of slot 0 from now on, and the logits behind them."""
    steps, step = [], engine.step

    def recording(state, rows, features=None):
        state, sampled = step(state, rows, features)
        steps.append((rows[0], np.asarray(sampled.logits[0])))
        return state, sampled

    monkeypatch.setattr(engine, "step", recording)
    return steps


@pytest.mark.parametrize("policy", ["window", "pyramid", "merge"])
def test_a_clip_that_is_longer_than_the_bank_is_compacted_as_a_stream_is(
    make_engine, frames, tokenizer, monkeypatch, policy
):
    """The rows and their logits are those of the same verbs by hand."""
    memory = MemoryConfig(policy, low_water=0.75, pyramid_shares=(0.5, 0.25, 0.25))
    engine, compact = make_engine(bank_capacity=8, memory=memory), Compaction(memory, 8)
    rgb = [frames[i % 16] for i in range(20)]
    state, logits = engine.start(), []
    opening = chat.offline_opening(tokenizer, system=None, num_frames=20, prompt="What is it?")
    features, begin = engine.encode(rgb), opening.index(tokenizer.special.image)
    row = Row(opening[: begin + 8], range(8))
    # Each compaction leaves 6 of 8 frames; the question comes with the last two.
    for first in range(8, 22, 2):
        state, sampled = engine.step(state, [row], features)
        logits.append(np.asarray(sampled.logits[0]))
        end = begin + first + 2 if first < 18 else None
        row = Row(opening[begin + first : end], range(first, first + 2), first == 18, compact=compact)
    steps = recorded(engine, monkeypatch)
    shown = (Frame(frame, float(i)) for i, frame in enumerate(rgb))
    events = list(answer_offline(engine, shown, "What is it?", max_tokens=3))
    assert [len(row.frames) for row, _ in steps] == [8, 2, 2, 2, 2, 2, 2] + [0] * events[-1].counters.tokens
    assert [row.compact for row, _ in steps[:7]] == [None] + [compact] * 6
    assert steps[6][0].new_turn
    for (_, found), expected in zip(steps[:7], logits, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert [e.index for e in events if isinstance(e, FrameSeen)] == list(range(20))


def test_the_text_of_a_long_clip_keeps_its_opening_its_question_and_the_newest_frames(scripted, tokenizer):
    special = tokenizer.special
    engine = scripted({0: [9] * 1000}, text_capacity=64, bank_capacity=8, memory=WINDOW)
    contexts = []
    engine.before_step = lambda: contexts.append([*engine.state.context[0]])
    events = list(answer_offline(engine, clip(700), "What is it?", system="Look.", max_tokens=40))
    opening = chat.offline_opening(tokenizer, system="Look.", num_frames=1, prompt="What is it?")
    at = opening.index(special.image)
    assert engine.seen == [i % 256 for i in range(700)]
    assert engine.compactions == (700 - 8) // 2
    assert max(map(len, contexts)) <= 64
    asked = next(context for context in contexts if context[-len(opening[at + 1 :]) :] == opening[at + 1 :])
    assert asked[:at] == opening[:at]
    assert asked[at : -len(opening[at + 1 :])].count(special.image) > 16
    assert engine.state.context[0][:at] == opening[:at]
    assert (events[-1].reason, events[-1].counters.frames) == ("token_limit", 700)
    assert events[-1].counters.tokens == 40


def test_a_clip_is_read_as_it_is_encoded(scripted):
    pulled = 0

    def film():
        nonlocal pulled
        for frame in clip(1000):
            pulled += 1
            yield frame

    events = answer_offline(scripted({0: [5, EOT]}, bank_capacity=8, memory=WINDOW), film(), "What?")
    assert pulled == 0
    for event in events:
        if isinstance(event, FrameSeen):
            # A chunk, and one more to know whether it is the last.
            assert pulled <= (event.index // 256 + 1) * 256 + 1
    assert pulled == 1000


def test_an_iterator_that_does_not_fit_where_nothing_is_forgotten(scripted):
    engine = scripted(bank_capacity=10)
    with pytest.raises(SessionError, match="the clip has 11 frames; the bank has room for 10"):
        answer_offline(engine, iter(clip(11)), "What?", num_frames=11)
    with pytest.raises(SessionError, match=r"longer than engine\.bank_capacity has room for"):
        list(answer_offline(engine, iter(clip(11)), "What?"))
    with pytest.raises(SessionError, match=r"longer than engine\.text_capacity has room for"):
        list(answer_offline(scripted(text_capacity=100), iter(clip(90)), "What?"))
    with pytest.raises(SessionError, match="no frame"):
        list(answer_offline(engine, iter(()), "What?"))
    with pytest.raises(SessionError, match="more than the text capacity of 100"):
        answer_offline(scripted(text_capacity=100, memory=WINDOW), iter(clip(9)), "what " * 200)
