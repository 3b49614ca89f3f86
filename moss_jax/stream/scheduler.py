"""Continuous-batching scheduler: many live streams over the slots of one engine.

Streams are opened and closed while others run, each with its own dialogue, sampling, memory and limits. One
loop packs their pending work into steps: prompts and frames that have arrived (chunked prefill, interleaved
with the tokens of other streams) and the next token of each answer in progress. `<|silence|>` parks a stream
until something arrives.

The device must never wait for the host, so a realtime loop dispatches the next step of talking streams
speculatively, shortly before the step in flight ends and without knowing its tokens. If such a token turns
out to be silence, the speculative step has correctly appended it, and only its own sample is dropped.
"""

import collections
import dataclasses
import itertools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from time import monotonic
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from moss_jax.config import (
    MemoryConfig,
    SchedulerConfig,
    SessionConfig,
    TokenSampling,
    UnseenReason,
)
from moss_jax.stream.completion import Completion, DialogueTurn, dialogue_parts, misfit, sizes
from moss_jax.stream.conversation import Conversation, Inbound, Plan
from moss_jax.stream.dispatch_timer import DECODE, DispatchTimer, Kind, StepInFlight
from moss_jax.stream.engine import Engine, EngineLike
from moss_jax.stream.events import End, Event
from moss_jax.stream.frame_pool import FramePool
from moss_jax.stream.limits import saved_config, stream_config
from moss_jax.stream.moments import BankView
from moss_jax.stream.perception import FEW, Strips
from moss_jax.stream.rows import Encoded, Row, features_of, first_step
from moss_jax.stream.saved import (
    SavedStream,
    SavedStreamError,
    check_settings,
    compare_weights,
    read_stream,
)
from moss_jax.stream.stream import (
    Clock,
    SessionError,
    Stream,
    check_length,
    min_distance,
    saving_engine,
)
from moss_jax.text import chat

_logger = logging.getLogger(__name__)

# Longest time that a frame waits for its batch to fill, in units of `SchedulerConfig.max_stall_ms`.
PATIENCE = 2.0
# Weight of a new measurement in the running mean of the interval between frames.
INTERVAL_WEIGHT = 1 / 16


class Refused(RuntimeError):
    """A stream is not admitted; other streams are unaffected."""


class Reservation:
    """A free slot kept for a stream that opens with it, until then or until it is released."""

    def __init__(self, scheduler: "Scheduler"):
        self._scheduler = scheduler

    def release(self) -> None:
        """Frees the slot for others; does nothing if a stream has it already, or later."""
        with self._scheduler.changed:
            self._scheduler.reserved.discard(self)


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


@dataclasses.dataclass
class SchedulerCounters:
    """Counters of a scheduler since its creation; only its threads change them.

    Attributes:
      step_rows, step_frames: histograms of steps, by number of streams and by number of frames appended.
      encoded_frames: histogram of encoded batches, by number of frames.
      failures: failed steps, each of which ends all streams.
    """

    step_rows: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    step_frames: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    encoded_frames: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    failures: int = 0


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
        self.reserved: set[Reservation] = set()
        self._orders = itertools.count()
        self._slots: list[Stream | None] = [None] * engine.config.slots
        # Streams that the loop has not started yet, and slots that still hold data of a former stream.
        self._opened: list[Stream] = []
        self._used: set[int] = set()
        # Remainders of the rows being appended, and plans, by stream.
        self._rows: dict[Stream, Row[Encoded]] = {}
        self._plans: dict[Stream, Plan] = {}
        # Calls that wait until a stream is between two steps; under None, until the loop's next pass.
        self._calls: dict[Stream | None, list[tuple[Callable[[Any], Any], Future]]] = {}
        self._thread: threading.Thread | None = None
        self._closing = self._paused = self._is_persistent = False
        # Whether a batch of frames was started since the last step, and the one in transit to the device.
        self._has_batch = False
        self._sent: tuple[list[Inbound], Strips] | None = None
        # Running mean of the seconds between two frames of any streams.
        self._frame_interval, self._last_frame = 1.0, monotonic()
        # State of the engine, once the loop has ended.
        self.state: Any = None
        self._failure: BaseException | None = None

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
          Refused: no slot is free, or the scheduler is closed.
          ConfigError: the engine has no room or no program for these limits.
          SessionError: the prompt does not fit.
          SavedStreamError: the file cannot be read or does not fit the engine.
        """
        config = dataclasses.replace(config or SessionConfig(), clock=self.config.clock)
        clock = clock or Clock(is_realtime=config.clock == "realtime")
        tokenizer = self.engine.tokenizer
        limits = stream_config(
            self.engine.config,
            memory,
            bank_capacity,
            text_capacity,
            model=self.engine.model_config if isinstance(self.engine, Engine) else None,
        )
        opening = [] if resume else chat.opening(tokenizer, system=system, prompt=prompt)
        saved = None
        if resume:
            engine = saving_engine(self.engine)
            saved = read_stream(resume)
            # A resumed stream keeps the limits that it was saved with.
            limits = saved_config(engine.config, saved.settings)
            check_settings(resume, saved.settings, engine.stream_settings(limits))
            compare_weights(resume, saved.weights, engine.weights)
        else:
            check_length(opening, limits)
        with self.changed:
            conversation = Conversation(
                tokenizer,
                limits,
                config,
                self._free_slot(reservation),
                opening=opening,
                prompt="" if resume else prompt,
            )
            if isinstance(self.engine, Engine):
                conversation.speed.bytes = self.engine.slot_bytes
            stream = Stream(self, conversation, clock)
            stream.sampling = None if resume else sampling
            if resume and saved:
                stream.arrays = self._resume(stream, resume, saved)
            clock.start_time = max(clock.start_time, conversation.start_time)
            self._take_slot(stream, reservation)
        return stream

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
        model = self.engine.model_config if isinstance(self.engine, Engine) else None
        limits = stream_config(self.engine.config, memory, bank_capacity, text_capacity, model=model)
        try:
            parts = dialogue_parts(self.engine.tokenizer, turns, self.next_order())
        except ValueError as error:
            raise SessionError(str(error)) from error
        if message := misfit(limits, *sizes(limits, parts)):
            raise SessionError(message)
        if max_tokens < 1:
            raise SessionError(f"max_tokens must be at least 1, not {max_tokens}")
        config = SessionConfig(clock=self.config.clock)
        with self.changed:
            completion = Completion(
                self.engine.tokenizer,
                limits,
                config,
                self._free_slot(reservation),
                parts=parts,
                max_tokens=max_tokens,
            )
            stream = Stream(self, completion, Clock(is_realtime=config.clock == "realtime"))
            stream.sampling = sampling
            self._take_slot(stream, reservation)
        return stream

    def reserve(self) -> Reservation:
        """Reserves a free slot.

        Raises:
          Refused: no slot is free, or the scheduler is closed.
        """
        with self.changed:
            self._free_slot()
            reservation = Reservation(self)
            self.reserved.add(reservation)
            return reservation

    def _free_slot(self, reservation: Reservation | None = None) -> int:
        """Finds a slot for a new stream; the caller holds the lock.

        Raises:
          Refused: no slot is free, or the scheduler is closed.
        """
        if self._closing:
            raise Refused("the scheduler is closed")
        free = [slot for slot, stream in enumerate(self._slots) if stream is None]
        if len(free) <= len(self.reserved - {reservation}):
            raise Refused(f"all {len(self._slots)} slots are taken; close a stream, or raise engine.slots")
        return free[0]

    def _take_slot(self, stream: Stream, reservation: Reservation | None) -> None:
        """Assigns a stream its slot, which is no longer reserved; the caller holds the lock."""
        self.reserved.discard(reservation)
        self._slots[stream.slot] = stream
        self._opened.append(stream)
        self.changed.notify_all()

    @property
    def free_slots(self) -> int:
        """Number of slots free for new streams, without those that are reserved."""
        with self.changed:
            return 0 if self._closing else self._slots.count(None) - len(self.reserved)

    @property
    def is_started(self) -> bool:
        """Whether a thread runs the loop; False after a step has failed."""
        return self._thread is not None

    @property
    def streams(self) -> list[Stream]:
        """The open streams, in order of slot."""
        with self.changed:
            return [stream for stream in self._slots if stream]

    def frame_arrived(self, at: float) -> None:
        """Updates the mean interval between frames with the arrival of one."""
        self._frame_interval += INTERVAL_WEIGHT * (at - self._last_frame - self._frame_interval)
        self._last_frame = at

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

    def _resume(self, stream: Stream, path: str | os.PathLike, saved: SavedStream) -> list[np.ndarray]:
        """Restores a stream's dialogue from a file; returns the initial arrays of its slot."""
        conversation, engine = stream.conversation, saving_engine(self.engine)

        def make_prompt(time: float, text: str) -> Inbound:
            tokens = chat.interjection(engine.tokenizer, text)
            return Inbound(time, 0, self.next_order(), prompt=text, tokens=tokens)

        def make_frame(
            time: float, rgb: UInt8[np.ndarray, "H W 3"] | None, unseen: UnseenReason | None
        ) -> Inbound:
            return Inbound(time, 1, self.next_order(), rgb=rgb, unseen=unseen)

        try:
            arrays = engine.check_slot(saved.arrays)
            small = saved.compared.get("thumbnail")
            conversation.resume(saved.dialogue, saved.frames, small, make_prompt, make_frame)
            features = saved.compared.get("features")
            # Kept only if the resumed stream compares frames; otherwise they would go stale.
            if features is not None and min_distance(stream) is not None:
                stream.remembered = Encoded(jnp.asarray(features)[None], 0)
            length = int(saved.arrays["text.length"])
            conversation.position = int(saved.arrays["text.position"])
            conversation.moments.resume(saved.compared)
            if length != conversation.text_length:
                raise ValueError(f"there are {length} tokens, of which {conversation.text_length} are known")
        except (KeyError, TypeError, ValueError) as error:
            raise SavedStreamError(f"{path} is not as it was saved: {error}") from error
        return arrays

    # --------------------------------------------------------------------------- the thread

    def start(self) -> "Scheduler":
        """Starts the loop in a thread of its own, with an empty state.

        Raises:
          RuntimeError: the loop is already running.
        """
        with self.changed:
            if self._thread is not None:
                raise RuntimeError("the scheduler is already running")
            self._closing = False
            self._thread = threading.Thread(target=self._serve, name="scheduler", daemon=True)
            self._thread.start()
        return self

    def close(self) -> None:
        """Stops all streams at their next token, and then the loop."""
        with self.changed:
            self._closing = True
            for stream in self._slots:
                if stream:
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
                # A client notified of the failure may restart at once, and a stream opened after that is not
                # one of these.
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
        perception = None
        self.is_running, self._is_persistent, self._failure, self.state = True, persistent, None, None
        with self.changed:
            self._used, self._rows, self._plans = set(), {}, {}
        if self.config.clock == "realtime" and self.engine.perception_device is not None:
            perception = threading.Thread(target=self._perceive, name="perception", daemon=True)
            perception.start()
        try:
            yield from self._loop(persistent=persistent)
        finally:
            # From now on, pushes return False.
            with self.changed:
                self.is_running = False
                for stream in self._slots:
                    if stream:
                        stream.conversation.ended = True
                for stream in list(self._calls):
                    self._give_up(stream)
                self.changed.notify_all()
            if perception is not None:
                perception.join()

    def _loop(self, *, persistent: bool) -> Iterator[tuple[Stream, Event]]:
        state, timer, in_flight = self.engine.start(), DispatchTimer(), None
        self._has_batch, self._sent, self._encoded_before = False, None, 0
        while (moves := self._next_moves(in_flight, persistent=persistent)) is not None:
            for stream in moves.opened:
                state = self._begin(state, stream)
            for function, future in moves.calls:
                _call(function, state, future)
            if moves.opened or moves.calls:
                continue
            if moves.encode:
                self._begin_batch(moves.encode, is_busy=in_flight is not None)
                continue
            plans = moves.plans
            self._plan_rows({stream: plan for stream, plan in plans.items() if plan.tokens})
            before, in_flight = in_flight, None
            if rows := self._next_rows():
                state, in_flight = self._dispatch(state, rows, timer, moves.begun)
            self._encode_sent()
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
            self._rows.pop(stream, None)
            self._plans.pop(stream, None)
            if stream in self._opened:
                self._opened.remove(stream)
            self._give_up(stream)
            if self._slots[stream.slot] is stream and self._is_persistent:
                self._slots[stream.slot] = None
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
                if self._failure:
                    raise self._failure
                if self._opened:
                    opened, self._opened = self._opened, []
                    return Moves(opened=opened)
                under_way = {*self._rows, *(step.plans if step else ())}
                if ready := [stream for stream in self._calls if stream not in under_way]:
                    return Moves(calls=[call for stream in ready for call in self._calls.pop(stream)])
                live = [stream for stream in self._slots if stream and not stream.conversation.ended]
                idle = not step and not self._rows
                if idle and (self._paused or (not live and (self._closing or not persistent))):
                    return None
                if step and self._paused:
                    return Moves(plans=dict.fromkeys(step.plans, Plan()))
                time_left = step.time_left() if step else None
                may_continue = time_left is None or time_left <= 0
                frames, frames_wait = self._due_frames(live)
                if frames:
                    return Moves(encode=frames)
                # A step includes everything that arrives until it is due. Only a single stream's next step is
                # dispatched early, unless frames are in flight: those behind them are best encoded together.
                if may_continue or (len(live) == 1 and not (step and step.has_frames)):
                    plans = self._make_plans(live, step, may_continue=may_continue)
                    if plans or self._rows or (step and may_continue):
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
        waits_for_features = self._shares_encoder or self._perceives_apart()
        plans = {}
        for stream in live:
            if stream in self._rows or stream in self._calls:
                continue
            try:
                plan = stream.conversation.plan(
                    stream.clock.now(),
                    in_flight.get(stream),
                    may_continue=may_continue,
                    perception_async=waits_for_features,
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

    def _plan_rows(self, plans: Mapping[Stream, Plan]) -> None:
        """Turns plans into rows for the next steps."""
        fresh = [frame for plan in plans.values() for frame in plan.seen if frame.encoded is None]
        if fresh:
            self._encode(fresh)
        for stream, plan in plans.items():
            frames = [None if frame.unseen else frame.encoded for frame in plan.frames]
            self._withdraw_alike(stream, plan, frames)
            self._rows[stream] = Row(plan.tokens, frames, plan.new_turn, plan.compact, plan.kept)
            self._plans[stream] = plan

    def _next_rows(self) -> dict[Stream, Row[Encoded]]:
        """Takes the rows of the next step, longest wait first; remainders stay queued."""
        if not self._rows:
            return {}
        # An engine given whole rows splits them itself, but then no other stream gets a token meanwhile.
        if self.config.clock == "lockstep" or len(self._slots) == 1 or not isinstance(self.engine, Engine):
            now, later = self._rows, {}
        else:
            by_slot = {stream.slot: stream for stream in self._rows}
            rows = {stream.slot: row for stream, row in self._rows.items()}
            image = self.engine.tokenizer.special.image
            parts = first_step(rows, len(self._slots), image)
            now, later = ({by_slot[slot]: row for slot, row in part.items()} for part in parts)
        self._rows = later
        return now

    def _dispatch(
        self, state: Any, rows: Mapping[Stream, Row[Encoded]], timer: DispatchTimer, started: float
    ) -> tuple[Any, StepInFlight]:
        """Dispatches one step."""
        batches, indexed = features_of({stream.slot: row for stream, row in rows.items()})
        features = batches[0] if len(batches) == 1 else batches or None
        by_slot = [indexed.get(slot) for slot in range(len(self._slots))]
        state, sampled = self.engine.step(state, by_slot, features)
        self._has_batch = False
        # A row with a remainder has no sample yet.
        plans = {stream: self._plans.pop(stream) for stream in rows if stream not in self._rows}
        kind = Kind(
            max(len(row.tokens) for row in rows.values()),
            sum(len(row.frames) for row in rows.values()),
            self._encoded_before,
        )
        self._encoded_before = 0
        self.counters.step_rows[len(rows)] += 1
        self.counters.step_frames[kind.frames] += 1
        # A single stream's steps with prompts and frames are rare, and dispatched as soon as they are needed.
        is_typical = self._shares_encoder or kind == DECODE
        return state, StepInFlight(plans, kind, sampled.tokens, timer, started if is_typical else None)

    # --------------------------------------------------------------------------- perception

    @property
    def _shares_encoder(self) -> bool:
        """Whether the loop encodes queued frames of all streams in batches between steps."""
        return (
            self.config.clock == "realtime" and len(self._slots) > 1 and self.engine.perception_device is None
        )

    def _due_frames(self, live: list[Stream]) -> tuple[list[Inbound], float | None]:
        """Selects queued frames to encode now as one batch; none if that would stall text for too long.

        Frames that a prompt is queued behind come first; then streams take turns, oldest frame first. While a
        stream talks, a batch has no padding, and unless a prompt waits for it, it waits briefly to fill if
        more frames are expected soon, since larger batches take less time per frame.

        Returns:
          The batch, and seconds until a smaller one is due; None if no frames wait for that.
        """
        if not self._shares_encoder:
            return [], None
        talking = any(stream.conversation.speaking for stream in live)
        if self._sent or (talking and self._has_batch):
            return [], None
        turns = [
            (not stream.conversation.is_asked, turn, frame.order, frame)
            for stream in live
            for turn, frame in enumerate(sorted(stream.conversation.unclaimed_frames()))
        ]
        waiting = [frame for *_, frame in sorted(turns, key=lambda entry: entry[:3])]
        stall = self.config.max_stall_ms / 1e3
        most = self._batch_limit(stall if talking else math.inf)
        batch = [frame for frame in waiting if frame.shape == waiting[0].shape][:most]
        if talking and 0 < len(batch) < most:
            is_awaited = any(not others for others, *_ in turns)
            wait = min(frame.arrived for frame in batch) + PATIENCE * stall - monotonic()
            if not is_awaited and self._frame_interval < stall and wait > 0:
                return [], wait
            batch = batch[: self._full_batch(len(batch))]
        for frame in batch:
            frame.claimed = True
        return batch, None

    def _batch_limit(self, seconds: float) -> int:
        """Size of the largest batch that is encoded within this time; at least 1."""
        if not isinstance(self.engine, Engine):
            return FEW if seconds == math.inf else 1
        return self.engine.frame_encoder.largest_batch(seconds)

    def _full_batch(self, frames: int) -> int:
        """Size of the largest batch without padding."""
        if not isinstance(self.engine, Engine):
            return frames
        return max(size for size in self.engine.frame_encoder.buckets if size <= frames)

    def _begin_batch(self, frames: list[Inbound], *, is_busy: bool) -> None:
        """Encodes a batch now or, with a step in flight, sends it to be encoded after the next step.

        A transfer waits for the programs launched before it. Sent one step ahead, the transfer overlaps with
        that step, and the encoder does not wait for it.
        """
        self._has_batch = True
        if is_busy and isinstance(self.engine, Engine):
            self._sent = frames, self.engine.send(_pixels(frames))
        else:
            self._encode(frames)

    def _encode_sent(self) -> None:
        """Encodes the batch that was sent before the last step, if any."""
        if self._sent:
            (frames, sent), self._sent = self._sent, None
            self._encoded_before += len(frames)
            self._set_encoded(frames, saving_engine(self.engine).encode_sent(sent))

    def _encode(self, frames: list[Inbound]) -> None:
        """Queues frames for encoding on the device, after the step in flight."""
        self._encoded_before += len(frames) * (self.engine.perception_device is None)
        self._set_encoded(frames, self.engine.encode(_pixels(frames)))

    def _set_encoded(self, frames: list[Inbound], features: Float[Array, "P N D"]) -> None:
        """Assigns frames their features."""
        self.counters.encoded_frames[len(frames)] += 1
        with self.changed:
            for index, frame in enumerate(frames):
                frame.encoded = Encoded(features, index)
            self.changed.notify_all()

    def _withdraw_alike(self, stream: Stream, plan: Plan, frames: list[Encoded | None]) -> None:
        """Sets to None the frames of a row whose features are similar to those of the last remembered frame.

        Blocks until the features are ready, and so for the step in flight before them.
        """
        threshold = min_distance(stream)
        if threshold is None:
            return
        for place, now in enumerate(frames):
            if now is None:
                continue
            before = stream.remembered
            if before and (
                self.engine.distance(before.features, before.index, now.features, now.index) < threshold
            ):
                stream.conversation.withdraw(plan, plan.frames[place])
                frames[place] = None
            else:
                stream.remembered = now

    def _perceives_apart(self) -> bool:
        """Whether frames stay in the inbox while the perception thread encodes them on another device.

        A step that waits for features would stall the text. While no stream is talking, it is better to
        dispatch the step at once.
        """
        return (
            self.config.clock == "realtime"
            and self.engine.perception_device is not None
            and any(s and not s.conversation.ended and s.conversation.speaking for s in self._slots)
        )

    def _perceive(self) -> None:
        """Encodes frames as they arrive while the model talks; body of the perception thread."""
        try:
            while frames := self._claim_frames():
                self._set_encoded(frames, jax.block_until_ready(self.engine.encode(_pixels(frames))))
        except BaseException as error:
            with self.changed:
                self._failure = error
                self.changed.notify_all()

    def _claim_frames(self) -> list[Inbound]:
        """Waits for frames to encode: the oldest and others of its size; none when the loop has ended."""
        with self.changed:
            while self.is_running:
                conversations = [s.conversation for s in self._slots if s and not s.conversation.ended]
                waiting = sorted(frame for c in conversations for frame in c.unclaimed_frames())
                if waiting and self._perceives_apart():
                    batch = [frame for frame in waiting if frame.shape == waiting[0].shape][:FEW]
                    for frame in batch:
                        frame.claimed = True
                    return batch
                self.changed.wait()
            return []


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


def _pixels(frames: list[Inbound]) -> list[UInt8[np.ndarray, "H W 3"]]:
    return [frame.rgb for frame in frames if frame.rgb is not None]
