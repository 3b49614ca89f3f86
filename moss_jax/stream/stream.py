"""One of the streams of a scheduler: what pushes frames and prompts into it, and its events."""

import copy
import os
import queue
from collections.abc import Iterator
from concurrent.futures import Future
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from moss_jax.config import EngineConfig, SessionConfig, TokenSampling
from moss_jax.memory.selection import thumbnail
from moss_jax.stream.conversation import Conversation, Inbound
from moss_jax.stream.engine import Engine, EngineLike
from moss_jax.stream.events import End, Event
from moss_jax.stream.moments import BankView
from moss_jax.stream.rows import Encoded
from moss_jax.stream.saved import SavedStream, write_stream
from moss_jax.text import chat

if TYPE_CHECKING:
    from moss_jax.stream.scheduler import Scheduler


class SessionError(ValueError):
    """A push that a stream refuses; the stream goes on."""


class Clock:
    """Wall-clock seconds of a stream, from its start on.

    Attributes:
      start_time: seconds from which the stream goes on, where it was saved before; else 0.
      is_realtime: whether the clock of a saved stream goes on.
    """

    def __init__(self, *, is_realtime: bool):
        self.start_time, self.is_realtime = 0.0, is_realtime
        self._started: float | None = None

    def start(self) -> None:
        """Starts the clock, unless it runs."""
        if self._started is None:
            self._started = monotonic()

    def now(self) -> float:
        """Seconds since the start; before it, those at which the stream begins."""
        before = self.start_time if self.is_realtime else 0.0
        return before if self._started is None else before + monotonic() - self._started


class Stream:
    """One stream of a scheduler: frames and prompts are pushed from any thread, typed events come out.

    `Scheduler.open` makes it. Iterating gives its events up to `End`, while the scheduler runs in a thread of
    its own.

    Attributes:
      slot: of the engine.
      conversation: the state of its dialogue.
      clock: its wall clock.
      arrays: that its slot begins with; None for an empty one.
      sampling: None for the engine's own.
      remembered: the features of the frame that was remembered last, where they are compared.
    """

    def __init__(self, scheduler: "Scheduler", conversation: Conversation, clock: Clock):
        self._scheduler = scheduler
        self.conversation, self.clock = conversation, clock
        self.slot = conversation.slot
        self.arrays: list[np.ndarray] | None = None
        self.sampling: TokenSampling | None = None
        self.remembered: Encoded | None = None
        self.inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()

    @property
    def config(self) -> SessionConfig:
        """Its clock and bounds."""
        return self.conversation.config

    def push_frame(self, rgb: UInt8[np.ndarray, "H W 3"], time: float | None = None) -> bool:
        """Shows the model a frame, taken at `time` seconds of the stream (now, if None).

        The frame is copied, so the caller may reuse its memory at once. Where frames are selected
        (`SessionConfig.selection`), it may be that the model is not shown it; an event says so.

        Returns:
          False if the stream is over, so that a feeder knows when to stop.

        Raises:
          SessionError: the frame is no uint8 [H, W, 3], or its time is missing or out of order in lockstep.
        """
        rgb = np.asarray(rgb)
        if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[-1] != 3 or not rgb.size:
            raise SessionError(f"a frame is uint8 RGB [height, width, 3]; got {rgb.dtype} {list(rgb.shape)}")
        small = thumbnail(rgb) if self.config.selection.enabled else None
        at = self._time(time)
        copied = self._scheduler.frame_pool.copy(rgb)
        return self._push(Inbound(at, 1, self._scheduler.next_order(), rgb=copied, thumbnail=small))

    def push_prompt(self, text: str, time: float | None = None) -> bool:
        """Asks the model something at `time` seconds of the stream (now, if None); cuts its answer, if any.

        Returns:
          False if the stream is over.

        Raises:
          SessionError: the prompt is longer than the text capacity, or its time is missing or out of order
            in lockstep.
        """
        tokens = self.check_prompt(text)
        at = self._time(time)
        return self._push(Inbound(at, 0, self._scheduler.next_order(), prompt=text, tokens=tokens))

    def check_prompt(self, text: str) -> list[int]:
        """The tokens that a prompt would append.

        Raises:
          SessionError: they are more than the text capacity.
        """
        tokens = chat.interjection(self._scheduler.engine.tokenizer, text)
        check_length(tokens, self.conversation.capacity, self.conversation.opening_length)
        return tokens

    def finish(self, *, time: float | None = None) -> None:
        """Declares the input complete: what waits is still seen, the answer is finished, then comes `End`.

        Args:
          time: seconds of the stream that the input lasts, for where it goes on if it is saved; None for the
            time of the last frame or prompt.
        """
        with self._scheduler.changed:
            self.conversation.finish(self.clock.now())
            self.conversation.latest = max(self.conversation.latest, time or 0.0)
            self._scheduler.changed.notify_all()

    def interrupt(self) -> None:
        """Cuts the answer in progress at its next token, if there is one; the stream goes on silent."""
        with self._scheduler.changed:
            self.conversation.interrupted = self.conversation.speaking
            self._scheduler.changed.notify_all()

    def stop(self) -> None:
        """Ends the stream at the next token."""
        with self._scheduler.changed:
            self.conversation.stopped = True
            self._scheduler.changed.notify_all()

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self.inbox.get()
            yield event
            if isinstance(event, End):
                # For whoever iterates once more.
                self.inbox.put(event)
                return

    def save(self, path: str | os.PathLike, state: Any, wall: float) -> float:
        """Writes the stream to a file, between two steps.

        Args:
          state: of the engine.
          wall: seconds on the stream's clock.

        Returns:
          Seconds of the stream at which it goes on.

        Raises:
          SessionError: the logits of the stream were not finite.
          OSError: the file cannot be written.
        """
        saved = self.copy(state, wall)
        write_stream(path, saved)
        return saved.dialogue["start_time"]

    def copy(self, state: Any, wall: float) -> SavedStream:
        """Copies the stream to the host, between two steps; arguments and errors as for `save`."""
        if not self.conversation.is_finite():
            raise SessionError("a stream whose logits are not finite cannot go on, so it is not saved")
        engine = saving_engine(self._scheduler.engine)
        dialogue, frames, small = self.conversation.save(wall)
        compared = {} if small is None else {"thumbnail": small}
        if self.remembered:
            compared["features"] = np.asarray(self.remembered.features[self.remembered.index])
        arrays = engine.save_slot(state, self.slot)
        compared |= self.conversation.moments.save(arrays["bank.positions"])
        settings = engine.stream_settings(self.conversation.capacity)
        return SavedStream(settings, copy.deepcopy(dialogue), arrays, frames, compared)

    def copy_while_running(self) -> "Future[SavedStream]":
        """Has the scheduler copy the stream between two of its steps, so that `write_stream` can save it.

        The others go on meanwhile. When the future is done, the events so far are in the inbox, and none of
        later ones.

        Returns:
          A future that raises `SessionError` if the stream is over, or cannot be saved.
        """
        return self._scheduler.call(self, lambda state: self.copy(state, self.clock.now()))

    def look_at_bank(self) -> "Future[BankView]":
        """Has the scheduler look at what the memory bank holds, without holding anything up.

        Returns:
          A future that raises `SessionError` if the scheduler is over, or the engine is a stand-in.
        """

        def look(state: Any) -> BankView:
            engine = saving_engine(self._scheduler.engine)
            positions, counts = engine.bank_vectors(state, self.slot)
            frames = self.conversation.moments.times()
            return BankView(positions, counts, frames, engine.model_config.vectors_per_frame)

        return self._scheduler.call(None, look)

    def _push(self, inbound: Inbound) -> bool:
        target = self.conversation
        with self._scheduler.changed:
            if target.ended or target.finished or target.stopped:
                return False
            if self.config.clock == "lockstep":
                _check_order(target, inbound, is_running=self._scheduler.is_running)
            inbound.arrived = monotonic()
            if inbound.is_frame:
                self._scheduler.frame_arrived(inbound.arrived)
            target.receive(inbound)
            self._scheduler.changed.notify_all()
            return True

    def _time(self, time: float | None) -> float:
        if time is None:
            if self.config.clock == "lockstep":
                raise SessionError("a lockstep session needs the time of each frame and prompt")
            return self.clock.now()
        if not np.isfinite(time) or time < 0:
            raise SessionError(f"time must be a number of seconds from 0 on, not {time}")
        return float(time)


def saving_engine(engine: EngineLike) -> Engine:
    """The engine itself, whose slots can be saved, loaded and emptied.

    Raises:
      SessionError: it is a stand-in.
    """
    if not isinstance(engine, Engine):
        raise SessionError(f"the streams of a {type(engine).__name__} cannot be saved or resumed")
    return engine


def check_length(tokens: list[int], config: EngineConfig, opening_length: int = 0) -> None:
    """Refuses a prompt for which a text cache has no room.

    Raises:
      SessionError: saying how long it may be.
    """
    capacity, memory = config.text_capacity, config.memory
    # One more for the token that answers.
    if len(tokens) + 1 > capacity:
        raise SessionError(
            f"the prompt takes {len(tokens)} tokens and its answer at least 1, but the text capacity "
            f"is {capacity}"
        )
    # What is pending comes before a prompt, at most an answer's last token and the silence after a cut.
    if memory.text == "window" and opening_length + 2 + len(tokens) > capacity:
        raise SessionError(
            f"the prompt takes {len(tokens)} tokens, but the text capacity of {capacity} has room for "
            f"{capacity - opening_length - 2} beside the opening, which is never forgotten"
        )


def min_distance(stream: Stream) -> float | None:
    """Distance from the frame remembered before, below which a frame is left out; None for no limit."""
    selection = stream.config.selection
    return selection.min_distance if selection.enabled else None


def _check_order(conversation: Conversation, inbound: Inbound, *, is_running: bool) -> None:
    """Refuses what a lockstep session gets too late.

    Args:
      is_running: whether the session runs.
    """
    # A saved stream has been running until it was saved.
    latest = conversation.latest if is_running else conversation.start_time
    if inbound.time < latest:
        raise SessionError(
            f"a running lockstep session takes frames and prompts in order of time: "
            f"{inbound.time:g} s came after {latest:g} s"
        )
    if inbound.thumbnail is not None and inbound.time < conversation.latest_frame:
        raise SessionError(
            f"a lockstep session that selects frames takes them in order of time: "
            f"{inbound.time:g} s came after {conversation.latest_frame:g} s"
        )
