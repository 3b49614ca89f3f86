"""Opens video files and images, checks them, and decodes their frames lazily, with the times of showing."""

import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np

from moss_jax.video.truncation import missing_part

# What libav makes of a text file: a video of a terminal that prints it.
_TEXT_CODECS = ("ansi", "bintext", "idf", "xbin")


class VideoError(ValueError):
    """A file that cannot be watched; the message is one sentence that names it and says why."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """One picture of a stream.

    Attributes:
      rgb: uint8 [H, W, 3].
      time: seconds since the first frame of the stream.
      duration: seconds that the frame stands; None if only the next frame tells.
    """

    rgb: np.ndarray
    time: float
    duration: float | None = None


@dataclasses.dataclass(frozen=True)
class DecodedFrame:
    """A `Frame` of a file whose `rgb` is made when it is first asked for, because most frames are skipped."""

    picture: av.VideoFrame
    time: float
    duration: float | None = None

    @functools.cached_property
    def rgb(self) -> np.ndarray:
        """uint8 [H, W, 3], turned the way the file says it is to be shown."""
        rgb = self.picture.to_ndarray(format="rgb24")
        return np.ascontiguousarray(np.rot90(rgb, _quarter_turns(self.picture)))


@dataclasses.dataclass(frozen=True)
class Span:
    """When a frame is shown, in seconds since the first one."""

    time: float
    duration: float | None


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a file says of itself.

    Attributes:
      width, height: in pixels, as shown: after rotation.
      duration: in seconds; 0 for an image, None if the file does not say.
      fps: average frames a second, None for an image or if the file does not say.
    """

    width: int
    height: int
    duration: float | None
    fps: float | None
    is_image: bool


def probe(path: str | os.PathLike) -> VideoInfo:
    """Opens a file, decodes its first frame and checks that its end is there.

    Raises:
      VideoError: if the file does not exist, is no video or image, is empty or cut off, or shows nothing.
    """
    with _open(path) as (container, stream):
        if missing := missing_part(path):
            raise VideoError(f"{path} {missing}; copy or download it again")
        picture = next(_decode(container, stream), None)
        if picture is None:
            raise VideoError(_no_frames(path))
        sideways = _quarter_turns(picture) % 2 == 1
        is_image = _is_image(container)
        return VideoInfo(
            width=picture.height if sideways else picture.width,
            height=picture.width if sideways else picture.height,
            duration=0.0 if is_image else _declared_duration(container, stream),
            fps=float(stream.average_rate) if stream.average_rate and not is_image else None,
            is_image=is_image,
        )


def read(path: str | os.PathLike) -> Iterator[DecodedFrame]:
    """Decodes a file frame by frame, in the order and at the times of showing, from time 0.

    The file is open from the first frame asked for until the iterator ends, is closed or dropped. Times never
    go back: where a file's own do or are missing, a frame follows at the end of the one before.

    Raises:
      VideoError: as `probe` does; for a file that is cut off or broken, after the good frames came.
    """
    with _open(path) as (container, stream):
        missing, is_image, empty = missing_part(path), _is_image(container), True
        pictures = _decode(container, stream, skip_partial=bool(missing))
        stamped = ((_stamp(picture, container), picture.duration, picture) for picture in pictures)
        for span, picture in _timed(itertools.islice(stamped, 1 if is_image else None), stream):
            empty = False
            # libav gives an image 1/25 s, like a frame of a film.
            yield DecodedFrame(picture, span.time, None if is_image else span.duration)
        if missing:
            raise VideoError(f"{path} {missing}; copy or download it again")
        if empty:
            raise VideoError(_no_frames(path))


def timeline(path: str | os.PathLike) -> list[Span]:
    """When each frame of a file is shown, read from its packets: nothing is decoded.

    Raises:
      VideoError: if the file cannot be opened or read.
    """
    with _open(path) as (container, stream):
        stamped = [
            (_stamp(packet, container), packet.duration, None)
            for packet in container.demux(stream)
            if packet.size and not packet.is_discard
        ]
        stamped.sort(key=lambda item: item[0] or 0)
        return [span for span, _ in _timed(stamped, stream)]


@contextmanager
def _open(path: str | os.PathLike) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a file and finds its video stream; every libav error inside becomes a VideoError."""
    file = Path(path)
    if not file.exists():
        raise VideoError(f"{path} does not exist; give the path of a video or an image")
    if not file.is_file():
        kind = "a directory" if file.is_dir() else "not a regular file"
        raise VideoError(f"{path} is {kind}; give the path of a video or an image")
    if file.stat().st_size == 0:
        raise VideoError(f"{path} is empty (0 bytes); copy or download it again")
    # "file:" and "none" keep names like "a:b.mp4" and "%d.jpg" from being read as protocols and patterns.
    # No options where none is needed: before version 18, PyAV crashes on FLV files with any.
    options = {"pattern_type": "none"} if "%" in str(path) else {}
    try:
        container = av.open(f"file:{os.fspath(path)}", options=options)
    except (av.FFmpegError, OSError) as error:
        if isinstance(error, PermissionError):
            raise VideoError(f"{path} may not be read by this user; change its permissions") from error
        if missing := missing_part(path):
            raise VideoError(f"{path} {missing}; copy or download it again") from error
        raise VideoError(f"{path} is neither a video nor an image in a known format") from error
    with container:
        stream = _video_stream(path, container)
        try:
            yield container, stream
        except av.FFmpegError as error:
            reason = error.strerror.lower()
            raise VideoError(f"{path} is damaged ({reason}); copy or download it again") from error


def _video_stream(path: str | os.PathLike, container: av.container.InputContainer) -> av.VideoStream:
    cover_art = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if cover_art not in stream.disposition]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams if stream.type != "video"})
        holds = f"only {' and '.join(kinds)}" if kinds else "nothing to show"
        raise VideoError(f"{path} has no video stream, {holds}; give the path of a video or an image")
    stream = streams[0]
    if stream.codec_context is None:
        raise VideoError(f"{path} is in a video codec unknown here; convert it to H.264 first")
    if stream.codec_context.name in _TEXT_CODECS:
        raise VideoError(f"{path} is a text file; give the path of a video or an image")
    if _is_image(container) and stream.codec_context.name == "mjpeg":
        # Without this, what is missing of a cut-off JPEG is filled with grey.
        stream.codec_context.options = {"err_detect": "explode"}
    return stream


def _decode(
    container: av.container.InputContainer, stream: av.VideoStream, *, skip_partial: bool = False
) -> Iterator[av.VideoFrame]:
    """Decodes a stream; an error is raised once the good frames before it are out.

    Threads share the slices of a frame (the default), not frames: each of those would hold a frame back, and
    PyAV drops errors when a call returns several frames.
    """
    started = False
    try:
        for packet in container.demux(stream):
            if skip_partial and packet.is_corrupt:
                continue
            try:
                pictures = packet.decode()
            except av.FFmpegError:
                if not started:  # a recording may begin between two key frames
                    continue
                raise
            started = started or bool(pictures)
            yield from pictures
    except av.FFmpegError:
        held_back = stream.codec_context.decode(None)
        yield from (picture for picture in held_back if not picture.is_corrupt)
        raise


def _timed[Item](
    stamped: Iterable[tuple[int | None, int | None, Item]], stream: av.VideoStream
) -> Iterator[tuple[Span, Item]]:
    """Turns (timestamp, duration, item) in the order of showing, in units of the stream, into seconds."""
    unit = float(stream.time_base)
    total = stream.duration * unit if stream.duration else math.inf
    typical = 1 / float(stream.average_rate) if stream.average_rate else 0.04
    origin, time, end = None, 0.0, 0.0
    for stamp, ticks, item in stamped:
        if stamp is None:
            time = end
        else:
            origin = stamp if origin is None else origin
            elapsed = (stamp - origin) * unit
            time = elapsed if elapsed >= time else end
        duration = ticks * unit if ticks else None
        if duration and time < total:
            # MP4 has durations in the order of decoding: with B-frames the last one may be another frame's.
            duration = min(duration, total - time)
        yield Span(time, duration), item
        end = time + (duration or typical)


def _stamp(item: av.Packet | av.VideoFrame, container: av.container.InputContainer) -> int | None:
    # AVI has times of decoding only; what libav makes of them as times of showing is wrong with B-frames.
    return item.dts if container.format.name == "avi" else item.pts


def _declared_duration(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    # Matroska has the duration of a stream in a tag: "00:01:02.048000000".
    if tag := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = map(float, tag.groups())
        return 3600 * hours + 60 * minutes + seconds
    return container.duration / av.time_base if container.duration else None


def _is_image(container: av.container.InputContainer) -> bool:
    return container.format.name == "image2" or container.format.name.endswith("_pipe")


def _quarter_turns(picture: av.VideoFrame) -> int:
    """How often to turn a picture by 90 degrees counterclockwise to show it."""
    return round(picture.rotation / 90)


def _no_frames(path: str | os.PathLike) -> str:
    return f"{path} has no picture that can be decoded; copy or download it again"
