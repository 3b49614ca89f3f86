"""Streams: their dependence on seeds, and their frames."""

import dataclasses
import itertools

import numpy as np
import pytest

from moss_jax.worlds.tabletop import digits, evaluation_stream
from moss_jax.worlds.tabletop.render import paint
from moss_jax.worlds.tabletop.stream import EVALUATION, TRAINING, TabletopStream, draw_stream
from moss_jax.worlds.tabletop.world import CARD

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
