"""Streams: their dependence on seeds, and their frames."""

import dataclasses
import itertools

import numpy as np
import pytest

from moss_jax.worlds.tabletop import digits, evaluation_stream
from moss_jax.worlds.tabletop.answers import evidence
from moss_jax.worlds.tabletop.language import LONG_PAST, PAST
from moss_jax.worlds.tabletop.render import paint
from moss_jax.worlds.tabletop.stream import (
    EVALUATION,
    RATES,
    TRAINING,
    TabletopStream,
    draw_stream,
    take_photographs,
)
from moss_jax.worlds.tabletop.world import CARD, IMPAIRMENTS, Impairment

SECONDS = 32


def training_stream(*seeds: int, **settings) -> TabletopStream:
    return draw_stream(np.random.default_rng([TRAINING, *seeds]), SECONDS, **settings)


def cards(stream: TabletopStream) -> set[int]:
    """Indices of the digit images in a stream."""
    return {t.digit for table in stream.world.tables for t in table.things if t.kind == CARD}


def calm(stream: TabletopStream) -> TabletopStream:
    """The same stream with a perfect camera."""
    return dataclasses.replace(
        stream, look=dataclasses.replace(stream.look, noise=0.0, shake=0.0, flicker=0.0)
    )


@pytest.fixture(scope="module")
def held_out() -> list[TabletopStream]:
    return [evaluation_stream(3, index, SECONDS) for index in range(60)]


@pytest.fixture(scope="module")
def trained() -> list[TabletopStream]:
    return [training_stream(3, index) for index in range(60)]


def test_digits_of_evaluation_are_not_in_training(held_out, trained):
    dense = [training_stream(3, index, dense=True) for index in range(30)]
    for streams, allowed in (
        (held_out, digits.held_out_indices()),
        (trained, digits.training_indices()),
        (dense, digits.training_indices()),
    ):
        seen = set().union(*map(cards, streams))
        assert len(seen) > 40
        assert seen <= set(allowed.tolist())


def test_streams_of_evaluation_are_independent_of_training():
    """For all seeds, and not only in their digits."""
    assert TRAINING != EVALUATION
    seeds = list(itertools.product(range(3), repeat=2))
    drawn = [
        *(evaluation_stream(seed[0], seed[1], SECONDS) for seed in seeds),
        *(training_stream(*seed, row) for seed in seeds for row in range(3)),
    ]
    looks = {stream.look for stream in drawn}
    events = {tuple((e.frame, e.change, e.kind) for e in stream.world.events) for stream in drawn}
    assert len(looks) == len(drawn)
    assert len(events) > 0.9 * len(drawn)  # a few have hardly any


def test_the_same_seed_gives_the_same_stream():
    assert evaluation_stream(1, 2, 12) == evaluation_stream(1, 2, 12)
    assert training_stream(1, 2) == training_stream(1, 2)
    assert evaluation_stream(1, 2, 12).world.seconds == 12


def test_streams_of_evaluation_have_no_first_turn(held_out, trained):
    """So that streams side by side share their first turn."""
    first = [stream.requests[0].time for stream in held_out]
    assert min(first) > 0
    share = np.mean([stream.requests[0].time == 0 for stream in trained])
    assert 0.1 < share < 0.5
    assert all(training_stream(5, i, dense=True).requests[0].time > 0 for i in range(30))


def test_streams_differ_in_their_number_of_events(held_out):
    counts = [len(stream.world.events) for stream in held_out]
    assert min(counts) <= 3
    assert max(counts) >= 11
    asked = [len(stream.requests) for stream in held_out]
    assert min(asked) <= 4
    assert max(asked) >= 8


def test_dense_streams_have_more_events_and_requests(trained):
    dense = [training_stream(3, index, dense=True) for index in range(30)]

    def mean(streams, of):
        return np.mean([len(of(stream)) for stream in streams])

    assert mean(dense, lambda s: s.world.events) > 1.5 * mean(trained, lambda s: s.world.events)
    assert mean(dense, lambda s: s.requests) > 3 * mean(trained, lambda s: s.requests)


# ----------------------------------------------------------------------------------- the frames


@pytest.mark.parametrize("size", [32, 56])
def test_there_is_a_frame_a_second(size):
    stream = evaluation_stream(0, 1, 6)
    frames = stream.frames(size)
    assert frames.shape == (6, size, size, 3)
    assert frames.dtype == np.uint8
    np.testing.assert_array_equal(frames, stream.frames(size))
    assert (frames != dataclasses.replace(stream, noise=stream.noise + 1).frames(size)).any()


def test_frames_show_the_table_as_it_is(held_out):
    for stream in map(calm, held_out[:8]):
        frames = stream.frames(32)
        for second, frame in enumerate(frames):
            # A perfect camera clips at white.
            shown = paint(stream.world.scene(float(second)), stream.look, 32).clip(0, 255)
            np.testing.assert_allclose(frame, shown, atol=0.51)


def test_frames_differ_where_something_happens(held_out):
    for stream in map(calm, held_out[:8]):
        events = {event.frame for event in stream.world.events}
        for second, (before, after) in enumerate(itertools.pairwise(stream.frames(32)), start=1):
            assert (before != after).any() == (second in events)


def test_photographs_of_a_noisy_camera_differ(held_out):
    stream = next(s for s in held_out if s.look.noise > 3)
    frames = stream.frames(32)
    assert all((a != b).any() for a, b in itertools.combinations(frames, 2))
    # But only by noise and shake.
    difference = np.abs(frames - calm(stream).frames(32).astype(float)).mean()
    assert 1 < difference < 20


# ------------------------------------------------------------------------------- ranges of frames


def test_frames_of_a_range_are_those_of_the_whole():
    stream = training_stream(4, 0, impaired=1.0)
    whole = stream.frames(24)
    for start, stop in ((0, 1), (0, 9), (5, 6), (7, SECONDS), (3, None)):
        np.testing.assert_array_equal(stream.frames(24, start, stop), whole[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 3), (5, 2), (0, SECONDS + 1)])
def test_a_range_that_the_stream_does_not_have_is_refused(start, stop):
    with pytest.raises(ValueError, match="0 <= start < stop <= 32"):
        evaluation_stream(0, 0, SECONDS).frames(24, start, stop)


# ---------------------------------------------------------------------------- long, varied streams


def test_long_streams_vary_in_their_events_and_in_the_pace_of_the_user():
    streams = [draw_stream(np.random.default_rng(seed), 400) for seed in range(40)]
    events = np.array([len(stream.world.events) for stream in streams]) / 400
    requests = np.array([len(stream.requests) for stream in streams]) / 400
    assert events.min() < 0.03
    assert events.max() > 0.2
    assert requests.min() < 1 / 20
    assert requests.max() > 1 / 8


def test_a_long_stream_has_quiet_stretches_and_busy_ones():
    """At least in some streams: events in one minute, and none for the next."""
    changing = 0
    for seed in range(20):
        stream = draw_stream(np.random.default_rng(seed), 600)
        counts = np.bincount([event.frame // 60 for event in stream.world.events], minlength=10)
        changing += counts.max() >= 12 and counts.min() <= 3
    assert changing > 3


def test_the_variety_can_be_chosen():
    """How much streams differ in their number of requests."""

    def spread(seconds, **settings):
        streams = [draw_stream(np.random.default_rng(seed), seconds, **settings) for seed in range(40)]
        counts = [len(stream.requests) for stream in streams]
        return np.std(counts) / np.mean(counts)

    assert spread(200) > 3 * spread(200, varied=False)
    assert spread(32, varied=True) > 1.5 * spread(32)


def test_the_rate_of_events_can_be_chosen():
    def events(*rates):
        streams = [evaluation_stream(0, index, 100, varied=True, rates=rates) for index in range(20)]
        return np.mean([len(stream.world.events) / 100 for stream in streams])

    assert events(0.01, 0.02) < 0.04
    assert events(0.4, 0.6) > 0.2
    assert evaluation_stream(0, 1, 100, rates=RATES) == evaluation_stream(0, 1, 100)


def test_the_share_of_questions_about_the_past_can_be_chosen():
    for past in (0.0, 0.4, 1.0):
        streams = [draw_stream(np.random.default_rng(s), 200, past=past, varied=False) for s in range(20)]
        kinds = [request.kind for stream in streams for request in stream.requests if request.time > 0]
        assert abs(np.mean([kind in PAST for kind in kinds]) - past) < 0.07
    # All kinds come up where they are asked for, and the recent ones alone where they are not.
    assert set(kinds) == set(PAST)
    usual = {r.kind for s in range(40) for r in evaluation_stream(0, s, 32).requests}
    assert not usual & set(LONG_PAST)


# ----------------------------------------------------------------------------- an impaired camera


def test_questions_can_ask_for_what_is_old():
    def age(request, world):
        shown = evidence(request, world, int(request.time))
        return -1 if shown is None else int(request.time) - shown

    shares = []
    for old in (0.0, 1.0):
        streams = [draw_stream(np.random.default_rng(s), 300, past=1.0, old=old) for s in range(12)]
        asked = [(request, s.world) for s in streams for request in s.requests if request.time > 100]
        shares.append(np.mean([age(*question) > 30 for question in asked if question[0].kind != "times"]))
        # How often something happened, for which the whole stream counts, is asked as usual.
        assert 0.05 < np.mean([request.kind == "times" for request, _ in asked]) < 0.25
    assert shares[0] < 0.7
    assert shares[1] > 0.8


def test_a_share_of_a_stream_can_be_quiet():
    for seed in range(5):
        usual, quiet = (draw_stream(np.random.default_rng(seed), 100, quiet=q) for q in (0.0, 0.6))
        assert quiet.requests == tuple(request for request in usual.requests if request.time >= 60)
        assert quiet.world == usual.world


def test_a_quiet_user_may_listen_to_a_narration():
    for seed in range(5):
        quiet, narrated = (
            draw_stream(np.random.default_rng(seed), 100, quiet=0.6, narrated=n) for n in (False, True)
        )
        first, *rest = narrated.requests
        assert first.kind == "narrate"
        assert 0 < first.time < 8
        assert first.time % 1
        assert tuple(rest) == quiet.requests


def test_a_part_of_the_longer_training_streams_has_an_impaired_camera():
    drawn = [draw_stream(np.random.default_rng(seed), 13) for seed in range(400)]
    assert 0.08 < np.mean([bool(stream.impairments) for stream in drawn]) < 0.17
    assert not any(draw_stream(np.random.default_rng(s), 12).impairments for s in range(50))
    assert not any(evaluation_stream(0, index, 640).impairments for index in range(10))
    assert all(evaluation_stream(0, index, 64, impaired=1.0).impairments for index in range(10))


def test_impairments_are_disjoint_and_nothing_changes_in_them():
    kinds = set()
    for seed in range(60):
        seconds = (4, 20, 700)[seed % 3]
        stream = draw_stream(np.random.default_rng(seed), seconds, impaired=1.0)
        events = {event.frame for event in stream.world.events}
        last = 0
        for impairment in stream.impairments:
            kinds.add(impairment.kind)
            assert last < impairment.start < impairment.stop < seconds
            assert 2 <= impairment.stop - impairment.start <= 60
            assert events.isdisjoint(range(impairment.start, impairment.stop))
            last = impairment.stop
    assert kinds == set(IMPAIRMENTS)


@pytest.mark.parametrize("kind", IMPAIRMENTS)
def test_frames_show_the_impairment(held_out, kind):
    stream = next(s for s in held_out if len(s.world.events) > 8)
    world = dataclasses.replace(stream.world, impairments=(Impairment(6, 12, kind),))
    frames = dataclasses.replace(stream, world=world).frames(32).astype(float)
    usual = stream.frames(32).astype(float)
    np.testing.assert_array_equal(frames[:6], usual[:6])
    np.testing.assert_array_equal(frames[12:], usual[12:])
    if kind == "frozen":
        assert (frames[6:12] == usual[6]).all()
    else:
        # Each frame has its own noise, and no more structure than that.
        assert all((a != b).any() for a, b in itertools.pairwise(frames[6:12]))
        levels = {"black": (0, 20), "overexposed": (240, 256), "blurred": (30, 240)}[kind]
        assert levels[0] <= frames[6:12].mean() <= levels[1]


def test_a_frozen_camera_repeats_its_image_at_any_frame_rate(held_out):
    stream = held_out[0]
    world = dataclasses.replace(stream.world, impairments=(Impairment(2, 4, "frozen"),))
    stream = dataclasses.replace(stream, world=world)
    found = list(take_photographs(stream, size=24, start=1, stop=5, fps=4))
    assert len(found) == 16
    assert all((image == found[4]).all() for image in found[4:12])
    assert (found[3] != found[4]).any()
    assert (found[12] != found[4]).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"past": 1.5}, "past must be between 0 and 1; got 1.5"),
        ({"impaired": -1}, "impaired must be between 0 and 1; got -1"),
        ({"old": 2}, "old must be between 0 and 1; got 2"),
        ({"quiet": -0.1}, "quiet must be between 0 and 1; got -0.1"),
        ({"rates": (0.0, 0.5)}, r"rates must be a range within \(0, 1\]; got \(0.0, 0.5\)"),
        ({"rates": (0.5, 0.1)}, r"rates must be a range within \(0, 1\]; got \(0.5, 0.1\)"),
    ],
)
def test_shares_and_rates_that_are_none_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        training_stream(0, **settings)


def test_a_stream_too_short_for_an_impairment_is_refused():
    with pytest.raises(ValueError, match="at least 4 seconds; got 3"):
        draw_stream(np.random.default_rng(0), 3, impaired=0.5)
