"""A live session: frames and prompts are pushed from any thread, typed events come out.

The loop of a stream: prompts and frames that arrived since the last token are appended in order of time, then
one token is sampled. `<|silence|>` parks the stream until something arrives. A frame or a prompt that arrives
while the model is talking enters at the next token.

The device must never wait for the host, so a realtime session dispatches the next step of a talking model
speculatively, shortly before the step in flight ends and without knowing its token. If that token is a
silence, the speculative step has appended it, which is right, and its own sample is dropped.
"""

import itertools
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from moss_jax.config import EngineConfig, SessionConfig, UnseenReason
from moss_jax.memory.selection import thumbnail
from moss_jax.stream.conversation import Conversation, Encoded, Inbound, Plan
from moss_jax.stream.dispatch_timer import DispatchTimer, StepInFlight
from moss_jax.stream.engine import Engine, EngineLike
from moss_jax.stream.events import Event
from moss_jax.stream.limits import saved_config
from moss_jax.stream.perception import FEW
from moss_jax.stream.rows import Row
from moss_jax.stream.saved import (
    SavedStream,
    SavedStreamError,
    check_settings,
    read_stream,
    write_stream,
)
from moss_jax.stream.step import Sampled
from moss_jax.text import chat


class SessionError(ValueError):
    """A push that the session refuses; the session goes on."""


class Session:
    """The live loop over the slots of an engine.

    Iterating runs the loop, in the thread that iterates; a session is iterated once. The pushes are
    thread-safe. A realtime session takes what has been pushed so far, by the wall clock. A lockstep session
    waits until it knows what comes next, so push in order of time, beforehand or from another thread, and
    call `finish`.

    Args:
      engine: of one or more slots.
      config: clock and bounds.
      system: system prompt; None for none.
      prompt: content of the first user turn. If it is empty, the model watches unasked.
      resume: files that `save` has written, by the slot that goes on with each; system and prompt are for the
        other slots. The clock goes on as well: from `start_time`.

    Attributes:
      opening_length: tokens of system prompt, first turn and header, of the slot with the most.

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
        self._changed = threading.Condition()
        self._order = itertools.count()
        # By slot, the features of the frame that was remembered last, where they are compared.
        self._remembered: dict[int, Encoded] = {}
        self._started: float | None = None
        self._iterated = False
        self._failure: BaseException | None = None
        # State of the engine, once the loop is over.
        self._state: Any = None
        self._ended_at = 0.0
        self._paused = False
        self.opening_length = 0
        opening = chat.opening(engine.tokenizer, system=system, prompt=prompt)
        if len(resume or ()) < engine.config.slots:
            self._check_length(opening, engine.config)
        self._conversations = [
            Conversation(engine.tokenizer, engine.config, self.config, slot, opening=opening, prompt=prompt)
            for slot in range(engine.config.slots)
        ]
        # By slot, the arrays that it begins with.
        self._resumed = {slot: self._resume(slot, path) for slot, path in (resume or {}).items()}
        self.opening_length = max(c.opening_length for c in self._conversations)

    def push_frame(
        self, rgb: UInt8[np.ndarray, "H W 3"], time: float | None = None, *, slot: int = 0
    ) -> bool:
        """Shows the model a frame, taken at `time` seconds of the stream (now, if None).

        The frame is copied, so the caller may reuse its memory at once. Where frames are selected
        (`SessionConfig.selection`), it may be that the model is not shown it; an event says so.

        Returns:
          False if the slot's stream is over, so that a feeder knows when to stop.

        Raises:
          SessionError: the frame is no uint8 [H, W, 3], or its time is missing or out of order in lockstep.
        """
        rgb = np.asarray(rgb)
        if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[-1] != 3 or not rgb.size:
            raise SessionError(f"a frame is uint8 RGB [height, width, 3]; got {rgb.dtype} {list(rgb.shape)}")
        small = thumbnail(rgb) if self.config.selection.enabled else None
        inbound = Inbound(self._time(time), 1, next(self._order), rgb=rgb.copy(), thumbnail=small)
        return self._push(inbound, slot)

    def push_prompt(self, text: str, time: float | None = None, *, slot: int = 0) -> bool:
        """Asks the model something at `time` seconds of the stream (now, if None); cuts its answer, if any.

        Returns:
          False if the slot's stream is over.

        Raises:
          SessionError: the prompt is longer than the text capacity, or its time is missing or out of order
            in lockstep.
        """
        tokens = self.check_prompt(text)
        return self._push(Inbound(self._time(time), 0, next(self._order), prompt=text, tokens=tokens), slot)

    def check_prompt(self, text: str) -> list[int]:
        """The tokens that a prompt would append.

        Raises:
          SessionError: they are more than the text capacity, of the stream with the smallest.
        """
        tokens = chat.interjection(self._engine.tokenizer, text)
        for capacity in sorted({c.capacity for c in self._conversations}, key=lambda c: c.text_capacity):
            self._check_length(tokens, capacity)
        return tokens

    @property
    def start_time(self) -> float:
        """Seconds of the stream at which the session begins: where a saved stream ended, the latest, or 0."""
        return max(c.start_time for c in self._conversations)

    def now(self) -> float:
        """Seconds since the session began; before it is iterated, those at which it begins.

        In realtime, the clock of a saved stream goes on.
        """
        before = self.start_time if self.config.clock == "realtime" else 0.0
        return before if self._started is None else before + time.monotonic() - self._started

    def finish(self, slot: int | None = None, *, time: float | None = None) -> None:
        """Declares the input complete: what waits is still seen, the answer is finished, then comes `End`.

        Args:
          slot: None for all.
          time: seconds of the stream that the input lasts, for where it goes on if it is saved; None for the
            time of the last frame or prompt.
        """
        with self._changed:
            for conversation in self._select(slot):
                conversation.finish(self.now())
                conversation.latest = max(conversation.latest, time or 0.0)
            self._changed.notify_all()

    def pause(self) -> None:
        """Ends the iteration after the step in flight, without `End`, so that streams can be saved.

        What waits in an inbox is saved as well.
        """
        with self._changed:
            self._paused = True
            self._changed.notify_all()

    @property
    def can_save(self) -> bool:
        """Whether `save` may be called: the iteration is over, and not by an error."""
        return self._state is not None

    def save(self, path: str | os.PathLike, slot: int = 0) -> float:
        """Writes the stream of a slot to a file, which another session resumes, also of another process.

        If it cannot be written, a file that was there is as it was.

        Returns:
          Seconds of the stream at which it goes on.

        Raises:
          SessionError: the iteration is not over, or the stream ended because its logits were not finite.
          OSError: the file cannot be written.
        """
        (conversation,) = self._select(slot)
        if not self.can_save:
            raise SessionError("a stream is saved when its iteration is over: pause it, and read all events")
        if not conversation.is_finite():
            raise SessionError("a stream whose logits are not finite cannot go on, so it is not saved")
        engine = self._saving_engine()
        dialogue, frames, small = conversation.save(self._ended_at)
        compared = {} if small is None else {"thumbnail": small}
        if remembered := self._remembered.get(slot):
            compared["features"] = np.asarray(remembered.features[remembered.index])
        arrays = engine.save_slot(self._state, slot)
        settings = engine.stream_settings(conversation.capacity)
        write_stream(path, SavedStream(settings, dialogue, arrays, frames, compared))
        return dialogue["start_time"]

    def _resume(self, slot: int, path: str | os.PathLike) -> list[np.ndarray]:
        """Has a slot go on with the dialogue of a file; the arrays that it holds."""
        self._select(slot)
        engine = self._saving_engine()
        saved = read_stream(path)
        # It keeps the limits that it was saved with.
        capacity = saved_config(engine.config, saved.settings)
        check_settings(path, saved.settings, engine.stream_settings(capacity))
        conversation = Conversation(engine.tokenizer, capacity, self.config, slot, opening=[], prompt="")
        self._conversations[slot] = conversation

        def make_prompt(time: float, text: str) -> Inbound:
            tokens = chat.interjection(engine.tokenizer, text)
            return Inbound(time, 0, next(self._order), prompt=text, tokens=tokens)

        def make_frame(
            time: float, rgb: UInt8[np.ndarray, "H W 3"] | None, unseen: UnseenReason | None
        ) -> Inbound:
            return Inbound(time, 1, next(self._order), rgb=rgb, unseen=unseen)

        try:
            arrays = engine.check_slot(saved.arrays)
            small = saved.compared.get("thumbnail")
            conversation.resume(saved.dialogue, saved.frames, small, make_prompt, make_frame)
            features = saved.compared.get("features")
            # Those of a stream that goes on without comparing would soon be of an older frame.
            if features is not None and self._min_distance is not None:
                self._remembered[slot] = Encoded(jnp.asarray(features)[None], 0)
            length = int(saved.arrays["text.length"])
            if length != conversation.text_length:
                raise ValueError(f"there are {length} tokens, of which {conversation.text_length} are known")
        except (KeyError, TypeError, ValueError) as error:
            raise SavedStreamError(f"{path} is not as it was saved: {error}") from error
        return arrays

    def _saving_engine(self) -> Engine:
        if not isinstance(self._engine, Engine):
            raise SessionError(f"the streams of a {type(self._engine).__name__} cannot be saved or resumed")
        return self._engine

    def interrupt(self, slot: int | None = None) -> None:
        """Cuts the answer in progress at its next token, if there is one; the stream goes on silent.

        Args:
          slot: None for all.
        """
        with self._changed:
            for conversation in self._select(slot):
                conversation.interrupted = conversation.speaking
            self._changed.notify_all()

    def stop(self, slot: int | None = None) -> None:
        """Ends the stream at the next token.

        Args:
          slot: None for all.
        """
        with self._changed:
            for conversation in self._select(slot):
                conversation.stopped = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Event]:
        if self._iterated:
            raise SessionError("a session is iterated once; make another for another stream")
        self._iterated = True
        self._started = time.monotonic()
        perception = None
        if self.config.clock == "realtime" and self._engine.perception_device is not None:
            perception = threading.Thread(target=self._perceive, name="perception", daemon=True)
            perception.start()
        try:
            yield from self._live()
        finally:
            # From now on, pushes return False.
            with self._changed:
                for conversation in self._conversations:
                    conversation.ended = True
                self._changed.notify_all()
            if perception is not None:
                perception.join()

    def _live(self) -> Iterator[Event]:
        state, timer, in_flight = self._engine.start(), DispatchTimer(), None
        while self._resumed:
            state = self._saving_engine().load_slot(state, *self._resumed.popitem())
        while plans := self._next_plans(in_flight):
            rows = {slot: plan for slot, plan in plans.items() if plan.tokens}
            before, in_flight = in_flight, None
            if rows:
                started = time.monotonic()
                state, sampled = self._dispatch(state, rows)
                in_flight = StepInFlight(rows, sampled.tokens, timer, started)
            if before:
                tokens = before.wait()
                if in_flight:
                    in_flight.begun = max(in_flight.begun, time.monotonic())
                yield from self._on_tokens(before, tokens)
                with self._changed:
                    # Whether the model is talking decides which thread encodes the waiting frames.
                    self._changed.notify_all()
            for slot, plan in plans.items():
                yield from self._conversations[slot].events(plan)
            if in_flight and self.config.clock == "lockstep":
                yield from self._on_tokens(in_flight, in_flight.wait())
                in_flight = None
        self._state, self._ended_at = state, self.now()

    def _on_tokens(self, step: StepInFlight, tokens: np.ndarray) -> Iterator[Event]:
        for slot, plan in step.plans.items():
            yield from self._conversations[slot].on_token(plan, int(tokens[slot]), self.now())

    def _next_plans(self, step: StepInFlight | None) -> Mapping[int, Plan]:
        """Waits until a slot has something to do; the plans by slot, none when all streams are over.

        With a step in flight, waits until the time to dispatch the next one at most; if there is nothing to
        do then, its slots get empty plans.
        """
        with self._changed:
            # One pass under the lock decides for every slot, so a push is either in it or wakes the wait.
            while True:
                if self._failure:
                    raise self._failure
                if not step and (self._paused or all(c.ended for c in self._conversations)):
                    return {}
                if step and self._paused:
                    return dict.fromkeys(step.plans, Plan())
                wall, time_left = self.now(), step.time_left() if step else None
                may_continue = time_left is None or time_left <= 0
                in_flight = step.plans if step else {}
                perception_async = self._perception_async()
                plans = {
                    c.slot: c.plan(
                        wall,
                        in_flight.get(c.slot),
                        may_continue=may_continue,
                        perception_async=perception_async,
                    )
                    for c in self._conversations
                    if not c.ended
                }
                plans = {slot: plan for slot, plan in plans.items() if plan is not None}
                if plans or (step and may_continue):
                    return plans or dict.fromkeys(in_flight, Plan())
                self._changed.wait(time_left)

    def _dispatch(self, state: Any, plans: Mapping[int, Plan]) -> tuple[Any, Sampled]:
        """Dispatches one step for the slots that have a plan."""
        inbound = [frame for plan in plans.values() for frame in plan.seen]
        features, index = self._features(inbound) if inbound else (None, iter(()))
        rows: list[Row | None] = [None] * len(self._conversations)
        for slot, plan in plans.items():
            frames = [None if frame.unseen else next(index) for frame in plan.frames]
            self._withdraw_alike(slot, plan, frames, features)
            rows[slot] = Row(plan.tokens, frames, plan.new_turn, plan.compact, plan.kept)
        return self._engine.step(state, rows, features)

    @property
    def _min_distance(self) -> float | None:
        return self.config.selection.min_distance if self.config.selection.enabled else None

    def _withdraw_alike(self, slot: int, plan: Plan, frames: list[int | None], features: Any) -> None:
        """Sets to None the frames of a row whose features are like those of the frame remembered before.

        The host waits for the features, and for the step in flight before them.
        """
        threshold = self._min_distance
        if threshold is None:
            return
        for place, index in enumerate(frames):
            if index is None:
                continue
            before = self._remembered.get(slot)
            if before and self._engine.distance(before.features, before.index, features, index) < threshold:
                self._conversations[slot].withdraw(plan, plan.frames[place])
                frames[place] = None
            else:
                self._remembered[slot] = Encoded(features, index)

    def _features(self, frames: list[Inbound]) -> tuple[Float[Array, "P N D"], Iterator[int]]:
        """Features of frames, encoded here unless they are already, and the index of each."""
        fresh = [frame for frame in frames if frame.encoded is None]
        if fresh:
            features = self._engine.encode([frame.rgb for frame in fresh if frame.rgb is not None])
            if len(fresh) == len(frames):
                return features, itertools.count()
            for index, frame in enumerate(fresh):
                frame.encoded = Encoded(features, index)
        encoded = [frame.encoded for frame in frames if frame.encoded is not None]
        batches = list({id(e.features): e.features for e in encoded}.values())
        begin = dict(zip(map(id, batches), itertools.accumulate([0, *map(len, batches)]), strict=False))
        index = [begin[id(e.features)] + e.index for e in encoded]
        return batches[0] if len(batches) == 1 else jnp.concatenate(batches), iter(index)

    def _perception_async(self) -> bool:
        """Whether frames wait in the inbox while the perception thread has them encoded on another device.

        A step that waits for features would stall the text. While no slot is talking, the step is better
        dispatched at once.
        """
        return (
            self.config.clock == "realtime"
            and self._engine.perception_device is not None
            and any(c.speaking for c in self._conversations if not c.ended)
        )

    def _perceive(self) -> None:
        """Encodes frames as they arrive while the model talks; the body of the perception thread."""
        try:
            while frames := self._claim_frames():
                rgb = [frame.rgb for frame in frames if frame.rgb is not None]
                features = jax.block_until_ready(self._engine.encode(rgb))
                with self._changed:
                    for index, frame in enumerate(frames):
                        frame.encoded = Encoded(features, index)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _claim_frames(self) -> list[Inbound]:
        """Waits for frames to encode; the oldest and others of its size, none when all streams are over."""
        with self._changed:
            while any(not c.ended for c in self._conversations):
                waiting = sorted(frame for c in self._conversations for frame in c.unclaimed_frames())
                if waiting and self._perception_async():
                    batch = [frame for frame in waiting if frame.shape == waiting[0].shape]
                    batch = batch[:FEW]
                    for frame in batch:
                        frame.claimed = True
                    return batch
                self._changed.wait()
            return []

    def _push(self, inbound: Inbound, slot: int) -> bool:
        with self._changed:
            (target,) = self._select(slot)
            if target.ended or target.finished or target.stopped:
                return False
            if self.config.clock == "lockstep":
                _check_order(target, inbound, iterated=self._iterated)
            target.receive(inbound)
            self._changed.notify_all()
            return True

    def _select(self, slot: int | None) -> list[Conversation]:
        if slot is None:
            return self._conversations
        if not 0 <= slot < len(self._conversations):
            raise SessionError(f"there is no slot {slot}; the session has {len(self._conversations)}")
        return [self._conversations[slot]]

    def _time(self, time: float | None) -> float:
        if time is None:
            if self.config.clock == "lockstep":
                raise SessionError("a lockstep session needs the time of each frame and prompt")
            return self.now()
        if not np.isfinite(time) or time < 0:
            raise SessionError(f"time must be a number of seconds from 0 on, not {time}")
        return float(time)

    def _check_length(self, tokens: list[int], config: EngineConfig) -> None:
        capacity, memory = config.text_capacity, config.memory
        # One more for the token that answers.
        if len(tokens) + 1 > capacity:
            raise SessionError(
                f"the prompt takes {len(tokens)} tokens and its answer at least 1, but the text capacity "
                f"is {capacity}"
            )
        # What is pending comes before a prompt, at most an answer's last token and the silence after a cut.
        if memory.text == "window" and self.opening_length + 2 + len(tokens) > capacity:
            raise SessionError(
                f"the prompt takes {len(tokens)} tokens, but the text capacity of {capacity} has room for "
                f"{capacity - self.opening_length - 2} beside the opening, which is never forgotten"
            )


def _check_order(conversation: Conversation, inbound: Inbound, *, iterated: bool) -> None:
    """Refuses what a lockstep session gets too late.

    Args:
      iterated: whether the session runs.
    """
    # A saved stream has been running until it was saved.
    latest = conversation.latest if iterated else conversation.start_time
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
