"""The baseline that sees the newest frames alone."""

import numpy as np
import pytest

from moss_jax.eval.memory import ages
from moss_jax.eval.memory.recent import RECENT, excerpts
from moss_jax.eval.tabletop import scores
from moss_jax.eval.tabletop.scores import SpeechRate, StreamTranscript
from moss_jax.stream import FrameSeen, Silence, Text, Turn
from moss_jax.worlds.tabletop import evaluation_stream
from moss_jax.worlds.tabletop.answers import true_answer, truth_of

NOTHING = StreamTranscript((), frozenset())


@pytest.fixture(scope="module")
def stream():
    return evaluation_stream(2, 0, 180, past=0.5)


@pytest.fixture(scope="module")
def probes(stream, tokenizer):
    return list(scores.probes(stream, NOTHING, SpeechRate(tokenizer, 8)))


def events(excerpt, *sentences, unasked=()):
    """An excerpt in which these sentences are said, some of them before the question."""
    (request,) = excerpt.requests
    at = {"slot": 0, "stream_time": request.time, "wall_time": 0.0}
    frames = [FrameSeen(**at, index=n, time=float(n)) for n in range(len(excerpt.frames(8)))]
    before, after = (
        [event for text in said for event in (Text(**at, text=text), Silence(**at))]
        for said in (unasked, sentences)
    )
    return [*frames, *before, Turn(**at, prompt=request.text), *after]


def test_every_question_is_asked_once_after_the_newest_frames(stream, probes):
    asked = list(excerpts(stream, probes))
    assert [e.probe.request for e in asked] == sorted({probe.request for probe in probes})
    whole = stream.frames(16)
    for excerpt in asked:
        second = excerpt.probe.second
        assert second == min(p.second for p in probes if p.request == excerpt.probe.request)
        np.testing.assert_array_equal(excerpt.frames(16), whole[max(second - RECENT + 1, 0) : second + 1])
        (request,) = excerpt.requests
        assert request.text == stream.requests[excerpt.probe.request].text
        assert int(request.time) == len(excerpt.frames(16)) - 1


def test_answers_are_judged_by_the_truth_at_the_probe(stream, probes):
    asked = list(excerpts(stream, probes))
    right = []
    for excerpt in asked:
        (request,) = excerpt.requests
        words = true_answer(request, truth_of(request, stream.world, excerpt.probe.second)).text(0)
        right.append(excerpt.judge(events(excerpt, words)))
        assert right[-1].right == 1
        assert excerpt.judge(events(excerpt)).right == 0
        assert excerpt.judge(events(excerpt, unasked=[words])).right == 0
        assert excerpt.judge(events(excerpt, "I like tables.")).right == 0
    found = ages.summary(right)
    live = ages.summary(list(ages.answers(stream, probes)))
    assert {age: n["total"] for age, n in found["by_age"].items()} == {
        age: n["total"] for age, n in live["by_age"].items()
    }
