"""What the memory bank of a stream holds of which moment.

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
    """Vectors that the bank holds of one frame, or of some that were merged.

    Attributes:
      time: seconds of the stream at which the frame was taken.
      vectors: that the bank holds.
      frames: that they stand for.
    """

    time: float
    vectors: int
    frames: int = 1


class FrameTimes(NamedTuple):
    """When frames were taken, in seconds of the stream, by their positions in its context, which ascend."""

    positions: Int[np.ndarray, " F"]
    times: Float[np.ndarray, " F"]


class Moments:
    """Times of the frames that a stream has been shown: 16 bytes each, since there is no end of them.

    Args:
      most: of the latest that are kept; a quarter more before the oldest go.
    """

    def __init__(self, most: int = 1 << 16):
        self._positions, self._times = array("q"), array("d")
        self._most = most

    def add(self, position: int, time: float) -> None:
        """Notes a frame; positions ascend."""
        self._positions.append(position)
        self._times.append(time)
        if len(self._positions) > self._most + self._most // 4:
            del self._positions[: -self._most], self._times[: -self._most]

    def forget(self, position: int) -> None:
        """Takes a frame back that the model was not shown after all."""
        index = bisect.bisect_left(self._positions, position)
        if self._positions[index : index + 1] == array("q", [position]):
            del self._positions[index], self._times[index]

    def times(self) -> FrameTimes:
        """A copy of what is known."""
        return FrameTimes(np.array(self._positions), np.array(self._times))

    def save(self, positions: Int[np.ndarray, " S"]) -> dict[str, np.ndarray]:
        """The frames of which a bank holds something, as arrays for a file.

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
        """Goes on with what `save` has returned; files of earlier versions have none of it."""
        if "moments.positions" in saved:
            self._positions = array("q", saved["moments.positions"].tolist())
            self._times = array("d", saved["moments.times"].tolist())


@dataclasses.dataclass(frozen=True)
class BankView:
    """The vectors of a bank at one moment, yet to be copied from the device, and what their positions mean.

    Attributes:
      positions: of the vectors; NO_POSITION where there is none.
      counts: vectors that each stands for; None where nothing is merged.
      frames: that the stream has been shown.
      vectors_per_frame: of a whole frame.
    """

    positions: Int[Array | np.ndarray, " S"]
    counts: Float[Array | np.ndarray, " S"] | None
    frames: FrameTimes
    vectors_per_frame: int

    def moments(self) -> list[Moment]:
        """The moments in the bank, the oldest first; waits for the device.

        A vector whose frame is not known counts as of the last one before that is.
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
