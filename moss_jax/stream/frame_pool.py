"""Memory for the frames that wait in inboxes, used again."""

import sys
import threading

import numpy as np
from jaxtyping import UInt8

# Frames that are kept for use again; those of more streams that wait at once are allocated as usual.
MOST = 16


class FramePool:
    """Copies frames into memory that earlier copies have left.

    Of a fresh allocation of some megabytes, each page faults at its first write, which can take ten times as
    long as the copy. A copy is in use for as long as anything refers to it: an inbox, or JAX until it has
    transferred it.
    """

    def __init__(self):
        self._frames: list[np.ndarray] = []
        self._lock = threading.Lock()

    def copy(self, frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """A contiguous copy of a frame; any thread may call this."""
        copied = self._unused(frame.shape)
        np.copyto(copied, frame)
        return copied

    def _unused(self, shape: tuple[int, ...]) -> np.ndarray:
        with self._lock:
            for frame, count in zip(self._frames, _references(self._frames), strict=True):
                if frame.shape == shape and count == UNUSED:
                    return frame
            fresh = np.empty(shape, np.uint8)
            self._frames = [fresh, *self._frames[: MOST - 1]]
            return fresh


def _references(frames: list[np.ndarray]) -> list[int]:
    """References to each frame, those of the list and of this function included."""
    return [sys.getrefcount(frame) for frame in frames]


# Of a frame that nobody else refers to; how many that are depends on the version of Python.
UNUSED = _references([np.empty(0)])[0]
