"""Feeds a session from a source of frames and timed prompts in a separate thread."""

import bisect
import collections
import contextlib
import dataclasses
import heapq
import os
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence

from moss_jax.config import ConfigError, FrameSampling, SessionConfig
from moss_jax.stream import (
    End,
    EngineLike,
    Event,
    FrameSeen,
    FramesSkipped,
    FrameUnseen,
    NotAsked,
    Session,
)
from moss_jax.text import chat
from moss_jax.video import Frame

# Frames by which the reader of a lockstep stream may be ahead, to bound memory on long files.
READ_AHEAD = 16
# Tolerance in seconds at both ends of a frame, as in `video.sampling`.
TOLERANCE = 2e-3


def adapt_rate(session: SessionConfig, sampling: FrameSampling) -> tuple[SessionConfig, FrameSampling]:
    """Raises the source's sampling rate to the highest that the session's frame selection accepts, if any.

    The source's own rate becomes the rate at which frames enter while nothing changes.

    Raises:
      ConfigError: the highest rate is below the source's.
    """
    selection = session.selection
    if not selection.enabled or selection.max_fps is None:
        return session, sampling
    try:
        selection = dataclasses.replace(selection, fps=sampling.fps)
    except ConfigError as error:
        raise ConfigError(f"selection.{error}") from error
    sampling = dataclasses.replace(sampling, fps=selection.max_fps)
    return dataclasses.replace(session, selection=selection), sampling


def open_session(
    engine: EngineLike,
    prompts: Iterable[tuple[float, str]],
    config: SessionConfig | None = None,
    *,
    system: str | None = chat.SYSTEM_PROMPT,
    resume: str | os.PathLike | None = None,
) -> tuple[Session, list[tuple[float, str]]]:
    """Creates a session whose first user turn is the first prompt at time 0, if any.

    Args:
      engine: engine with one slot.
      prompts: (seconds since the start of the session, text) pairs.
      system: system prompt; None for none.
      resume: file of a saved stream to resume, with its own opening.

    Returns:
      The session, and the remaining prompts in order of time, with their stream times.

    Raises:
      SessionError: a prompt is longer than the text capacity.
      SavedStreamError: the file cannot be read or does not fit the engine.
    """
    prompts = sorted(prompts, key=lambda prompt: prompt[0])
    if resume is not None:
        session = Session(engine, config, resume={0: resume})
    else:
        first = prompts.pop(0)[1] if prompts and prompts[0][0] == 0 else ""
        session = Session(engine, config, system=system, prompt=first)
    for _, text in prompts:
        session.check_prompt(text)
    return session, [(session.start_time + at, text) for at, text in prompts]


def run_session(
    session: Session,
    frames: Iterable[Frame],
    prompts: Sequence[tuple[float, str]],
    *,
    copy: bool = True,
) -> Generator[Event]:
    """Runs a session on a source of frames: timed by timestamps in realtime, at full speed in lockstep.

    Args:
      session: session with one slot, not yet iterated.
      frames: frames in order of time.
      prompts: (stream time in seconds, text) pairs. Prompts after the end of the frames are not asked; the
        last frame is shown for its duration or, if unknown, for as long as the one before it.
      copy: as in `Stream.push_frame`; False if each frame has a buffer of its own.

    Yields:
      The session's events, and a `NotAsked` for each prompt that was not accepted, also after a pause.

    Raises:
      Exception: any error from reading the frames, after the events of the frames before it.
    """
    feeder = _Feeder(session, frames, prompts, copy=copy)
    feeder.start()
    last = Event(stream_time=session.start_time, wall_time=session.now())
    try:
        for event in session:
            last = event
            if isinstance(event, FrameSeen | FrameUnseen):
                feeder.room.release()
            if isinstance(event, End):
                yield from feeder.not_asked(event)
                if feeder.error:
                    # The source failed and the stream ended for that reason, so the error replaces the event.
                    break
            yield event
        if not isinstance(last, End):
            yield from feeder.not_asked(last)
    finally:
        feeder.close()
    if feeder.error:
        raise feeder.error


def report_skipped(events: Iterable[Event], skipped: Sequence[float]) -> Generator[Event]:
    """Adds a file's undecodable frames to the events of its stream.

    Args:
      events: events of `run_session` or `answer_offline`.
      skipped: times of those frames, in order; may grow as the file is read. The events do not depend on how
        far the reader is ahead.

    Yields:
      The events, with a `FramesSkipped` before the first frame sampled after the gap.
    """
    told = 0
    for event in events:
        if isinstance(event, FrameSeen | FrameUnseen):
            end = bisect.bisect_left(skipped, event.time)
        elif isinstance(event, End) and event.reason in ("finished", "token_limit"):
            end = len(skipped)
        else:
            end = told
        if end > told:
            stamp = {"slot": event.slot, "stream_time": event.stream_time, "wall_time": event.wall_time}
            yield FramesSkipped(**stamp, time=skipped[told], count=end - told)
            told = end
        yield event


class _Feeder(threading.Thread):
    """Pushes frames and prompts in order of time.

    Attributes:
      error: error from reading the frames, if any.
      room: in lockstep, number of frames that may be pushed ahead of the session.
    """

    def __init__(
        self,
        session: Session,
        frames: Iterable[Frame],
        prompts: Sequence[tuple[float, str]],
        *,
        copy: bool,
    ):
        super().__init__(name="feeder", daemon=True)
        self.error: Exception | None = None
        self.room = threading.Semaphore(READ_AHEAD)
        self._session = session
        self._frames = frames
        self._copies = copy
        # Prompts not accepted yet; locked while one is being pushed.
        self._prompts = collections.deque(sorted(prompts, key=lambda prompt: prompt[0]))
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._realtime = session.config.clock == "realtime"
        # End of the last accepted frame's display time.
        self._shown_until = 0.0

    def run(self) -> None:
        try:
            with contextlib.closing(self._reader()) as frames:
                self._push(frames)
        except Exception as error:  # Re-raised by the thread that reads the events.
            self.error = error
        finally:
            self._session.finish(time=self._shown_until)

    def _reader(self) -> Generator[tuple[float, int, Frame | None]]:
        """Yields the frames by time, then None at the end of the last."""
        time = self._session.start_time
        shown = 0.0
        for frame in self._frames:
            shown = frame.time - time if frame.duration is None else frame.duration
            time = frame.time
            yield time, 1, dataclasses.replace(frame, duration=shown)
        yield time + shown + TOLERANCE, 2, None

    def _push(self, frames: Iterator[tuple[float, int, Frame | None]]) -> None:
        # At equal times, prompts precede frames.
        prompts = [(at, 0, text) for at, text in self._prompts]
        for at, _, item in heapq.merge(prompts, frames, key=lambda x: x[:2]):
            if item is None:
                return
            if self._realtime:
                # The session's clock may start later than this thread.
                while (ahead := at - self._session.now()) > 0 and not self._closed.wait(ahead):
                    pass
            elif isinstance(item, Frame):
                self.room.acquire()
            if self._closed.is_set():
                return
            if isinstance(item, Frame):
                if alive := self._session.push_frame(item.rgb, at, copy=self._copies):
                    self._shown_until = at + (item.duration or 0.0)
            else:
                with self._lock:
                    if alive := self._session.push_prompt(item, at):
                        self._prompts.popleft()
            if not alive:
                return

    def not_asked(self, last: Event) -> list[NotAsked]:
        """The prompts that were not accepted before the session's last event."""
        with self._lock:
            stamp = {"slot": last.slot, "stream_time": last.stream_time, "wall_time": last.wall_time}
            return [NotAsked(**stamp, prompt=text, time=at) for at, text in self._prompts]

    def close(self) -> None:
        """Stops the session, wakes the thread if it waits, and joins it, so that the file is closed."""
        self._closed.set()
        self.room.release()
        self._session.stop()
        self.join()
