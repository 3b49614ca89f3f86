"""Counters of a scheduler, for its metrics."""

import collections
import dataclasses


@dataclasses.dataclass
class SchedulerCounters:
    """Counters of a scheduler since its creation; only its threads change them.

    Attributes:
      step_rows, step_frames: histograms of steps, by number of streams and by number of frames appended.
      encoded_frames: histogram of encoded batches, by number of frames.
      failures: failed steps, each of which ends all streams.
    """

    step_rows: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    step_frames: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    encoded_frames: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    failures: int = 0
