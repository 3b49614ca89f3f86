"""One stream of a session: what comes in, what is appended next, what is told of it."""

import dataclasses
import heapq
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from moss_jax.config import SessionConfig
from moss_jax.stream.engine import PENDING, Engine
from moss_jax.stream.events import Counters, End, EndReason, Event, Frame, Interrupted, Silence, Text, Turn
from moss_jax.text import Detokenizer

# Stream times that lie closer than this are one instant.
INSTANT = 1e-6


class Encoded(NamedTuple):
    """Where a frame's features are."""

    pool: Float[Array, "P N D"]
    index: int


@dataclasses.dataclass(order=True)
class Inbound:
    """A frame or a prompt on its way in; sorts by time, prompts before frames of the same instant.

    Attributes:
      taken: a thread of its own sees to the encoding.
      encoded: a frame's features.
    """

    time: float
    kind: int
    order: int
    rgb: np.ndarray | None = dataclasses.field(default=None, compare=False)
    prompt: str | None = dataclasses.field(default=None, compare=False)
    tokens: list[int] = dataclasses.field(default_factory=list, compare=False)
    taken: bool = dataclasses.field(default=False, compare=False)
    encoded: Encoded | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass
class Plan:
    """What a slot does next: the row to append (none if the stream just ended), and what to tell of it.

    Attributes:
      ahead: nothing has happened; the row is a token that isn't known yet, and may turn out to be a silence.
      end: why the stream ends here.
    """

    events: list[Event]
    tokens: list[int] = dataclasses.field(default_factory=list)
    frames: list[Inbound] = dataclasses.field(default_factory=list)
    new_turn: bool = False
    ahead: bool = False
    end: EndReason | None = None


class Slot:
    """One stream of a session: its inbox, its clock, and where its dialogue stands.

    `receive` and `plan` run under the session's lock; `hear` and `tell` in the thread that iterates, like
    `plan`.
    """

    def __init__(self, engine: Engine, config: SessionConfig, slot: int, opening: list[int], prompt: str):
        self.slot = slot
        self.finished = self.stopped = self.ended = False
        self.latest = 0.0
        self._config = config
        self._capacity = engine.config
        self._special = engine.tokenizer.special
        self._detokenizer = Detokenizer(engine.tokenizer)
        self._opening: list[int] | None = opening
        self._prompt = prompt
        self._inbox: list[Inbound] = []
        self._counts = dict.fromkeys((f.name for f in dataclasses.fields(Counters)), 0)
        # What the next row begins with: the token that was drawn, unless it has been appended already.
        self._pending = [PENDING]
        self.speaking = False
        self._said = ""
        self._text_length = 0
        # The lockstep clock: the instant of the last thing that happened, and the tokens since.
        self._instant, self._ticks = 0.0, 0
        self._finished_at = 0.0
        # Why the stream ends when what fitted has been taken in.
        self._full: EndReason | None = None
        self._wall = 0.0

    def finish(self, wall: float) -> None:
        self.finished, self._finished_at = True, wall

    def receive(self, inbound: Inbound) -> None:
        self.latest = max(self.latest, inbound.time)
        if inbound.rgb is not None and self._config.clock == "realtime":
            self._make_room()
        heapq.heappush(self._inbox, inbound)

    def _make_room(self) -> None:
        """Drops the oldest waiting frame of a full inbox."""
        waiting = [i for i in self._inbox if i.rgb is not None]
        if len(waiting) >= self._config.inbox_frames:
            self._inbox.remove(min(waiting))
            heapq.heapify(self._inbox)
            self._counts["frames_dropped"] += 1

    def not_encoded(self) -> list[Inbound]:
        """Frames that wait to be encoded."""
        return [i for i in self._inbox if i.rgb is not None and not i.taken]

    def plan(self, wall: float, flying: Plan | None, on: bool, apart: bool) -> Plan | None:
        """What to do now; None if there is nothing to do.

        Args:
          flying: of this slot, what the step under way appends; its token isn't known yet.
          on: whether it is time to go on with an answer.
          apart: whether frames wait until they are encoded.
        """
        self._wall = wall
        if self.stopped:
            return self._end("stopped")
        if self._full:
            return self._end(self._full)
        if self._opening is not None:
            tokens, self._opening = self._opening, None
            self._text_length = len(tokens)
            return Plan([self._turn(self._prompt)], tokens, new_turn=True)
        if due := self._take_due(apart):
            return self._take_in(due, flying)
        if self.speaking and on and self._may_speak():
            return self._take_in([], flying)
        if self.finished and not self._inbox and not flying:
            return self._end("finished")
        return None

    def tell(self, plan: Plan) -> Iterator[Event]:
        """What a plan means to the listener, once everything before it has been heard."""
        for event in plan.events:
            if isinstance(event, Turn):
                yield from self._interrupt()
            yield event
        if plan.end:
            yield End(**self._stamp(), reason=plan.end, counters=Counters(**self._counts))

    def hear(self, plan: Plan, token: int, wall: float) -> Iterator[Event]:
        """Takes the token that was drawn after a plan's row."""
        if plan.ahead and not self.speaking:
            # The row was a silence, as turned out meanwhile: it has been appended, and nothing comes of it.
            self._pending = []
            return
        self._wall = wall
        at = self._now()
        self._ticks += 1
        self._pending = [PENDING]
        if token == self._special.silence:
            self.speaking, self._said = False, ""
            self._detokenizer.flush()
            self._counts["silences"] += 1
            yield Silence(slot=self.slot, stream_time=at, wall_time=wall)
            return
        self.speaking = True
        self._counts["tokens"] += 1
        if text := self._detokenizer.push(token):
            self._said += text
            yield Text(slot=self.slot, stream_time=at, wall_time=wall, text=text)

    def _take_due(self, apart: bool) -> list[Inbound]:
        """Removes from the inbox what has happened by now."""
        if not self._inbox:
            return []
        limit = np.inf
        if self._config.clock == "lockstep":
            first, now = self._inbox[0].time, self._now()
            if self.speaking and first > now + INSTANT:
                return []
            # A silent stream has nothing to do before the next event, so its clock goes there.
            limit = max(first, now) + INSTANT
            # Until something later is known, more may yet be pushed for this instant.
            if not self.finished and max(self._inbox).time <= limit:
                return []
        due = []
        while self._inbox and self._inbox[0].time <= limit and _goes_with(due, self._inbox[0], apart):
            due.append(heapq.heappop(self._inbox))
        return due

    def _take_in(self, due: list[Inbound], flying: Plan | None) -> Plan | None:
        """The row and the events of what happened, as far as there is room; the end if there is none."""
        begin = list(self._pending)
        if flying:
            # What it draws is pending, unless it is of no use; see `hear`.
            begin = [] if flying.ahead and not self.speaking else [PENDING]
        plan = Plan([], begin, ahead=bool(flying) and not due)
        for inbound in due:
            is_frame = inbound.rgb is not None
            if is_frame and self._counts["frames"] == self._capacity.bank_capacity:
                self._full = "bank_capacity"
                break
            tokens = [self._special.image] if is_frame else inbound.tokens
            if self._text_length + len(plan.tokens) + len(tokens) > self._capacity.text_capacity:
                self._full = "text_capacity"
                break
            plan.tokens += tokens
            if inbound.time > self._instant:
                self._instant, self._ticks = inbound.time, 0
            if is_frame:
                plan.frames.append(inbound)
                plan.events.append(Frame(**self._stamp(), index=self._counts["frames"], time=inbound.time))
                self._counts["frames"] += 1
            else:
                plan.new_turn = True
                plan.events.append(self._turn(inbound.prompt))
        if plan.ahead and self._text_length + len(plan.tokens) > self._capacity.text_capacity:
            return None  # If it is a silence, there is nothing that needs room.
        if self._text_length + len(plan.tokens) > self._capacity.text_capacity:
            self._full = "text_capacity"
        if self._full and not plan.events:
            return self._end(self._full)
        self._text_length += len(plan.tokens)
        return plan

    def _interrupt(self) -> Iterator[Event]:
        """Cuts the answer in progress, if there is one."""
        if self.speaking:
            self._counts["interruptions"] += 1
            yield Interrupted(**self._stamp(), said=self._said)
        self.speaking, self._said = False, ""
        self._detokenizer.flush()

    def _may_speak(self) -> bool:
        """Whether an answer in progress gets another token now."""
        if self.finished and not self._inbox:
            end_of_input = self._instant if self._config.clock == "lockstep" else self._finished_at
            return self._now() + INSTANT < end_of_input + self._config.tail_seconds
        if self._config.clock == "realtime":
            return True
        # A lockstep stream must know that nothing happens before this token.
        return bool(self._inbox) and self._inbox[0].time > self._now() + INSTANT

    def _turn(self, prompt: str) -> Turn:
        self._counts["prompts"] += bool(prompt)
        return Turn(**self._stamp(), prompt=prompt)

    def _end(self, reason: EndReason) -> Plan:
        self.ended = True
        return Plan([], end=reason)

    def _stamp(self) -> dict[str, float | int]:
        return {"slot": self.slot, "stream_time": self._now(), "wall_time": self._wall}

    def _now(self) -> float:
        """The time of the stream."""
        if self._config.clock == "realtime":
            return self._wall
        return self._instant + self._ticks / self._config.tokens_per_second


def _goes_with(due: list[Inbound], inbound: Inbound, apart: bool) -> bool:
    """Whether it can be taken in with those before it; of frames encoded apart, one batch a step."""
    if inbound.rgb is None:
        return True
    if inbound.encoded is None and (apart or inbound.taken):
        return False
    return len({i.encoded and id(i.encoded.pool) for i in (*due, inbound) if i.rgb is not None}) == 1
