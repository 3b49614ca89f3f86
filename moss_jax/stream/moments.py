"""What the memory bank of a stream holds of which moment.

S vectors
"""

import bisect
import dataclasses
from collections.abc import Mapping

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


class Moments:
    """Times of the frames that a stream has been shown, by their positions in its context.

    Args:
      most: of the latest that are kept.
    """

    def __init__(self, most: int = 1 << 16):
        self._times: dict[int, float] = {}
        self._most = most

    def add(self, position: int, time: float) -> None:
        """Notes a frame; positions ascend."""
        self._times[position] = time
        if len(self._times) > self._most:
            del self._times[next(iter(self._times))]

    def forget(self, position: int) -> None:
        """Takes a frame back that the model was not shown after all."""
        self._times.pop(position, None)

    def save(self, positions: Int[np.ndarray, " S"]) -> dict[str, np.ndarray]:
        """The frames of which a bank holds something, as arrays for a file.

        Args:
          positions: of the vectors in the bank.
        """
        held = set(positions.tolist())
        pairs = [(position, time) for position, time in self._times.items() if position in held]
        return {
            "moments.positions": np.array([position for position, _ in pairs], np.int32),
            "moments.times": np.array([time for _, time in pairs], np.float32),
        }

    def resume(self, saved: Mapping[str, np.ndarray]) -> None:
        """Goes on with what `save` has returned; files of earlier versions have none of it."""
        if "moments.positions" in saved:
            positions, times = saved["moments.positions"], saved["moments.times"]
            self._times = dict(zip(positions.tolist(), times.tolist(), strict=True))

    @property
    def times(self) -> Mapping[int, float]:
        """By position."""
        return self._times


@dataclasses.dataclass(frozen=True)
class BankView:
    """The vectors of a bank at one moment, yet to be copied from the device, and what their positions mean.

    Attributes:
      positions: of the vectors; NO_POSITION where there is none.
      counts: vectors that each stands for; None where nothing is merged.
      times: of frames, by position.
      vectors_per_frame: of a whole frame.
    """

    positions: Int[Array | np.ndarray, " S"]
    counts: Float[Array | np.ndarray, " S"] | None
    times: Mapping[int, float]
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
        known = sorted(self.times)
        moments = []
        for position, size, share in zip(found, vectors, frames, strict=True):
            index = max(bisect.bisect_right(known, position) - 1, 0)
            time = self.times[known[index]] if known else 0.0
            moments.append(Moment(time, int(size), max(1, round(share))))
        return moments
