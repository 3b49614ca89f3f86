"""Batches of segments: whole streams behind one another, and that step and seed alone determine them."""

import dataclasses
import pickle

import jax
import numpy as np
import pytest

from moss_jax.config import SegmentsConfig, TabletopConfig
from moss_jax.data.segments import TabletopSegments, shown_seconds
from moss_jax.text.labels import IGNORED
from moss_jax.worlds.tabletop.stream import draw_stream

SEGMENTS = SegmentsConfig(
    per_step=2,
    frames=4,
    tokens=160,
    streams=(2, 5),
    memories=(("window", 8, "model"),),
    text_capacities=(330, 500),
    skips=0.3,
)


@pytest.fixture(scope="module")
def make_segments(tokenizer):
    def make(*, batch_size=4, **share) -> TabletopSegments:
        return TabletopSegments(
            TabletopConfig(image_size=32), SEGMENTS, tokenizer, batch_size=batch_size, seed=0, **share
        )

    return make


def pieces(source: TabletopSegments, row: int, count: int) -> list[dict]:
    """The first segments of a row, in order."""
    found = []
    for step in range(-(-count // SEGMENTS.per_step)):
        batch = source[step].batch
        for k in range(SEGMENTS.per_step):
            length, T, F = int(batch.segments.lengths[row, k]), SEGMENTS.tokens, SEGMENTS.frames
            places = batch.frame_positions[row, k * F : (k + 1) * F]
            found.append(
                {
                    "tokens": batch.tokens[row, k * T : k * T + length].tolist(),
                    "rest": batch.tokens[row, k * T + length : (k + 1) * T],
                    "begins": bool(batch.segments.begins[row, k]),
                    "frames": [p - k * T for p in places if p < 2 * T],
                    "kept": batch.segments.kept[row, k, : batch.segments.kept_length[row, k]].tolist(),
                    "skipped": int(batch.segments.skipped[row, k]),
                    "pixels": batch.frames[row, k * F : (k + 1) * F],
                }
            )
    return found[:count]


def test_segments_go_on_where_the_last_ended(make_segments, tokenizer):
    """Behind one another, segments are whole streams, each frame at its token, and the text fits."""
    source, special, selected = make_segments(), tokenizer.special, 0
    for row in range(4):
        cache = []
        for piece in pieces(source, row, 12):
            if piece["begins"]:
                cache = []
                assert piece["tokens"][0] == special.begin_of_text
                assert not piece["kept"]
            assert not piece["rest"].any()
            images = [i for i, token in enumerate(piece["tokens"]) if token == special.image]
            assert set(piece["frames"]) <= set(images)
            selected += len(piece["frames"]) < len(images)
            assert all(image.any() for image in piece["pixels"][: len(piece["frames"])])
            if not piece["begins"] and piece["tokens"]:
                assert images[:1] == [0] or len(piece["tokens"]) == SEGMENTS.tokens
            assert piece["kept"] == sorted(set(piece["kept"]))
            assert piece["kept"][-1:] <= [len(cache) - 1]
            cache = [cache[i] for i in piece["kept"]] + piece["tokens"]
            assert len(cache) <= max(SEGMENTS.text_capacities)
            assert cache[0] == special.begin_of_text
    assert selected


def test_frames_are_shown_where_something_changes():
    for seed in range(5):
        stream = draw_stream(np.random.default_rng(seed), 120, impaired=0.5)
        shown = np.flatnonzero(shown_seconds(stream, 10))
        assert shown[0] == 0
        assert np.diff(shown).max() <= 10
        changes = {event.frame for event in stream.world.events}
        changes |= {second for i in stream.impairments for second in (i.start, i.stop) if second < 120}
        assert changes <= set(shown.tolist())
        assert len(shown) <= len(changes) + 1 + 120 // 10
        assert all(shown_seconds(stream, 1))


def test_segments_depend_on_their_step_alone(make_segments):
    source = make_segments()
    ahead = source[7].batch
    in_order = [make_segments()[step].batch for step in (3, 7)][1]
    for a, b in zip(jax.tree.leaves(ahead), jax.tree.leaves(in_order), strict=True):
        np.testing.assert_array_equal(a, b)
    copy = pickle.loads(pickle.dumps(source))[7].batch
    np.testing.assert_array_equal(copy.tokens, ahead.tokens)


def test_processes_share_the_rows_of_segments(make_segments):
    whole = make_segments()[5].batch
    halves = [make_segments(process_index=i, process_count=2)[5].batch for i in range(2)]
    np.testing.assert_array_equal(np.concatenate([half.tokens for half in halves]), whole.tokens)
    np.testing.assert_array_equal(np.concatenate([half.frames for half in halves]), whole.frames)
    # And workers those of a process: as many as divide them.
    parts = [part for i in range(2) for part in make_segments(process_index=i, process_count=2).split(3)]
    assert len(parts) == 4
    for step in (5, 6):
        found = np.concatenate([part[step].batch.tokens for part in parts])
        np.testing.assert_array_equal(found, make_segments()[step].batch.tokens)


def test_streams_of_all_lengths_begin_and_some_skip_positions(make_segments):
    found = [piece for row in range(4) for piece in pieces(make_segments(), row, 30)]
    assert 30 < sum(piece["begins"] for piece in found) < 60
    skipped = [piece["skipped"] for piece in found if piece["skipped"]]
    assert 5 < len(skipped) < 40
    assert max(skipped) <= SEGMENTS.max_skip


def test_users_may_be_late_or_listen(tokenizer):
    """Less is said in the first third of the streams, and nothing in some, unless it is narrated."""

    def spoken(**shares):
        # A step is a whole stream of each row.
        settings = dataclasses.replace(
            SEGMENTS, per_step=30, streams=(30,), past=0.8, old=0.5, paces=(3.0, 6.0), **shares
        )
        config = TabletopConfig(image_size=32)
        batch = TabletopSegments(config, settings, tokenizer, batch_size=8, seed=0)[0].batch
        labels = batch.labels[:, : 10 * SEGMENTS.tokens]
        return ((labels != IGNORED) & (labels != tokenizer.special.silence)).sum(axis=1)

    usual, late, narrated = spoken(), spoken(late=1.0), spoken(late=1.0, narrated=1.0)
    assert usual.min() > 0
    assert late.min() == 0
    assert late.mean() < 0.7 * usual.mean()
    assert narrated.min() > 0
    # Nor is a user late whose requests are the usual ones.
    assert spoken(late=1.0, usual=1.0).min() > 0
