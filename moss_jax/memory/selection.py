"""Frame selection for live streams: which frames are encoded, and which of those are remembered.

The host decides whether to encode a frame by how much its thumbnail differs from that of the frame that was
encoded last. Noise, lighting and camera shake change pictures as well, so the exposure is matched, the two
are aligned, and edges may move by less than a cell. The maximum of the remaining difference counts, so that
a small object in a corner weighs as much as a large one in the middle.

H, W height and width of a frame; R, C rows and columns of a thumbnail; N vectors a frame; D width
"""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from moss_jax.config import SelectionConfig, UnseenReason

# Cells per side of a thumbnail, and pixels sampled per side of a cell.
CELLS, SAMPLES = 64, 4
# Cells by which the camera may have moved between two frames.
REACH = 3
# Share of a cell by which an edge may move in addition: blur, and the residue of whole-cell alignment.
PLAY = 0.7
# Side, in cells, of the blocks over which the difference is averaged, to suppress noise.
BLOCK = 3
# Maximum factor of exposure change per channel that is compensated.
EXPOSURE = 1.25
# Seconds by which a heartbeat may be early.
INSTANT = 1e-6

type Thumbnail = Float[np.ndarray, "R C 3"]


def thumbnail(rgb: UInt8[np.ndarray, "H W 3"]) -> Thumbnail:
    """Averages a frame over the cells of a grid, at most 64 x 64, in 8-bit levels."""
    height, width = rgb.shape[:2]
    # Subsamples large frames: some pixels of a cell are as good as all.
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

    Colours are compared, since a red and a purple may have the same grey level. Thumbnails of different
    shapes differ by 1.
    """
    if before.shape != after.shape:
        return 1.0
    # The median ignores changes in less than half of the picture.
    gain = np.median((after + 1) / (before + 1), axis=(0, 1)).clip(1 / EXPOSURE, EXPOSURE)
    before, after = _aligned(before * gain, after)
    difference = np.maximum(_beyond(before, after), _beyond(after, before))
    block = [min(BLOCK, size) for size in difference.shape[:2]]
    windows = np.lib.stride_tricks.sliding_window_view(difference, block, (0, 1))
    return min(float(windows.mean((-2, -1)).max()) / 255, 1.0)


def _aligned(before: Thumbnail, after: Thumbnail) -> tuple[Thumbnail, Thumbnail]:
    """Crops two thumbnails to the part that both show, compensating for a small camera motion."""
    rows, columns = before.shape[:2]
    # The mean difference of the part in common is least at the offset that aligns most of the picture.
    y, x = (min(REACH, (size - 1) // 4) for size in (rows, columns))
    middle = after[y : rows - y, x : columns - x]

    def mismatch(offset: tuple[int, int]) -> float:
        dy, dx = offset
        return float(np.abs(before[y + dy : rows - y + dy, x + dx : columns - x + dx] - middle).mean())

    # Ties go to the smallest offset.
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
    """Distance of each cell from the range of the cells around its place in the previous thumbnail."""
    padded = np.pad(before, ((1, 1), (1, 1), (0, 0)), mode="edge")
    bounds = []
    for extreme in (np.minimum, np.maximum):
        across = extreme(extreme(padded[:-2], padded[1:-1]), padded[2:])
        around = extreme(extreme(across[:, :-2], across[:, 1:-1]), across[:, 2:])
        bounds.append(before + PLAY * (around - before))
    low, high = bounds
    return np.maximum(np.maximum(low - after, after - high), 0)


def feature_distance(before: Float[Array, "N D"], after: Float[Array, "N D"]) -> Float[Array, ""]:
    """Largest relative L2 distance between corresponding vectors of two frames.

    A small object in the picture changes few vectors, so a mean would hide it.
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
      earliest: time of the next frame at the maximum rate, in seconds.
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
        # Frames may be half a period early, to allow for jitter.
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
