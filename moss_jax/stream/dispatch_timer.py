"""Timing of speculative dispatch: when to dispatch the next step while one is in flight.

Late enough that it takes in what arrives meanwhile, early enough that the device is never idle.
"""

import time
from collections.abc import Hashable, Mapping

import jax
import numpy as np

from moss_jax.stream.conversation import Plan

# Weight of a new measurement in the running means.
WEIGHT = 0.25
# What a step counts that was done before the host waited for it, as a share of its time so far.
SHORTER = 0.5
# Seconds for the device to begin after a dispatch, and for the host to be late.
MARGIN = 0.0014

# Kind of a step: the tokens of its longest row, and its frames.
type Kind = tuple[int, int]
# A step that appends pending tokens alone.
DECODE: Kind = (1, 0)


class DispatchTimer:
    """Running means: how long steps take on the device, by kind, and planning and dispatch on the host.

    A host that is late for a step sees how long it was itself, not the step. If that counted, the next step
    would be dispatched still later, and so on.
    """

    def __init__(self):
        self._steps: dict[Kind, float] = {}
        self._dispatch: float | None = None

    def record_dispatch(self, seconds: float) -> None:
        """Counts the planning and the dispatch of a decode step."""
        self._dispatch = _mean(self._dispatch, seconds)

    def record_step(self, kind: Kind, seconds: float, *, is_late: bool = False) -> None:
        """Counts a step on the device.

        Args:
          is_late: whether the step was done before, so that the device has been idle.
        """
        before = self._steps.get(kind)
        if is_late:
            seconds = SHORTER * min(seconds, seconds if before is None else before)
        self._steps[kind] = _mean(before, seconds)

    def delay(self, kind: Kind) -> float:
        """Seconds from the begin of a step to the dispatch of the next; 0 for a kind without measurements."""
        return max(0.0, self._steps.get(kind, 0.0) - (self._dispatch or 0.0) - MARGIN)


class StepInFlight[Key: Hashable]:
    """A step that was dispatched and whose tokens are not on the host yet.

    Args:
      plans: whose rows it completes, by stream.
      kind: of the step.
      tokens: the sampled tokens, on the device.
      dispatch_started: when the host began to plan and dispatch it, by `time.monotonic`.

    Attributes:
      begun: when the device began with it, as far as the host knows.
    """

    def __init__(
        self,
        plans: Mapping[Key, Plan],
        kind: Kind,
        tokens: jax.Array,
        timer: DispatchTimer,
        dispatch_started: float,
    ):
        self.plans, self.begun = plans, time.monotonic()
        self._tokens, self._timer = tokens, timer
        tokens.copy_to_host_async()
        self._kind = kind
        if self._kind == DECODE:
            # Other steps are dispatched as soon as there is reason to; only decode steps are timed.
            timer.record_dispatch(self.begun - dispatch_started)

    def wait(self) -> np.ndarray:
        """Blocks until the step is done; the token of each slot."""
        is_late = self._tokens.is_ready()  # pyright: ignore[reportAttributeAccessIssue]
        tokens = np.asarray(self._tokens)
        self._timer.record_step(self._kind, time.monotonic() - self.begun, is_late=is_late)
        return tokens

    def time_left(self) -> float:
        """Seconds until the next step should be dispatched; negative if it is late."""
        return self.begun + self._timer.delay(self._kind) - time.monotonic()


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + WEIGHT * (new - before)
