"""Training sequences of the tabletop world are token for token those that a live session builds."""

import numpy as np
import pytest

from moss_jax.config import SessionConfig
from moss_jax.data.worlds import SPEEDS
from moss_jax.stream import End, Session, Text
from moss_jax.text import chat
from moss_jax.text.labels import IGNORED
from moss_jax.worlds.tabletop import evaluation_stream
from moss_jax.worlds.tabletop.dialogue import converse
from moss_jax.worlds.tabletop.language import WAIT
from moss_jax.worlds.tabletop.requests import Request
from moss_jax.worlds.tabletop.stream import draw_stream


def replay(scripted, dialogues, requests, *, speed, system: str | None = chat.SYSTEM_PROMPT, seconds):
    """A session whose engine samples the assistant's part of each dialogue; all share the first turn."""
    script = {slot: [t for t in d.labels if t != IGNORED] for slot, d in enumerate(dialogues)}
    engine = scripted(script, slots=len(dialogues))
    asked = requests[0]
    first = asked[0].text if asked and asked[0].time == 0 else ""
    # A tail long enough for the last sentence to end.
    config = SessionConfig(clock="lockstep", tokens_per_second=speed, tail_seconds=100.0)
    session = Session(engine, config, system=system, prompt=first)
    for slot, asked in enumerate(requests):
        for request in asked[bool(first) :]:
            session.push_prompt(request.text, request.time, slot=slot)
        for second in range(seconds):
            session.push_frame(np.full((2, 2, 3), second, np.uint8), float(second), slot=slot)
    session.finish()
    return engine, list(session)


def draw(rng, tokenizer, seconds, speed, *, system: str | None = chat.SYSTEM_PROMPT, dense=False):
    stream = draw_stream(rng, seconds, dense=dense)
    return stream, converse(
        stream.world, stream.requests, tokenizer, tokens_per_second=speed, rng=rng, system=system
    )


@pytest.mark.parametrize("speed", sorted(set(SPEEDS)))
@pytest.mark.parametrize(("seconds", "dense"), [(20, False), (6, True)])
def test_a_session_builds_the_tokens_of_the_dialogue(scripted, tokenizer, speed, seconds, dense):
    rng = np.random.default_rng(speed)
    for system in (chat.SYSTEM_PROMPT, None):
        for _ in range(4):
            stream, dialogue = draw(rng, tokenizer, seconds, speed, system=system, dense=dense)
            engine, events = replay(
                scripted, [dialogue], [stream.requests], speed=speed, system=system, seconds=seconds
            )
            # The last token is still pending.
            assert [*engine.state.context[0], engine.state.pending[0]] == dialogue.tokens
            assert not engine.script[0]
            assert engine.seen == list(range(seconds))
            assert dialogue.frame_positions == [
                i for i, token in enumerate(dialogue.tokens) if token == tokenizer.special.image
            ]
            assert isinstance(events[-1], End)
            assert events[-1].reason == "finished"


def test_text_events_come_at_the_times_of_the_utterances(scripted, tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(6):
        stream, dialogue = draw(rng, tokenizer, 24, 8)
        _, events = replay(scripted, [dialogue], [stream.requests], speed=8, seconds=24)
        texts = [(event.stream_time, event.text) for event in events if isinstance(event, Text)]
        times = {time for time, _ in texts}
        assert all(any(abs(u.time - time) < 1e-6 for time in times) for u in dialogue.utterances)
        said = sum(text.count(WAIT.split()[1]) for _, text in texts)
        assert said == sum(u.cut for u in dialogue.utterances)


def test_streams_side_by_side_build_the_same_sequences(scripted, tokenizer):
    """Each slot has a clock of its own."""
    streams = [evaluation_stream(0, index, 16) for index in range(24)]
    streams = [s for s in streams if not s.requests or s.requests[0].time > 0][:8]
    rng = np.random.default_rng(0)
    dialogues = [converse(s.world, s.requests, tokenizer, tokens_per_second=8, rng=rng) for s in streams]
    engine, _ = replay(scripted, dialogues, [s.requests for s in streams], speed=8, seconds=16)
    assert [
        [*context, last] for context, last in zip(engine.state.context, engine.state.pending, strict=True)
    ] == [d.tokens for d in dialogues]


def test_requests_at_edge_times(scripted, tokenizer):
    """Before the first frame, in the tick of a frame, and after the last."""
    rng = np.random.default_rng(5)
    stream, _ = draw(rng, tokenizer, 8, 8)
    requests = (
        Request(0.0, "Tell me what changes.", "narrate"),
        Request(0.1, "Stop.", "watch"),
        Request(2.95, "What is on the table?", "list"),
        Request(3.05, "Thanks.", "watch"),
        Request(7.4, "What do you see?", "list"),
    )
    for speed in SPEEDS:
        dialogue = converse(stream.world, requests, tokenizer, tokens_per_second=speed, rng=rng)
        engine, _ = replay(scripted, [dialogue], [requests], speed=speed, seconds=8)
        assert [*engine.state.context[0], engine.state.pending[0]] == dialogue.tokens
