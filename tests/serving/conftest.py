"""Servers over small engines."""

from collections.abc import Iterator

import pytest
from engines import FORGETS_NOTHING, ScriptedEngine, shown_in
from servers import Running, running

from moss_jax.config import EngineConfig, SchedulerConfig, ServerConfig, SessionConfig
from moss_jax.serving.hub import Hub
from moss_jax.stream import Scheduler
from moss_jax.worlds.tabletop.language import WAIT

QUICK = ServerConfig(counters_seconds=0.05, grace_seconds=30.0, correction=WAIT)
# What is said to a question that has a word in it, and of a frame whose pixels have a value.
ANSWERS = {
    "cat": "A cat. It sleeps.",
    "story": "And then, " * 400,
    "colour": "It is grey. The cat is red - wait, the cat is black.",
}
REMARKS = {200: "Something has come."}


class AnsweringEngine(ScriptedEngine):
    """Answers questions and remarks on frames, however they are put into rows."""

    def step(self, state, rows, features=None):
        for slot, row in enumerate(rows):
            if row is None:
                continue
            said = self.tokenizer.decode([t for t in row.tokens if t >= 0])
            texts = [text for word, text in ANSWERS.items() if word in said]
            texts += [REMARKS[frame] for frame in shown_in(row, features) if frame in REMARKS]
            if row.new_turn:
                self.script[slot].clear()
            for text in texts:
                self.script[slot].extend([*self.tokenizer.encode(text), self.tokenizer.special.silence])
        return super().step(state, rows, features)


@pytest.fixture
def answering(tokenizer) -> AnsweringEngine:
    """An engine that answers by `ANSWERS`; each of its streams serves once."""
    config = EngineConfig(8, 4096, 256, FORGETS_NOTHING)
    return AnsweringEngine(tokenizer, {slot: [] for slot in range(config.slots)}, config)


@pytest.fixture
def served(answering) -> Iterator[Running]:
    """A server over such an engine."""
    with running(Hub(Scheduler(answering, SchedulerConfig()), QUICK, session=SessionConfig())) as server:
        yield server
