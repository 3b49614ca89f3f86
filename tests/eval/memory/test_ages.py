"""Answers by the age of the evidence: buckets, counts, the constant guess."""

import dataclasses

import pytest

from moss_jax.eval.memory.ages import Answer, answers, bucket, constant_guess, summary
from moss_jax.eval.tabletop.scores import Probe
from moss_jax.worlds.tabletop import TabletopStream, evaluation_stream
from moss_jax.worlds.tabletop.render import TABLES, Look
from moss_jax.worlds.tabletop.requests import Request
from moss_jax.worlds.tabletop.world import Table, Thing, World


@pytest.mark.parametrize(
    ("evidence", "second", "age"),
    [
        (7, 7, "now"),
        (6, 7, "<= 10 s"),
        (0, 10, "<= 10 s"),
        (0, 11, "<= 1 min"),
        (40, 100, "<= 1 min"),
        (39, 100, "<= 10 min"),
        (0, 600, "<= 10 min"),
        (0, 601, "<= 1 h"),
        (1, 3601, "<= 1 h"),
        (0, 3601, "> 1 h"),
        (None, 5, "whole stream"),
    ],
)
def test_ages(evidence, second, age):
    assert bucket(evidence, second) == age


def star_until(gone: int, seconds: int, *requests: Request) -> TabletopStream:
    """A stream of a red star that is taken away."""
    star, empty = Table((Thing("star", (0, 0), colour="red"),)), Table()
    tables = (star,) * gone + (empty,) * (seconds - gone)
    return TabletopStream(World(tables, ()), look=Look(0, TABLES[0]), requests=requests, noise=0)


def test_the_age_is_that_of_the_last_sight():
    seen = Request(80.5, "Was there a star?", "seen", "star")
    stream = star_until(5, 100, seen, dataclasses.replace(seen, subject="ring"))
    found = list(answers(stream, [Probe(0, "seen", 80, "yes", True), Probe(1, "seen", 80, "none", False)]))
    assert [(a.kind, a.age, a.right) for a in found] == [
        ("seen", "<= 10 min", 1),
        ("seen", "whole stream", 0),
    ]


def test_a_question_counts_once_for_each_age():
    colour = Request(0.5, "What colour is the star?", "colour", "star")
    stream = star_until(9, 10, colour)
    rights = [True, True, False, False, True]
    probes = [Probe(0, "colour", s, "red" if s < 7 else "blue", right) for s, right in enumerate(rights, 3)]
    (answer,) = answers(stream, probes)
    assert answer == Answer("colour", "now", 0.6, {"red": 0.8, "blue": 0.2})


FOUND = [
    Answer("colour", "now", 1.0, {"red": 1.0}),
    Answer("colour", "now", 0.5, {"red": 0.5, "blue": 0.5}),
    Answer("seen", "<= 10 s", 1.0, {"yes": 1.0}),
    Answer("seen", "whole stream", 0.0, {"none": 1.0}),
    Answer("seen", "whole stream", 1.0, {"none": 1.0}),
]


def test_counts_by_age_and_kind():
    assert summary(FOUND) == {
        "all": {"right": 3.5, "total": 5},
        "by_age": {
            "now": {"right": 1.5, "total": 2},
            "<= 10 s": {"right": 1, "total": 1},
            "whole stream": {"right": 1, "total": 2},
        },
        "by_kind": {"colour": {"right": 1.5, "total": 2}, "seen": {"right": 2, "total": 3}},
        "by_kind_and_age": {
            "colour": {"now": {"right": 1.5, "total": 2}},
            "seen": {"<= 10 s": {"right": 1, "total": 1}, "whole stream": {"right": 1, "total": 2}},
        },
    }


def test_the_constant_guess_is_one_for_each_kind_whatever_the_age():
    guess = constant_guess(FOUND)
    assert guess["by_kind"] == {"colour": {"right": 1.5, "total": 2}, "seen": {"right": 2, "total": 3}}
    assert guess["by_age"]["<= 10 s"] == {"right": 0, "total": 1}
    assert guess["by_age"]["whole stream"] == {"right": 2, "total": 2}


def test_nothing_asked():
    nothing = {"all": {"right": 0, "total": 0}, "by_age": {}, "by_kind": {}, "by_kind_and_age": {}}
    assert summary([]) == constant_guess([]) == nothing


def test_ages_in_a_drawn_stream_are_those_of_its_evidence():
    stream = evaluation_stream(0, 0, 32)
    probes = [Probe(n, r.kind, int(r.time), "", True) for n, r in enumerate(stream.requests) if r.keys]
    assert {answer.age for answer in answers(stream, probes)} == {"now"}
