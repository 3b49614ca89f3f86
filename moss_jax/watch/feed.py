"""A video file and timed prompts, fed to a session from a thread of its own."""

import contextlib
import heapq
import threading
from collections.abc import Iterable, Iterator, Sequence

from moss_jax.stream import End, Event, FrameSeen, Session
from moss_jax.video import Frame

# Frames that the reader of a lockstep stream may be ahead, so that a long file is never all in memory.
READ_AHEAD = 16


def watch(session: Session, frames: Iterable[Frame], prompts: Sequence[tuple[float, str]]) -> Iterator[Event]:
    """Runs a session on a source of frames: at their own pace in realtime, as fast as it goes in lockstep.

    Args:
      session: of one slot, not yet run.
      frames: in order of time.
      prompts: (stream time in seconds, text) pairs.

    Yields:
      The session's events.

    Raises:
      What reading the frames raises, after the events of those that came before.
    """
    feeder = _Feeder(session, frames, prompts)
    feeder.start()
    try:
        for event in session:
            if isinstance(event, FrameSeen):
                feeder.room.release()
            if isinstance(event, End) and feeder.error:
                # The stream ended because its source broke, and that is what there is to tell.
                break
            yield event
    finally:
        feeder.close()
    if feeder.error:
        raise feeder.error


class _Feeder(threading.Thread):
    def __init__(self, session: Session, frames: Iterable[Frame], prompts: Sequence[tuple[float, str]]):
        super().__init__(name="feeder", daemon=True)
        self.error: Exception | None = None
        self.room = threading.Semaphore(READ_AHEAD)
        self._session = session
        self._frames = frames
        # At one instant prompts come before the frame.
        self._prompts = [(at, 0, text) for at, text in sorted(prompts, key=lambda p: p[0])]
        self._closed = threading.Event()
        self._paced = session.config.clock == "realtime"

    def run(self) -> None:
        try:
            with contextlib.closing(iter(self._frames)) as frames:
                self._feed(frames)
        except Exception as error:  # Whatever it is, the thread that reads the events shall raise it.
            self.error = error
        finally:
            self._session.finish()

    def _feed(self, frames: Iterator[Frame]) -> None:
        timed = ((frame.time, 1, frame) for frame in frames)
        for at, is_frame, item in heapq.merge(self._prompts, timed, key=lambda x: x[:2]):
            if self._paced:
                # By the session's clock, which may begin later than this thread.
                while (ahead := at - self._session.now()) > 0 and not self._closed.wait(ahead):
                    pass
            elif is_frame:
                self.room.acquire()
            if self._closed.is_set():
                return
            push = self._session.push_frame if is_frame else self._session.push_prompt
            if not push(item.rgb if is_frame else item, at):
                return

    def close(self) -> None:
        """Ends the thread, also while it waits, and sees it close the file that it reads."""
        self._closed.set()
        self.room.release()
        self._session.stop()
        self.join()
