"""The timeline: the same for decoded frames and for packets, whatever the timestamps do."""

import types
from pathlib import Path

import av
import numpy as np
import pytest

from moss_jax.config import FrameSampling
from moss_jax.video import clip_times, frame_spans, probe, read, sample_clip, sample_file
from moss_jax.video.timeline import stamped_packets

TICKS = 3600  # of a frame in MPEG-TS at 25 fps


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("timelines")


def join(path: Path, *parts: Path) -> Path:
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def assert_one_timeline(path: Path, times, numbers, number_of) -> None:
    """Decoding, packets, live and offline sampling agree on what is shown when."""
    frames, spans = list(read(path)), frame_spans(path)
    assert [number_of(frame.rgb) for frame in frames] == list(numbers)
    np.testing.assert_allclose([frame.time for frame in frames], times, atol=1.1e-3)
    assert [span.time for span in spans] == pytest.approx([frame.time for frame in frames], abs=1e-9)
    end = spans[-1].time + (spans[-1].duration or 0)
    assert probe(path).duration == pytest.approx(end)
    sampling = FrameSampling(fps=1, max_frames=64)
    clip, live = sample_clip(path, sampling), list(sample_file(path, sampling))
    assert [frame.time for frame in clip] == [frame.time for frame in live] == clip_times(path, sampling)
    assert len(clip) == np.ceil(end)
    shown = [number_of(frame.rgb) for frame in clip]
    assert shown == [number_of(frame.rgb) for frame in live]
    numbers, times = np.array(numbers), np.array(times)
    assert shown == [numbers[times <= frame.time + 2e-3][-1] for frame in clip]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("part.ts", {}),
        ("part.ts", {"gop": 50}),
        ("short.ts", {"count": 8}),
        ("part.mpg", {"codec": "mpeg2video"}),
        ("part.h264", {"muxer": "h264"}),
        ("part.mjpeg", {"codec": "mjpeg", "pix_fmt": "yuvj420p", "muxer": "mjpeg"}),
    ],
)
def test_files_that_are_joined_are_seen_whole(tmp_path, encode, number_of, name, how):
    """Their timestamps start over; `cat a.ts b.ts c.ts > all.ts`."""
    count = how.pop("count", 50)
    part = encode(tmp_path / name, count, **how)
    path = join(tmp_path / f"all{part.suffix}", *[part] * 3)
    times = np.arange(3 * count) / 25
    if part.suffix == ".mpg":  # libav loses a timestamp of each part
        assert probe(path).duration == pytest.approx(6, abs=0.1)
        assert np.diff([span.time for span in frame_spans(path)]).max() < 0.1
        assert [number_of(frame.rgb) for frame in read(path)] == 3 * list(range(50))
        return
    assert_one_timeline(path, times, 3 * list(range(count)), number_of)


@pytest.mark.parametrize(("suffix", "codec"), [("mkv", "libx264"), ("webm", "libvpx")])
def test_recordings_that_are_joined_are_seen_as_far_as_libav_reads(
    tmp_path, encode, number_of, suffix, codec
):
    part = encode(tmp_path / f"part.{suffix}", 50, codec=codec)
    path = join(tmp_path / f"all.{suffix}", part, part)
    assert_one_timeline(path, np.arange(100) / 25, 2 * list(range(50)), number_of)


@pytest.mark.parametrize("seconds", [-1.0, 3.0, 30.0, 80_000.0])
def test_a_broadcast_whose_clock_jumps(tmp_path, encode, number_of, seconds):
    """Back, or far ahead, where another recording begins; a gap of a few seconds is a gap."""
    first = encode(tmp_path / "first.ts", 50, muxer_options={"output_ts_offset": "100"})
    second = encode(tmp_path / "second.ts", 50, muxer_options={"output_ts_offset": str(102 + seconds)})
    path = join(tmp_path / "all.ts", first, second)
    gap = seconds if seconds == 3 else 0
    times = np.concatenate([np.arange(50) / 25, 2 + gap + np.arange(50) / 25])
    assert_one_timeline(path, times, 2 * list(range(50)), number_of)


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx")])
def test_a_long_gap_of_a_recording_is_kept(tmp_path, encode, number_of, suffix, codec):
    """Of a screen recording, for instance, that has no frame while nothing changes."""
    times = [40 * i for i in range(30)] + [20_000 + 40 * i for i in range(30)]
    path = encode(tmp_path / f"gap.{suffix}", 60, codec=codec, times_ms=times)
    assert_one_timeline(path, np.array(times) / 1000, range(60), number_of)


def test_a_recording_that_begins_between_keyframes_begins_at_the_next(folder, encode, number_of):
    whole = encode(folder / "whole.ts", 50)
    late = folder / "late.ts"
    late.write_bytes(whole.read_bytes()[188 * 30 :])
    first = number_of(next(read(late)).rgb)
    assert 0 < first < 25
    assert_one_timeline(late, np.arange(50 - first) / 25, range(first, 50), number_of)


# -------------------------------------------------------------------- timestamps packet by packet


def packet(pts: int | None, dts: int | None, *, key: bool = True) -> av.Packet:
    packet = av.Packet(b"x")
    packet.pts, packet.dts, packet.duration, packet.is_keyframe = pts, dts, TICKS, key
    return packet


@pytest.fixture
def stamps(folder, encode):
    """Times in frames that packets of (pts, dts, keyframe) get; None for those that are not shown."""
    path = folder / "stream.ts"
    path = path if path.exists() else encode(path, 20)

    def stamps(packets, muxer: str = "mpegts", *, reorders: bool = True):
        scale = lambda ticks: None if ticks is None else round(ticks * TICKS)  # noqa: E731
        demuxed = [packet(scale(pts), scale(dts), key=key) for pts, dts, key in packets]
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            fake = types.SimpleNamespace(
                format=av.ContainerFormat(muxer, "r"), demux=lambda stream: iter(demuxed)
            )
            context = types.SimpleNamespace(has_b_frames=reorders)
            like = types.SimpleNamespace(
                time_base=stream.time_base, average_rate=stream.average_rate, codec_context=context
            )
            return [stamp and stamp.time / TICKS for _, stamp in stamped_packets(fake, like)]

    return stamps


def keys(*times) -> list[tuple]:
    return [(time, time, True) for time in times]


def test_missing_timestamps_follow_on(stamps):
    packets = [(0, 0, True), (None, None, True), (None, None, True), (3, 3, True)]
    assert stamps(packets) == [0, 1, 2, 3]
    assert stamps([(None, None, True)] * 3) == [0, 1, 2]
    # Without B-frames, frames are shown as they are decoded.
    assert stamps([(None, 0, True), (None, 2, True), (5, 5, True)], reorders=False) == [0, 2, 5]


def test_one_wrong_timestamp_shifts_nothing_else(stamps):
    packets = keys(*range(20), 900_000, *range(21, 24))
    assert stamps(packets, reorders=False) == list(range(24))
    assert stamps(packets) == list(range(24))


def test_small_steps_back_are_not_a_jump(stamps):
    """Clocks are not exact: 40 ms stay where they are, a second is another recording."""
    assert stamps(keys(*range(20), 18, 20), reorders=False) == [*range(20), 18, 20]
    assert stamps(keys(*range(30), 5, 6), reorders=False) == list(range(32))


def test_packets_before_the_first_keyframe_are_not_shown(stamps):
    packets = [(0, 0, False), (1, 1, False), (6, 2, True), (3, 3, False), (5, 4, False), (8, 5, False)]
    # Those between the keyframe and its presentation depend on what came before.
    assert stamps(packets) == [6, None, None, 8]
    unmarked = [(time, time, False) for time in range(5)]
    assert stamps(unmarked) == list(range(5))
    # Nor does a keyframe help that comes so late that few mark theirs.
    assert stamps([(time, time, time == 1500) for time in range(2000)]) == list(range(2000))


def test_decoding_timestamps_that_are_copies_are_not_trusted(stamps):
    """As libav makes them behind the joint of two Matroska files with B-frames, here at 2 fps."""
    first = [(0, None, True), (48, None, False), (24, 0, False), (12, 12, False), (36, 24, False)]
    more = [(60 + 12 * i, 36 + 12 * i, False) for i in range(15)]
    second = [(time, time, time == 0) for time in (0, 48, 24, 12, 36, 96, 72, 60, 84)]
    end = 60 + 12 * 14 + 1
    expected = [0, 48, 24, 12, 36, *(60 + 12 * i for i in range(15))]
    assert stamps([*first, *more, *second], "matroska") == [*expected, *(end + time for time, _, _ in second)]


def test_presentation_timestamps_of_avi_are_ignored(stamps):
    packets = [(7, 0, True), (3, 1, False), (None, 2, False), (5, 3, False)]
    assert stamps(packets, "avi") == [0, 1, 2, 3]
