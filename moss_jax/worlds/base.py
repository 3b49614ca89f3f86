"""The interface between worlds and the evaluations that play their streams."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import UInt8


class TimedPrompt(Protocol):
    """A prompt of the user at a time of the stream."""

    @property
    def time(self) -> float:
        """Seconds of the stream; 0 for a prompt that opens the dialogue, before the first frame."""
        ...

    @property
    def text(self) -> str:
        """The prompt's words."""
        ...


class WorldStream(Protocol):
    """A stream of a world: frames, one a second from second 0 on, and the prompts of its user."""

    @property
    def requests(self) -> Sequence[TimedPrompt]:
        """The prompts, in order of time."""
        ...

    def frames(self, size: int) -> UInt8[np.ndarray, "F H W 3"]:
        """Renders all frames, `size` pixels wide and high."""
        ...


class LongStream(WorldStream, Protocol):
    """A stream that can be rendered in parts."""

    def frames(self, size: int, start: int = 0, stop: int | None = None) -> UInt8[np.ndarray, "F H W 3"]:
        """Renders the frames of seconds `start` to `stop`, `size` pixels wide and high; all by default."""
        ...
