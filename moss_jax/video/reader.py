"""Opens and checks video files and images, and decodes their frames lazily with presentation times."""

import dataclasses
import functools
import heapq
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition

from moss_jax.video.files import VideoError, check_file, damaged
from moss_jax.video.stills import is_jpeg_stream, read_still
from moss_jax.video.timeline import Span, Stamp, spans, stamped_packets
from moss_jax.video.truncation import missing_part

logger = logging.getLogger(__name__)

# libav decodes text files as video of a terminal that prints them.
_TEXT_CODECS = ("ansi", "bintext", "idf", "xbin")
# Valid pixel aspect ratios: those of discs and tapes are well inside; others are errors in the file.
_PIXEL_ASPECTS = (0.1, 10.0)


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
      pixel_aspect: width of a stored pixel as a multiple of its height.
    """

    picture: av.VideoFrame
    time: float
    duration: float | None = None
    pixel_aspect: float = 1.0

    @functools.cached_property
    def rgb(self) -> np.ndarray:
        """uint8 [H, W, 3], as displayed: with square pixels, rotated and mirrored."""
        width, height = self.picture.width, self.picture.height
        if self.pixel_aspect > 1:
            width = round(width * self.pixel_aspect)
        else:
            height = round(height / self.pixel_aspect)
        return _turned(self.picture.to_ndarray(format="rgb24", width=width, height=height), self.picture)


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """Properties of a video or an image file, measured and as declared.

    Attributes:
      width, height: in pixels, as shown.
      duration: seconds from the first frame to the end of the last, by the packets; 0 for an image.
      fps: average frame rate; None for an image or if the file does not declare it.
      is_image: whether it is a still image.
    """

    width: int
    height: int
    duration: float
    fps: float | None
    is_image: bool


def probe(path: str | os.PathLike) -> VideoInfo:
    """Checks a file as `check` does, and reads its packets to measure its duration.

    Raises:
      VideoError: as `check` does.
    """
    return scan(path)[0]


def frame_spans(path: str | os.PathLike) -> list[Span]:
    """Returns the time and duration of each frame of a file, from its packets; only the first is decoded.

    Raises:
      VideoError: as `check` does.
    """
    return scan(path)[1]


def scan(path: str | os.PathLike, *, max_pixels: int | None = None) -> tuple[VideoInfo, list[Span]]:
    """Returns the results of both `probe` and `frame_spans`.

    Args:
      max_pixels: maximum size of a frame; the decoder rejects larger ones before it allocates memory.

    Raises:
      VideoError: as `check` does.
    """
    first, is_image = _first_frame(path, max_pixels)
    height, width, _ = first.rgb.shape
    if is_image:
        return VideoInfo(width, height, 0.0, None, True), [Span(0.0, None)]
    with _open(path) as (container, stream):
        stamps = sorted(stamp for _, stamp in stamped_packets(container, stream) if stamp)
        shown = [span for span, _ in spans(((stamp, None) for stamp in stamps), stream)]
        fps = float(stream.average_rate) if stream.average_rate else None
    return VideoInfo(width, height, shown[-1].time + (shown[-1].duration or 0.0), fps, False), shown


def check(path: str | os.PathLike) -> None:
    """Checks that a file is not truncated, and that a frame of it can be decoded.

    Raises:
      VideoError: the file cannot be read, is neither video nor image, is empty or truncated, or has no frame.
    """
    _first_frame(path)


def _first_frame(path: str | os.PathLike, max_pixels: int | None = None) -> tuple[DecodedFrame, bool]:
    """Checks a file; returns its first frame, and whether it is a still image."""
    check_file(path)
    if missing := missing_part(path):
        raise VideoError(f"{path} {missing}; copy or download it again")
    if still := _still(path):
        return still, True
    with _open(path, max_pixels) as (container, stream):
        for _, (picture, _) in _decoded(container, stream):
            if picture:
                return DecodedFrame(picture, 0.0, pixel_aspect=_pixel_aspect(stream)), _is_image(container)
    raise damaged(path)


def read(
    path: str | os.PathLike,
    on_skip: Callable[[float], None] | None = None,
    *,
    max_pixels: int | None = None,
) -> Iterator[DecodedFrame]:
    """Decodes a file frame by frame, in presentation order, starting at time 0.

    The file is open from the first `next` until the iterator is exhausted, closed or dropped. The times are
    those of `frame_spans`. A frame that cannot be decoded is skipped: the previous one is shown longer, or,
    at the start, the next one earlier. A warning is logged at the end.

    Args:
      on_skip: called with the time of each frame that is skipped, before the next frame is yielded.
      max_pixels: maximum size of a frame, as for `scan`.

    Raises:
      VideoError: as `check` does; of a truncated file, or one of which most cannot be decoded, after its
        intact frames.
    """
    check_file(path)
    missing = missing_part(path)
    if still := _still(path):
        if missing:
            raise VideoError(f"{path} {missing}; copy or download it again")
        yield still
        return
    with _open(path, max_pixels) as (container, stream):
        aspect, is_image = _pixel_aspect(stream), _is_image(container)
        decoded = _decoded(container, stream)
        newest: DecodedFrame | None = None
        count, skipped, lost = 0, 0, None
        try:
            for span, (picture, failed) in spans(decoded, stream):
                if picture is None:
                    # What a decoder drops without an error (a second field, a hidden frame) isn't counted.
                    lost = (lost[0] if lost else span.time, span.time + (span.duration or 0.0))
                    skipped += failed
                    if failed and on_skip:
                        on_skip(span.time)
                    continue
                time = span.time if newest else 0.0
                duration = span.duration and span.time + span.duration - time
                # libav gives an image a duration of 1/25 s.
                newest = DecodedFrame(picture, time, None if is_image else duration, aspect)
                count, lost = count + 1, None
                yield newest
                if is_image:
                    return
        finally:
            if skipped:
                frames = "1 frame" if skipped == 1 else f"{skipped} frames"
                logger.warning("%s is damaged: skipped %s that cannot be decoded", path, frames)
        if missing:
            raise VideoError(f"{path} {missing}; copy or download it again")
        if newest is None:
            raise damaged(path)
        if skipped > count:
            share = f"{skipped} of {count + skipped} frames cannot be decoded"
            raise VideoError(f"{path} is damaged ({share}); copy or download it again")
        if lost:
            yield dataclasses.replace(newest, time=lost[0], duration=lost[1] - lost[0])


@contextmanager
def _open(
    path: str | os.PathLike, max_pixels: int | None = None
) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """Opens a file and finds its video stream; libav errors inside the context become VideoErrors."""
    # "file:" and "none" keep names like "a:b.mp4" and "%d.jpg" from being read as protocols and patterns.
    try:
        # libav mistakes raw Motion JPEG for a still, unless its pictures are small.
        name, demuxer = f"file:{os.fspath(path)}", "mjpeg" if is_jpeg_stream(path) else None
        container = av.open(name, format=demuxer, options={"pattern_type": "none"})
    except (FFmpegError, OSError) as error:
        if missing := missing_part(path):
            raise VideoError(f"{path} {missing}; copy or download it again") from error
        raise VideoError(f"{path} is neither a video nor an image in a known format") from error
    with container:
        stream = _video_stream(path, container)
        if max_pixels is not None:
            # The decoder also rejects a frame that is larger than the container declares.
            options = stream.codec_context.options or {}
            stream.codec_context.options = {**options, "max_pixels": str(max_pixels)}
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
    # The first default stream, as in players, but preferably not the single picture beside an AVIF sequence.
    stream = max(streams, key=lambda s: (s.frames != 1, Disposition.default in s.disposition))
    if stream.codec_context is None:
        raise VideoError(f"{path} has an unknown video codec; convert it to H.264")
    if stream.codec_context.name in _TEXT_CODECS:
        raise VideoError(f"{path} is a text file; give the path of a video or an image")
    if _is_image(container) and stream.codec_context.name == "mjpeg":
        # Without this, the missing part of a truncated JPEG is filled with grey.
        stream.codec_context.options = {"err_detect": "explode"}
    return stream


def _decoded(
    container: InputContainer, stream: av.VideoStream
) -> Iterator[tuple[Stamp, tuple[av.VideoFrame | None, bool]]]:
    """Decodes a stream; yields the stamps of its packets in presentation order, each with its result.

    The result is the packet's picture, or None, and whether decoding it failed.

    Slice threading (the default) is used, not frame threading: the latter delays one frame per thread, and
    PyAV drops errors when a call returns several frames.
    """
    waiting: list[Stamp] = []
    failed: set[int] = set()

    def pop(picture: av.VideoFrame | None = None) -> tuple[Stamp, tuple[av.VideoFrame | None, bool]]:
        stamp = heapq.heappop(waiting)
        # A picture with concealed errors counts as missing.
        if picture is not None and not picture.is_corrupt:
            return stamp, (picture, False)
        return stamp, (None, picture is not None or stamp.index in failed)

    def decode(packet: av.Packet | None, stamp: Stamp | None):
        try:
            pictures = stream.codec_context.decode(packet)
        except FFmpegError:
            if stamp:
                failed.add(stamp.index)
            return
        for picture in pictures:
            while waiting and (
                waiting[0].index in failed if picture.pts is None else waiting[0].time < picture.pts
            ):
                yield pop()
            # Any other picture belongs to a packet that is not shown.
            if waiting and (picture.pts is None or waiting[0].time == picture.pts):
                yield pop(picture)

    try:
        for packet, stamp in stamped_packets(container, stream):
            if stamp:
                heapq.heappush(waiting, stamp)
            yield from decode(packet, stamp)
    except FFmpegError:
        # The rest of the file cannot be read.
        yield from decode(None, None)
        raise
    while waiting:
        yield pop()


def _still(path: str | os.PathLike) -> DecodedFrame | None:
    rgb = read_still(path)
    return None if rgb is None else DecodedFrame(av.VideoFrame.from_ndarray(rgb, format="rgb24"), 0.0)


def _is_image(container: InputContainer) -> bool:
    return container.format.name == "image2" or container.format.name.endswith("_pipe")


def _pixel_aspect(stream: av.VideoStream) -> float:
    aspect = stream.sample_aspect_ratio
    least, most = _PIXEL_ASPECTS
    return float(aspect) if aspect and least <= float(aspect) <= most else 1.0


def _turned(rgb: np.ndarray, picture: av.VideoFrame) -> np.ndarray:
    """Rotates and mirrors a picture by the display matrix of its file, in quarter turns."""
    matrix = picture.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return rgb
    # A pixel at (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32)
    if abs(a) + abs(d) < abs(b) + abs(c):
        rgb, a, d = rgb.swapaxes(0, 1), c, b
    return np.ascontiguousarray(rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
