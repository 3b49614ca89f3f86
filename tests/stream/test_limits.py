"""Streams with their own memory policies and budgets in one engine: each is as if it were alone."""

import dataclasses

import jax
import numpy as np
import pytest

from moss_jax.config import ConfigError, EngineConfig, MemoryConfig, SessionConfig
from moss_jax.stream import PENDING, Compaction, Engine, Row, stream_config
from moss_jax.stream.conversation import Conversation, Inbound

OWN = MemoryConfig("window", low_water=0.75, text_recent=0.4)
# The streams of one engine: policy, frames in the bank, tokens in the text cache.
STREAMS = {
    "all of it": (OWN, 16, 96),
    "small window": (dataclasses.replace(OWN, low_water=0.5), 5, 64),
    "pyramid": (MemoryConfig("pyramid", low_water=0.75), 8, 80),
    "merge": (MemoryConfig("merge", low_water=0.7), 10, 96),
    "full": (MemoryConfig("full"), 12, 96),
}


@pytest.fixture(scope="module")
def engine(make_engine) -> Engine:
    return make_engine(
        slots=3, text_capacity=96, bank_capacity=16, memory=OWN, policies=("pyramid", "merge", "window")
    )


class Played:
    """A stream that is planned by its own config: a frame a second, a question, and silence of the model."""

    def __init__(self, engine: Engine, config: EngineConfig, slot: int):
        self.slot, self.config = slot, config
        session = SessionConfig(tokens_per_second=4)
        opening = [engine.tokenizer.special.begin_of_text, 5, 6, 7]
        self.conversation = Conversation(engine.tokenizer, config, session, slot, opening=opening, prompt="")
        self.conversation.finish(0.0)
        self.silence = engine.tokenizer.special.silence
        self.plan = None

    def next_row(self, frame: int | None) -> Row | None:
        """The next row; frames have their number as their time."""
        if frame is not None:
            rgb = np.zeros((1, 1, 3), np.uint8)
            self.conversation.receive(Inbound(float(frame), 1, frame, rgb=rgb))
            if frame % 7 == 3:
                self.conversation.receive(Inbound(float(frame), 0, frame, prompt="?", tokens=[8, 9, 10]))
        plan = self.conversation.plan(0.0, None, may_continue=True, perception_async=False)
        if plan is None or plan.end:
            return None
        list(self.conversation.events(plan))
        # The model's word is not taken, so that all logits are of the same tokens.
        list(self.conversation.on_token(plan, self.silence, 0.0))
        tokens = [self.silence if token == PENDING else token for token in plan.tokens]
        frames = [frame.order % 16 for frame in plan.frames]
        return Row(tokens, frames, plan.new_turn, plan.compact, plan.kept)


def logits_of(engine, features, streams: list[EngineConfig], seconds=24) -> tuple[list, list]:
    """The logits after each row of streams side by side, and the vectors and tokens that they then hold."""
    state, played = engine.start(), [Played(engine, config, slot) for slot, config in enumerate(streams)]
    logits, held = [[] for _ in streams], [[] for _ in streams]
    for second in range(-1, seconds):
        rows = [stream.next_row(None if second < 0 else second) for stream in played]
        rows += [None] * (engine.config.slots - len(rows))
        if not any(rows):
            continue
        state, sampled = engine.step(
            state, rows, features if any(row and row.frames for row in rows) else None
        )
        for slot, row in enumerate(rows):
            if row:
                logits[slot].append(np.asarray(sampled.logits[slot]))
                held[slot].append((int(state.stream.bank.length[slot]), int(state.stream.text.length[slot])))
    return logits, held


@pytest.fixture(scope="module")
def features(engine):
    rng = np.random.default_rng(1)
    return engine.encode([rng.integers(0, 256, (24, 32, 3), dtype=np.uint8) for _ in range(16)])


@pytest.fixture(scope="module")
def alone(make_engine, features):
    """Of each stream, its logits and contents alone in an engine whose buffers are as small as its limits."""

    def play(name):
        memory, frames, tokens = STREAMS[name]
        small = make_engine(text_capacity=tokens, bank_capacity=frames, memory=memory)
        return logits_of(small, features, [small.config])

    return {name: play(name) for name in STREAMS}


@pytest.mark.parametrize(
    "names", [("pyramid", "small window", "merge"), ("full", "pyramid"), ("merge", "all of it")]
)
def test_streams_side_by_side_are_as_each_alone(engine, features, alone, names):
    """Their logits are, and what they hold; in one engine, through many compactions of bank and text."""
    limits = (STREAMS[name] for name in names)
    configs = [stream_config(engine.config, *limit, model=engine.model_config) for limit in limits]
    logits, held = logits_of(engine, features, configs)
    for name, found, holds in zip(names, logits, held, strict=True):
        (expected,), (expects,) = alone[name]
        memory, frames, tokens = STREAMS[name]
        assert holds == expects
        assert max(vectors for vectors, _ in holds) <= frames * engine.model_config.vectors_per_frame
        assert max(kept for _, kept in holds) <= tokens
        # A frame a second, until "full" is full.
        assert len(found) == len(expected) == (1 + 24 if memory.policy != "full" else 1 + 12)
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=0, atol=1e-3)


def test_one_program_for_each_policy_serves_every_budget(model, tokenizer):
    config = EngineConfig(2, 64, 16, MemoryConfig("pyramid"), policies=("merge", "full", "window", "pyramid"))
    engine = Engine(model, tokenizer, config)
    names = [name for name in engine.programs if name.startswith("compact_bank")]
    assert names == ["compact_bank.pyramid", "compact_bank.merge", "compact_bank.window"]
    state = engine.start()
    for policy in ("window", "pyramid", "merge"):
        for frames, low_water in ((16, 0.8), (8, 0.75), (12, 0.7)):
            memory = MemoryConfig(policy, low_water=low_water, text_recent=0.3)
            state, _ = engine.step(state, [Row([PENDING], compact=Compaction(memory, frames)), None])
    assert [engine.programs[name]._cache_size() for name in names] == [1, 1, 1]


def test_warm_up_compiles_the_compactions_of_all_policies(model, tokenizer):
    config = EngineConfig(1, 64, 8, MemoryConfig("full"), policies=("window", "merge"))
    engine = Engine(model, tokenizer, config)
    engine.warm_up((8, 8, 3))
    compiled = {name: program._cache_size() for name, program in engine.programs.items()}
    assert [compiled[f"compact_bank.{name}"] for name in ("window", "merge")] == [1, 1]
    stream = stream_config(config, MemoryConfig("merge", low_water=0.5, text_recent=0.2), bank_capacity=3)
    row = Row([PENDING], compact=Compaction(stream.memory, stream.bank_capacity), kept=[0])
    engine.step(engine.start(), [row])
    assert {name: program._cache_size() for name, program in engine.programs.items()} == compiled


def test_the_bank_has_counts_where_a_policy_merges(make_engine):
    for policies, has_counts in (((), False), (("full",), False), (("merge",), True)):
        engine = make_engine(slots=1, text_capacity=40, bank_capacity=8, memory=OWN, policies=policies)
        assert (jax.eval_shape(engine.start).stream.bank.counts is not None) == has_counts


def test_limits_of_a_stream():
    engine = EngineConfig(4, 100, 20, OWN, policies=("pyramid",))
    assert stream_config(engine) == engine
    memory = MemoryConfig("pyramid")
    assert stream_config(engine, memory, 8, 50) == dataclasses.replace(
        engine, memory=memory, bank_capacity=8, text_capacity=50
    )
    assert stream_config(engine, MemoryConfig("full")).memory.policy == "full"


def test_limits_that_an_engine_cannot_keep(model):
    engine = EngineConfig(1, 100, 20, OWN, policies=("pyramid",))

    def refused(message, **limits):
        with pytest.raises(ConfigError, match=message):
            stream_config(engine, **limits, model=model.config)

    refused("a stream's bank_capacity can be at most 20, the engine's, not 21", bank_capacity=21)
    refused("a stream's text_capacity can be at most 100, the engine's, not 101", text_capacity=101)
    refused("bank_capacity must be at least 1, not 0", bank_capacity=0)
    refused(
        "must be one of 'window', 'pyramid', 'full', .* not 'merge'; name it in engine.policies",
        memory=MemoryConfig("merge"),
    )
    refused("bank_dtype must be None, not 'int8'", memory=MemoryConfig("window", bank_dtype="int8"))
    refused("text_dtype must be None, not 'fp8'", memory=MemoryConfig("window", text_dtype="fp8"))
    refused(
        "a bank of 2 frames is too small for a pyramid",
        memory=MemoryConfig("pyramid", low_water=0.6),
        bank_capacity=2,
    )


def test_an_engine_refuses_policies_that_it_cannot_have(model, tokenizer):
    for config, message in (
        (EngineConfig(1, 64, 8, OWN, policies=("ring",)), "memory.policy must be one of .* got 'ring'"),
        (EngineConfig(1, 64, 1, OWN, policies=("pyramid",)), "a bank of 1 frames is too small for a pyramid"),
    ):
        with pytest.raises(ConfigError, match=message):
            Engine(model, tokenizer, config)
