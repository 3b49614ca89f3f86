"""The evaluation of memory: scripted speakers that know everything or forget; what is compared with what."""

import dataclasses

import jax
import numpy as np
import pytest
from engines import ScriptedEngine

from moss_jax.config import EngineConfig, MemoryConfig
from moss_jax.eval.feeding import Renderer
from moss_jax.eval.harness import Blindfold, play
from moss_jax.eval.memory import MemoryEvaluationConfig, ages
from moss_jax.eval.memory.evaluation import Judge, bytes_of_a_stream, variants
from moss_jax.eval.memory.recent import RECENT
from moss_jax.eval.tabletop import ideal_dialogue
from moss_jax.stream import Text, Turn
from moss_jax.text.labels import IGNORED
from moss_jax.worlds.tabletop import evaluation_stream
from moss_jax.worlds.tabletop.language import LIVE, PAST

SPEED = 8
CONFIG = MemoryEvaluationConfig(minutes=3.0, streams=16)


@pytest.fixture(scope="module")
def streams():
    return [evaluation_stream(2, index, CONFIG.seconds, past=0.5) for index in range(CONFIG.streams)]


@pytest.fixture(scope="module")
def played(streams, tokenizer):
    """Events of the ideal assistant, in a bank that is too small for the streams."""
    script = {
        slot: [token for token in ideal_dialogue(stream, tokenizer, SPEED).labels if token != IGNORED]
        for slot, stream in enumerate(streams)
    }
    engine = ScriptedEngine(tokenizer, script, EngineConfig(len(streams), 1024, 16, MemoryConfig("window")))
    with Renderer(streams, seconds=CONFIG.seconds, image_size=8) as renderer:
        return play({len(streams): engine}, streams, image_size=8, tokens_per_second=SPEED, renderer=renderer)


@dataclasses.dataclass(frozen=True)
class Stream:
    """A stream of these frames, without a user."""

    shown: list[np.ndarray]
    requests: tuple = ()

    def frames(self, size):
        return self.shown


@pytest.fixture(scope="module")
def judge(streams, tokenizer):
    return Judge(streams, tokenizer, SPEED)


def test_a_speaker_who_knows_everything(judge, played):
    figures = judge.figures(played)
    assert figures["all"]["right"] == figures["all"]["total"] > 50
    assert {"now", "<= 10 s", "<= 1 min", "<= 10 min", "whole stream"} == set(figures["by_age"])
    assert all(count["right"] == count["total"] for count in figures["by_age"].values())
    assert set(LIVE) < set(figures["by_kind"])
    assert len(set(PAST) & set(figures["by_kind"])) > 4
    for minute in (figures["first_minute"], figures["last_minute"]):
        assert minute["accuracy"]["value"] == minute["silence"]["value"] == 1
        assert minute["revision"]["value"] == minute["alerts"]["f1"] == 1
        assert minute["stale"]["value"] == 0
    assert figures["streams_cut_short"] == 0


def test_a_speaker_who_forgets(judge, played, streams):
    """Says nothing to questions about what was last to be seen more than a minute ago."""

    def forget(stream, events):
        number = -1
        for event in events:
            number += isinstance(event, Turn) and bool(event.prompt)
            request = stream.requests[number] if number >= 0 else None
            if isinstance(event, Text) and request and request.kind in PAST:
                second = int(request.time)
                seen = ages.evidence(request, stream.world, second)
                if seen is None or second - seen > 60:
                    continue
            yield event

    figures = judge.figures([forget(*both) for both in zip(streams, played, strict=True)])
    for age, count in figures["by_age"].items():
        assert count["right"] == (0 if age in ("<= 10 min", "whole stream") else count["total"])
    whole = judge.figures(played)
    assert figures["last_minute"] == whole["last_minute"] | {"stale": figures["last_minute"]["stale"]}
    assert 0 < judge.constant_guess()["all"]["right"] < whole["all"]["total"]
    assert judge.constant_guess()["by_age"].keys() == whole["by_age"].keys()


def test_a_speaker_who_goes_silent(judge, played):
    """Who says nothing any more in the last minute fails it, and it alone."""
    last = CONFIG.seconds - 60
    cut = [[e for e in events if not (isinstance(e, Text) and e.stream_time >= last)] for events in played]
    figures, whole = judge.figures(cut), judge.figures(played)
    assert figures["first_minute"] == whole["first_minute"]
    assert figures["last_minute"]["accuracy"]["value"] < 0.5
    assert figures["last_minute"]["accuracy"]["n"] == whole["last_minute"]["accuracy"]["n"]
    assert figures["last_minute"]["silence"]["value"] == 1


def test_every_policy_has_its_baselines():
    config = MemoryEvaluationConfig(
        minutes=10, policies=("merge", "window"), budgets=(16, 32), bank_dtypes=(None, "int8")
    )
    assert [str(variant) for variant in variants(config)] == [
        "merge, 16 frames",
        "window, 16 frames",
        "merge, 16 frames in int8",
        "window, 16 frames in int8",
        "merge, 32 frames",
        "window, 32 frames",
        "merge, 32 frames in int8",
        "window, 32 frames in int8",
        "full, 600 frames",
        "window, 4 frames",
        "empty bank, 4 frames",
    ]


def test_a_window_of_four_has_the_four_newest_frames(make_engine, frames):
    (recent,) = (v for v in variants(CONFIG) if v.frames == RECENT and not v.blind)
    memory = recent.engine_config(CONFIG).memory
    engine = make_engine(bank_capacity=recent.frames, text_capacity=128, memory=memory)
    vectors = engine.model_config.vectors_per_frame
    seen, held = [], []

    class Watched(Blindfold):
        """The engine, with a record of the frames in its bank."""

        def encode(self, frames):
            return engine.encode(frames)

        def step(self, state, rows, features=None):
            state, sampled = engine.step(state, rows, features)
            bank = state.stream.bank
            seen.extend([int(bank.positions[0, bank.length[0] - 1])] * len(rows[0].frames))
            held.append(np.asarray(bank.positions)[0, : int(bank.length[0]) : vectors].tolist())
            assert held[-1] == seen[-4:]
            return state, sampled

    play({1: Watched(engine)}, [Stream(frames)], image_size=8, tokens_per_second=4)
    assert len(seen) == len(frames)
    assert max(map(len, held)) == 4


def test_bytes_are_those_of_keys_values_and_scales(make_engine):
    engine = make_engine(slots=2, bank_capacity=8, memory=MemoryConfig("window"))
    small = make_engine(slots=2, bank_capacity=8, memory=MemoryConfig("window", bank_dtype="int8"))
    bank = engine.start().stream.bank
    arrays = jax.tree.leaves((bank.keys, bank.values))
    assert bytes_of_a_stream(engine)["bank_bytes"] == sum(x.nbytes for x in arrays) // 2
    head, wide = bank.keys[0].shape[-1], bank.keys[0].dtype.itemsize
    ratio = bytes_of_a_stream(small)["bank_bytes"] / bytes_of_a_stream(engine)["bank_bytes"]
    assert ratio == pytest.approx((head + 4) / (head * wide))  # A scale in float32 for each vector.
