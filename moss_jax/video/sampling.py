"""Frame sampling: picks frames of a stream at a fixed rate, by presentation time."""

import collections
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from moss_jax.config import FrameSampling
from moss_jax.video.preprocess import fit_frame
from moss_jax.video.reader import DecodedFrame, Frame, check, read, scan
from moss_jax.video.timeline import Span

# Seconds. Matroska rounds timestamps to milliseconds: 2/30 s is stored as 0.067.
_TOLERANCE = 1e-3


def sample_live(frames: Iterable[Frame | DecodedFrame], sampling: FrameSampling) -> Iterator[Frame]:
    """Samples a stream at times k/fps: yields the frame shown then, the latest that has begun (within 1 ms).

    A sample is yielded as soon as a frame at or after its time arrives, and nothing is read beyond the last
    sample. Times before the first frame are skipped.

    Args:
      frames: in time order, at any rate, which may vary. A frame is shown until the next; the last one for
        its `duration` if that is known, otherwise only at its own time. Each is copied on arrival, so the
        source may reuse its memory for the next.
      sampling: only `fps` applies. `min_frames` and `max_frames` bound a clip that is seen whole; a live
        stream lasts as long as its source.

    Yields:
      Frames with `time` = k/fps and the duration 1/fps. A frame that is sampled several times is one array.

    Raises:
      ValueError: times decrease or are not finite, or a frame is not uint8 [H, W, 3].
    """
    times = (k / sampling.fps for k in itertools.count())
    for time, frame in _pick(map(_owned, frames), times):
        yield Frame(_checked(frame.rgb), time, 1 / sampling.fps)


def sample_file(
    path: str | os.PathLike, sampling: FrameSampling, on_skip: Callable[[float], None] | None = None
) -> Iterator[Frame]:
    """Checks a file immediately, and returns an iterator over its frames, sampled as by `sample_live`.

    An image yields one frame.

    Args:
      on_skip: called with the time of each frame that cannot be decoded; see `read`.

    Raises:
      VideoError: the file cannot be read; see `probe` and `read`.
    """
    check(path)
    return sample_live(read(path, on_skip), sampling)


def sample_clip(path: str | os.PathLike, sampling: FrameSampling) -> list[Frame]:
    """Samples a whole clip at `fps`, with the number of frames clamped to [min_frames, max_frames].

    Within the bounds, the frames are those of `sample_live`. Otherwise their number is the bound, spread
    evenly over the clip; frames repeat if the clip has too few. An image yields one frame.

    Raises:
      VideoError: the file cannot be read; see `probe` and `read`.
    """
    return list(sample_at(path, clip_times(path, sampling)))


def clip_times(
    path: str | os.PathLike, sampling: FrameSampling, *, max_pixels: int | None = None
) -> list[float]:
    """Returns the times of the frames of `sample_clip`, from the packets; decodes only the first frame.

    Args:
      max_pixels: maximum size of a frame; the decoder rejects larger ones before it allocates memory.

    Raises:
      VideoError: the file cannot be read; see `probe`.
    """
    info, spans = scan(path, max_pixels=max_pixels)
    if info.is_image:
        return [0.0]
    most = sampling.max_frames
    grid = (k / sampling.fps for k in (itertools.count() if most is None else range(most + 1)))
    times = [time for time, _ in _pick(spans, grid)]
    count = max(len(times), sampling.min_frames)
    count = count if most is None else min(count, most)
    if len(times) == count:
        return times
    return [i * info.duration / count for i in range(count)]


def sample_at(
    path: str | os.PathLike,
    times: Sequence[float],
    on_skip: Callable[[float], None] | None = None,
    *,
    on_frame: Callable[[], None] | None = None,
    max_pixels: int | None = None,
) -> Iterator[Frame]:
    """Yields the frame of a file that is shown at each of the given times; after its end, the last frame.

    Args:
      path: path of the file.
      times: times in seconds, nonnegative and ascending. Nothing is read beyond the last.
      on_skip: called with the time of each frame that cannot be decoded; see `read`. With it, the file is
        read to its end.
      on_frame: called whenever a frame has been decoded; an exception from it stops the reading.
      max_pixels: maximum size of a frame, as for `clip_times`.

    Raises:
      VideoError: the file cannot be read; see `read`.
    """
    count, newest = 0, None

    def note(frame: DecodedFrame) -> DecodedFrame:
        nonlocal newest
        newest = frame
        if on_frame:
            on_frame()
        return frame

    decoded = map(note, read(path, on_skip, max_pixels=max_pixels))
    for time, frame in _pick(decoded, times):
        yield Frame(_checked(frame.rgb), time)
        count += 1
    if on_skip:
        collections.deque(decoded, maxlen=0)
    for time in times[count:]:
        assert newest is not None, "read raises VideoError if there is no frame"
        yield Frame(_checked(newest.rgb), time)


def fit_frames(frames: Iterable[Frame], image_size: int) -> Iterator[Frame]:
    """Resizes and pads frames by `fit_frame` as they arrive, so that only one is in memory at full size.

    A frame that is repeated in a row is resized once.
    """
    full, fitted = None, None
    for frame in frames:
        if fitted is None or frame.rgb is not full:
            full, fitted = frame.rgb, fit_frame(frame.rgb, image_size)
        yield Frame(fitted, frame.time, frame.duration)


def _pick[T: Frame | DecodedFrame | Span](
    frames: Iterable[T], times: Iterable[float]
) -> Iterator[tuple[float, T]]:
    """Pairs each time with the frame shown then, reading no more frames than needed."""
    times = iter(times)
    time = next(times, None)
    shown = None
    for frame in frames:
        if not math.isfinite(frame.time):
            raise ValueError(f"the time of a frame must be a finite number of seconds, not {frame.time}")
        if shown is not None and frame.time < shown.time:
            raise ValueError(f"frames must come in time order, but {frame.time} s follows {shown.time} s")
        while time is not None and time <= frame.time + _TOLERANCE:
            picked = frame if frame.time <= time + _TOLERANCE else shown
            if picked is not None:
                yield time, picked
            time = next(times, None)
        if time is None:
            return
        shown = frame
    if shown is not None:
        end = shown.time + (shown.duration or 0.0)
        while time is not None and time < end - _TOLERANCE:
            yield time, shown
            time = next(times, None)


def _owned(frame: Frame | DecodedFrame) -> Frame | DecodedFrame:
    """Returns a frame that owns its memory: a copy, unless it is a decoded frame, which does already."""
    return dataclasses.replace(frame, rgb=_checked(frame.rgb).copy()) if isinstance(frame, Frame) else frame


def _checked(rgb: np.ndarray) -> np.ndarray:
    if not (isinstance(rgb, np.ndarray) and rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3):
        given = f"{rgb.dtype} {list(rgb.shape)}" if isinstance(rgb, np.ndarray) else type(rgb).__name__
        raise ValueError(f"the rgb of a frame must be a numpy array, uint8 [H, W, 3], not {given}")
    return rgb
