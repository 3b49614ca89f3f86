"""On-the-fly rendering of streams that are too long to prerender: by segments, while a session plays them."""

import collections
import itertools
import math
import multiprocessing
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from jaxtyping import UInt8

from moss_jax.stream import End, Event, FrameSeen, FrameUnseen, Session
from moss_jax.worlds.base import LongStream

# Seconds in a rendered segment, segments rendered ahead of those pushed, and seconds pushed ahead of the
# slowest stream.
SEGMENT, AHEAD, LEAD = 16, 2, 64


class Renderer:
    """Renders segments of streams ahead; a context manager.

    Args:
      streams: to be rendered.
      seconds: their length.
      image_size: side of the frames, in pixels.
      processes: number of render processes; 0 for a thread of this process.
    """

    def __init__(self, streams: Sequence[LongStream], *, seconds: int, image_size: int, processes: int = 0):
        self.streams, self.seconds = streams, seconds
        # Each process gets the streams once, and tasks name them by index. A fork of a process that runs JAX
        # could deadlock.
        pool: dict[str, Any] = {"initializer": _take, "initargs": (streams, image_size)}
        self._executor = (
            futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), **pool)
            if processes
            else futures.ThreadPoolExecutor(1, **pool)
        )

    def __enter__(self) -> "Renderer":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def submit(self, index: int, start: int) -> "futures.Future[UInt8[np.ndarray, 'F H W 3']]":
        """Submits the segment of stream `index` that begins at second `start` for rendering."""
        return self._executor.submit(_render, index, start, min(start + SEGMENT, self.seconds))


def _take(streams: Sequence[LongStream], size: int) -> None:
    """Initializes a worker."""
    _worker.streams, _worker.size = streams, size


def _render(index: int, start: int, stop: int) -> UInt8[np.ndarray, "F H W 3"]:
    return _worker.streams[index].frames(_worker.size, start, stop)


_worker = threading.local()


def feed(session: Session, renderer: Renderer, group: Sequence[int], begin: int) -> Iterator[Event]:
    """Plays a lockstep session while a thread pushes frames and prompts, and yields its events.

    Args:
      session: nothing has been pushed into it yet; slots without a stream are finished.
      renderer: renderer of the frames.
      group: index of the stream in each slot.
      begin: index of the first request that is pushed.
    """
    feeder = _Feeder(session, renderer, group, begin)
    feeder.start()
    try:
        feeder.wait()
        for event in session:
            feeder.note(event)
            yield event
    finally:
        feeder.close()
    if feeder.failure:
        raise feeder.failure


class _Feeder(threading.Thread):
    """Pushes streams in order of time, by segments, a bounded time ahead of the slowest of them."""

    def __init__(self, session: Session, renderer: Renderer, group: Sequence[int], begin: int):
        super().__init__(name="feeder", daemon=True)
        self._session, self._renderer, self._group = session, renderer, group
        self._prompts = [collections.deque(renderer.streams[index].requests[begin:]) for index in group]
        # Frames seen by each slot whose stream is not over, and frames pushed to all of them.
        self._seen = dict.fromkeys(range(len(group)), 0)
        self._pushed = 0
        self._progress = threading.Condition()
        self._done = self._closed = False
        self.failure: BaseException | None = None

    def note(self, event: Event) -> None:
        """Records an event of the session; returns when the session may continue (see `wait`)."""
        if isinstance(event, FrameSeen | FrameUnseen | End):
            with self._progress:
                if isinstance(event, End):
                    self._seen.pop(event.slot, None)
                else:
                    self._seen[event.slot] = event.index + 1
                self._progress.notify()
            self.wait()

    def wait(self) -> None:
        """Blocks while a stream has seen all of its frames and more are about to be pushed.

        Otherwise the other streams would run ahead of it, in steps with ever fewer active slots.
        """
        with self._progress:
            self._progress.wait_for(lambda: self._done or not (self._is_starving() and self._may_push()))

    def close(self) -> None:
        """Stops the thread and joins it."""
        with self._progress:
            self._closed = True
            self._progress.notify()
        self.join()

    def run(self) -> None:
        try:
            self._push_all()
        except BaseException as error:
            self.failure = error
            # It would wait for frames forever.
            self._session.stop()
        finally:
            with self._progress:
                self._done = True
                self._progress.notify()

    def _push_all(self) -> None:
        segments = (
            (start, [self._renderer.submit(index, start) for index in self._group])
            for start in range(0, self._renderer.seconds, SEGMENT)
        )
        rendered = collections.deque(itertools.islice(segments, AHEAD))
        while rendered:
            start, frames = rendered.popleft()
            rendered.extend(itertools.islice(segments, 1))
            with self._progress:
                self._progress.wait_for(lambda: self._closed or self._may_push())
                if self._closed or not self._seen:
                    return
            for slot, future in enumerate(frames):
                for second, rgb in enumerate(future.result(), start):
                    self._push_prompts(slot, until=second)
                    self._session.push_frame(rgb, float(second), slot=slot)
            with self._progress:
                self._pushed = start + SEGMENT
                self._progress.notify()
        for slot in range(len(self._group)):
            self._push_prompts(slot, until=math.inf)
        self._session.finish()

    def _may_push(self) -> bool:
        """Whether the slowest stream has seen enough frames for another segment to be pushed."""
        return min(self._seen.values(), default=self._pushed) >= self._pushed - LEAD

    def _is_starving(self) -> bool:
        """Whether a stream has seen all it can; the last pushed frame waits until the next input is known."""
        return max(self._seen.values(), default=0) >= self._pushed - 1

    def _push_prompts(self, slot: int, *, until: float) -> None:
        prompts = self._prompts[slot]
        while prompts and prompts[0].time <= until:
            prompt = prompts.popleft()
            self._session.push_prompt(prompt.text, prompt.time, slot=slot)
