"""Selection of the frames of a live stream: which are encoded, and which of those are remembered.

Whether a frame is encoded is decided on the host, by how much a thumbnail of it differs from that of the
frame that was encoded last. Noise, lamps and a shaking camera change pictures as well, so the exposure is
matched, the two are aligned, and edges may move by less than a cell. What is left counts where it is largest,
so that a small thing in a corner weighs as much as a large one in the middle.

H, W height and width of a frame; R, C rows and columns of a thumbnail; N vectors a frame; D width
"""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from moss_jax.config import SelectionConfig, UnseenReason

# Cells of a thumbnail along each side, and the pixels of a frame that are read for one, likewise.
CELLS, SAMPLES = 64, 4
# Cells by which the camera may have moved between two frames.
REACH = 3
# Share of a cell by which an edge may move beside that: blur, and what alignment to whole cells leaves.
PLAY = 0.7
# Side, in cells, of the blocks whose mean difference counts: noise averages out in them.
BLOCK = 3
# Factor by which the exposure of a channel may change.
EXPOSURE = 1.25
# Seconds by which a heartbeat may be early.
INSTANT = 1e-6

type Thumbnail = Float[np.ndarray, "R C 3"]


def thumbnail(rgb: UInt8[np.ndarray, "H W 3"]) -> Thumbnail:
    """Averages a frame over the cells of a grid, at most 64 x 64, in 8-bit levels."""
    height, width = rgb.shape[:2]
    # Of a large frame, some pixels of a cell are as good as all.
    rgb = rgb[:: max(height // (CELLS * SAMPLES), 1), :: max(width // (CELLS * SAMPLES), 1)]
    mean = rgb.astype(np.float32)
    for axis in (0, 1):
        size = mean.shape[axis]
        begins = np.arange(min(CELLS, size)) * size // min(CELLS, size)
        pixels = np.diff(begins, append=size)
        mean = np.add.reduceat(mean, begins, axis) / np.expand_dims(pixels, (1 - axis, 2)).astype(np.float32)
    return mean


def change(before: Thumbnail, after: Thumbnail) -> float:
    """Measures the largest local change between two frames, as a share of the full scale: 0 to 1.

    Colours count, since a red and a purple may be the same grey. Thumbnails of different shapes differ by 1.
    """
    if before.shape != after.shape:
        return 1.0
    # The median ignores what has changed in less than half of the picture.
    gain = np.median((after + 1) / (before + 1), axis=(0, 1)).clip(1 / EXPOSURE, EXPOSURE)
    before, after = _aligned(before * gain, after)
    difference = np.maximum(_beyond(before, after), _beyond(after, before))
    block = [min(BLOCK, size) for size in difference.shape[:2]]
    windows = np.lib.stride_tricks.sliding_window_view(difference, block, (0, 1))
    return min(float(windows.mean((-2, -1)).max()) / 255, 1.0)


def _aligned(before: Thumbnail, after: Thumbnail) -> tuple[Thumbnail, Thumbnail]:
    """The parts of two thumbnails that show the same, if the camera has moved a little."""
    rows, columns = before.shape[:2]
    # The mean difference of the part that stays in view is least where most of the picture falls in place.
    y, x = (min(REACH, (size - 1) // 4) for size in (rows, columns))
    middle = after[y : rows - y, x : columns - x]

    def mismatch(offset: tuple[int, int]) -> float:
        dy, dx = offset
        return float(np.abs(before[y + dy : rows - y + dy, x + dx : columns - x + dx] - middle).mean())

    # Of equally good ones, the smallest offset.
    offsets = sorted(
        itertools.product(range(-y, y + 1), range(-x, x + 1)), key=lambda offset: np.hypot(*offset)
    )
    dy, dx = min(offsets, key=mismatch)
    return _overlap(before, -dy, -dx), _overlap(after, dy, dx)


def _overlap(picture: Thumbnail, dy: int, dx: int) -> Thumbnail:
    """The part of a picture that stays in view when it is shifted by an offset."""
    rows, columns = picture.shape[:2]
    return picture[max(-dy, 0) : rows - max(dy, 0), max(-dx, 0) : columns - max(dx, 0)]


def _beyond(before: Thumbnail, after: Thumbnail) -> Thumbnail:
    """How far each cell is outside of what the cells around its place held before."""
    padded = np.pad(before, ((1, 1), (1, 1), (0, 0)), mode="edge")
    bounds = []
    for extreme in (np.minimum, np.maximum):
        across = extreme(extreme(padded[:-2], padded[1:-1]), padded[2:])
        around = extreme(extreme(across[:, :-2], across[:, 1:-1]), across[:, 2:])
        bounds.append(before + PLAY * (around - before))
    low, high = bounds
    return np.maximum(np.maximum(low - after, after - high), 0)


def feature_distance(before: Float[Array, "N D"], after: Float[Array, "N D"]) -> Float[Array, ""]:
    """Relative L2 distance of the vectors of two frames, of the one that differs most.

    A thing that is small in the picture changes few vectors, so a mean would hide it.
    """
    before, after = before.astype(jnp.float32), after.astype(jnp.float32)
    norms = jnp.linalg.norm(before, axis=-1)
    return (jnp.linalg.norm(after - before, axis=-1) / jnp.maximum(norms, 1e-6)).max()


@dataclasses.dataclass(frozen=True)
class Selection:
    """State of the frame selection of one stream.

    Attributes:
      thumbnail: of the frame that was encoded last; None before the first.
      time: of that frame, in seconds.
      due: time of the next frame at the base rate, in seconds.
      earliest: time of the next frame at the highest rate.
    """

    thumbnail: Thumbnail | None = None
    time: float = 0.0
    due: float = 0.0
    earliest: float = 0.0


def select(
    config: SelectionConfig, state: Selection, time: float, frame: Thumbnail
) -> tuple[UnseenReason | None, Selection]:
    """Decides whether the next frame of a stream is encoded.

    Args:
      state: of the stream.
      time: of the frame, in seconds.
      frame: its thumbnail.

    Returns:
      None if it is encoded, "still" if it has not changed enough, "rate" if it comes too early; and the state
      for the next frame.
    """
    is_due = True
    if config.max_fps is not None:
        # Half a period early is in time, since frames do not come on the dot.
        slack = 0.5 / config.max_fps
        if time + slack < state.earliest:
            return "rate", state
        is_due = time + slack >= state.due
    is_old = time - state.time >= config.max_gap - INSTANT
    changed = state.thumbnail is None or change(state.thumbnail, frame) >= config.min_change
    if not changed and not is_due:
        return "rate", state
    if config.max_fps is not None:
        state = dataclasses.replace(
            state,
            due=max(state.due, time) + 1 / config.fps if is_due else state.due,
            earliest=max(state.earliest, time) + 1 / config.max_fps,
        )
    if not changed and not is_old:
        return "still", state
    return None, dataclasses.replace(state, thumbnail=frame, time=time)
