"""Answers about the past and their evidence, recomputed from tables and events alone."""

import collections
import math

import numpy as np
import pytest

from moss_jax.worlds.tabletop.answers import evidence, true_answer, truth_of
from moss_jax.worlds.tabletop.language import (
    LIVE,
    LONG_PAST,
    PAST,
    PLACE_WORDS,
    RECENT_PAST,
    SPANS,
    TIMES,
    holds,
)
from moss_jax.worlds.tabletop.requests import Request
from moss_jax.worlds.tabletop.stream import draw_stream
from moss_jax.worlds.tabletop.world import CARD, Table, Thing, World


@pytest.fixture(scope="module")
def long_past() -> list[tuple[World, Request]]:
    """Questions about the past of long streams, some of them with an impaired camera."""
    drawn = []
    for seed in range(40):
        stream = draw_stream(np.random.default_rng(seed), 480, past=0.8, impaired=0.5)
        asked = [request for request in stream.requests if request.kind in PAST]
        drawn += [(stream.world, request) for request in asked]
    return drawn


def was_visible(world: World, kind: str, second: int) -> Thing | None:
    """The thing of a kind at a second, if the camera shows it."""
    found = [thing for thing in world.tables[second].visible if thing.kind == kind]
    return found[0] if found and world.clear[second] else None


def test_every_kind_of_question_about_the_past_is_asked(long_past):
    kinds = collections.Counter(request.kind for _, request in long_past)
    assert set(kinds) == set(PAST)
    assert min(kinds[kind] for kind in LONG_PAST) > 15
    assert {request.span for _, request in long_past} == {0, *SPANS}


def test_answers_about_the_long_past_follow_from_the_tables(long_past):
    """Recomputed from the tables and events alone, second by second."""
    judged = collections.Counter()
    for world, request in long_past:
        now, k = int(request.time), request.subject
        said = true_answer(request, truth_of(request, world, now))
        seen = [s for s in range(now + 1) if k and was_visible(world, k, s)]
        last = was_visible(world, k, seen[-1]) if seen else None
        match request.kind:
            case "first":
                numbers = [c.label for s in range(now + 1) if (c := was_visible(world, CARD, s))]
                expected = f"The first number was {numbers[0]}." if numbers else "There was no number."
            case "order":
                first = {kind: world.sightings[kind][0] for kind in (k, request.other)}
                assert len(set(first.values())) == 2
                assert max(first.values()) <= now
                expected = f"The {min(first, key=lambda kind: first[kind])} came first."
            case "times":
                count = sum(e.frame <= now and e.kind == k and e.change == "appear" for e in world.events)
                words = ["Never so far.", "It came once.", "It came twice."]
                words += [f"It came {word} times." for word in list(TIMES.values())[:-1]]
                expected = words[count] if count < 10 else "It came many times."
            case "last place":
                expected = f"It was {PLACE_WORDS[last.place]}." if last else "I have not seen it."
            case "last colour":
                expected = f"It was {last.colour}." if last else "I have not seen it."
            case "was under":
                covers = [e.kind for e in world.events if e.frame <= now and e.change == "cover"]
                covers = covers[:-1] if world.tables[now].covered else covers
                expected = f"The {covers[-1]} was under it." if covers else "Nothing was covered before."
            case "digit ago" | "place ago" | "colour ago":
                then = world.tables[now - request.span]
                thing = next((thing for thing in then.things if thing.kind == k), None)
                if thing is None:
                    expected = "There was no card." if request.kind == "digit ago" else "It was not there."
                elif then.covered == k:
                    expected = "It was covered."
                elif request.kind == "digit ago":
                    expected = f"It was a{'n' if thing.label == '8' else ''} {thing.label}."
                elif request.kind == "place ago":
                    expected = f"It was {PLACE_WORDS[thing.place]}."
                else:
                    expected = f"It was {thing.colour}."
            case _:
                continue
        assert said.text() == expected
        assert holds(said.facts, truth_of(request, world, now))
        judged[request.kind] += 1
    assert set(judged) == set(LONG_PAST)


def test_a_time_ago_is_asked_about_where_the_answer_was_the_same_around_it(long_past):
    """And where the camera showed it."""
    found = 0
    for world, request in long_past:
        if not request.span:
            continue
        then, slack = int(request.time) - request.span, max(2, request.span / 6)
        around = range(math.floor(then - slack), math.ceil(then + slack) + 1)
        assert around[0] >= 0
        topic = {"digit ago": "digit"}.get(request.kind, f"{request.kind.split()[0]}:{request.subject}")
        assert len({world.truth[second][topic] for second in around}) == 1
        assert all(world.clear[second] for second in around)
        assert SPANS[request.span] in request.text
        found += 1
    assert found > 100


def test_evidence_is_the_latest_second_that_showed_the_answer(long_past):
    judged = collections.Counter()
    for world, request in long_past:
        now, k = int(request.time), request.subject
        truth = world.truth[now]
        found = evidence(request, world, now)
        judged[request.kind, found is None] += 1
        if found is None:
            # Nothing was ever there, or it takes the whole stream to know.
            said = true_answer(request, truth_of(request, world, now))
            nothing = ("no previous", "no first", "not seen", "unseen", "nothing under", "never covered")
            assert request.kind == "times" or said.name in (*nothing, "nothing happened")
            continue
        assert 0 <= found <= now
        assert world.clear[found]
        match request.kind:
            case "seen" | "last place" | "last colour":
                assert was_visible(world, k, found)
                assert not any(was_visible(world, k, s) for s in range(found + 1, now + 1))
            case "previous":
                assert world.truth[found]["digit"] == truth["previous"]
                later = {c.label for s in range(found + 1, now + 1) if (c := was_visible(world, CARD, s))}
                assert len(later) == 1
                assert later != {truth["previous"]}
            case "first":
                run = [was_visible(world, CARD, s) for s in range(world.sightings[CARD][0], found + 1)]
                assert all(shown and shown.label == truth["first"] for shown in run)
                after = was_visible(world, CARD, found + 1) if found < now else None
                assert after is None or found == now or after.label != truth["first"]
            case "event":
                assert found == [event.frame for event in world.events if event.frame <= now][-1]
            case "under" | "was under":
                assert was_visible(world, truth[request.kind], found)
                cover = next(event for event in world.events if event.frame > found)
                assert (cover.change, cover.kind) == ("cover", truth[request.kind])
            case "order":
                known = [world.truth[s] for s in (found - 1, found)]
                both = [all(t[f"seen:{kind}"] == "yes" for kind in (k, request.other)) for t in known]
                assert both == [False, True]
            case _:
                assert found == now - request.span
    for kind in (*RECENT_PAST, "first", "last place", "last colour", "was under"):
        assert judged[kind, False] > 5
    assert judged["times", False] == 0
    assert judged["was under", True] > 0


def test_evidence_of_other_requests():
    world = World((Table((Thing("star", (0, 0), "red"),)),) * 9, ())
    for kind in LIVE:
        assert evidence(Request(5.5, "", kind, "star"), world, 5) == 5
    assert evidence(Request(5.5, "", "narrate"), world, 5) is None
    assert evidence(Request(5.5, "", "watch"), world, 5) is None
