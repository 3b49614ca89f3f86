"""Images, videos and data URLs of clients: every form that is taken, and every bomb that is not."""

import base64
import contextlib
import dataclasses
import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from moss_jax.config import FrameSampling
from moss_jax.serving.media import (
    MediaError,
    MediaLimits,
    decode_clip,
    decode_image,
    is_image,
    parse_data_url,
)
from moss_jax.video import Frame, fit_frames, read, sample_clip

LIMITS = MediaLimits(max_bytes=2**20, max_pixels=2**20, max_side=2048)
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def halves(mode: str = "RGB", left=RED, right=BLUE) -> Image.Image:
    """32 wide, 16 high."""
    image = Image.new(mode, (32, 16), left)
    image.paste(right, (16, 0, 32, 16))
    return image


def decode(data: bytes) -> np.ndarray:
    rgb = decode_image(data, limits=LIMITS)
    assert rgb.dtype == np.uint8
    assert rgb.shape[2:] == (3,)
    return rgb


def assert_colours(rgb: np.ndarray, left, right, *, tolerance=8) -> None:
    """The middles of both halves; a lossy format is a little off."""
    height, width, _ = rgb.shape
    for x, colour in ((width // 4, left), (width * 3 // 4, right)):
        assert np.abs(rgb[height // 2, x].astype(int) - colour).max() <= tolerance


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"lossless": True}), ("WEBP", {})]
)
def test_pictures_of_the_three_formats(kind, options):
    rgb = decode(saved(halves(), kind, **options))
    assert rgb.shape == (16, 32, 3)
    # Colour is stored at half the resolution.
    assert_colours(rgb, RED, BLUE, tolerance=8 if kind == "PNG" else 40)


def test_a_progressive_jpeg():
    assert_colours(decode(saved(halves(), "JPEG", quality=95, progressive=True)), RED, BLUE, tolerance=40)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_turns_a_picture_upright(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # A quarter turn clockwise to be shown.
    options = {"lossless": True} if kind == "WEBP" else {}
    rgb = decode(saved(halves(), kind, exif=exif, **options))
    assert rgb.shape == (32, 16, 3)
    assert_colours(rgb.swapaxes(0, 1), RED, BLUE, tolerance=40)


def test_cmyk():
    assert_colours(decode(saved(halves("CMYK", (0, 0, 0, 0), (0, 0, 0, 255)), "JPEG")), (255,) * 3, (0,) * 3)


def test_16_bits_of_grey_are_scaled_not_clipped():
    grey = np.zeros((16, 32), np.uint16)
    grey[:, :16], grey[:, 16:] = 0x4000, 0xFFFF
    data = saved(Image.fromarray(grey), "PNG")
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    assert_colours(decode(data), (0x40,) * 3, (0xFF,) * 3, tolerance=0)


def test_16_bits_of_colour():
    row = b"\0" + struct.pack(">6H", 0x8000, 0, 0xFFFF, 0, 0x4000, 0)
    data = png(2, 1, row, depth=16)
    np.testing.assert_array_equal(decode(data), [[[0x80, 0, 0xFF], [0, 0x40, 0]]])


def test_grey_palettes_and_one_bit():
    assert_colours(decode(saved(halves("L", 10, 200), "PNG")), (10,) * 3, (200,) * 3, tolerance=0)
    assert_colours(decode(saved(halves("1", 0, 1), "PNG")), (0,) * 3, (255,) * 3, tolerance=0)
    palette = halves().quantize(4)
    assert_colours(decode(saved(palette, "PNG")), RED, BLUE, tolerance=0)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_what_is_transparent_is_white(kind):
    image = halves("RGBA", (255, 0, 0, 255), (0, 0, 0, 0))
    options = {"lossless": True} if kind == "WEBP" else {}
    assert_colours(decode(saved(image, kind, **options)), RED, (255,) * 3, tolerance=0)
    half = halves("RGBA", (0, 0, 0, 128), (0, 0, 0, 255))
    assert_colours(decode(saved(half, kind, **options)), (127,) * 3, (0,) * 3, tolerance=1)


def test_a_transparent_colour_of_a_palette_or_of_rgb_is_white():
    palette = halves().quantize(4)
    transparent = palette.getpixel((0, 0))
    assert_colours(decode(saved(palette, "PNG", transparency=transparent)), (255,) * 3, BLUE, tolerance=0)
    assert_colours(decode(saved(halves(), "PNG", transparency=RED)), (255,) * 3, BLUE, tolerance=0)
    grey = halves("LA", (0, 0), (50, 255))
    assert_colours(decode(saved(grey, "PNG")), (255,) * 3, (50,) * 3, tolerance=0)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_picture(kind):
    frames = [halves("RGB", colour, colour) for colour in (GREEN, RED, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert_colours(decode(data), GREEN, GREEN, tolerance=0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_picture_is_refused(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), kind)
    for length in (0, 1, 3, 12, 20, 29, 40, len(data) // 2, len(data) - 40):
        with pytest.raises(MediaError):
            decode(data[:length])


@pytest.mark.parametrize("data", [b"", b"GIF89a", saved(halves(), "GIF"), saved(halves(), "TIFF"), b"<svg/>"])
def test_other_formats_are_refused(data):
    with pytest.raises(MediaError, match="not a JPEG, PNG or WebP"):
        decode(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damage_anywhere_is_an_error_or_a_picture(kind):
    data = bytearray(saved(halves(), kind))
    rng = np.random.default_rng(1)
    for _ in range(200):
        broken = bytearray(data)
        for at in rng.integers(0, len(data), 3):
            broken[at] = rng.integers(256)
        with contextlib.suppress(MediaError):
            decode(bytes(broken))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, rows: bytes, *, depth=8, colour=2, extra: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + body + chunk(b"IEND", b"")


def webp(kind: bytes, content: bytes) -> bytes:
    body = b"WEBP" + kind + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(body)) + body


def side(n: int) -> bytes:
    return (n - 1).to_bytes(3, "little")


JPEG_HEAD = bytes.fromhex("ffd8ffe000104a46494600010100000100010000ffc0001108ffffffff03012200021101031101")
BOMBS = {
    "png": png(50_000, 50_000, b"\0" * 1000),
    "png that Pillow warns of": png(10_000, 10_000, b"\0" * 1000),
    "png, long": png(2**31 - 1, 1, b"\0" * 1000),
    "jpeg": JPEG_HEAD,
    "webp, extended": webp(b"VP8X", b"\0" * 4 + side(2**24) + side(2**24)),
    "webp, lossless": webp(b"VP8L", b"\x2f" + struct.pack("<I", 0x3FFF | 0x3FFF << 14)),
    "webp, lossy": webp(b"VP8 ", b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 0x3FFF, 0x3FFF)),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_it_takes_memory(name):
    tracemalloc.start()
    try:
        with pytest.raises(MediaError, match="pixels"):
            decode(BOMBS[name])
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_limits_are_exact():
    within = saved(Image.new("RGB", (1024, 1024)), "PNG")
    assert decode(within).shape == (1024, 1024, 3)
    with pytest.raises(MediaError, match="1048576 are allowed"):
        decode(saved(Image.new("RGB", (1024, 1025)), "PNG"))
    with pytest.raises(MediaError, match="no side may exceed 2048"):
        decode(saved(Image.new("RGB", (2049, 1)), "PNG"))
    with pytest.raises(MediaError, match="bytes"):
        decode(within + b"\0" * 2**20)


def test_a_jpeg_of_many_scans_is_refused():
    """Each takes as long to decode as the whole picture."""
    data = saved(halves(), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    scan = data[start:-2]
    with pytest.raises(MediaError, match="scans"):
        decode(data[:-2] + scan * 100 + data[-2:])


def test_text_that_unpacks_to_much_is_refused():
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 2**26, 9))
    with pytest.raises(MediaError):
        decode(png(2, 1, b"\0" * 7, extra=text))


# --------------------------------------------------------------------------------------- videos


DEMO = Path(__file__).parents[2] / "assets" / "demo.mp4"
SAMPLING = FrameSampling(fps=1.0)


def encode(path: Path, sizes: list[tuple[int, int]], **options) -> Path:
    """A video of one grey frame a second, each of its own size."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = *sizes[0], "yuv420p"
        for number, (width, height) in enumerate(sizes):
            grey = np.full((height, width, 3), 20 * number % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def clip(path: Path, **limits) -> list[Frame]:
    return decode_clip(path, SAMPLING, 28, limits=dataclasses.replace(LIMITS, **limits))


def test_a_clip_is_sampled_and_fitted():
    frames = clip(DEMO)
    expected = list(fit_frames(sample_clip(DEMO, SAMPLING), 28))
    assert [frame.time for frame in frames] == [frame.time for frame in expected]
    for frame, same in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(frame.rgb, same.rgb)
    bounded = decode_clip(DEMO, dataclasses.replace(SAMPLING, max_frames=3), 28, limits=LIMITS)
    assert len(bounded) == 3


def test_a_video_beyond_the_limits_is_refused(tmp_path):
    video = encode(tmp_path / "large.mp4", [(640, 480)] * 5)
    assert len(clip(video)) == 5
    with pytest.raises(MediaError, match="640 x 480 pixels; 300000 are allowed"):
        clip(video, max_pixels=300_000)
    with pytest.raises(MediaError, match="640 x 480"):
        clip(video, max_side=600)
    with pytest.raises(MediaError, match="longer than 3 s"):
        clip(video, max_seconds=3.0)
    with pytest.raises(MediaError, match="takes longer"):
        clip(video, decode_seconds=0.0)


def test_the_decoder_refuses_frames_that_are_larger_than_the_header_says(tmp_path):
    """A stream in which another with larger frames begins."""
    small = encode(tmp_path / "small.m4v", [(64, 48)] * 4, format="m4v").read_bytes()
    large = encode(tmp_path / "large.m4v", [(640, 480)] * 4, format="m4v").read_bytes()
    path = tmp_path / "both.m4v"
    path.write_bytes(small + large)
    seen = [frame.rgb.shape for frame in read(path)]
    assert (480, 640, 3) in seen
    seen = {frame.rgb.shape for frame in read(path, max_pixels=100_000)}
    assert seen == {(48, 64, 3)}


def test_decoding_can_be_ended(tmp_path):
    video = encode(tmp_path / "video.mp4", [(64, 48)] * 30)
    calls = []

    def on_frame():
        calls.append(1)
        if len(calls) == 40:
            raise MediaError("enough")

    with pytest.raises(MediaError, match="enough"):
        decode_clip(video, SAMPLING, 28, limits=LIMITS, on_frame=on_frame)
    assert len(calls) == 40


def test_a_playlist_opens_no_other_file(tmp_path):
    """libav would read what playlists name."""
    encode(tmp_path / "secret.ts", [(64, 48)] * 5, format="mpegts")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nsecret.ts\n#EXT-X-ENDLIST\n"
    concat = f"ffconcat version 1.0\nfile {tmp_path / 'secret.ts'}\n"
    for name, content in (("a.m3u8", playlist), ("a.mp4", playlist), ("a.ffconcat", concat)):
        (tmp_path / name).write_text(content)
        with pytest.raises(MediaError, match="unknown format"):
            clip(tmp_path / name)
    assert len(clip(tmp_path / "secret.ts")) == 5


@pytest.mark.parametrize("content", [b"", b"text", b"\0" * 5000, b"\x1aE\xdf\xa3" + b"\0" * 100])
def test_what_is_no_video_is_refused_without_its_name(tmp_path, content):
    path = tmp_path / "name-of-the-file"
    path.write_bytes(content)
    with pytest.raises(MediaError) as refused:
        clip(path)
    assert "name-of-the-file" not in str(refused.value)


def test_a_truncated_video_is_refused(tmp_path):
    content = DEMO.read_bytes()
    path = tmp_path / "part.mp4"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(MediaError, match="damaged, incomplete"):
        clip(path)


def test_pictures_are_told_by_their_head():
    for kind in ("JPEG", "PNG", "WEBP"):
        assert is_image(saved(halves(), kind)[:16])
    assert not is_image(DEMO.read_bytes()[:16])
    assert not is_image(saved(halves(), "GIF")[:16])
    assert not is_image(b"RIFF\0\0\0\0AVI ")


# ------------------------------------------------------------------------------------- data URLs


def test_a_data_url():
    assert parse_data_url("data:image/jpeg;base64,YWJj") == ("image/jpeg", b"abc")
    assert parse_data_url("DATA:image/PNG;name=a.png;base64,YWI=") == ("image/png", b"ab")
    assert parse_data_url("data:video/x-matroska;codecs=vp9;base64,YQ==")[0] == "video/x-matroska"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "data:",
        "data:,abc",
        "data:image/png,abc",
        "data:;base64,YWJj",
        "data:image;base64,YWJj",
        "data:image/png;base64 ,YWJj",
        "data: image/png;base64,YWJj",
        "data:image/png;base64;charset=x,YWJj",
        "http://example.com/a.png",
        "file:///etc/passwd",
        "data:image/png;base64,",
        "data:image/png;base64,YWJ",
        "data:image/png;base64,YWJj\n",
        "data:image/png;base64,YW Jj",
        "data:image/png;base64,YW-_",
        "data:image/png;base64,YWI=YWI=",
        "data:image/png;base64,YQ====",
        "data:image/png;base64,=",
        "data:image/png;base64,YWJj%3D",
        "data:image/png;base64,ÿÿÿÿ",
        "data:" + "a" * 1000 + "/png;base64,YWJj",
    ],
)
def test_anything_else_is_none(url):
    with pytest.raises(MediaError):
        parse_data_url(url)


@given(st.binary(min_size=1, max_size=64))
def test_a_data_url_is_as_long_as_it_may_be(content):
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    assert parse_data_url(url, max_bytes=len(content)) == ("image/png", content)
    if len(content) > 1:
        with pytest.raises(MediaError, match="more than"):
            parse_data_url(url, max_bytes=len(content) - 1)
