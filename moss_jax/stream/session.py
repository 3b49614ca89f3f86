"""A live session: frames and prompts go in from any thread, typed events come out.

The loop of a stream: what has happened since the last token - prompts, frames - is appended in order of
time, then one token is drawn. `<|silence|>` parks the stream until something happens. A frame or a prompt
that arrives while the model is talking enters at the next token.

So that the device never waits for the host, a realtime session dispatches a step of a talking model shortly
before the one under way ends, without knowing what that one draws. Should it be a silence, that step has
appended it, which is right, and what it drew itself is not used.
"""

import itertools
import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from moss_jax.config import SessionConfig
from moss_jax.stream.conversation import Encoded, Inbound, Plan, Slot
from moss_jax.stream.engine import ENCODE_BUCKETS, Drawn, Engine, EngineState, Row
from moss_jax.stream.events import Event
from moss_jax.stream.pace import Pace
from moss_jax.text import chat


class SessionError(ValueError):
    """A push that the session cannot take; the session goes on."""


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
      prompt: content of the first user turn. Empty, the model watches unasked.

    Attributes:
      opening_length: tokens of system prompt, first turn and header.
    """

    def __init__(
        self,
        engine: Engine,
        config: SessionConfig | None = None,
        *,
        system: str | None = chat.SYSTEM_PROMPT,
        prompt: str = "",
    ):
        self.config = config or SessionConfig()
        self._engine = engine
        self._changed = threading.Condition()
        self._order = itertools.count()
        self._started: float | None = None
        self._iterated = False
        self._failure: BaseException | None = None
        opening = chat.opening(engine.tokenizer, system=system, prompt=prompt)
        self._check_length(opening)
        self.opening_length = len(opening)
        self._slots = [
            Slot(engine, self.config, slot, opening, prompt) for slot in range(engine.config.slots)
        ]

    def push_frame(
        self, rgb: UInt8[np.ndarray, "H W 3"], time: float | None = None, *, slot: int = 0
    ) -> bool:
        """Shows the model a frame, taken at `time` seconds of the stream (now, if None).

        Returns:
          False if the slot's stream is over, so that a feeder knows when to stop.

        Raises:
          SessionError: the frame is no uint8 [H, W, 3], or its time is missing or out of order in lockstep.
        """
        rgb = np.asarray(rgb)
        if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[-1] != 3 or not rgb.size:
            raise SessionError(f"a frame is uint8 RGB [height, width, 3]; got {rgb.dtype} {list(rgb.shape)}")
        return self._push(Inbound(self._time(time), 1, next(self._order), rgb=rgb), slot)

    def push_prompt(self, text: str, time: float | None = None, *, slot: int = 0) -> bool:
        """Asks the model something at `time` seconds of the stream (now, if None); cuts what it is saying.

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
          SessionError: they are more than the text capacity.
        """
        tokens = chat.interjection(self._engine.tokenizer, text)
        self._check_length(tokens)
        return tokens

    def now(self) -> float:
        """Seconds since the session began; 0 before it is iterated."""
        return 0.0 if self._started is None else time.monotonic() - self._started

    def finish(self, slot: int | None = None) -> None:
        """Nothing more will be pushed: what waits is still seen, the answer is finished, then comes `end`."""
        with self._changed:
            for s in self._select(slot):
                s.finish(self.now())
            self._changed.notify_all()

    def stop(self, slot: int | None = None) -> None:
        """Ends the stream at the next token."""
        with self._changed:
            for s in self._select(slot):
                s.stopped = True
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
            # Whoever still pushes learns that nobody listens any more.
            with self._changed:
                for s in self._slots:
                    s.ended = True
                self._changed.notify_all()
            if perception is not None:
                perception.join()

    def _live(self) -> Iterator[Event]:
        state, pace, flight = self._engine.start(), Pace(), None
        while plans := self._next_plans(flight):
            rows = {slot: plan for slot, plan in plans.items() if plan.tokens}
            before, flight = flight, None
            if rows:
                started = time.monotonic()
                state, drawn = self._run(state, rows)
                flight = _Flight(rows, drawn.tokens, pace, started)
            if before:
                tokens = before.land()
                if flight:
                    flight.begun = max(flight.begun, time.monotonic())
                yield from self._hear(before, tokens)
                with self._changed:
                    # Whether the model is talking decides who encodes what waits.
                    self._changed.notify_all()
            for slot, plan in plans.items():
                yield from self._slots[slot].tell(plan)
            if flight and self.config.clock == "lockstep":
                yield from self._hear(flight, flight.land())
                flight = None

    def _hear(self, flight: "_Flight", tokens: np.ndarray) -> Iterator[Event]:
        for slot, plan in flight.plans.items():
            yield from self._slots[slot].hear(plan, int(tokens[slot]), self.now())

    def _next_plans(self, flight: "_Flight | None") -> dict[int, Plan]:
        """What each slot does next, once there is anything to do; empty when all streams are over.

        With a step under way, also once it is time for the next one; if there is nothing to do then, its
        slots get empty plans.
        """
        with self._changed:
            # One pass under the lock decides for every slot, so a push is either in it or wakes the wait.
            while True:
                if self._failure:
                    raise self._failure
                if not flight and all(s.ended for s in self._slots):
                    return {}
                wall, left = self.now(), flight and flight.left()
                on = not flight or left <= 0
                flying = flight.plans if flight else {}
                apart = self._perceives_apart()
                plans = {
                    s.slot: s.plan(wall, flying.get(s.slot), on, apart) for s in self._slots if not s.ended
                }
                plans = {slot: plan for slot, plan in plans.items() if plan is not None}
                if plans or (flight and on):
                    return plans or dict.fromkeys(flying, Plan([]))
                self._changed.wait(left)

    def _run(self, state: EngineState, plans: dict[int, Plan]) -> tuple[EngineState, Drawn]:
        """Dispatches one step for the slots that have a plan."""
        inbound = [frame for plan in plans.values() for frame in plan.frames]
        pool, index = self._pool(inbound) if inbound else (None, iter(()))
        rows: list[Row | None] = [None] * len(self._slots)
        for slot, plan in plans.items():
            rows[slot] = Row(plan.tokens, [next(index) for _ in plan.frames], plan.new_turn)
        return self._engine.step(state, rows, pool)

    def _pool(self, frames: list[Inbound]) -> tuple[Float[Array, "P N D"], Iterator[int]]:
        """Features of frames, and where each one's are."""
        fresh = [frame for frame in frames if frame.encoded is None]
        pool = self._engine.encode([frame.rgb for frame in fresh]) if fresh else None
        if len(fresh) == len(frames):
            return pool, itertools.count()
        for index, frame in enumerate(fresh):
            frame.encoded = Encoded(pool, index)
        pools = list({id(frame.encoded.pool): frame.encoded.pool for frame in frames}.values())
        begin = dict(zip(map(id, pools), itertools.accumulate([0, *map(len, pools)]), strict=False))
        index = [begin[id(frame.encoded.pool)] + frame.encoded.index for frame in frames]
        return pools[0] if len(pools) == 1 else jnp.concatenate(pools), iter(index)

    def _perceives_apart(self) -> bool:
        """Whether frames wait until another thread has had them encoded by another device.

        That is for the sake of the text: a step that waits for features would hold it up. While nobody talks,
        the step is better dispatched at once.
        """
        return (
            self.config.clock == "realtime"
            and self._engine.perception_device is not None
            and any(s.speaking for s in self._slots if not s.ended)
        )

    def _perceive(self) -> None:
        """Encodes frames as they come, in a thread of its own, while the model talks."""
        try:
            while frames := self._next_frames():
                pool = jax.block_until_ready(self._engine.encode([frame.rgb for frame in frames]))
                with self._changed:
                    for index, frame in enumerate(frames):
                        frame.encoded = Encoded(pool, index)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _next_frames(self) -> list[Inbound]:
        """Frames of one size that wait to be encoded, the oldest first; empty when all streams are over."""
        with self._changed:
            while any(not s.ended for s in self._slots):
                waiting = sorted(frame for s in self._slots for frame in s.not_encoded())
                if waiting and self._perceives_apart():
                    alike = [frame for frame in waiting if frame.rgb.shape == waiting[0].rgb.shape]
                    alike = alike[: ENCODE_BUCKETS[1]]
                    for frame in alike:
                        frame.taken = True
                    return alike
                self._changed.wait()
            return []

    def _push(self, inbound: Inbound, slot: int) -> bool:
        with self._changed:
            (target,) = self._select(slot)
            if target.ended or target.finished or target.stopped:
                return False
            if self._iterated and self.config.clock == "lockstep" and inbound.time < target.latest:
                raise SessionError(
                    f"a running lockstep session takes frames and prompts in order of time: "
                    f"{inbound.time:g} s came after {target.latest:g} s"
                )
            target.receive(inbound)
            self._changed.notify_all()
            return True

    def _select(self, slot: int | None) -> list[Slot]:
        if slot is None:
            return self._slots
        if not 0 <= slot < len(self._slots):
            raise SessionError(f"there is no slot {slot}; the session has {len(self._slots)}")
        return [self._slots[slot]]

    def _time(self, time: float | None) -> float:
        if time is None:
            if self.config.clock == "lockstep":
                raise SessionError("a lockstep session needs the time of each frame and prompt")
            return self.now()
        if not np.isfinite(time) or time < 0:
            raise SessionError(f"time must be a number of seconds from 0 on, not {time}")
        return float(time)

    def _check_length(self, tokens: list[int]) -> None:
        # One more for the token that answers.
        capacity = self._engine.config.text_capacity
        if len(tokens) + 1 > capacity:
            raise SessionError(
                f"the prompt takes {len(tokens)} tokens and its answer at least 1, but the text capacity "
                f"is {capacity}"
            )


# Tokens and frames of a step that appends what was drawn last.
GOING_ON = (1, 0)


class _Flight:
    """A step under way.

    Attributes:
      plans: of the slots that take part.
      begun: when the device began with it, as far as the host knows.
    """

    def __init__(self, plans: dict[int, Plan], tokens: jax.Array, pace: Pace, started: float):
        self.plans, self.begun = plans, time.monotonic()
        self._tokens, self._pace = tokens, pace
        tokens.copy_to_host_async()
        self._kind = (max(len(p.tokens) for p in plans.values()), sum(len(p.frames) for p in plans.values()))
        if self._kind == GOING_ON:
            # The others are dispatched as soon as there is reason to, whatever the pace.
            pace.dispatched(self.begun - started)

    def land(self) -> np.ndarray:
        """Waits for its tokens."""
        tokens = np.asarray(self._tokens)
        self._pace.landed(self._kind, time.monotonic() - self.begun)
        return tokens

    def left(self) -> float:
        """Seconds until the next step should be dispatched."""
        return self.begun + self._pace.lead(self._kind) - time.monotonic()
