"""One stream of a scheduler: its input queue, its events, and saving it."""

import copy
import dataclasses
import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from time import monotonic
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from moss_jax.config import EngineConfig, SessionConfig, TokenSampling, UnseenReason
from moss_jax.memory.selection import Thumbnail, thumbnail
from moss_jax.stream.conversation import Conversation, Inbound
from moss_jax.stream.engine import Engine, EngineLike, SlotArrays
from moss_jax.stream.events import End, Event
from moss_jax.stream.moments import FrameTimes
from moss_jax.stream.rows import Encoded
from moss_jax.stream.saved import SavedStream, SavedStreamError, write_stream
from moss_jax.stream.step import EngineState
from moss_jax.text import chat

if TYPE_CHECKING:
    from moss_jax.stream.scheduler import Scheduler


class SessionError(ValueError):
    """A stream rejects a push or another request; the stream itself continues."""


class Clock:
    """Wall clock of a stream, in seconds since its start.

    Attributes:
      start_time: stream time at which a resumed stream continues; 0 for a new one.
      is_realtime: whether the clock of a resumed stream continues from there.
    """

    def __init__(self, *, is_realtime: bool):
        self.start_time, self.is_realtime = 0.0, is_realtime
        self._started: float | None = None

    def start(self) -> None:
        """Starts the clock, unless it is running."""
        if self._started is None:
            self._started = monotonic()

    def now(self) -> float:
        """Seconds since the start; before it, the time at which the stream begins."""
        before = self.start_time if self.is_realtime else 0.0
        return before if self._started is None else before + monotonic() - self._started


class Inbox:
    """Thread-safe queue of a stream's events, which may be redirected to a function."""

    def __init__(self):
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._take: Callable[[Any], object] | None = None

    def put(self, item: Any) -> None:
        """Appends an item, or calls the function with it."""
        with self._lock:
            if self._take is None:
                self._queue.put(item)
            else:
                self._take(item)

    def get(self) -> Any:
        """Waits for the next item."""
        return self._queue.get()

    def redirect(self, take: Callable[[Any], object]) -> None:
        """Calls a function with the queued items, and with all that are put later, in the putting threads."""
        with self._lock:
            while not self._queue.empty():
                take(self._queue.get())
            self._take = take


@dataclasses.dataclass(frozen=True)
class StreamCopy:
    """A copy of a stream between two steps, with its arrays on the device.

    Attributes:
      engine: that steps the stream.
      state: of the stream's slot alone.
      settings, dialogue, frames: as in `SavedStream`.
      thumbnail: of the frame that was encoded last, if frames are selected.
      remembered: features of the frame that was remembered last, if frames are compared.
      times: of the frames shown in the stream.
    """

    engine: Engine
    state: EngineState
    settings: dict[str, Any]
    dialogue: dict[str, Any]
    frames: list[UInt8[np.ndarray, "H W 3"]]
    thumbnail: Thumbnail | None
    remembered: Encoded | None
    times: FrameTimes

    def fetch(self) -> SavedStream:
        """Copies the arrays to the host; any thread may do that while the stream goes on."""
        arrays = self.engine.save_slot(self.state)
        compared = {} if self.thumbnail is None else {"thumbnail": self.thumbnail}
        if self.remembered:
            compared["features"] = np.asarray(self.remembered.features)[self.remembered.index]
        compared |= self.times.save(arrays["bank.positions"])
        return SavedStream(self.settings, self.dialogue, arrays, self.frames, compared, self.engine.weights)


class Stream:
    """One stream of a scheduler: any thread pushes frames and prompts, and iteration yields typed events.

    Created by `Scheduler.open`. Iterating yields its events up to `End`, while the scheduler runs in a thread
    of its own.

    Attributes:
      slot: of the engine.
      conversation: the state of its dialogue.
      clock: its wall clock.
      arrays: initial arrays of its slot; None for an empty slot.
      sampling: None for the engine's default.
      remembered: features of the frame that was remembered last, if frames are compared.
      inbox: its events.
    """

    def __init__(self, scheduler: "Scheduler", conversation: Conversation, clock: Clock):
        self._scheduler = scheduler
        self.conversation, self.clock = conversation, clock
        self.slot = conversation.slot
        self.arrays: SlotArrays | None = None
        self.sampling: TokenSampling | None = None
        self.remembered: Encoded | None = None
        self.inbox = Inbox()

    @property
    def config(self) -> SessionConfig:
        """Its clock and limits."""
        return self.conversation.config

    def push_frame(
        self, rgb: UInt8[np.ndarray, "H W 3"], time: float | None = None, *, copy: bool = True
    ) -> bool:
        """Shows the model a frame, taken at `time` seconds of the stream (now, if None).

        If frames are selected (`SessionConfig.selection`), it may not be shown to the model; an event reports
        that.

        Args:
          copy: whether the frame is copied, so that the caller may reuse its buffer at once. A copy of 1920 x
            1080 pixels takes 0.3 to 3 ms, so a caller that never changes the array should pass False.

        Returns:
          False if the stream has ended, so that a producer knows when to stop.

        Raises:
          SessionError: the frame is not uint8 [H, W, 3], or its time is missing or out of order in lockstep.
        """
        rgb = np.asarray(rgb)
        if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[-1] != 3 or not rgb.size:
            raise SessionError(f"a frame is uint8 RGB [height, width, 3]; got {rgb.dtype} {list(rgb.shape)}")
        small = thumbnail(rgb) if self.config.selection.enabled else None
        at = self._time(time)
        rgb = self._scheduler.frame_pool.copy(rgb) if copy else np.ascontiguousarray(rgb)
        return self._push(Inbound(at, 1, self._scheduler.next_order(), rgb=rgb, thumbnail=small))

    def push_prompt(self, text: str, time: float | None = None) -> bool:
        """Asks the model something at `time` seconds of the stream (now, if None); cuts its answer, if any.

        Returns:
          False if the stream has ended.

        Raises:
          SessionError: the prompt exceeds the text capacity, or its time is missing or out of order in
            lockstep.
        """
        tokens = self.check_prompt(text)
        at = self._time(time)
        return self._push(Inbound(at, 0, self._scheduler.next_order(), prompt=text, tokens=tokens))

    def check_prompt(self, text: str) -> list[int]:
        """Tokenizes a prompt and checks its length.

        Raises:
          SessionError: it exceeds the text capacity.
        """
        tokens = chat.interjection(self._scheduler.engine.tokenizer, text)
        check_length(tokens, self.conversation.capacity, self.conversation.opening_length)
        return tokens

    def finish(self, *, time: float | None = None) -> None:
        """Declares the input complete: queued items are still processed, the answer finishes, then `End`.

        Args:
          time: stream time at which the input ends, from which a saved stream resumes; None for the time of
            the last frame or prompt.
        """
        with self._scheduler.changed:
            self.conversation.finish(self.clock.now())
            self.conversation.latest = max(self.conversation.latest, time or 0.0)
            self._scheduler.changed.notify_all()

    def interrupt(self) -> None:
        """Cuts the answer in progress, if any, at its next token; the stream stays open, in silence."""
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
                # Put back, so that iterating again ends at once.
                self.inbox.put(event)
                return

    def save(self, path: str | os.PathLike, state: Any, wall: float) -> float:
        """Writes the stream to a file, between two steps.

        Args:
          state: of the engine.
          wall: seconds on the stream's clock.

        Returns:
          Stream time at which it resumes.

        Raises:
          SessionError: the logits of the stream were not finite, or the device has no room for a copy.
          OSError: the file cannot be written.
        """
        copied = self.copy(state, wall)
        write_stream(path, copied.fetch())
        return copied.dialogue["start_time"]

    def copy(self, state: Any, wall: float) -> StreamCopy:
        """Copies the stream between two steps; arguments and errors are those of `save`."""
        if not self.conversation.is_finite():
            raise SessionError("a stream whose logits are not finite cannot continue, so it is not saved")
        engine = saving_engine(self._scheduler.engine)
        dialogue, frames, small = self.conversation.save(wall)
        try:
            slot = engine.copy_slot(state, self.slot)
        except jax.errors.JaxRuntimeError as error:
            raise SessionError(f"the device could not copy the stream: {error}") from error
        return StreamCopy(
            engine,
            slot,
            settings=engine.stream_settings(self.conversation.capacity),
            dialogue=copy.deepcopy(dialogue),
            frames=frames,
            thumbnail=small,
            remembered=self.remembered,
            times=self.conversation.moments.times(),
        )

    def resume(self, path: str | os.PathLike, saved: SavedStream) -> None:
        """Restores the dialogue of a copy, into a stream that has not begun.

        Args:
          path: file that it was read from, for errors.
          saved: whose arrays have been checked.

        Raises:
          SavedStreamError: the dialogue is not as it was saved.
        """
        conversation, engine = self.conversation, saving_engine(self._scheduler.engine)

        def make_prompt(time: float, text: str) -> Inbound:
            tokens = chat.interjection(engine.tokenizer, text)
            return Inbound(time, 0, self._scheduler.next_order(), prompt=text, tokens=tokens)

        def make_frame(
            time: float, rgb: UInt8[np.ndarray, "H W 3"] | None, unseen: UnseenReason | None
        ) -> Inbound:
            return Inbound(time, 1, self._scheduler.next_order(), rgb=rgb, unseen=unseen)

        try:
            small = saved.compared.get("thumbnail")
            conversation.resume(saved.dialogue, saved.frames, small, make_prompt, make_frame)
            features = saved.compared.get("features")
            # Kept only if the resumed stream compares frames; otherwise they would go stale.
            if features is not None and min_distance(self) is not None:
                self.remembered = Encoded(jnp.asarray(features)[None], 0)
            length = int(saved.arrays["text.length"])
            conversation.position = int(saved.arrays["text.position"])
            conversation.moments.resume(saved.compared)
            if length != conversation.text_length:
                raise ValueError(f"there are {length} tokens, of which {conversation.text_length} are known")
        except (KeyError, TypeError, ValueError) as error:
            raise SavedStreamError(f"{path} is not as it was saved: {error}") from error

    def copy_while_running(self) -> "Future[StreamCopy]":
        """Asks the scheduler for a copy of the stream between two of its steps, on the device.

        When the future is done, the inbox holds the events up to the copy and no later ones.

        Returns:
          A future that raises `SessionError` if the stream has ended or cannot be saved.
        """
        return self._scheduler.call(self, lambda state: self.copy(state, self.clock.now()))

    def _push(self, inbound: Inbound) -> bool:
        target = self.conversation
        with self._scheduler.changed:
            if target.ended or target.finished or target.stopped:
                return False
            if self.config.clock == "lockstep":
                _check_order(target, inbound, is_running=self._scheduler.is_running)
            inbound.arrived = monotonic()
            if inbound.is_frame:
                self._scheduler.frame_batcher.frame_arrived(inbound.arrived)
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
    """Narrows to an `Engine`, whose slots can be saved, loaded and reset.

    Raises:
      SessionError: the engine is a stand-in.
    """
    if not isinstance(engine, Engine):
        raise SessionError(f"the streams of a {type(engine).__name__} cannot be saved or resumed")
    return engine


def check_length(tokens: list[int], config: EngineConfig, opening_length: int = 0) -> None:
    """Rejects a prompt that does not fit in the text cache.

    Raises:
      SessionError: with the longest length that fits.
    """
    capacity, memory = config.text_capacity, config.memory
    # One more for the first token of the answer.
    if len(tokens) + 1 > capacity:
        raise SessionError(
            f"the prompt takes {len(tokens)} tokens and its answer at least 1, but the text capacity "
            f"is {capacity}"
        )
    # Pending tokens precede a prompt: at most an answer's last token and the silence after a cut.
    if memory.text == "window" and opening_length + 2 + len(tokens) > capacity:
        raise SessionError(
            f"the prompt takes {len(tokens)} tokens, but the text capacity of {capacity} has room for "
            f"{capacity - opening_length - 2} beside the opening, which is never forgotten"
        )


def min_distance(stream: Stream) -> float | None:
    """Feature distance to the last remembered frame below which a frame is skipped; None for no limit."""
    selection = stream.config.selection
    return selection.min_distance if selection.enabled else None


def _check_order(conversation: Conversation, inbound: Inbound, *, is_running: bool) -> None:
    """Rejects items that a lockstep session gets too late.

    Args:
      is_running: whether the session runs.
    """
    # A resumed stream was running until it was saved.
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
