"""Buffer pool for the frames that are queued in inboxes."""

import sys
import threading

import numpy as np
from jaxtyping import UInt8

# Maximum number of pooled buffers; frames beyond that are allocated as usual.
MOST = 16


class FramePool:
    """Copies frames into buffers of earlier copies that are no longer in use.

    In a fresh allocation of some megabytes, each page faults at its first write, which can take ten times as
    long as the copy. A buffer is in use as long as anything refers to it: an inbox, or JAX until it has
    transferred the frame.
    """

    def __init__(self):
        self._frames: list[np.ndarray] = []
        self._lock = threading.Lock()

    def copy(self, frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """Returns a contiguous copy of a frame; thread-safe."""
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
    """Reference count of each frame, including the references of the list and of this function."""
    return [sys.getrefcount(frame) for frame in frames]


# Reference count of a frame in no other use; the number depends on the version of Python.
UNUSED = _references([np.empty(0)])[0]
