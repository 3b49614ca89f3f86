"""Continuous-batching scheduler: many live streams over the slots of one engine.

Streams are opened and closed while others run, each with its own dialogue, sampling, memory and limits. One
loop packs their pending work into steps: prompts and frames that have arrived (chunked prefill, interleaved
with the tokens of other streams) and the next token of each answer in progress. `<|silence|>` parks a stream
until something arrives.

The device must never wait for the host, so a realtime loop dispatches the next step of talking streams
speculatively, shortly before the step in flight ends and without knowing its tokens. If such a token turns
out to be silence, the speculative step has correctly appended it, and only its own sample is dropped.
"""

import dataclasses
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from time import monotonic
from typing import Any

import numpy as np

from moss_jax.config import MemoryConfig, SchedulerConfig, SessionConfig, TokenSampling
from moss_jax.stream.admission import Reservation, Slots, checked_dialogue, checked_file, checked_limits
from moss_jax.stream.completion import Completion, DialogueTurn
from moss_jax.stream.conversation import Conversation, Inbound, Plan
from moss_jax.stream.counters import SchedulerCounters
from moss_jax.stream.dispatch_timer import StepInFlight
from moss_jax.stream.dispatcher import StepDispatcher
from moss_jax.stream.engine import Engine, EngineLike
from moss_jax.stream.events import End, Event
from moss_jax.stream.frame_batcher import FrameBatcher
from moss_jax.stream.frame_pool import FramePool
from moss_jax.stream.moments import BankView
from moss_jax.stream.stream import Clock, SessionError, Stream, check_length, saving_engine
from moss_jax.text import chat

_logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Moves:
    """The next actions of the loop.

    Attributes:
      opened: streams to start.
      calls: functions to call with the engine's state, each while its stream is between two steps.
      encode: frames to encode.
      plans: of streams that have rows to append or events to emit.
      begun: when the host started to plan, by `time.monotonic`.
    """

    opened: list[Stream] = dataclasses.field(default_factory=list)
    calls: "list[tuple[Callable[[Any], Any], Future]]" = dataclasses.field(default_factory=list)
    encode: list[Inbound] = dataclasses.field(default_factory=list)
    plans: dict[Stream, Plan] = dataclasses.field(default_factory=dict)
    begun: float = 0.0


class Scheduler:
    """Runs the streams of one engine: in a thread between `start` and `close`, or in the caller of `run`.

    A failing stream ends alone, with `Failed` and `End`. A failing step ends all streams that way, and
    `start` may be called again. As a context manager, it starts and closes.

    Args:
      engine: its number of slots is the maximum number of concurrent streams.
      config: of all streams.

    Attributes:
      engine: as given.
      frame_pool: buffers of the queued frames.
      frame_batcher: encodes the queued frames in batches.
      changed: condition that guards all state shared by the threads and wakes the loop.
      is_running: whether the loop runs.
      counters: of steps and batches.
      reserved: free slots kept for streams that are about to open.
      state: of the engine, once the loop has ended without an error; otherwise None.
    """

    def __init__(self, engine: EngineLike, config: SchedulerConfig | None = None):
        self.engine = engine
        self.config = config or SchedulerConfig()
        self.frame_pool = FramePool()
        self.changed = threading.Condition()
        self.is_running = False
        self.counters = SchedulerCounters()
        self._slots = Slots(engine.config.slots, self.changed)
        self.reserved = self._slots.reserved
        self.frame_batcher = FrameBatcher(engine, self.config, self._slots, self.counters)
        self._dispatcher = self._make_dispatcher()
        self._orders = itertools.count()
        # Slots that still hold data of a former stream of this run.
        self._used: set[int] = set()
        # Calls that wait until a stream is between two steps; under None, until the loop's next pass.
        self._calls: dict[Stream | None, list[tuple[Callable[[Any], Any], Future]]] = {}
        self._thread: threading.Thread | None = None
        self._paused = self._is_persistent = False
        # Held while a saved stream is copied to the device.
        self._resuming = threading.Lock()
        # State of the engine, once the loop has ended.
        self.state: Any = None

    def _make_dispatcher(self) -> StepDispatcher:
        """A dispatcher without rows, for one run of the loop."""
        return StepDispatcher(self.engine, self.config, self.frame_batcher, self.counters)

    # ------------------------------------------------------------------------------ streams

    def open(
        self,
        config: SessionConfig | None = None,
        *,
        system: str | None = chat.SYSTEM_PROMPT,
        prompt: str = "",
        sampling: TokenSampling | None = None,
        memory: MemoryConfig | None = None,
        bank_capacity: int | None = None,
        text_capacity: int | None = None,
        resume: str | os.PathLike | None = None,
        clock: Clock | None = None,
        reservation: Reservation | None = None,
    ) -> Stream:
        """Opens a stream in a reserved or a free slot.

        Args:
          config: limits of the stream; its clock is the scheduler's.
          system: system prompt; None for none.
          prompt: content of the first user turn. If it is empty, the model watches unprompted.
          sampling: how its tokens are sampled; None for the engine's default.
          memory, bank_capacity, text_capacity: as for `stream_config`; None for the engine's.
          resume: file written by `Session.save` to resume from, with its dialogue, sampling and limits.
          clock: None for a clock of its own.
          reservation: of its slot; None for a slot that nobody has reserved.

        Raises:
          Refused: no slot is free, the device has no room to resume, or the scheduler is closed.
          ConfigError: the engine has no room or no program for these limits.
          SessionError: the prompt does not fit.
          SavedStreamError: the file cannot be read or does not fit the engine.
        """
        config = dataclasses.replace(config or SessionConfig(), clock=self.config.clock)
        clock = clock or Clock(is_realtime=config.clock == "realtime")
        limits = checked_limits(self.engine, memory, bank_capacity, text_capacity)
        opening, saved, arrays = [], None, None
        if resume:
            prompt, sampling = "", None
        else:
            opening = chat.opening(self.engine.tokenizer, system=system, prompt=prompt)
            check_length(opening, limits)

        def make(slot: int) -> Stream:
            conversation = Conversation(
                self.engine.tokenizer, limits, config, slot, opening=opening, prompt=prompt
            )
            if isinstance(self.engine, Engine):
                conversation.speed.bytes = self.engine.slot_bytes
            stream = Stream(self, conversation, clock)
            stream.sampling, stream.arrays = sampling, arrays
            if resume and saved:
                stream.resume(resume, saved)
            clock.start_time = max(clock.start_time, conversation.start_time)
            return stream

        # The slot is reserved first, so that no file is copied to the device for a stream that is refused.
        with self._slots.held(reservation) as reservation:
            if not resume:
                return self._slots.admit(make, reservation)
            # One file at a time, or their arrays could fill the device.
            with self._resuming:
                saved, limits, arrays = checked_file(self.engine, resume)
                return self._slots.admit(make, reservation)

    def complete(
        self,
        turns: Sequence[DialogueTurn],
        *,
        max_tokens: int = 512,
        sampling: TokenSampling | None = None,
        memory: MemoryConfig | None = None,
        bank_capacity: int | None = None,
        text_capacity: int | None = None,
        reservation: Reservation | None = None,
    ) -> Stream:
        """Answers a whole dialogue in a reserved or a free slot, alongside the live streams.

        All its frames are shown, in chunks; if they exceed the bank, memory is compacted as in a live stream.
        Nothing can be pushed, and its events are those of `answer_offline`. `stop` ends the answer.

        Args:
          turns: the last is the user's.
          max_tokens: limit on the answer.
          sampling: how its tokens are sampled; None for the engine's default.
          memory, bank_capacity, text_capacity: as for `stream_config`; None for the engine's.
          reservation: of its slot; None for a slot that nobody has reserved.

        Raises:
          Refused: no slot is free, or the scheduler is closed.
          ConfigError: the engine has no room or no program for these limits.
          SessionError: the dialogue does not fit, or cannot be answered.
        """
        limits = checked_limits(self.engine, memory, bank_capacity, text_capacity)
        parts = checked_dialogue(self.engine, limits, turns, self.next_order())
        if max_tokens < 1:
            raise SessionError(f"max_tokens must be at least 1, not {max_tokens}")
        config = SessionConfig(clock=self.config.clock)

        def make(slot: int) -> Stream:
            completion = Completion(
                self.engine.tokenizer, limits, config, slot, parts=parts, max_tokens=max_tokens
            )
            stream = Stream(self, completion, Clock(is_realtime=config.clock == "realtime"))
            stream.sampling = sampling
            return stream

        return self._slots.admit(make, reservation)

    def reserve(self) -> Reservation:
        """Reserves a free slot.

        Raises:
          Refused: no slot is free, or the scheduler is closed.
        """
        return self._slots.reserve()

    @property
    def free_slots(self) -> int:
        """Number of slots free for new streams, without those that are reserved."""
        return self._slots.num_free

    @property
    def is_started(self) -> bool:
        """Whether a thread runs the loop; False after a step has failed."""
        return self._thread is not None

    @property
    def streams(self) -> list[Stream]:
        """The open streams, in order of slot."""
        return self._slots.streams

    def next_order(self) -> int:
        """Returns the next sequence number for a pushed item."""
        return next(self._orders)

    def call[T](self, stream: Stream | None, function: Callable[[Any], T]) -> "Future[T]":
        """Schedules a function to be called by the loop with the engine's state.

        The function must be quick and must not keep the state.

        Args:
          stream: gets no new step before the call, which waits for its step in flight; None to call in the
            loop's next pass.

        Returns:
          A future of the function's result; it raises `SessionError` if the stream or the loop ends first.
        """
        future: Future[T] = Future()
        with self.changed:
            if self.is_running and not (stream and stream.conversation.ended):
                self._calls.setdefault(stream, []).append((function, future))
                self.changed.notify_all()
                return future
        future.set_exception(SessionError("the stream is over"))
        return future

    def look_at_banks(self) -> "Future[dict[Stream, BankView]]":
        """Asks the loop for a snapshot of the memory banks of all streams, without stalling any of them.

        Returns:
          A future that raises `SessionError` if the loop has ended, or the engine is not an `Engine`.
        """

        def look(state: Any) -> dict[Stream, BankView]:
            engine = saving_engine(self.engine)
            vectors, whole = engine.bank_vectors(state), engine.model_config.vectors_per_frame
            return {
                stream: BankView(*vectors, stream.slot, stream.conversation.moments.times(), whole)
                for stream in self.streams
            }

        return self.call(None, look)

    # --------------------------------------------------------------------------- the thread

    def start(self) -> "Scheduler":
        """Starts the loop in a thread of its own, with an empty state.

        Raises:
          RuntimeError: the loop is already running.
        """
        with self.changed:
            if self._thread is not None:
                raise RuntimeError("the scheduler is already running")
            self._slots.is_closed = False
            self._thread = threading.Thread(target=self._serve, name="scheduler", daemon=True)
            self._thread.start()
        return self

    def close(self) -> None:
        """Stops all streams at their next token, and then the loop."""
        with self.changed:
            self._slots.is_closed = True
            for stream in self.streams:
                stream.conversation.stopped = True
            thread = self._thread
            self.changed.notify_all()
        if thread is not None:
            thread.join()

    def __enter__(self) -> "Scheduler":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        """Body of the loop's thread."""
        try:
            for stream, event in self._guarded(persistent=True):
                stream.inbox.put(event)
        except Exception as error:
            _logger.exception("a step failed; all streams were ended")
            self.counters.failures += 1
            with self.changed:
                # A client notified of the failure may restart at once, but not among streams of before, and a
                # stream opened after that is not one of these.
                streams, self._thread = self.streams, None
                for stream in streams:
                    self._fail(stream, error)
        else:
            with self.changed:
                self._thread = None

    def _fail(self, stream: Stream, error: BaseException) -> None:
        """Ends a stream with an error."""
        for event in stream.conversation.fail(f"{type(error).__name__}: {error}", stream.clock.now()):
            stream.inbox.put(event)
        self._release(stream)

    # ----------------------------------------------------------------------------- the loop

    def run(self) -> Iterator[Event]:
        """Runs the loop in the iterating thread until all streams have ended; yields their events.

        Errors propagate to the caller.
        """
        for _, event in self._guarded(persistent=False):
            yield event

    def pause(self) -> None:
        """Stops the loop after the step in flight, without `End` events."""
        with self.changed:
            self._paused = True
            self.changed.notify_all()

    def _guarded(self, *, persistent: bool) -> Iterator[tuple[Stream, Event]]:
        """Runs the loop together with the perception thread."""
        self.is_running, self._is_persistent, self.state = True, persistent, None
        with self.changed:
            self._used, self._dispatcher = set(), self._make_dispatcher()
        self.frame_batcher.start()
        try:
            yield from self._loop(persistent=persistent)
        finally:
            # From now on, pushes return False.
            with self.changed:
                self.is_running = False
                self.frame_batcher.stop()
                for stream in self.streams:
                    stream.conversation.ended = True
                for stream in list(self._calls):
                    self._give_up(stream)
                self.changed.notify_all()
            self.frame_batcher.join()

    def _loop(self, *, persistent: bool) -> Iterator[tuple[Stream, Event]]:
        state, in_flight = self.engine.start(), None
        while (moves := self._next_moves(in_flight, persistent=persistent)) is not None:
            for stream in moves.opened:
                state = self._begin(state, stream)
            for function, future in moves.calls:
                _call(function, state, future)
            if moves.opened or moves.calls:
                continue
            if moves.encode:
                self.frame_batcher.begin(moves.encode, is_busy=in_flight is not None)
                continue
            plans = moves.plans
            self._dispatcher.add({stream: plan for stream, plan in plans.items() if plan.tokens})
            before = in_flight
            state, in_flight = self._dispatcher.dispatch(state, moves.begun)
            self.frame_batcher.encode_sent()
            if before:
                tokens = before.wait()
                if in_flight:
                    in_flight.begun = max(in_flight.begun, monotonic())
                yield from self._on_tokens(before, tokens)
                with self.changed:
                    # Whether the model is talking decides which thread encodes the queued frames.
                    self.changed.notify_all()
            for stream, plan in plans.items():
                yield from self._told(stream, stream.conversation.events(plan))
            if in_flight and self.config.clock == "lockstep":
                yield from self._on_tokens(in_flight, in_flight.wait())
                in_flight = None
        self.state = state

    def _on_tokens(self, step: StepInFlight, tokens: np.ndarray) -> Iterator[tuple[Stream, Event]]:
        for stream, plan in step.plans.items():
            wall = stream.clock.now()
            events = stream.conversation.on_token(plan, int(tokens[stream.slot]), wall)
            yield from self._told(stream, events)

    def _told(self, stream: Stream, events: Iterator[Event]) -> Iterator[tuple[Stream, Event]]:
        """Yields a stream's events; in the scheduler's thread, an error in them ends only that stream."""
        if stream.conversation.has_failed:
            return
        try:
            for event in events:
                yield stream, event
                if isinstance(event, End):
                    self._release(stream)
        except Exception as error:
            if not self._is_persistent:
                raise
            _logger.exception("a stream failed and was ended; the others continue")
            self._fail(stream, error)

    def _release(self, stream: Stream) -> None:
        """Frees the slot of a stream that has ended."""
        with self.changed:
            stream.conversation.ended = True
            self._dispatcher.drop(stream)
            self._give_up(stream)
            self._slots.release(stream, frees_slot=self._is_persistent)
            self.changed.notify_all()

    def _give_up(self, stream: Stream | None) -> None:
        """Fails the pending calls of a stream that has ended."""
        for _, future in self._calls.pop(stream, ()):
            if future.set_running_or_notify_cancel():
                future.set_exception(SessionError("the stream is over"))

    def _begin(self, state: Any, stream: Stream) -> Any:
        """Initialises the slot of a stream."""
        if stream.slot in self._used:
            state = saving_engine(self.engine).reset_slot(state, stream.slot)
        if stream.arrays is not None:
            state = saving_engine(self.engine).load_slot(state, stream.slot, stream.arrays)
            stream.arrays = None
        elif stream.sampling is not None or stream.slot in self._used:
            engine = saving_engine(self.engine)
            state = engine.set_sampling(state, stream.slot, stream.sampling or engine.sampling)
        self._used.add(stream.slot)
        stream.clock.start()
        return state

    def _next_moves(self, step: StepInFlight | None, *, persistent: bool) -> Moves | None:
        """Waits until a stream has something to do; returns None when the loop is to end.

        With a step in flight, waits at most until it is time to dispatch the next one; if there is nothing to
        do then, its streams get empty plans.
        """
        with self.changed:
            # One pass under the lock plans every stream, so a push is either included or wakes the wait.
            while True:
                begun = monotonic()
                if self.frame_batcher.failure:
                    raise self.frame_batcher.failure
                if opened := self._slots.take_admitted():
                    return Moves(opened=opened)
                under_way = {*self._dispatcher.rows, *(step.plans if step else ())}
                if ready := [stream for stream in self._calls if stream not in under_way]:
                    return Moves(calls=[call for stream in ready for call in self._calls.pop(stream)])
                live = self._slots.live
                idle = not step and not self._dispatcher.rows
                if idle and (self._paused or (not live and (self._slots.is_closed or not persistent))):
                    return None
                if step and self._paused:
                    return Moves(plans=dict.fromkeys(step.plans, Plan()))
                time_left = step.time_left() if step else None
                may_continue = time_left is None or time_left <= 0
                frames, frames_wait = self.frame_batcher.due(live)
                if frames:
                    return Moves(encode=frames)
                # A step includes everything that arrives until it is due. Only a single stream's next step is
                # dispatched early, unless frames are in flight: those behind them are best encoded together.
                if may_continue or (len(live) == 1 and not (step and step.has_frames)):
                    plans = self._make_plans(live, step, may_continue=may_continue)
                    if plans or self._dispatcher.rows or (step and may_continue):
                        plans = plans or dict.fromkeys(step.plans if step else (), Plan())
                        return Moves(plans=plans, begun=begun)
                deadlines = [stream.conversation.deadline(stream.clock.now()) for stream in live]
                waits = [wait for wait in (time_left, frames_wait, *deadlines) if wait is not None]
                self.changed.wait(max(0.0, min(waits)) if waits else None)

    def _make_plans(
        self, live: list[Stream], step: StepInFlight | None, *, may_continue: bool
    ) -> dict[Stream, Plan]:
        """Plans the next action of each stream, except those whose row is still being appended."""
        in_flight = step.plans if step else {}
        encodes_ahead = self.frame_batcher.encodes_ahead
        plans = {}
        for stream in live:
            if stream in self._dispatcher.rows or stream in self._calls:
                continue
            try:
                plan = stream.conversation.plan(
                    stream.clock.now(),
                    in_flight.get(stream),
                    may_continue=may_continue,
                    perception_async=encodes_ahead,
                )
            except Exception as error:
                if not self._is_persistent:
                    raise
                _logger.exception("a stream failed and was ended; the others continue")
                self._fail(stream, error)
                continue
            if plan is not None:
                plans[stream] = plan
        return plans


def _call(function: Callable[[Any], Any], state: Any, future: Future) -> None:
    """Calls a function and sets its result or exception on the future, unless that is cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function(state)
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(result)
