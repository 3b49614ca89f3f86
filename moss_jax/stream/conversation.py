"""The dialogue of one slot: its inbox, its clock, the rows to append, the events to report."""

import dataclasses
import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, UInt8

from moss_jax.config import EngineConfig, SessionConfig
from moss_jax.stream.events import (
    Counters,
    End,
    EndReason,
    Event,
    FrameSeen,
    Interrupted,
    NotAsked,
    Silence,
    Text,
    Turn,
)
from moss_jax.stream.rows import PENDING
from moss_jax.stream.step import NOT_FINITE
from moss_jax.text import Detokenizer, Tokenizer

# Stream times that are closer than this are one instant.
INSTANT = 1e-6


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A frame's features: an index into those of its batch."""

    features: Float[Array, "P N D"]
    index: int


@dataclasses.dataclass(order=True)
class Inbound:
    """A frame or a prompt in the inbox; sorts by time, prompts before frames of the same instant.

    Attributes:
      kind: 0 for a prompt, 1 for a frame.
      order: of pushing, among those of one time and kind.
      rgb: None for a prompt.
      tokens: that a prompt appends.
      claimed: whether the perception thread encodes the frame.
      encoded: a frame's features, once the perception thread has them.
    """

    time: float
    kind: int
    order: int
    rgb: UInt8[np.ndarray, "H W 3"] | None = dataclasses.field(default=None, compare=False)
    prompt: str = dataclasses.field(default="", compare=False)
    tokens: list[int] = dataclasses.field(default_factory=list, compare=False)
    claimed: bool = dataclasses.field(default=False, compare=False)
    encoded: Encoded | None = dataclasses.field(default=None, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a frame."""
        return () if self.rgb is None else self.rgb.shape


@dataclasses.dataclass
class Plan:
    """The next move of a slot: the row to append (empty if the stream just ended) and the events of it.

    Attributes:
      speculative: the row is only the token of the step in flight, which may turn out to be a silence.
      end: why the stream ends here.
    """

    events: list[Event] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    frames: list[Inbound] = dataclasses.field(default_factory=list)
    new_turn: bool = False
    speculative: bool = False
    end: EndReason | None = None


class Conversation:
    """The state of the dialogue in one slot; knows no engine.

    `receive` and `plan` run under the session's lock; `plan`, `events` and `on_token` in the thread that
    iterates the session.

    Args:
      capacity: room of the slot.
      opening: tokens of the system prompt, the first user turn and the assistant's header.
      prompt: of the first user turn.

    Attributes:
      finished: nothing more will be pushed.
      stopped: the stream ends at the next token.
      ended: the stream is over.
      latest: the latest time of anything pushed.
      speaking: whether the model is in the middle of an answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        capacity: EngineConfig,
        config: SessionConfig,
        slot: int,
        *,
        opening: list[int],
        prompt: str,
    ):
        self.slot = slot
        self.finished = self.stopped = self.ended = False
        self.latest = 0.0
        self.speaking = False
        self._config = config
        self._capacity = capacity
        self._special = tokenizer.special
        self._detokenizer = Detokenizer(tokenizer)
        self._opening: list[int] | None = opening
        self._prompt = prompt
        self._inbox: list[Inbound] = []
        self._counts = dict.fromkeys((f.name for f in dataclasses.fields(Counters)), 0)
        # The begin of the next row: the pending token, unless it has been appended already.
        self._pending = [PENDING]
        self._said = ""
        self._text_length = 0
        # The lockstep clock: the instant of the last thing that happened, and the tokens since.
        self._instant, self._ticks = 0.0, 0
        self._finished_at = 0.0
        # Why the stream ends at the next move: a capacity, once what fitted has been appended, or the logits.
        self._end_reason: EndReason | None = None
        self._wall = 0.0

    def finish(self, wall: float) -> None:
        """Notes that nothing more will be pushed."""
        self.finished, self._finished_at = True, wall

    def receive(self, inbound: Inbound) -> None:
        """Puts a frame or a prompt into the inbox; a full realtime inbox drops its oldest frame."""
        self.latest = max(self.latest, inbound.time)
        if inbound.rgb is not None and self._config.clock == "realtime":
            waiting = [i for i in self._inbox if i.rgb is not None]
            if len(waiting) >= self._config.inbox_frames:
                self._inbox.remove(min(waiting))
                heapq.heapify(self._inbox)
                self._counts["frames_dropped"] += 1
        heapq.heappush(self._inbox, inbound)

    def unclaimed_frames(self) -> list[Inbound]:
        """Frames in the inbox that the perception thread has not claimed."""
        return [i for i in self._inbox if i.rgb is not None and not i.claimed]

    def plan(
        self, wall: float, in_flight: Plan | None, *, may_continue: bool, perception_async: bool
    ) -> Plan | None:
        """The next move; None if there is none yet.

        Args:
          wall: seconds since the session began.
          in_flight: this slot's plan of the step in flight, whose token isn't known yet.
          may_continue: whether it is time for the next token of an answer.
          perception_async: whether frames wait in the inbox until the perception thread has encoded them.
        """
        self._wall = wall
        if self.stopped:
            return self._end("stopped")
        if self._end_reason:
            return self._end(self._end_reason)
        if self._opening is not None:
            tokens, self._opening = self._opening, None
            self._text_length = len(tokens)
            return Plan([self._turn(self._prompt)], tokens, new_turn=True)
        if due := self._pop_due(perception_async):
            return self._append(due, in_flight)
        if self.speaking and may_continue and self._may_sample():
            return self._append([], in_flight)
        if self.finished and not self._inbox and not in_flight:
            return self._end("finished")
        return None

    def events(self, plan: Plan) -> Iterator[Event]:
        """The events of a plan, to be read after those of the tokens before it."""
        for event in plan.events:
            if isinstance(event, Turn):
                yield from self._interrupt()
            yield event
        if plan.end:
            for prompt in sorted(i for i in self._inbox if i.rgb is None):
                yield NotAsked(**self._stamp(), prompt=prompt.prompt, time=prompt.time)
            yield End(**self._stamp(), reason=plan.end, counters=Counters(**self._counts))

    def on_token(self, plan: Plan, token: int, wall: float) -> Iterator[Event]:
        """Takes the token that was sampled after a plan's row; the events of it."""
        if token == NOT_FINITE or self._end_reason == "not_finite":
            self._end_reason = "not_finite"
            return
        if plan.speculative and not self.speaking:
            # The row turned out to be a silence: it has been appended, and the token after it is dropped.
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

    def _pop_due(self, perception_async: bool) -> list[Inbound]:
        """Removes from the inbox what has happened by now."""
        if not self._inbox:
            return []
        limit = np.inf
        if self._config.clock == "lockstep":
            first, now = self._inbox[0].time, self._now()
            if self.speaking and first > now + INSTANT:
                return []
            # A silent stream has nothing to do before the next event, so its clock jumps there.
            limit = max(first, now) + INSTANT
            # Until something later is known, more may yet be pushed for this instant.
            if not self.finished and max(self._inbox).time <= limit:
                return []
        due = []
        while (
            self._inbox
            and self._inbox[0].time <= limit
            and _fits_step(due, self._inbox[0], perception_async=perception_async)
        ):
            due.append(heapq.heappop(self._inbox))
        return due

    def _append(self, due: list[Inbound], in_flight: Plan | None) -> Plan | None:
        """Plans the row and the events of what is due, as far as there is room; the end if there is none."""
        begin = list(self._pending)
        if in_flight:
            # Its token will be pending, unless it is to be dropped; see `on_token`.
            begin = [] if in_flight.speculative and not self.speaking else [PENDING]
        plan = Plan(tokens=begin, speculative=bool(in_flight) and not due)
        for index, inbound in enumerate(due):
            is_frame = inbound.rgb is not None
            tokens = [self._special.image] if is_frame else inbound.tokens
            if is_frame and self._counts["frames"] == self._capacity.bank_capacity:
                self._end_reason = "bank_capacity"
            elif self._text_length + len(plan.tokens) + len(tokens) > self._capacity.text_capacity:
                self._end_reason = "text_capacity"
            if self._end_reason:
                # Back into the inbox, whose prompts are named at the end.
                self._inbox += due[index:]
                break
            plan.tokens += tokens
            if inbound.time > self._instant:
                self._instant, self._ticks = inbound.time, 0
            if is_frame:
                plan.frames.append(inbound)
                number = self._counts["frames"]
                plan.events.append(FrameSeen(**self._stamp(), index=number, time=inbound.time))
                self._counts["frames"] += 1
            else:
                plan.new_turn = True
                plan.events.append(self._turn(inbound.prompt))
        if plan.speculative and self._text_length + len(plan.tokens) > self._capacity.text_capacity:
            return None  # If it is a silence, nothing needs the room.
        if self._text_length + len(plan.tokens) > self._capacity.text_capacity:
            self._end_reason = "text_capacity"
        if self._end_reason and not plan.events:
            return self._end(self._end_reason)
        self._text_length += len(plan.tokens)
        return plan

    def _interrupt(self) -> Iterator[Event]:
        """Cuts the answer in progress, if there is one."""
        if self.speaking:
            self._counts["interruptions"] += 1
            yield Interrupted(**self._stamp(), said=self._said)
        self.speaking, self._said = False, ""
        self._detokenizer.flush()

    def _may_sample(self) -> bool:
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
        return Plan(end=reason)

    def _stamp(self) -> dict[str, Any]:
        return {"slot": self.slot, "stream_time": self._now(), "wall_time": self._wall}

    def _now(self) -> float:
        """Seconds on the stream's clock."""
        if self._config.clock == "realtime":
            return self._wall
        return self._instant + self._ticks / self._config.tokens_per_second


def _fits_step(due: Sequence[Inbound], inbound: Inbound, *, perception_async: bool) -> bool:
    """Whether one step can append it with those before it: the frames of a step are of one encoded batch."""
    if inbound.rgb is None:
        return True
    if inbound.encoded is None and (perception_async or inbound.claimed):
        return False
    batches = {i.encoded and id(i.encoded.features) for i in (*due, inbound) if i.rgb is not None}
    return len(batches) == 1
