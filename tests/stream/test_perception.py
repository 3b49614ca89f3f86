"""Encoding of frames: how they are batched, and when batches are sent."""

from unittest import mock

import numpy as np
import pytest

from moss_jax.stream.perception import split_batches

# Programs of two batch sizes sum in another order: float32 rounding of features of up to 4.
ATOL = 1e-4


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (5, [5]), (20, [8, 8, 4]), (75, [8, 32, 32, 3])])
def test_a_batch_is_sent_before_the_one_ahead_of_it_is_encoded(make_engine, frames, count, sizes):
    engine, seen = make_engine(), []
    send, encode = engine.frame_encoder.send, engine.frame_encoder.encode_sent

    def watched_send(batch):
        seen.append(("send", len(batch)))
        return send(batch)

    def watched_encode(sent):
        seen.append(("encode", None))
        return encode(sent)

    frames = (frames * 5)[:count]
    with mock.patch.multiple(engine.frame_encoder, send=watched_send, encode_sent=watched_encode):
        features = engine.encode(frames)
    assert [size for what, size in seen if what == "send"] == sizes
    what = [what for what, _ in seen]
    for i in range(1, len(sizes)):
        encodings = [k for k, x in enumerate(what) if x == "encode"]
        assert what[: encodings[i]].count("send") == min(i + 2, len(sizes))
    assert what[:2] == ["send", "encode"]
    for i in (0, count // 2, count - 1):
        np.testing.assert_allclose(features[i], engine.encode(frames[i : i + 1])[0], atol=ATOL)


def test_how_frames_are_split_into_batches():
    """All frames in order, small batches first, with one at least before a large one."""
    for count in (1, 2, 8, 9, 32, 39, 40, 41, 72, 130, 256):
        batches = list(split_batches(list(range(count)), 32))
        assert [frame for batch in batches for frame in batch] == list(range(count))
        sizes = [len(batch) for batch in batches]
        assert sizes[0] <= 8
        assert sizes.count(32) == max(count - 8, 0) // 32
        *whole, last = sizes
        assert set(whole) <= {8, 32}
        assert whole == sorted(whole)
        assert last in (count % 8 or 8, 32)


def test_frames_of_different_sizes_keep_their_order(make_engine, frames):
    engine = make_engine()
    small = np.ascontiguousarray(frames[1][:12, :20])
    mixed = engine.encode([frames[0], small, frames[2]])
    for i, frame in enumerate([frames[0], small, frames[2]]):
        np.testing.assert_allclose(mixed[i], engine.encode([frame])[0], atol=ATOL)
    assert len(mixed) == len(engine.encode(frames[:1]))
