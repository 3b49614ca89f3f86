"""A live session: any thread pushes frames and prompts, and an iterator yields typed events."""

import os
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import UInt8

from moss_jax.config import SchedulerConfig, SessionConfig
from moss_jax.stream.engine import EngineLike
from moss_jax.stream.events import Event
from moss_jax.stream.scheduler import Scheduler
from moss_jax.stream.stream import Clock, SessionError, Stream, saving_engine
from moss_jax.text import chat

__all__ = ["Session", "SessionError"]


class Session:
    """One stream in each slot of an engine, from start to end: a `Scheduler` driven by iteration.

    Iterating runs the loop in the calling thread; a session can be iterated once. Pushes are thread-safe. A
    realtime session consumes what has been pushed so far, by the wall clock. A lockstep session waits until
    it knows what comes next, so push in order of time, beforehand or from another thread, and call `finish`.

    Args:
      engine: of one or more slots.
      config: clock and limits.
      system: system prompt; None for none.
      prompt: content of the first user turn. If it is empty, the model watches unprompted.
      resume: files written by `save`, by the slot that resumes each; system and prompt are for the other
        slots. The clock continues as well, from `start_time`.

    Attributes:
      opening_length: tokens of system prompt, first turn and header; the maximum over the slots.

    Raises:
      SessionError: the prompt does not fit, or there is no such slot.
      SavedStreamError: a file cannot be read or does not fit the engine.
    """

    def __init__(
        self,
        engine: EngineLike,
        config: SessionConfig | None = None,
        *,
        system: str | None = chat.SYSTEM_PROMPT,
        prompt: str = "",
        resume: Mapping[int, str | os.PathLike] | None = None,
    ):
        self.config = config or SessionConfig()
        self._engine = engine
        self._iterated = False
        self._ended_at = 0.0
        self._scheduler = Scheduler(engine, SchedulerConfig(clock=self.config.clock))
        # All slots have one clock.
        self._clock = Clock(is_realtime=self.config.clock == "realtime")
        resume = resume or {}
        for slot in resume:
            self._check_slot(slot)
            saving_engine(engine)
        self._streams = [
            self._scheduler.open(
                self.config, system=system, prompt=prompt, resume=resume.get(slot), clock=self._clock
            )
            for slot in range(engine.config.slots)
        ]
        self.opening_length = max(s.conversation.opening_length for s in self._streams)

    def push_frame(
        self,
        rgb: UInt8[np.ndarray, "H W 3"],
        time: float | None = None,
        *,
        slot: int = 0,
        copy: bool = True,
    ) -> bool:
        """Shows the model a frame; see `Stream.push_frame`."""
        return self._stream(slot).push_frame(rgb, time, copy=copy)

    def push_prompt(self, text: str, time: float | None = None, *, slot: int = 0) -> bool:
        """Asks the model something; see `Stream.push_prompt`."""
        stream = self._stream(slot)
        self.check_prompt(text)
        return stream.push_prompt(text, time)

    def check_prompt(self, text: str) -> list[int]:
        """Tokenizes a prompt and checks its length.

        Raises:
          SessionError: it exceeds the smallest text capacity of any stream.
        """
        by_room = sorted(self._streams, key=lambda s: s.conversation.capacity.text_capacity)
        checked = [stream.check_prompt(text) for stream in by_room]
        return checked[0]

    @property
    def start_time(self) -> float:
        """Stream time at which the session begins: the latest end of the resumed streams, or 0."""
        return self._clock.start_time

    def now(self) -> float:
        """Seconds since the session began; before it is iterated, its start time.

        In realtime, the clock of a resumed stream continues.
        """
        return self._clock.now()

    def finish(self, slot: int | None = None, *, time: float | None = None) -> None:
        """Declares the input complete: queued items are still processed, the answer finishes, then `End`.

        Args:
          slot: None for all.
          time: stream time at which the input ends, from which a saved stream resumes; None for the time of
            the last frame or prompt.
        """
        with self._scheduler.changed:
            for stream in self._select(slot):
                stream.finish(time=time)

    def pause(self) -> None:
        """Stops the iteration after the step in flight, without `End`, so that streams can be saved.

        Items queued in an inbox are saved as well.
        """
        self._scheduler.pause()

    @property
    def can_save(self) -> bool:
        """Whether `save` may be called: the iteration has ended without an error."""
        return self._scheduler.state is not None

    def save(self, path: str | os.PathLike, slot: int = 0) -> float:
        """Writes the stream of a slot to a file that another session, also in another process, can resume.

        If that fails, an existing file is left intact.

        Returns:
          Stream time at which it resumes.

        Raises:
          SessionError: the iteration has not ended, or the stream ended because its logits were not finite.
          OSError: the file cannot be written.
        """
        stream = self._stream(slot)
        if not self.can_save:
            raise SessionError("a stream is saved when its iteration is over: pause it, and read all events")
        return stream.save(path, self._scheduler.state, self._ended_at)

    def interrupt(self, slot: int | None = None) -> None:
        """Cuts the answer in progress, if any, at its next token; the stream stays open, in silence.

        Args:
          slot: None for all.
        """
        for stream in self._select(slot):
            stream.interrupt()

    def stop(self, slot: int | None = None) -> None:
        """Ends the stream at the next token.

        Args:
          slot: None for all.
        """
        with self._scheduler.changed:
            for stream in self._select(slot):
                stream.stop()

    def __iter__(self) -> Iterator[Event]:
        if self._iterated:
            raise SessionError("a session is iterated once; make another for another stream")
        self._iterated = True
        self._clock.start()
        yield from self._scheduler.run()
        self._ended_at = self.now()

    def _select(self, slot: int | None) -> list[Stream]:
        return self._streams if slot is None else [self._stream(slot)]

    def _stream(self, slot: int) -> Stream:
        self._check_slot(slot)
        return self._streams[slot]

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < (slots := self._engine.config.slots):
            raise SessionError(f"there is no slot {slot}; the session has {slots}")
