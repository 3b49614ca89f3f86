"""Frame sampling, compared with brute force, and on real files."""

import itertools
import math
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moss_jax.config import FrameSampling
from moss_jax.video import (
    Frame,
    VideoError,
    clip_times,
    fit_frame,
    fit_frames,
    probe,
    sample_at,
    sample_clip,
    sample_file,
    sample_live,
)

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
CLIPS = sorted([*SHARED.glob("*.mp4"), *SHARED.glob("*.avi")])
TOLERANCE = 1e-3


def frame(time: float, number: int = 0, duration: float | None = None) -> Frame:
    return Frame(np.full((2, 2, 3), number, np.uint8), time, duration)


def numbered(times: list[float], last_duration: float | None = None) -> list[Frame]:
    durations = [None] * (len(times) - 1) + [last_duration]
    return [frame(t, i, d) for i, (t, d) in enumerate(zip(times, durations, strict=True))]


def shown(frames) -> list[tuple[float, int]]:
    """(time, number of the frame) of sampled frames."""
    return [(f.time, int(f.rgb[0, 0, 0])) for f in frames]


def brute_force(times, last_duration, fps, limit) -> list[tuple[float, int]]:
    """Searches all frames for the one shown at each k/fps: one that begins then, else the last before."""
    result = []
    for k in itertools.count():
        instant = k / fps
        if len(result) == limit:
            return result
        if instant > times[-1] + TOLERANCE and not instant < times[-1] + (last_duration or 0) - TOLERANCE:
            return result
        there = [i for i, t in enumerate(times) if t - TOLERANCE <= instant <= t + TOLERANCE]
        before = [i for i, t in enumerate(times) if t < instant]
        if there:
            result.append((instant, there[0]))
        elif before:
            result.append((instant, before[-1]))


@st.composite
def streams(draw):
    fps = draw(st.sampled_from([0.5, 1.0, 2.0, 3.0, 7.3, 24.0, 30.0]) | st.floats(0.3, 40))
    exact = st.integers(0, 60).map(lambda k: k / fps)
    rounded = exact.map(lambda t: round(t, 3))
    times = sorted(draw(st.lists(exact | rounded | st.floats(0, 12), min_size=1, max_size=50)))
    duration = draw(st.none() | st.floats(0, 4))
    return times, duration, fps, draw(st.integers(1, 40))


@settings(deadline=None)
@given(streams())
def test_live_matches_brute_force(stream):
    times, duration, fps, limit = stream
    # Exactly at the tolerance, float rounding decides.
    ends = [*times, times[-1] + (duration or 0)]
    offsets = [abs(t * fps - k) / fps for t in ends for k in (math.floor(t * fps), math.ceil(t * fps))]
    assume(all(abs(offset - TOLERANCE) > 1e-9 for offset in offsets))
    sampled = sample_live(numbered(times, duration), FrameSampling(fps=fps))
    assert shown(itertools.islice(sampled, limit)) == brute_force(times, duration, fps, limit)


@settings(deadline=None)
@given(streams())
def test_live_reads_no_further_than_it_must(stream):
    times, duration, fps, limit = stream
    pulled = []

    def source():
        for f in numbered(times, duration):
            pulled.append(f.time)
            yield f

    sampled = sample_live(source(), FrameSampling(fps=fps))
    assert pulled == []
    count = 0
    for count, f in enumerate(itertools.islice(sampled, limit), 1):  # noqa: B007
        # All frames before the latest one precede the sample: it could not be yielded any sooner.
        assert all(t < f.time - TOLERANCE + 1e-9 for t in pulled[:-1])
    assert count <= limit
    if count == limit:
        assert all(t < f.time - TOLERANCE + 1e-9 for t in pulled[:-1])
    else:
        assert len(pulled) == len(times)


def test_live_yields_without_delay():
    log = []

    def source():
        for i, t in enumerate([0.0, 0.4, 0.8, 1.2, 2.0, 5.0]):
            log.append(f"frame {i}")
            yield frame(t, i)

    for f in sample_live(source(), FrameSampling(fps=1)):
        log.append(f"{f.time:g} s: {f.rgb[0, 0, 0]}")
    begin = "frame 0, 0 s: 0, frame 1, frame 2, frame 3, 1 s: 2, frame 4, 2 s: 4"
    assert ", ".join(log) == begin + ", frame 5, 3 s: 4, 4 s: 4, 5 s: 5"


def test_live_works_on_an_endless_source():
    endless = (frame(i / 30, i % 256) for i in itertools.count())
    # No setting limits it.
    sampled = sample_live(endless, FrameSampling(fps=2, min_frames=1, max_frames=1))
    assert shown(itertools.islice(sampled, 600)) == [(k / 2, 15 * k % 256) for k in range(600)]


def test_the_source_may_reuse_the_memory_of_a_frame():
    buffer = np.zeros((2, 2, 3), np.uint8)

    def source():
        for i in range(4):
            buffer[:] = i
            yield Frame(buffer, i + 0.5)

    assert shown(list(sample_live(source(), FrameSampling(fps=1)))) == [(1, 0), (2, 1), (3, 2)]


def test_a_sampled_frame_lasts_until_the_next():
    sampled = list(sample_live(numbered([0, 1, 2], 5.0), FrameSampling(fps=4)))
    assert {f.duration for f in sampled} == {0.25}


def test_a_gap_repeats_the_frame_before_it():
    sampled = shown(sample_live(numbered([0, 1, 4.5]), FrameSampling(fps=1)))
    assert sampled == [(0, 0), (1, 1), (2, 1), (3, 1), (4, 1)]


def test_the_last_frame_is_shown_for_its_duration():
    assert shown(sample_live(numbered([0, 1]), FrameSampling(fps=2))) == [(0, 0), (0.5, 0), (1, 1)]
    stays = sample_live(numbered([0, 1], 1.5), FrameSampling(fps=2))
    assert shown(stays) == [(0, 0), (0.5, 0), (1, 1), (1.5, 1), (2, 1)]  # not 2.5, where it ends
    rounded = sample_live(numbered([0, 0.967], 0.0334), FrameSampling(fps=1))
    assert shown(rounded) == [(0, 0)]


def test_times_before_the_first_frame_are_skipped():
    assert shown(sample_live(numbered([1.5, 2.5]), FrameSampling(fps=1))) == [(2, 0)]


def test_timestamps_in_whole_milliseconds_lose_no_frame():
    times = [round(i / 30, 3) for i in range(60)]
    assert [n for _, n in shown(sample_live(numbered(times), FrameSampling(fps=30)))] == list(range(60))


def test_an_empty_stream_has_no_samples():
    assert list(sample_live([], FrameSampling())) == []


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ([frame(0), frame(2), frame(1)], "time order, but 1 s follows 2 s"),
        ([frame(0), frame(math.nan)], "finite"),
        ([frame(math.inf)], "finite"),
        ([Frame(np.zeros((2, 2, 3), np.float32), 0)], r"uint8 \[H, W, 3\], not float32 \[2, 2, 3\]"),
        ([Frame(np.zeros((2, 2), np.uint8), 0)], r"not uint8 \[2, 2\]"),
        ([Frame(np.zeros((3, 2, 2), np.uint8), 0)], r"not uint8 \[3, 2, 2\]"),
        ([Frame([[0, 0, 0]], 0)], "not list"),
    ],
)
def test_bad_sources_are_refused(frames, says):
    with pytest.raises(ValueError, match=says):
        list(sample_live(frames, FrameSampling()))


# ---------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def film(tmp_path_factory, encode) -> Path:
    """100 frames in 4 s."""
    return encode(tmp_path_factory.mktemp("films") / "film.mp4", 100)


@pytest.mark.parametrize("fps", [0.3, 1.0, 2.0, 2.5, 4.0, 25.0])
def test_a_clip_within_bounds_equals_live_sampling(film, fps, number_of):
    sampling = FrameSampling(fps=fps)
    clip, live = sample_clip(film, sampling), list(sample_file(film, sampling))
    assert [f.time for f in clip] == [f.time for f in live] == [k / fps for k in range(math.ceil(4 * fps))]
    assert [number_of(f.rgb) for f in clip] == [math.floor(25 * f.time + 1e-6) for f in clip]
    for a, b in zip(clip, live, strict=True):
        np.testing.assert_array_equal(a.rgb, b.rgb)


@pytest.mark.parametrize("suffix", ["mkv", "webm", "avi", "gif"])
def test_other_containers_agree(tmp_path, encode, number_of, suffix):
    how = {
        "mkv": {},
        "webm": {"codec": "libvpx"},
        "avi": {},
        "gif": {"codec": "gif", "pix_fmt": "rgb8"},
    }[suffix]
    path = encode(tmp_path / f"film.{suffix}", 50, **how)
    for frames in (sample_clip(path, FrameSampling(fps=5)), list(sample_file(path, FrameSampling(fps=5)))):
        assert [number_of(f.rgb) for f in frames] == list(range(0, 50, 5))


def test_a_long_clip_is_spread_to_max_frames(film, number_of):
    sampling = FrameSampling(fps=10, max_frames=8)
    frames = sample_clip(film, sampling)
    assert [f.time for f in frames] == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5])
    assert [number_of(f.rgb) for f in frames] == [math.floor(25 * f.time + 1e-6) for f in frames]
    assert [f.time for f in sample_file(film, sampling)] == pytest.approx(np.arange(40) / 10)


def test_a_clip_without_bound_is_sampled_at_its_rate(film):
    frames = sample_clip(film, FrameSampling(fps=10, max_frames=None))
    assert [f.time for f in frames] == pytest.approx(np.arange(40) / 10)
    assert len(sample_clip(film, FrameSampling(fps=1, min_frames=10, max_frames=None))) == 10


def test_a_short_clip_is_spread_to_min_frames(film, number_of):
    frames = sample_clip(film, FrameSampling(fps=1, min_frames=10))
    assert [f.time for f in frames] == pytest.approx(np.arange(10) * 0.4)
    assert [number_of(f.rgb) for f in frames] == list(range(0, 100, 10))


def test_a_clip_of_too_few_frames_repeats_them(tmp_path, encode, number_of):
    path = encode(tmp_path / "two.mp4", 2, fps=1)
    frames = sample_clip(path, FrameSampling(fps=1, min_frames=6))
    assert [number_of(f.rgb) for f in frames] == [0, 0, 0, 1, 1, 1]
    assert [f.time for f in frames] == pytest.approx([0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])


def test_undecodable_frames_are_replaced(tmp_path, encode):
    whole = encode(tmp_path / "whole.ts", 50)
    late = tmp_path / "late.ts"
    late.write_bytes(whole.read_bytes()[188 * 30 :])
    assert len(list(sample_file(late, FrameSampling(fps=25)))) < 49
    frames = sample_clip(late, FrameSampling(fps=25, min_frames=80))
    assert len(frames) == 80
    assert np.diff([f.time for f in frames]) == pytest.approx(np.full(79, frames[1].time))


def test_the_duration_of_audio_does_not_count(tmp_path, encode):
    path = encode(tmp_path / "sound.mkv", 50, audio_seconds=5.0)
    assert len(sample_clip(path, FrameSampling(fps=1))) == 2
    assert len(list(sample_file(path, FrameSampling(fps=1)))) == 2


def test_a_variable_frame_rate_is_sampled_by_time(tmp_path, encode, number_of):
    times = [0, 40, 80, 900, 1100, 1140, 3300, 3340, 5020]
    path = encode(tmp_path / "vfr.mkv", len(times), times_ms=times)
    frames = sample_clip(path, FrameSampling(fps=1))
    assert [number_of(f.rgb) for f in frames] == [0, 3, 5, 5, 7, 7]


def test_frames_at_given_times(film, number_of):
    times = [0, 0.5, 0.5, 1.99, 3.96, 4.5, 9]
    frames = list(sample_at(film, times))
    assert [f.time for f in frames] == times
    assert [number_of(f.rgb) for f in frames] == [0, 12, 12, 49, 99, 99, 99]
    assert list(sample_at(film, [])) == []
    assert clip_times(film, FrameSampling(fps=0.5)) == [0, 2]


def test_frames_are_fitted_one_by_one(film):
    """So that a clip of large frames is never in memory at its full size."""
    pulled = []

    def source():
        for frame in sample_at(film, [0, 0.5, 0.5, 1, 9, 10]):
            pulled.append(frame)
            yield frame

    fitted = fit_frames(source(), 56)
    for count in range(1, 7):
        frame = next(fitted)
        assert len(pulled) == count
        assert frame.time == pulled[-1].time
        np.testing.assert_array_equal(frame.rgb, fit_frame(pulled[-1].rgb, 56))
    frames = list(fit_frames(pulled, 56))
    # Repeated frames are one array.
    assert frames[1].rgb is frames[2].rgb is not frames[3].rgb
    assert frames[4].rgb is frames[5].rgb


def test_a_file_is_read_to_its_end_for_the_frames_that_cannot_be_decoded(tmp_path, encode):
    whole = encode(tmp_path / "whole.mkv", 50, codec="mjpeg", pix_fmt="yuvj420p")
    with av.open(str(whole)) as container:
        wreck = bytes([packet for packet in container.demux(video=0) if packet.size][45])
    path = tmp_path / "damaged.mkv"
    path.write_bytes(whole.read_bytes().replace(wreck, bytes(len(wreck))))
    skipped = []
    for frames in (
        sample_at(path, [0, 1], skipped.append),
        sample_file(path, FrameSampling(), skipped.append),
    ):
        assert [frame.time for frame in frames] == [0, 1]
    assert skipped == pytest.approx([1.8, 1.8])


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared clips")
def test_an_image_is_one_frame():
    sampling = FrameSampling(fps=100, min_frames=4, max_frames=8)
    for frames in (sample_clip(SHARED / "1.jpg", sampling), list(sample_file(SHARED / "1.jpg", sampling))):
        (only,) = frames
        assert only.time == 0
        assert only.rgb.shape == (168, 300, 3)


@pytest.mark.parametrize("path", CLIPS, ids=lambda path: path.name)
def test_real_clips(path):
    info = probe(path)
    frames = list(sample_file(path, FrameSampling(fps=1)))
    assert [f.time for f in frames] == list(range(math.ceil(info.duration)))
    assert [f.time for f in sample_clip(path, FrameSampling(fps=1))] == [f.time for f in frames]


def test_a_bad_file_is_refused_at_once(tmp_path):
    with pytest.raises(VideoError, match="does not exist"):
        sample_file(tmp_path / "none.mp4", FrameSampling())
    with pytest.raises(VideoError, match="does not exist"):
        sample_clip(tmp_path / "none.mp4", FrameSampling())
