"""Opens and checks video files and images, and decodes their frames lazily with presentation times."""

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
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition

from moss_jax.video.truncation import missing_part

# libav decodes text files as video of a terminal that prints them.
_TEXT_CODECS = ("ansi", "bintext", "idf", "xbin")


class VideoError(ValueError):
    """A file that cannot be read as video; the message is one sentence with its name and the reason."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """A frame of a video stream.

    Attributes:
      rgb: uint8 [H, W, 3].
      time: presentation time, in seconds since the first frame.
      duration: seconds for which the frame is shown; None means until the next frame.
    """

    rgb: np.ndarray
    time: float
    duration: float | None = None


@dataclasses.dataclass(frozen=True)
class DecodedFrame:
    """A frame of a file whose `rgb` is converted on first access, because most frames are skipped.

    Attributes:
      picture: the decoded frame, usually in YUV.
      time, duration: as in `Frame`.
    """

    picture: av.VideoFrame
    time: float
    duration: float | None = None

    @functools.cached_property
    def rgb(self) -> np.ndarray:
        """uint8 [H, W, 3], with the file's display rotation applied."""
        rgb = self.picture.to_ndarray(format="rgb24")
        return np.ascontiguousarray(np.rot90(rgb, _quarter_turns(self.picture)))


@dataclasses.dataclass(frozen=True)
class Span:
    """Presentation time and duration of a frame, in seconds; see `Frame`."""

    time: float
    duration: float | None


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """Metadata of a video or image file.

    Attributes:
      width, height: in pixels, after display rotation.
      duration: in seconds; 0 for an image, None if the file does not declare it.
      fps: average frame rate; None for an image or if the file does not declare it.
      is_image: whether it is a still image.
    """

    width: int
    height: int
    duration: float | None
    fps: float | None
    is_image: bool


def probe(path: str | os.PathLike) -> VideoInfo:
    """Reads a file's metadata, decodes its first frame and checks that the file is not truncated.

    Raises:
      VideoError: the file does not exist, is neither video nor image, is empty or truncated, or has no frame.
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
    """Decodes a file frame by frame, in presentation order, starting at time 0.

    The file is open from the first `next` until the iterator is exhausted, closed or dropped. Times are
    monotonic: where a timestamp is missing or goes back, the frame starts at the end of the previous one.

    Raises:
      VideoError: as `probe` does; of a truncated or damaged file, after its intact frames.
    """
    with _open(path) as (container, stream):
        missing, is_image, empty = missing_part(path), _is_image(container), True
        pictures = _decode(container, stream, skip_partial=bool(missing))
        stamped = ((_stamp(picture, container), picture.duration, picture) for picture in pictures)
        for span, picture in _timed(itertools.islice(stamped, 1 if is_image else None), stream):
            empty = False
            # libav gives an image a duration of 1/25 s.
            yield DecodedFrame(picture, span.time, None if is_image else span.duration)
        if missing:
            raise VideoError(f"{path} {missing}; copy or download it again")
        if empty:
            raise VideoError(_no_frames(path))


def frame_spans(path: str | os.PathLike) -> list[Span]:
    """Returns the time and duration of each frame of a file, from its packets, without decoding.

    Raises:
      VideoError: the file cannot be opened or read.
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
def _open(path: str | os.PathLike) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """Opens a file and finds its video stream; libav errors inside the context become VideoErrors."""
    file = Path(path)
    if not file.exists():
        raise VideoError(f"{path} does not exist; give the path of a video or an image")
    if not file.is_file():
        kind = "a directory" if file.is_dir() else "not a regular file"
        raise VideoError(f"{path} is {kind}; give the path of a video or an image")
    if file.stat().st_size == 0:
        raise VideoError(f"{path} is empty (0 bytes); copy or download it again")
    # "file:" and "none" keep names like "a:b.mp4" and "%d.jpg" from being read as protocols and patterns.
    try:
        container = av.open(f"file:{os.fspath(path)}", options={"pattern_type": "none"})
    except (FFmpegError, OSError) as error:
        if isinstance(error, PermissionError):
            raise VideoError(f"{path} is not readable by this user; change its permissions") from error
        if missing := missing_part(path):
            raise VideoError(f"{path} {missing}; copy or download it again") from error
        raise VideoError(f"{path} is neither a video nor an image in a known format") from error
    with container:
        stream = _video_stream(path, container)
        try:
            yield container, stream
        except FFmpegError as error:
            reason = error.strerror or type(error).__name__
            raise VideoError(f"{path} is damaged ({reason.lower()}); copy or download it again") from error


def _video_stream(path: str | os.PathLike, container: InputContainer) -> av.VideoStream:
    cover_art = Disposition.attached_pic
    streams = [stream for stream in container.streams.video if cover_art not in stream.disposition]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams if stream.type != "video"})
        holds = f"only {' and '.join(kinds)}" if kinds else "no stream at all"
        raise VideoError(f"{path} has no video stream, {holds}; give the path of a video or an image")
    stream = streams[0]
    if stream.codec_context is None:
        raise VideoError(f"{path} has an unknown video codec; convert it to H.264")
    if stream.codec_context.name in _TEXT_CODECS:
        raise VideoError(f"{path} is a text file; give the path of a video or an image")
    if _is_image(container) and stream.codec_context.name == "mjpeg":
        # Without this, the missing part of a truncated JPEG is filled with grey.
        stream.codec_context.options = {"err_detect": "explode"}
    return stream


def _decode(
    container: InputContainer, stream: av.VideoStream, *, skip_partial: bool = False
) -> Iterator[av.VideoFrame]:
    """Decodes a stream; an error is raised after the intact frames before it have been yielded.

    Slice threading (the default) is used, not frame threading: the latter delays one frame per thread, and
    PyAV drops errors when a call returns several frames.
    """
    started = False
    try:
        for packet in container.demux(stream):
            if skip_partial and packet.is_corrupt:
                continue
            try:
                pictures = packet.decode()
            except FFmpegError:
                if not started:  # a recording may begin between two keyframes
                    continue
                raise
            started = started or bool(pictures)
            yield from pictures
    except FFmpegError:
        delayed = stream.codec_context.decode(None)
        yield from (picture for picture in delayed if not picture.is_corrupt)
        raise


def _timed[Item](
    stamped: Iterable[tuple[int | None, int | None, Item]], stream: av.VideoStream
) -> Iterator[tuple[Span, Item]]:
    """Converts (timestamp, duration, item) in presentation order from stream time base to seconds."""
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
            # MP4 stores durations in decoding order: with B-frames the last one may be another frame's.
            duration = min(duration, total - time)
        yield Span(time, duration), item
        end = time + (duration or typical)


def _stamp(item: av.Packet | av.VideoFrame, container: InputContainer) -> int | None:
    # AVI has decoding timestamps only; presentation timestamps that libav derives are wrong with B-frames.
    return item.dts if container.format.name == "avi" else item.pts


def _declared_duration(container: InputContainer, stream: av.VideoStream) -> float | None:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    # Matroska stores the duration of a stream in a tag: "00:01:02.048000000".
    if tag := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = map(float, tag.groups())
        return 3600 * hours + 60 * minutes + seconds
    return container.duration / av.time_base if container.duration else None


def _is_image(container: InputContainer) -> bool:
    return container.format.name == "image2" or container.format.name.endswith("_pipe")


def _quarter_turns(picture: av.VideoFrame) -> int:
    """Display rotation in counterclockwise quarter turns."""
    return round(picture.rotation / 90)


def _no_frames(path: str | os.PathLike) -> str:
    return f"{path} has no frame that can be decoded; copy or download it again"
