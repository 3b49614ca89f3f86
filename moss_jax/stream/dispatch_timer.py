"""Timing of speculative dispatch: when to dispatch the next step while one is in flight.

Late enough to include what arrives meanwhile, early enough that the device is never idle.
"""

import time
from collections.abc import Hashable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from moss_jax.stream.conversation import Plan

# Weight of a new measurement in the running means.
WEIGHT = 0.25
# Factor on the time recorded for a step that was done before the host waited for it.
SHORTER = 0.5
# Limit of the time recorded for a step, in units of the mean: one pause of the process must not count long.
OUTLIER = 2.0
# Safety margin in seconds: launch latency of the device, and jitter of the host.
MARGIN = 0.0014


class Kind(NamedTuple):
    """Key under which the durations of similar steps are averaged.

    Attributes:
      tokens: of its longest row.
      frames: that it appends.
      encoded: frames that the device encodes between the step before and this one.
    """

    tokens: int
    frames: int = 0
    encoded: int = 0


# A step that appends only pending tokens.
DECODE = Kind(1)


class DispatchTimer:
    """Running means of step times on the device, by kind, and of planning and dispatch time on the host.

    A host that is late for a step measures its own delay, not the step. If that counted, the next step would
    be dispatched even later, and so on.
    """

    def __init__(self):
        self._steps: dict[Kind, float] = {}
        self._dispatch: float | None = None

    def record_dispatch(self, seconds: float) -> None:
        """Records the time to plan and dispatch a step."""
        self._dispatch = _mean(self._dispatch, seconds)

    def record_step(self, kind: Kind, seconds: float, *, is_late: bool = False) -> None:
        """Records the time of a step on the device.

        Args:
          is_late: whether the step was done before the host waited for it, so the device has been idle.
        """
        before = self._steps.get(kind)
        if before is not None:
            seconds = min(seconds, OUTLIER * before)
        if is_late:
            seconds = SHORTER * min(seconds, seconds if before is None else before)
        self._steps[kind] = _mean(before, seconds)

    def delay(self, kind: Kind) -> float:
        """Seconds from the start of a step to the dispatch of the next; 0 for a kind never measured."""
        return max(0.0, self._steps.get(kind, 0.0) - (self._dispatch or 0.0) - MARGIN)


class StepInFlight[Key: Hashable]:
    """A dispatched step whose tokens are not on the host yet.

    Args:
      plans: plans whose rows it completes, by stream.
      kind: of the step.
      tokens: the sampled tokens, on the device.
      dispatch_started: when the host started to plan and dispatch it, by `time.monotonic`; None if the next
        steps will hardly take the host as long.

    Attributes:
      begun: when the device started it, as far as the host knows.
    """

    def __init__(
        self,
        plans: Mapping[Key, Plan],
        kind: Kind,
        tokens: jax.Array,
        timer: DispatchTimer,
        dispatch_started: float | None,
    ):
        self.plans, self.begun = plans, time.monotonic()
        self._tokens, self._timer = tokens, timer
        tokens.copy_to_host_async()
        self._kind = kind
        if dispatch_started is not None:
            timer.record_dispatch(self.begun - dispatch_started)

    @property
    def has_frames(self) -> bool:
        """Whether the step appends frames."""
        return self._kind.frames > 0

    def wait(self) -> np.ndarray:
        """Blocks until the step is done; returns the token of each slot."""
        is_late = self._tokens.is_ready()  # pyright: ignore[reportAttributeAccessIssue]
        tokens = np.asarray(self._tokens)
        self._timer.record_step(self._kind, time.monotonic() - self.begun, is_late=is_late)
        return tokens

    def time_left(self) -> float:
        """Seconds until the next step should be dispatched; negative if that is overdue."""
        return self.begun + self._timer.delay(self._kind) - time.monotonic()


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + WEIGHT * (new - before)
