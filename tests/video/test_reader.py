"""Reading: common containers, and the ways in which a file can be invalid."""

import gc
import itertools
import os
import re
import struct
from pathlib import Path

import av
import numpy as np
import pytest

from moss_jax.video import VideoError, frame_spans, probe, read

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
FASTSTART = {"movflags": "faststart"}

# name → how to encode 50 frames at 25 fps
GOOD = {
    "plain.mp4": {},
    "faststart.mp4": {"muxer_options": FASTSTART},
    "fragments.mp4": {"muxer_options": {"movflags": "frag_keyframe+empty_moov"}},
    "film.mov": {},
    "film.mkv": {},
    "live.mkv": {"muxer_options": {"live": "1"}},
    "film.webm": {"codec": "libvpx"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mjpeg.mkv": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "h264_with_b_frames.avi": {},
    "loop.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "film.ts": {},
    "film.flv": {},
    "raw.h264": {"muxer": "h264"},
    "raw.mjpeg": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "muxer": "mjpeg"},
    "audio_longer.mp4": {"audio_seconds": 4.0, "muxer_options": FASTSTART},
    "audio_longer.mkv": {"audio_seconds": 4.0},
    "100%d.mp4": {},
    "file:with:colons.mp4": {},
}
NO_DURATION = {"live.mkv", "raw.h264", "raw.mjpeg"}
DECLARES_ITS_SIZE = [
    "plain.mp4",
    "faststart.mp4",
    "fragments.mp4",
    "film.mov",
    "film.mkv",
    "film.webm",
    "mpeg4.avi",
    "h264_with_b_frames.avi",
]
CLIPS = sorted([*SHARED.glob("*.mp4"), *SHARED.glob("*.avi")])
CALLS = {"probe": probe, "read": lambda path: list(read(path)), "frame_spans": frame_spans}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("films")


@pytest.fixture(scope="module")
def film(folder, encode):
    """Name in GOOD → its file, encoded once."""
    return lambda name: folder / name if (folder / name).exists() else encode(folder / name, **GOOD[name])


def cut(path: Path, fraction: float) -> Path:
    data = path.read_bytes()
    short = path.with_stem(f"{path.stem}_cut{fraction}")
    short.write_bytes(data[: int(len(data) * fraction)])
    return short


def image(rgb: np.ndarray, codec: str = "mjpeg", pix_fmt: str = "yuvj444p") -> bytes:
    context = av.CodecContext.create(codec, "w")
    context.width, context.height, context.pix_fmt, context.framerate = 160, 96, pix_fmt, 25
    frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
    return b"".join(map(bytes, [*context.encode(frame), *context.encode(None)]))


def error_of(call, path: Path) -> str:
    with pytest.raises(VideoError) as caught:
        call(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def until_error(path: Path) -> tuple[list, str]:
    """The frames that come before the error, and what it says."""
    frames = []
    try:
        frames.extend(read(path))
    except VideoError as error:
        return frames, str(error)
    pytest.fail(f"{path} was read to its end")


# ---------------------------------------------------------------------------------- valid files


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_is_probed(film, name):
    info = probe(film(name))
    assert (info.width, info.height, info.is_image) == (160, 96, False)
    assert info.fps == pytest.approx(25, rel=0.01)
    if name in NO_DURATION:
        assert info.duration is None
    else:
        assert info.duration == pytest.approx(2.0, abs=0.09)  # FLV counts from the first packet


@pytest.mark.parametrize("name", GOOD)
def test_frames_come_in_order_at_their_times(film, name, number_of):
    frames = list(read(film(name)))
    assert [number_of(frame.rgb) for frame in frames] == list(range(50))
    np.testing.assert_allclose([frame.time for frame in frames], np.arange(50) / 25, atol=1.01e-3)
    assert frames[0].time == 0
    assert frames[-1].duration == pytest.approx(0.04, abs=2e-3)
    assert frames[0].rgb.dtype == np.uint8
    assert frames[0].rgb.shape == (96, 160, 3)


@pytest.mark.parametrize("name", GOOD)
def test_spans_match_the_decoded_frames(film, name):
    spans, frames = frame_spans(film(name)), list(read(film(name)))
    np.testing.assert_allclose([span.time for span in spans], [frame.time for frame in frames], atol=1e-9)
    assert spans[-1].duration == pytest.approx(frames[-1].duration)


def test_a_gap_does_not_extend_the_last_frame(tmp_path, encode):
    declared = []
    for gap_before in range(8, 13):
        times = [40 * i + (9000 if i >= gap_before else 0) for i in range(13)]
        path = encode(tmp_path / "gap.mp4", 13, times_ms=times)
        with av.open(str(path)) as container:
            *_, last = container.decode(video=0)
            declared.append(float(last.duration * last.time_base))
        for last in (frame_spans(path)[-1], list(read(path))[-1]):
            assert last.time == pytest.approx(9.48)
            assert last.duration < 0.05
    assert max(declared) > 9  # otherwise the encoder has changed, and this test proves nothing


def test_timestamps_that_restart_are_continued(folder, film, number_of):
    twice = folder / "twice.ts"
    twice.write_bytes(2 * film("film.ts").read_bytes())
    frames = list(read(twice))
    assert [number_of(frame.rgb) for frame in frames] == 2 * list(range(50))
    np.testing.assert_allclose([frame.time for frame in frames], np.arange(100) / 25, atol=1e-3)


def test_frames_skipped_by_an_edit_list_are_not_shown(film, folder, number_of):
    data = bytearray(film("plain.mp4").read_bytes())
    # Of the one edit, after version, flags and count: duration, start in the media, rate.
    start = data.index(b"elst") + 16
    (before,) = struct.unpack_from(">i", data, start)
    with av.open(str(film("plain.mp4"))) as container:
        ticks = int(10 / (25 * container.streams.video[0].time_base))
    struct.pack_into(">i", data, start, before + ticks)
    edited = folder / "edited.mp4"
    edited.write_bytes(data)
    frames = list(read(edited))
    assert [number_of(frame.rgb) for frame in frames] == list(range(10, 50))
    assert [span.time for span in frame_spans(edited)] == pytest.approx([frame.time for frame in frames])


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_odd_timestamps_are_kept(tmp_path, encode, number_of, suffix):
    gaps = [7, 33, 1, 400, 90, 90, 2500, 13, 17, 60]
    times = list(itertools.accumulate(gaps * 3, initial=137))
    frames = list(read(encode(tmp_path / f"vfr.{suffix}", len(times), times_ms=times)))
    assert [number_of(frame.rgb) for frame in frames] == list(range(len(times)))
    np.testing.assert_allclose([frame.time for frame in frames], (np.array(times) - 137) / 1000, atol=1e-4)


def test_the_duration_is_that_of_the_video_stream(film):
    with av.open(str(film("audio_longer.mp4"))) as container:
        assert container.duration / av.time_base > 3.9
    assert probe(film("audio_longer.mp4")).duration == pytest.approx(2.0)


def test_display_rotation_is_applied(film, folder, number_of):
    upright = film("plain.mp4")
    data = bytearray(upright.read_bytes())
    # The matrix of the track header: x' = -y + height, y' = x, a quarter turn clockwise.
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 96 << 16, 0, 1 << 30)
    start = data.index(b"tkhd") + 44
    data[start : start + 36] = matrix
    turned = folder / "turned.mp4"
    turned.write_bytes(data)

    info = probe(turned)
    assert (info.width, info.height) == (96, 160)
    for before, after in itertools.islice(zip(read(upright), read(turned), strict=True), 20):
        np.testing.assert_array_equal(after.rgb, np.rot90(before.rgb, -1))


def test_unused_frames_are_not_converted(film):
    frames = list(read(film("plain.mp4")))
    assert frames[3].rgb is frames[3].rgb
    assert [i for i, frame in enumerate(frames) if "rgb" in vars(frame)] == [3]


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("i.jpg", "mjpeg", "yuvj444p"),
        ("i.png", "png", "rgb24"),
        ("i.webp", "libwebp", "yuv420p"),
    ],
)
def test_an_image_is_one_frame_at_time_0(tmp_path, draw, name, codec, pix_fmt):
    (tmp_path / name).write_bytes(image(draw(90), codec, pix_fmt))
    info = probe(tmp_path / name)
    assert (info.width, info.height, info.duration, info.fps, info.is_image) == (160, 96, 0, None, True)
    (only,) = read(tmp_path / name)
    assert (only.time, only.duration) == (0, None)
    assert np.abs(only.rgb.astype(int) - draw(90)).mean() < 4


def test_file_names_are_not_patterns_or_protocols(tmp_path, monkeypatch, draw, film, number_of):
    for number, name in enumerate(["0.jpg", "%d.jpg"]):
        (tmp_path / name).write_bytes(image(draw(number)))
    (only,) = read(tmp_path / "%d.jpg")
    assert number_of(only.rgb) == 1

    monkeypatch.chdir(tmp_path)
    Path("concat:0.mp4").write_bytes(film("plain.mp4").read_bytes())
    assert len(list(read("concat:0.mp4"))) == 50


def test_only_the_first_of_two_images_in_a_file_is_read(tmp_path, draw, number_of):
    path = tmp_path / "two.png"
    path.write_bytes(image(draw(5), "png", "rgb24") + image(draw(6), "png", "rgb24"))
    (only,) = read(path)
    assert number_of(only.rgb) == 5


def test_a_broadcast_may_begin_between_keyframes(folder, film):
    data = film("film.ts").read_bytes()
    late = folder / "late.ts"
    late.write_bytes(data[188 * 30 :])
    frames = list(read(late))
    assert 0 < len(frames) < 50
    assert probe(late).fps == pytest.approx(25)


def test_a_cut_live_recording_is_read_to_its_end(film, number_of):
    frames = list(read(cut(film("live.mkv"), 0.6)))
    assert 10 < len(frames) < 50
    assert [number_of(frame.rgb) for frame in frames][:10] == list(range(10))


@pytest.mark.parametrize("notes", [b"\x7f\xff\xff\xffSEFT", b"\0\0\0\1SEFT"])
def test_trailing_data_of_a_camera_is_ignored(folder, film, notes):
    noted = folder / "noted.mp4"
    noted.write_bytes(film("faststart.mp4").read_bytes() + notes + b"\0" * 40)
    assert len(list(read(noted))) == 50
    assert probe(noted).duration == pytest.approx(2.0)


def test_the_file_is_closed_with_the_iterator(film):
    path = film("plain.mp4").resolve()
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("needs /proc to see open files")

    def is_open() -> bool:
        return any(os.path.realpath(entry) == str(path) for entry in descriptors.iterdir())

    closed, dropped = read(path), read(path)
    assert not is_open()
    next(closed)
    assert is_open()
    closed.close()
    assert not is_open()
    next(dropped)
    assert is_open()
    del dropped
    gc.collect()
    assert not is_open()


@pytest.mark.parametrize("path", CLIPS, ids=lambda path: path.name)
def test_real_clips_are_good(path):
    info = probe(path)
    spans = frame_spans(path)
    assert spans[-1].time + spans[-1].duration == pytest.approx(info.duration, abs=2 / info.fps)
    frame = next(read(path))
    assert frame.rgb.shape == (info.height, info.width, 3)
    assert frame.rgb.std() > 5


@pytest.mark.parametrize("path", sorted(SHARED.glob("*.jpg")), ids=lambda p: p.name)
def test_real_images_are_good(path):
    info = probe(path)
    assert info.is_image
    (frame,) = read(path)
    assert frame.rgb.shape == (info.height, info.width, 3)


# -------------------------------------------------------------------------------- invalid files


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.mp4", None, "does not exist"),
        ("empty.mp4", b"", "is empty"),
        ("notes.txt", b"the cat sat on the mat\n" * 200, "is a text file"),
        ("renamed.mp4", b"the cat sat on the mat\n" * 200, "neither a video nor an image"),
        ("random.mp4", np.random.default_rng(0).bytes(50_000), "neither a video nor an image"),
        ("random.bin", np.random.default_rng(1).bytes(50_000), "neither a video nor an image"),
        ("no_index.mp4", b"\0\0\0\x14ftypisom\0\0\2\0isom\0\0\0\x10mdat12345678", "moov"),
        ("unfinished.mp4", b"\0\0\0\x14ftypisom\0\0\2\0isom\0\0\0\0mdat12345678", "moov"),
    ],
)
def test_other_files_are_refused(tmp_path, call, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert says in error_of(CALLS[call], tmp_path / name)


def test_a_directory_is_refused(tmp_path):
    assert "is a directory" in error_of(probe, tmp_path)


def test_audio_alone_is_refused(tmp_path, encode_audio):
    assert "no video stream, only audio" in error_of(probe, encode_audio(tmp_path / "sound.wav"))


def test_cover_art_is_not_video(tmp_path, draw, encode_audio):
    path = tmp_path / "song.mp4"
    with av.open(str(encode_audio(tmp_path / "sound.wav"))) as sound, av.open(str(path), "w") as song:
        audio = song.add_stream("aac", rate=48_000)
        cover = song.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 160, 96, "yuvj444p"
        cover.disposition = av.stream.Disposition.attached_pic.value
        song.mux(cover.encode(av.VideoFrame.from_ndarray(draw(1), format="rgb24")))
        song.mux(cover.encode(None))
        for frame in sound.decode(audio=0):
            song.mux(audio.encode(frame))
        song.mux(audio.encode(None))
    with av.open(str(path)) as container:
        assert container.streams.video
    assert "no video stream, only audio" in error_of(probe, path)


def test_a_stream_without_frames_is_refused(tmp_path, encode):
    path = encode(tmp_path / "none.avi", 0, codec="mpeg4")
    with av.open(str(path)) as container:
        assert container.streams.video
    assert "no frame" in error_of(probe, path)
    assert "no frame" in until_error(path)[1]


def test_an_unknown_codec_is_refused(folder, film):
    data = film("mpeg4.avi").read_bytes()
    path = folder / "unknown.avi"
    path.write_bytes(data.replace(b"FMP4", b"QQZZ"))
    assert "codec" in error_of(probe, path)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_damaged_image_is_refused(tmp_path, suffix):
    magic = {"jpg": b"\xff\xd8\xff\xe0", "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"}[suffix]
    path = tmp_path / f"i.{suffix}"
    path.write_bytes(magic + np.random.default_rng(2).bytes(5000))
    assert error_of(probe, path)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared clips")
@pytest.mark.parametrize("fraction", [0.3, 0.9])
def test_a_truncated_jpeg_is_refused(tmp_path, fraction):
    whole = tmp_path / "1.jpg"
    whole.write_bytes((SHARED / "1.jpg").read_bytes())
    assert "no frame" in error_of(probe, cut(whole, fraction))


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("name", DECLARES_ITS_SIZE)
def test_a_truncated_file_is_refused(film, name, fraction):
    message = error_of(probe, cut(film(name), fraction))
    assert re.search(r"cut off: it has \d+ bytes of at least \d+", message)


@pytest.mark.parametrize("name", ["faststart.mp4", "film.mkv", "film.webm", "h264_with_b_frames.avi"])
def test_a_truncated_file_yields_its_intact_frames_first(film, name, number_of):
    frames, message = until_error(cut(film(name), 0.6))
    numbers = [number_of(frame.rgb) for frame in frames]
    assert "cut off" in message
    assert 24 <= len(numbers) < 40
    assert numbers[:24] == list(
        range(24)
    )  # two whole groups of pictures; of the third, all that can be shown
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("path", CLIPS, ids=lambda path: path.name)
def test_a_truncated_real_clip_is_refused(tmp_path, path, fraction):
    whole = tmp_path / path.name
    whole.write_bytes(path.read_bytes())
    assert "cut off" in error_of(probe, cut(whole, fraction))


@pytest.mark.parametrize("name", ["faststart.mp4", "film.webm", "mjpeg.mkv"])
def test_damage_is_raised_after_the_intact_frames(film, folder, name, number_of):
    with av.open(str(film(name))) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    shown_at = sorted(packet.pts for packet in packets)
    good = sorted(shown_at.index(packet.pts) for packet in packets[:30])
    wreck = bytes(packets[30])
    damaged = folder / f"damaged_{name}"
    damaged.write_bytes(film(name).read_bytes().replace(wreck, bytes(len(wreck))))

    probe(damaged)
    frames, message = until_error(damaged)
    assert str(damaged) in message
    assert "is damaged" in message
    assert [number_of(frame.rgb) for frame in frames] == good


def test_a_partly_decoded_frame_is_not_yielded(film, folder, number_of):
    with av.open(str(film("faststart.mp4"))) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    # A frame that waits for others to be shown first loses its second half, the next packet everything.
    i = next(i for i in range(25, 49) if packets[i].pts > packets[i + 1].pts)
    first, second = bytes(packets[i]), bytes(packets[i + 1])
    half = first[: len(first) // 2] + bytes(len(first) - len(first) // 2)
    damaged = folder / "half_decoded.mp4"
    data = film("faststart.mp4").read_bytes()
    damaged.write_bytes(data.replace(first, half).replace(second, bytes(len(second))))

    frames, _ = until_error(damaged)
    assert [number_of(frame.rgb) for frame in frames[:24]] == list(range(24))
    bad = sorted(packet.pts for packet in packets).index(packets[i].pts)
    assert bad not in [round(25 * frame.time) for frame in frames]
