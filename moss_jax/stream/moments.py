"""Which moments of a stream its memory bank holds, and how many vectors of each.

B slots, S vectors of a bank, F frames
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from moss_jax.memory.bank import NO_POSITION


@dataclasses.dataclass(frozen=True)
class Moment:
    """The vectors in the bank of one frame, or of several that were merged.

    Attributes:
      time: seconds of the stream at which the frame was taken.
      vectors: number of vectors in the bank.
      frames: number of frames that they stand for.
    """

    time: float
    vectors: int
    frames: int = 1


class FrameTimes(NamedTuple):
    """Stream times of frames in seconds, and their positions in the context, ascending."""

    positions: Int[np.ndarray, " F"]
    times: Float[np.ndarray, " F"]

    def save(self, positions: Int[np.ndarray, " S"]) -> dict[str, np.ndarray]:
        """The frames that a bank still holds vectors of, as arrays for a file.

        Args:
          positions: of the vectors in the bank.
        """
        held = np.isin(self.positions, positions)
        return {
            "moments.positions": self.positions[held].astype(np.int32),
            "moments.times": self.times[held].astype(np.float32),
        }


class Moments:
    """Times of the frames shown in a stream: at most 32 bytes each and bounded, since a stream never ends.

    Args:
      most: number of latest frames to keep; the oldest are dropped once there are a quarter more.
    """

    def __init__(self, most: int = 1 << 16):
        # Of which the first `_length` are in use. Those are never changed, since `times` returns views.
        self._buffers = FrameTimes(np.empty(0, np.int64), np.empty(0))
        self._length, self._most = 0, most

    def add(self, position: int, time: float) -> None:
        """Records a frame; positions ascend."""
        if self._length == len(self._buffers.positions):
            more = max(64, self._length)
            self._buffers = FrameTimes(*(np.pad(x, (0, more)) for x in self._buffers))
        self._buffers.positions[self._length] = position
        self._buffers.times[self._length] = time
        self._length += 1
        if self._length > self._most + self._most // 4:
            self._set(*(x[-self._most :] for x in self.times()))

    def forget(self, position: int) -> None:
        """Removes a frame that was not shown to the model after all."""
        known = self.times()
        self._set(*(x[known.positions != position] for x in known))

    def times(self) -> FrameTimes:
        """Returns the known times, which do not change when more are added."""
        return FrameTimes(*(x[: self._length] for x in self._buffers))

    def _set(self, positions: Int[np.ndarray, " F"], times: Float[np.ndarray, " F"]) -> None:
        self._buffers, self._length = FrameTimes(positions.copy(), times.copy()), len(positions)

    def resume(self, saved: Mapping[str, np.ndarray]) -> None:
        """Restores what `FrameTimes.save` returned; files of earlier versions do not have it."""
        if "moments.positions" in saved:
            positions, times = saved["moments.positions"], saved["moments.times"]
            self._set(positions.astype(np.int64), times.astype(np.float64))


@dataclasses.dataclass(frozen=True)
class BankView:
    """A snapshot of the vectors in a stream's bank, with the times of their frames.

    Attributes:
      positions: of the vectors in the banks of all slots; NO_POSITION in empty places. Not copied from the
        device yet, which happens once for all streams.
      counts: number of vectors that each stands for; None if nothing is ever merged.
      slot: of the stream.
      frames: times of the frames shown in the stream.
      vectors_per_frame: of a whole frame.
    """

    positions: Int[Array | np.ndarray, "B S"]
    counts: Float[Array | np.ndarray, "B S"] | None
    slot: int
    frames: FrameTimes
    vectors_per_frame: int

    def moments(self) -> list[Moment]:
        """The moments in the bank, oldest first; blocks on the device.

        A vector whose frame is not known counts towards the last known frame before it.
        """
        positions = np.asarray(self.positions)[self.slot]
        in_use = positions != NO_POSITION
        found, first, vectors = np.unique(positions[in_use], return_index=True, return_counts=True)
        if not len(found):
            return []
        stands_for = np.ones(len(positions)) if self.counts is None else np.asarray(self.counts)[self.slot]
        frames = np.add.reduceat(stands_for[in_use], first) / self.vectors_per_frame
        known = self.frames
        before = np.searchsorted(known.positions, found, side="right") - 1
        times = known.times[np.maximum(before, 0)] if len(known.times) else np.zeros(len(found))
        return [
            Moment(float(time), int(size), max(1, round(share)))
            for time, size, share in zip(times, vectors, frames, strict=True)
        ]
