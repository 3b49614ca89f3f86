"""Picks the frames of a stream that are looked at, by the times at which they are shown."""

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from moss_jax.config import FrameSampling
from moss_jax.video.reader import DecodedFrame, Frame, Span, probe, read, timeline

# Seconds. Matroska rounds timestamps to milliseconds, so that 2/30 s is stored as 0.067.
_TOLERANCE = 1e-3


def sample_live(frames: Iterable[Frame | DecodedFrame], sampling: FrameSampling) -> Iterator[Frame]:
    """Yields at the times k/fps the frame that a viewer sees then: the last that began (give or take 1 ms).

    Args:
      frames: in time order, at any rate, even a changing one. A frame stands until the next; the last one for
        its `duration` if that is known, else only for its own instant.
      sampling: `fps` and `max_frames` count; `min_frames` does not, as a live stream cannot be stretched.

    Yields each frame, with `time` = k/fps, as soon as one at or after that time arrives, and reads no further
    after `max_frames`. Instants before the first frame are left out. A frame that stands for several instants
    gives them one array.

    Raises:
      ValueError: if the times go back or are not finite, or a picture is not uint8 [H, W, 3].
    """
    picked = _pick(frames, (k / sampling.fps for k in itertools.count()))
    for instant, frame in itertools.islice(picked, sampling.max_frames):
        yield Frame(_checked(frame.rgb), instant)


def sample_file(path: str | os.PathLike, sampling: FrameSampling) -> Iterator[Frame]:
    """Checks a file at once, then yields its frames as `sample_live` does; an image yields one.

    Raises:
      VideoError: if the file cannot be watched; see `probe` and `read`.
    """
    probe(path)
    return sample_live(read(path), sampling)


def sample_clip(path: str | os.PathLike, sampling: FrameSampling) -> list[Frame]:
    """Reads a whole clip: the frames of `sample_live` if their number lies in [min_frames, max_frames].

    Otherwise as many as the bound that it breaks, spread evenly over the clip; frames repeat where a clip has
    too few. An image gives one frame.

    Raises:
      VideoError: if the file cannot be watched; see `probe` and `read`.
    """
    return list(sample_at(path, clip_times(path, sampling)))


def clip_times(path: str | os.PathLike, sampling: FrameSampling) -> list[float]:
    """The times of the frames of `sample_clip`, found without decoding more than the first frame.

    Raises:
      VideoError: if the file cannot be watched; see `probe`.
    """
    if probe(path).is_image:
        return [0.0]
    spans = timeline(path)
    instants = (k / sampling.fps for k in range(sampling.max_frames + 1))
    times = [instant for instant, _ in _pick(spans, instants)]
    if sampling.min_frames <= len(times) <= sampling.max_frames:
        return times
    count = min(max(len(times), sampling.min_frames), sampling.max_frames)
    length = spans[-1].time + (spans[-1].duration or 0.0)
    return [i * length / count for i in range(count)]


def sample_at(path: str | os.PathLike, times: Sequence[float]) -> Iterator[Frame]:
    """Yields the frame of a file that a viewer sees at each of some times, after its end the last one.

    Args:
      times: seconds from 0 on, ascending. Nothing is read beyond the last.

    Raises:
      VideoError: if the file cannot be watched; see `read`.
    """
    count, last = 0, None

    def note(frame: DecodedFrame) -> DecodedFrame:
        nonlocal last
        last = frame
        return frame

    for instant, frame in _pick(map(note, read(path)), times):
        yield Frame(_checked(frame.rgb), instant)
        count += 1
    for instant in times[count:]:
        yield Frame(_checked(last.rgb), instant)


def _pick[T: Frame | DecodedFrame | Span](
    frames: Iterable[T], instants: Iterable[float]
) -> Iterator[tuple[float, T]]:
    """Pairs each instant with the frame that stands at it, reading no more frames than that takes."""
    instants = iter(instants)
    instant = next(instants, None)
    standing = None
    for frame in frames:
        if not math.isfinite(frame.time):
            raise ValueError(f"the time of a frame must be a finite number of seconds, not {frame.time}")
        if standing is not None and frame.time < standing.time:
            raise ValueError(f"frames must come in time order, but {frame.time} s follows {standing.time} s")
        while instant is not None and instant <= frame.time + _TOLERANCE:
            shown = frame if frame.time <= instant + _TOLERANCE else standing
            if shown is not None:
                yield instant, shown
            instant = next(instants, None)
        if instant is None:
            return
        standing = frame
    if standing is not None:
        end = standing.time + (standing.duration or 0.0)
        while instant is not None and instant < end - _TOLERANCE:
            yield instant, standing
            instant = next(instants, None)


def _checked(rgb: np.ndarray) -> np.ndarray:
    if not (isinstance(rgb, np.ndarray) and rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3):
        given = f"{rgb.dtype} {list(rgb.shape)}" if isinstance(rgb, np.ndarray) else type(rgb).__name__
        raise ValueError(f"the rgb of a frame must be a numpy array, uint8 [H, W, 3], not {given}")
    return rgb
