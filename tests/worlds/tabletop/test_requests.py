"""Requests: what a user asks makes sense at the time at which it is asked."""

import collections
import itertools

import numpy as np
import pytest

from moss_jax.worlds.tabletop import digits
from moss_jax.worlds.tabletop.language import (
    ASK,
    LIVE,
    PAST,
    holds,
)
from moss_jax.worlds.tabletop.requests import Request, draw_requests
from moss_jax.worlds.tabletop.stream import TabletopStream, draw_stream
from moss_jax.worlds.tabletop.world import CARD, World, generate


@pytest.fixture(scope="module")
def streams() -> list[TabletopStream]:
    """Short ones, some with requests in quick succession, and some with questions about all of the past."""
    drawn = []
    for seed in range(440):
        rng, dense = np.random.default_rng(seed), seed % 4 == 3
        past = 0.8 if seed >= 320 else None
        drawn.append(draw_stream(rng, 6 if dense else 24, dense=dense, past=past, impaired=0.0))
    return drawn


@pytest.fixture(scope="module")
def asked(streams) -> list[tuple[World, Request]]:
    drawn = [(stream.world, request) for stream in streams for request in stream.requests]
    for seed in range(200):
        rng = np.random.default_rng([seed, 1])
        world = generate(rng, 24, digit_indices=digits.training_indices(), rate=0.4, gap=2)
        drawn += [(world, request) for request in draw_requests(rng, world, first_turn=0.5)]
    return drawn


def test_every_kind_of_request_is_made(asked):
    kinds = collections.Counter(request.kind for _, request in asked)
    assert set(kinds) == set(ASK)
    assert min(kinds.values()) > 5


def test_requests_come_between_the_frames(streams):
    for stream in streams:
        times = [request.time for request in stream.requests]
        assert times == sorted(set(times))
        for time in times:
            assert time == 0 or 0.04 < time % 1 < 0.96
            assert time < stream.world.seconds


def test_requests_make_sense(asked):
    for world, request in asked:
        frame = int(request.time) if request.time else -1
        truth = world.truth[frame] if frame >= 0 else None
        if request.kind in ("colour", "there", "seen"):
            assert request.subject not in ("", CARD)
        if request.kind in ("list", "count", "narrate", "watch"):
            assert request.subject == ""
        if request.subject and request.kind != "digit":
            assert request.subject in request.text
        if request.kind in PAST:
            assert truth is not None
        if request.kind == "previous":
            assert truth
            assert truth["digit"] not in ("none", "covered")
        assert (request.awaited is not None) == request.kind.startswith("alert")
        if request.awaited:
            assert request.awaited.name == request.kind
            assert request.awaited.values.get("k", "") == request.subject
            assert all(value in request.text for value in request.awaited.values.values())
            # What is awaited is not true yet.
            assert truth is None or not holds(request.awaited.facts, truth)
    alerts = [(world, request) for world, request in asked if request.awaited]
    comes = [
        any(holds(r.awaited.facts, truth) for truth in world.truth[int(r.time) :]) for world, r in alerts
    ]
    assert 0.5 < np.mean(comes) < 0.9


def test_the_share_of_first_turns_can_be_chosen():
    rng = np.random.default_rng(0)
    world = generate(rng, 10, digit_indices=digits.training_indices(), rate=0.4, gap=2)
    for share in (0.0, 0.3, 1.0):
        first = [draw_requests(rng, world, first_turn=share)[0].time == 0 for _ in range(200)]
        assert abs(np.mean(first) - share) < 0.1


def test_dense_requests_are_questions_in_quick_succession():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        world = generate(rng, 8, digit_indices=digits.training_indices(), rate=0.5, gap=1)
        requests = draw_requests(rng, world, dense=True)
        assert {request.kind for request in requests} <= {*LIVE, *PAST}
        assert len(requests) >= 6
        assert max(b.time - a.time for a, b in itertools.pairwise(requests)) < 1.5
        assert requests[0].time < 1


def test_a_short_stream_can_be_asked_about():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        world = generate(rng, 1, digit_indices=digits.training_indices(), rate=0.5, gap=1)
        assert all(r.time < 1 for r in draw_requests(rng, world, first_turn=0.5, dense=seed % 2 == 0))
