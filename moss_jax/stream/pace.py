"""When to dispatch the next step.

Late enough that it takes in what happens meanwhile, early enough that the device doesn't wait for it.
"""

from collections.abc import Hashable

# Share of a new measurement in the running mean.
WEIGHT = 0.25
# Seconds from the end of a dispatch until the device can begin, and by which the host may be late.
MARGIN = 0.0014


class Pace:
    """Running means of how long steps take on the device, by kind, and of how long the next is dispatched."""

    def __init__(self):
        self._steps: dict[Hashable, float] = {}
        self._dispatch: float | None = None

    def dispatched(self, seconds: float) -> None:
        """The host has taken so long to dispatch a step that only goes on."""
        self._dispatch = _mean(self._dispatch, seconds)

    def landed(self, kind: Hashable, seconds: float) -> None:
        """A step has taken so long on the device."""
        self._steps[kind] = _mean(self._steps.get(kind), seconds)

    def lead(self, kind: Hashable) -> float:
        """Seconds after the begin of a step at which to dispatch the next; 0 if steps of its kind are new."""
        return max(0.0, self._steps.get(kind, 0.0) - (self._dispatch or 0.0) - MARGIN)


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + WEIGHT * (new - before)
