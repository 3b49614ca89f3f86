"""Which moments of a stream its memory bank holds, and how many vectors of each.

S vectors
"""

import bisect
import dataclasses
from array import array
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


class Moments:
    """Times of the frames shown in a stream: 16 bytes each and bounded, since a stream never ends.

    Args:
      most: number of latest frames to keep; the oldest are dropped once there are a quarter more.
    """

    def __init__(self, most: int = 1 << 16):
        self._positions, self._times = array("q"), array("d")
        self._most = most

    def add(self, position: int, time: float) -> None:
        """Records a frame; positions ascend."""
        self._positions.append(position)
        self._times.append(time)
        if len(self._positions) > self._most + self._most // 4:
            del self._positions[: -self._most], self._times[: -self._most]

    def forget(self, position: int) -> None:
        """Removes a frame that was not shown to the model after all."""
        index = bisect.bisect_left(self._positions, position)
        if self._positions[index : index + 1] == array("q", [position]):
            del self._positions[index], self._times[index]

    def times(self) -> FrameTimes:
        """Returns a copy of the known times."""
        return FrameTimes(np.array(self._positions), np.array(self._times))

    def save(self, positions: Int[np.ndarray, " S"]) -> dict[str, np.ndarray]:
        """The frames that a bank still holds vectors of, as arrays for a file.

        Args:
          positions: of the vectors in the bank.
        """
        known = self.times()
        held = np.isin(known.positions, positions)
        return {
            "moments.positions": known.positions[held].astype(np.int32),
            "moments.times": known.times[held].astype(np.float32),
        }

    def resume(self, saved: Mapping[str, np.ndarray]) -> None:
        """Restores what `save` returned; files of earlier versions do not have it."""
        if "moments.positions" in saved:
            self._positions = array("q", saved["moments.positions"].tolist())
            self._times = array("d", saved["moments.times"].tolist())


@dataclasses.dataclass(frozen=True)
class BankView:
    """A snapshot of a bank's vectors, not yet copied from the device, with the times of their frames.

    Attributes:
      positions: of the vectors; NO_POSITION in empty places.
      counts: number of vectors that each stands for; None if nothing is ever merged.
      frames: times of the frames shown in the stream.
      vectors_per_frame: of a whole frame.
    """

    positions: Int[Array | np.ndarray, " S"]
    counts: Float[Array | np.ndarray, " S"] | None
    frames: FrameTimes
    vectors_per_frame: int

    def moments(self) -> list[Moment]:
        """The moments in the bank, oldest first; blocks on the device.

        A vector whose frame is not known counts towards the last known frame before it.
        """
        positions = np.asarray(self.positions)
        in_use = positions != NO_POSITION
        found, first, vectors = np.unique(positions[in_use], return_index=True, return_counts=True)
        if not len(found):
            return []
        stands_for = np.ones(in_use.sum()) if self.counts is None else np.asarray(self.counts)[in_use]
        frames = np.add.reduceat(stands_for, first) / self.vectors_per_frame
        known = self.frames
        before = np.searchsorted(known.positions, found, side="right") - 1
        times = known.times[np.maximum(before, 0)] if len(known.times) else np.zeros(len(found))
        return [
            Moment(float(time), int(size), max(1, round(share)))
            for time, size, share in zip(times, vectors, frames, strict=True)
        ]
