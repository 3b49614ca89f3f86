"""Images and videos that clients send, decoded within limits.

Input is untrusted: every size is checked before memory of that size is allocated.
"""

import base64
import binascii
import dataclasses
import io
import os
import re
import struct
import time
from collections.abc import Callable

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import UInt8
from PIL import Image

from moss_jax.config import FrameSampling
from moss_jax.video import Frame, VideoError, clip_times, fit_frames, sample_at
from moss_jax.video.stills import to_rgb, upright
from moss_jax.video.truncation import iso_brands

_FORMATS = ("JPEG", "PNG", "WEBP")
# A media type, optionally with parameters, before the content.
_DATA_URL = re.compile(r"data:([a-z]+/[a-z0-9.+-]+)((?:;[a-z0-9-]+=[a-z0-9.+-]+)*);base64", re.IGNORECASE)
# Progressive JPEGs have about 10 scans, each as slow to decode as the whole picture.
_MAX_SCANS = 64
_START_OF_SCAN = b"\xff\xda"
# Video containers, by libav's names. Others, such as playlists, may make libav open further files.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2",
    "matroska,webm",
    "avi",
    "mpegts",
    "mpeg",
    "ogg",
    "flv",
    "gif",
    "asf",
)
_PACKETS_PER_SECOND = 240
# HEIC and AVIF, which use the MP4 container.
_STILL_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis"}


class MediaError(ValueError):
    """Unacceptable media from a client; the message says why, and quotes none of the content."""


@dataclasses.dataclass(frozen=True)
class MediaLimits:
    """Limits on decoded media.

    Attributes:
      max_bytes: encoded size of an image.
      max_pixels: pixels of an image or a video frame.
      max_side: maximum width and height of an image or a frame, in pixels.
      max_seconds: duration of a video.
      decode_seconds: time to decode a video.
    """

    max_bytes: int = 8 * 2**20
    max_pixels: int = 16 * 2**20
    max_side: int = 8192
    max_seconds: float = 3600.0
    decode_seconds: float = 120.0


def parse_data_url(url: str, *, max_bytes: int = MediaLimits.max_bytes) -> tuple[str, bytes]:
    """Returns the lower-case media type and the content of a base64 data URL.

    Raises:
      MediaError: it is not a data URL, not strict base64, or larger than `max_bytes`.
    """
    head, comma, content = url.partition(",")
    match = _DATA_URL.fullmatch(head) if comma and len(head) < 256 else None
    if not match:
        raise MediaError("a data URL has the form data:image/jpeg;base64,…")
    # Checked before decoding; the padding stands for no bytes.
    if len(content) // 4 * 3 - content.count("=", -2) > max_bytes:
        raise MediaError(f"the data URL holds more than {max_bytes} bytes")
    try:
        decoded = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise MediaError("the content of the data URL is not valid base64") from None
    if not decoded:
        raise MediaError("the data URL is empty")
    return match[1].lower(), decoded


def decode_image(data: bytes, *, limits: MediaLimits) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes a JPEG, PNG or WebP, upright by EXIF and on white; of an animation, the first picture.

    Raises:
      MediaError: it is in another format, damaged, or beyond the limits.
    """
    if len(data) > limits.max_bytes:
        raise MediaError(f"the image has {len(data)} bytes; {limits.max_bytes} are allowed")
    # Pillow allocates a WebP when opening it, other formats when loading them.
    if size := _webp_size(data):
        _check_size(size, limits)
    if data.startswith(b"\xff\xd8") and data.count(_START_OF_SCAN) > _MAX_SCANS:
        raise MediaError(f"the image has more than {_MAX_SCANS} scans; save it as an ordinary JPEG")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_size(image.size, limits)
            image.load()
            return to_rgb(_over_white(upright(image)))
    except (MediaError, ImportError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise MediaError("the image is not a JPEG, PNG or WebP, or its beginning is damaged") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaError(f"the image has more than {limits.max_pixels} pixels") from None
    except Exception:  # Pillow raises arbitrary errors for damaged files
        raise MediaError("the image is damaged or incomplete") from None


def is_image(head: bytes) -> bool:
    """Whether the first bytes of a file are of a picture format that `decode_image` accepts."""
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return is_webp or head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"))


def decode_clip(
    path: str | os.PathLike,
    sampling: FrameSampling,
    image_size: int,
    *,
    limits: MediaLimits,
    on_frame: Callable[[], None] = lambda: None,
) -> list[Frame]:
    """Samples a video as `sample_clip` does, and scales its frames as `fit_frame` does.

    Args:
      on_frame: called after each decoded frame; an exception from it aborts the decoding.

    Returns:
      Frames of [image_size, image_size, 3].

    Raises:
      MediaError: it is not a video in a known format, damaged, or beyond the limits.
    """
    end = time.monotonic() + limits.decode_seconds

    def check() -> None:
        on_frame()
        if time.monotonic() > end:
            raise MediaError(f"decoding the video takes longer than {limits.decode_seconds:g} s")

    try:
        _check_video(path, limits, check)
        # The decoder pads frames by less than 256 pixels on either axis, which the header does not include.
        most = limits.max_pixels + 512 * (limits.max_side + 128)
        times = clip_times(path, sampling, max_pixels=most)
        frames = sample_at(path, times, on_frame=check, max_pixels=most)
        return list(fit_frames(frames, image_size))
    except (VideoError, FFmpegError, OSError):
        # The original messages contain the file name.
        raise MediaError("the video is damaged, incomplete or in an unknown format") from None


def _check_video(path: str | os.PathLike, limits: MediaLimits, check: Callable[[], None]) -> None:
    """Checks from header and packets alone that a video is within the limits."""
    if iso_brands(path) & _STILL_BRANDS:
        raise MediaError("the file is a still picture in an unknown format; convert it to JPEG, PNG or WebP")
    options = {"format_whitelist": ",".join(_CONTAINERS), "protocol_whitelist": "file"}
    with av.open(f"file:{os.fspath(path)}", options=options) as container:
        if container.format.name not in _CONTAINERS:
            raise MediaError("the video is in an unknown format; convert it to MP4 or WebM")
        for stream in container.streams.video:
            aspect = float(stream.sample_aspect_ratio or 1) or 1.0
            stretch = min(max(aspect, 1 / aspect), 10.0)
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height * stretch > limits.max_pixels or max(width, height) * stretch > limits.max_side:
                raise MediaError(f"the video has {width} x {height} pixels; {limits.max_pixels} are allowed")
        most, first = limits.max_seconds * _PACKETS_PER_SECOND, None
        for number, packet in enumerate(container.demux(video=0)):
            check()
            at = None if packet.dts is None else float(packet.dts * packet.time_base)
            first = at if first is None else first
            if number > most or (at is not None and first is not None and at - first > limits.max_seconds):
                raise MediaError(f"the video is longer than {limits.max_seconds:g} s")


def _check_size(size: tuple[int, int], limits: MediaLimits) -> None:
    width, height = size
    if not (width and height):
        raise MediaError("the image is empty")
    if width * height > limits.max_pixels:
        raise MediaError(f"the image has {width} x {height} pixels; {limits.max_pixels} are allowed")
    if max(size) > limits.max_side:
        raise MediaError(f"the image is {width} x {height}; no side may exceed {limits.max_side} pixels")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from a WebP header; None if it is not a WebP.

    Raises:
      MediaError: the header is damaged.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    head = data[:30].ljust(30, b"\0")
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", head, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise MediaError("the image is damaged or incomplete")


def _over_white(image: Image.Image) -> Image.Image:
    """Composites a transparent picture onto white."""
    if not image.has_transparency_data or image.mode.startswith("I"):
        return image
    picture = image.convert("RGBA")
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture.getchannel("A"))
    return white
