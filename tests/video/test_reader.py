"""Reading: common containers, and the ways in which a file can be invalid."""

import gc
import itertools
import os
import re
import struct
import sys
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
    assert info.duration == pytest.approx(2.0, abs=2e-3)  # also where the header says nothing


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


@pytest.mark.parametrize("notes", [b"\x7f\xff\xff\xffSEFT", b"\0\0\0\1SEFT", b"\0\0\0\4\xff\xff\xff\xffmoov"])
def test_trailing_data_of_a_camera_is_ignored(folder, film, notes):
    noted = folder / "noted.mp4"
    noted.write_bytes(film("faststart.mp4").read_bytes() + notes + b"\0" * 40)
    assert len(list(read(noted))) == 50
    assert probe(noted).duration == pytest.approx(2.0)


def test_a_riff_size_may_include_its_header(film, folder):
    data = bytearray(film("mpeg4.avi").read_bytes())
    size = int.from_bytes(data[4:8], "little")
    path = folder / "header_counted.avi"
    for extra, is_whole in ((8, True), (9, False)):
        path.write_bytes(data[:4] + (size + extra).to_bytes(4, "little") + data[8:])
        if is_whole:
            assert probe(path).duration == pytest.approx(2)
        else:
            assert "cut off" in error_of(probe, path)


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


# --------------------------------------------------------------------------------- damaged frames


def packets_of(path: Path) -> list[av.Packet]:
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def damage(path: Path, to: Path, numbers: list[int], keep: float = 0.0) -> list[float]:
    """Zeros packets, by their number in decoding order, but for a share; returns their times, ascending."""
    packets, data = packets_of(path), path.read_bytes()
    for wreck in (bytes(packets[i]) for i in numbers):
        kept = wreck[: int(len(wreck) * keep)]
        assert data.count(wreck) == 1
        data = data.replace(wreck, kept + bytes(len(wreck) - len(kept)))
    to.write_bytes(data)
    shown_at = sorted(packet.pts for packet in packets)
    return sorted(shown_at.index(packets[i].pts) / 25 for i in numbers)


@pytest.mark.parametrize("name", ["faststart.mp4", "film.webm", "mjpeg.mkv", "film.flv", "mpeg4.avi"])
def test_undecodable_frames_are_skipped_and_told(film, folder, name, number_of, caplog):
    damaged, skipped = folder / f"damaged_{name}", []
    bad = damage(film(name), damaged, [20, 30])
    probe(damaged)
    frames = list(read(damaged, skipped.append))
    assert skipped == pytest.approx(bad, abs=1e-3)
    expected = [i / 25 for i in range(50) if round(i / 25, 2) not in [round(time, 2) for time in bad]]
    assert [frame.time for frame in frames] == pytest.approx(expected, abs=1e-3)
    assert [number_of(frame.rgb) for frame in frames[:16]] == list(range(16))
    if name == "mjpeg.mkv":  # where no frame depends on another
        assert [number_of(frame.rgb) for frame in frames] == [round(25 * time) for time in expected]
    (warning,) = [record.getMessage() for record in caplog.records]
    assert str(damaged) in warning
    assert "skipped 2 frames" in warning


def test_what_follows_damage_keeps_its_time_without_presentation_timestamps(film, folder, number_of):
    name = "h264_with_b_frames.avi"
    packets, data = packets_of(film(name)), film(name).read_bytes()
    wreck = bytes(packets[15])
    damaged, skipped = folder / f"damaged_{name}", []
    damaged.write_bytes(data.replace(wreck, bytes(len(wreck))))
    frames = list(read(damaged, skipped.append))
    assert (len(frames), len(skipped)) == (49, 1)
    later = [frame for frame in frames if frame.time > 24.5 / 25]  # from the next keyframe on
    assert [number_of(frame.rgb) for frame in later] == list(range(25, 50))
    assert [frame.time for frame in later] == pytest.approx(np.arange(25, 50) / 25)


@pytest.mark.parametrize("numbers", [[0, 1], [48, 49], [0, 25, 49]])
def test_the_timeline_holds_where_frames_are_undecodable(film, folder, number_of, numbers):
    """The first frame stands for those before it, the last one for those to the end."""
    damaged, skipped = folder / "ends.mkv", []
    damage(film("mjpeg.mkv"), damaged, numbers)
    frames, spans = list(read(damaged, skipped.append)), frame_spans(damaged)
    assert skipped == pytest.approx([number / 25 for number in numbers])
    assert len(spans) == 50
    good = [i for i in range(50) if i not in numbers]
    shown, times = list(good), [0, *(i / 25 for i in good[1:])]
    if 49 in numbers:
        shown.append(good[-1])
        times.append((good[-1] + 1) / 25)
    assert [number_of(frame.rgb) for frame in frames] == shown
    assert [frame.time for frame in frames] == pytest.approx(times)
    assert frames[0].duration == pytest.approx((good[0] + 1) / 25)
    assert frames[-1].time + frames[-1].duration == pytest.approx(2)


def test_a_partly_decoded_frame_is_not_shown(film, folder, number_of):
    """It would be completed from others, and look like a smear."""
    packets = packets_of(film("faststart.mp4"))
    i = next(i for i in range(25, 49) if packets[i].pts > packets[i + 1].pts)
    damaged, skipped = folder / "half_decoded.mp4", []
    (bad,) = damage(film("faststart.mp4"), damaged, [i], keep=0.5)
    frames = list(read(damaged, skipped.append))
    assert skipped == [bad]
    assert bad not in [frame.time for frame in frames]
    assert len(frames) == 49
    assert [number_of(frame.rgb) for frame in frames[:24]] == list(range(24))


@pytest.mark.parametrize("bad", [range(10, 50), range(40)])
def test_a_file_with_little_else_is_refused(film, folder, bad):
    damaged = folder / "wreck.mkv"
    damage(film("mjpeg.mkv"), damaged, list(bad))
    frames, message = until_error(damaged)
    assert len(frames) == 10
    assert "is damaged (40 of 50 frames cannot be decoded)" in message


def test_a_file_of_undecodable_frames_alone_is_refused(film, folder):
    damaged = folder / "nothing.mkv"
    damage(film("mjpeg.mkv"), damaged, list(range(50)))
    for call in CALLS.values():
        assert "no frame that can be decoded" in error_of(call, damaged)


def test_an_intact_file_gives_no_warning(film, caplog):
    skipped = []
    for name in ("film.ts", "h264_with_b_frames.avi", "film.webm"):
        list(read(film(name), skipped.append))
    assert not skipped
    assert not caplog.records


# ------------------------------------------------------------------------------------- as shown

# What an EXIF orientation says of the stored picture, and the display matrix of the same.
ORIENTATIONS = {
    1: lambda rgb: rgb,
    2: lambda rgb: rgb[:, ::-1],
    3: lambda rgb: rgb[::-1, ::-1],
    4: lambda rgb: rgb[::-1],
    5: lambda rgb: rgb.swapaxes(0, 1),
    6: lambda rgb: np.rot90(rgb, -1),
    7: lambda rgb: np.rot90(rgb, 2).swapaxes(0, 1),
    8: lambda rgb: np.rot90(rgb),
}
# (x, y) is shown at (a x + c y, b x + d y).
MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


@pytest.mark.parametrize("orientation", MATRICES)
def test_the_whole_display_matrix_is_applied(film, folder, orientation):
    upright = film("plain.mp4")
    data = bytearray(upright.read_bytes())
    a, b, c, d = (value << 16 for value in MATRICES[orientation])
    start = data.index(b"tkhd") + 44
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    turned = folder / f"turned{orientation}.mp4"
    turned.write_bytes(data)

    stored, shown = next(read(upright)).rgb, next(read(turned)).rgb
    np.testing.assert_array_equal(shown, ORIENTATIONS[orientation](stored))
    info = probe(turned)
    assert (info.height, info.width) == shown.shape[:2]


@pytest.mark.parametrize(("aspect", "size"), [("64:45", (228, 96)), ("8:9", (160, 108)), ("2:1", (320, 96))])
def test_pixels_that_are_not_square_are_made_so(folder, encode, number_of, aspect, size):
    path = encode(folder / f"sar{aspect.replace(':', '_')}.mp4", 5, pixel_aspect=aspect)
    info = probe(path)
    assert (info.width, info.height) == size
    for i, frame in enumerate(read(path)):
        assert frame.rgb.shape == (size[1], size[0], 3)
        # Over the whole width, not cut or padded.
        assert number_of(frame.rgb[:, np.linspace(0, size[0] - 1, 160).astype(int)][:96]) == i


def test_pixels_of_an_absurd_shape_are_square(folder, encode):
    path = encode(folder / "absurd.mp4", 2, pixel_aspect="1:100")
    assert (probe(path).width, probe(path).height) == (160, 96)


def test_turned_pixels_that_are_not_square(folder, encode):
    path = encode(folder / "both.mp4", 2, pixel_aspect="2:1", rotation=90)
    assert next(read(path)).rgb.shape == (320, 96, 3)
    assert (probe(path).width, probe(path).height) == (96, 320)


# -------------------------------------------------------------------------------- several streams


def two_streams(path: Path, draw, default: int) -> Path:
    """Two video streams, of frames 100 and 200; one is the default."""
    with av.open(str(path), "w") as container:
        streams = []
        for i in range(2):
            stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
            stream.disposition = av.stream.Disposition.default.value if i == default else 0
            streams.append(stream)
        for _ in range(10):
            for stream, number in zip(streams, (100, 200), strict=True):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(draw(number), format="rgb24")))
        for stream in streams:
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
@pytest.mark.parametrize("default", [0, 1])
def test_the_default_stream_is_read(tmp_path, draw, number_of, suffix, default):
    path = two_streams(tmp_path / f"two.{suffix}", draw, default)
    assert {number_of(frame.rgb) for frame in read(path)} == {(100, 200)[default]}


# ---------------------------------------------------------------------------- names and permissions


@pytest.mark.parametrize("call", CALLS)
def test_names_that_cannot_be_are_refused(tmp_path, call):
    assert "file name too long" in error_of(CALLS[call], tmp_path / ("x" * 300 + ".mp4"))
    for name in ("null\0.mp4", "half \ud800.mp4"):
        with pytest.raises(VideoError, match="cannot be a file") as caught:
            CALLS[call](str(tmp_path / name))
        str(caught.value).encode()
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    assert "symbolic links" in error_of(CALLS[call], tmp_path / "loop.mp4")
    (tmp_path / "file").touch()
    assert "does not exist" in error_of(CALLS[call], tmp_path / "file" / "film.mp4")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("function", ["os.stat", "builtins.open"])
def test_a_file_that_may_not_be_read_is_refused(film, monkeypatch, call, function):
    """In a folder that may not be entered, and in one that may; mocked, since root may do either."""
    path = film("plain.mp4")
    module, _, name = function.partition(".")
    original = getattr(sys.modules[module], name)

    def deny(file, *args, **kwargs):
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return original(file, *args, **kwargs)

    monkeypatch.setattr(function, deny)
    assert "is not readable by this user" in error_of(CALLS[call], path)
