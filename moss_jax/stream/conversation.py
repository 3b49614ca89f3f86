"""The dialogue of one slot: its inbox, its clock, the rows to append and the events to emit."""

import dataclasses
import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from moss_jax.config import EngineConfig, SessionConfig, UnseenReason
from moss_jax.memory import selection
from moss_jax.memory.eviction import Kind
from moss_jax.stream.contents import SlotContents
from moss_jax.stream.events import (
    Counters,
    End,
    EndReason,
    Event,
    Failed,
    Figures,
    FrameDropped,
    FrameSeen,
    FrameUnseen,
    Interrupted,
    NearCapacity,
    NotAsked,
    Silence,
    Text,
    Turn,
    TurnLimit,
)
from moss_jax.stream.moments import Moments
from moss_jax.stream.rows import PENDING, Compaction, Encoded
from moss_jax.stream.step import NOT_FINITE
from moss_jax.text import Detokenizer, Tokenizer

# Share of a capacity in use at which a stream that will end when it is full emits a warning.
NEARLY = 0.9
# Stream times closer than this count as the same instant.
INSTANT = 1e-6


@dataclasses.dataclass(order=True)
class Inbound:
    """A frame or a prompt in the inbox; ordered by time, prompts before frames of the same instant.

    Attributes:
      kind: 0 for a prompt, 1 for a frame.
      order: sequence number of the push, which breaks ties of time and kind.
      rgb: None for a prompt, and for a frame that is not shown to the model.
      thumbnail: of a frame; None if frames are not selected.
      unseen: why a frame is not shown to the model; None if it is.
      tokens: that a prompt appends.
      arrived: when it was pushed, by `time.monotonic`.
      claimed: whether the scheduler has taken the frame for encoding.
      encoded: a frame's features, once they are available.
      position: of a frame in the context, once it is planned.
    """

    time: float
    kind: int
    order: int
    rgb: UInt8[np.ndarray, "H W 3"] | None = dataclasses.field(default=None, compare=False)
    thumbnail: selection.Thumbnail | None = dataclasses.field(default=None, compare=False)
    unseen: UnseenReason | None = dataclasses.field(default=None, compare=False)
    prompt: str = dataclasses.field(default="", compare=False)
    tokens: list[int] = dataclasses.field(default_factory=list, compare=False)
    arrived: float = dataclasses.field(default=0.0, compare=False)
    claimed: bool = dataclasses.field(default=False, compare=False)
    encoded: Encoded | None = dataclasses.field(default=None, compare=False)
    position: int = dataclasses.field(default=-1, compare=False)

    @property
    def is_frame(self) -> bool:
        """Whether this is a frame, as opposed to a prompt."""
        return self.kind == 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the frame."""
        return () if self.rgb is None else self.rgb.shape

    def can_be_shown(self, *, encodes_apart: bool) -> bool:
        """Whether a step can append it now; a frame may have to wait for its features.

        Args:
          encodes_apart: whether frames are encoded separately, never as part of a step.
        """
        waits = encodes_apart or self.claimed
        return self.rgb is None or self.encoded is not None or not waits


@dataclasses.dataclass
class Plan:
    """The next action of a slot: the row to append (empty if the stream just ended) and its events.

    Attributes:
      frames: of the row's `<|image|>` tokens, including those not shown to the model.
      speculative: the row holds only the token of the step in flight, which may turn out to be silence.
      compact, kept: as in `Row`.
      asked_at: time of the last prompt in it; None without a prompt.
      end: why the stream ends here; None if it does not.
    """

    events: list[Event] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    frames: list[Inbound] = dataclasses.field(default_factory=list)
    new_turn: bool = False
    speculative: bool = False
    compact: Compaction | None = None
    kept: list[int] | None = None
    asked_at: float | None = None
    end: EndReason | None = None

    @property
    def seen(self) -> list[Inbound]:
        """The frames that are shown to the model."""
        return [frame for frame in self.frames if not frame.unseen]


class Speed:
    """Running latency and throughput statistics of a realtime stream.

    Attributes:
      bytes: device memory of its slot; None if unknown.
    """

    def __init__(self):
        self.bytes: int | None = None
        self._answers, self._frames = Mean(), Mean()
        self._asked_at: float | None = None
        self._token_at = self._talking = 0.0
        self._gaps = 0

    def on_sample(self, wall: float, frames: Sequence[float], asked_at: float | None) -> None:
        """Records a sample taken after frames and perhaps a prompt, given their arrival times."""
        for time in frames:
            self._frames.add(wall - time)
        if asked_at is not None:
            self._asked_at = asked_at

    def on_token(self, wall: float, *, is_first: bool) -> None:
        """Records a token of text."""
        if self._asked_at is not None:
            self._answers.add(wall - self._asked_at)
            self._asked_at = None
        if not is_first:
            self._talking += wall - self._token_at
            self._gaps += 1
        self._token_at = wall

    def figures(self) -> Figures:
        """The statistics so far."""
        return Figures(
            ttft=self._answers.mean,
            ttft_worst=self._answers.worst,
            frame_to_token=self._frames.mean,
            frame_to_token_worst=self._frames.worst,
            tokens_per_second=self._gaps / self._talking if self._talking else None,
            bytes=self.bytes,
        )


class Mean:
    """Running mean and maximum; None while nothing has been added."""

    def __init__(self):
        self._sum, self._count = 0.0, 0
        self.worst: float | None = None

    def add(self, x: float) -> None:
        """Adds a number."""
        self._sum, self._count = self._sum + x, self._count + 1
        self.worst = x if self.worst is None else max(x, self.worst)

    @property
    def mean(self) -> float | None:
        """Mean of the numbers so far."""
        return self._sum / self._count if self._count else None


class Conversation:
    """State of the dialogue in one slot, independent of the engine.

    `receive` and `plan` run under the session's lock; `plan`, `events` and `on_token` in the thread that
    iterates the session.

    Args:
      capacity: of the stream, with its memory policy; see `stream_config`.
      opening: tokens of the system prompt, the first user turn and the assistant's header.
      prompt: of the first user turn.

    Attributes:
      capacity, config: as given.
      has_failed: whether an error has ended the stream.
      speed: statistics of a realtime stream.
      finished: nothing more will be pushed.
      stopped: the stream ends at the next token.
      ended: the stream is over.
      start_time: stream time at which a resumed stream continues; 0 for a new one.
      latest: the latest time of anything pushed.
      latest_frame: the latest time of any frame.
      moments: times of the frames that were shown to the model.
      speaking: whether the model is in the middle of an answer.
      interrupted: whether an answer in progress is to be cut.
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
        self.finished = self.stopped = self.ended = self.has_failed = False
        self.start_time = self.latest = self.latest_frame = 0.0
        self.speaking = self.interrupted = False
        self.config = config
        self.capacity = capacity
        self._special = tokenizer.special
        self._detokenizer = Detokenizer(tokenizer)
        self._opening: list[int] | None = opening
        self._prompt = prompt
        self._inbox: list[Inbound] = []
        self._selection = selection.Selection()
        # Events of frames that get no row, until they are emitted.
        self._passed: list[Event] = []
        self._counts = dict.fromkeys((f.name for f in dataclasses.fields(Counters)), 0)
        # Tokens that start the next row, with their kinds: the pending token, unless it is appended already.
        self._pending, self._pending_kinds = [PENDING], [Kind.UNKNOWN]
        # Whether an answer was cut, so that silence follows its last token.
        self._is_cut = False
        self._said, self._said_tokens = "", 0
        self._contents = SlotContents(capacity)
        self.moments = Moments()
        # Index in the text cache of a token that the host does not have yet.
        self._unknown: int | None = None
        self._warned: set[str] = set()
        # The lockstep clock: the instant of the last event, and the tokens since.
        self._instant, self._ticks = 0.0, 0
        self._finished_at = 0.0
        # Why the stream ends at the next plan: a full capacity (what fitted was appended), or the logits.
        self._end_reason: EndReason | None = None
        self._wall = 0.0
        # Earliest times of the next token and the next frame of a realtime stream (rate limits).
        self._next_token = self._next_frame = 0.0
        self.speed = Speed()

    def save(
        self, wall: float
    ) -> tuple[dict[str, Any], list[UInt8[np.ndarray, "H W 3"]], selection.Thumbnail | None]:
        """Returns the dialogue between two steps, as JSON-ready values.

        Also returns the frames in the inbox that are still to be shown to the model, and the thumbnail that
        the next frame is compared with.

        Args:
          wall: seconds since the session began.
        """
        self._wall = wall
        inbox = sorted(self._inbox)
        saved = {
            "clock": self.config.clock,
            "tokens_per_second": self.config.tokens_per_second,
            "start_time": max(self._now(), self.latest),
            "latest_frame": self.latest_frame,
            "instant": self._instant,
            "ticks": self._ticks,
            # Empty once it has been appended.
            "opening": self._opening or [],
            "prompt": self._prompt,
            "kinds": [kind.name for kind in self._contents.kinds],
            "frame_room": self._contents.frame_room,
            "pending": self._pending,
            "pending_kinds": [kind.name for kind in self._pending_kinds],
            "is_cut": self._is_cut,
            "speaking": self.speaking,
            "interrupted": self.interrupted,
            "said": self._said,
            "said_tokens": self._said_tokens,
            "incomplete": self._detokenizer.incomplete.hex(),
            "counts": self._counts,
            "warned": sorted(self._warned),
            "selection": [self._selection.time, self._selection.due, self._selection.earliest],
            # For a prompt its time and text; for a frame its time, None, and why it is not shown, if so.
            "inbox": [[i.time, None if i.is_frame else i.prompt, i.unseen] for i in inbox],
        }
        return saved, [i.rgb for i in inbox if i.rgb is not None], self._selection.thumbnail

    def resume(
        self,
        saved: dict[str, Any],
        frames: Sequence[UInt8[np.ndarray, "H W 3"]],
        thumbnail: selection.Thumbnail | None,
        make_prompt: Callable[[float, str], Inbound],
        make_frame: Callable[[float, UInt8[np.ndarray, "H W 3"] | None, UnseenReason | None], Inbound],
    ) -> None:
        """Resumes a dialogue that `save` returned, instead of starting a new one.

        Args:
          saved, frames, thumbnail: as `save` returned them.
          make_prompt, make_frame: create the items of the inbox.

        Raises:
          ValueError: they are not valid output of `save`.
        """
        types = {name: type(value) for name, value in self.save(0.0)[0].items()}
        if wrong := {n for n in types.keys() | saved.keys() if type(saved.get(n)) is not types.get(n)}:
            raise ValueError(f"{', '.join(sorted(wrong))} is missing, unknown or of the wrong type")
        if saved["counts"].keys() != self._counts.keys():
            raise ValueError(f"counts are of {', '.join(saved['counts'])}, not of {', '.join(self._counts)}")
        if sum(prompt is None and not unseen for _, prompt, unseen in saved["inbox"]) != len(frames):
            raise ValueError(f"the inbox should not hold {len(frames)} frames")
        if not 0 <= saved["frame_room"] <= self.capacity.bank_capacity:
            raise ValueError(f"frame_room cannot be {saved['frame_room']}")
        self.start_time = self.latest = saved["start_time"]
        self._wall = self.start_time
        self._instant, self._ticks = saved["instant"], saved["ticks"]
        if (saved["clock"], saved["tokens_per_second"]) != (
            self.config.clock,
            self.config.tokens_per_second,
        ):
            self._instant, self._ticks = self.start_time, 0
        self._opening, self._prompt = saved["opening"] or None, saved["prompt"]
        self._contents.kinds = [Kind[name] for name in saved["kinds"]]
        self._contents.frame_room = saved["frame_room"]
        self._pending = saved["pending"]
        self._pending_kinds = [Kind[name] for name in saved["pending_kinds"]]
        self._is_cut, self.speaking, self.interrupted = (
            saved[name] for name in ("is_cut", "speaking", "interrupted")
        )
        self._said, self._said_tokens = saved["said"], saved["said_tokens"]
        self._detokenizer.incomplete = bytes.fromhex(saved["incomplete"])
        self._counts, self._warned = dict(saved["counts"]), set(saved["warned"])
        self.latest_frame = saved["latest_frame"]
        # Without selection, the thumbnail is not updated and would go stale.
        if self.config.selection.enabled:
            self._selection = selection.Selection(thumbnail, *saved["selection"])
        left = iter(frames)
        for time, prompt, unseen in saved["inbox"]:
            if prompt is not None:
                inbound = make_prompt(time, prompt)
            else:
                inbound = make_frame(time, None if unseen else next(left), unseen)
            heapq.heappush(self._inbox, inbound)

    @property
    def opening_length(self) -> int:
        """Number of tokens of the opening, which are never evicted."""
        return len(self._opening or ()) or self._contents.kinds.count(Kind.PINNED)

    @property
    def position(self) -> int:
        """Position of the next token in the context."""
        return self._contents.position

    @position.setter
    def position(self, position: int) -> None:
        self._contents.position = position

    @property
    def text_length(self) -> int:
        """Number of tokens in the text cache."""
        return len(self._contents.kinds)

    def is_finite(self) -> bool:
        """Whether all logits have been finite."""
        return self._end_reason != "not_finite"

    def finish(self, wall: float) -> None:
        """Marks the input as complete: nothing more will be pushed."""
        self.finished, self._finished_at = True, wall

    def receive(self, inbound: Inbound) -> None:
        """Puts a frame or a prompt into the inbox; a full realtime inbox drops its oldest frame.

        Frames are selected here, in order of arrival. A selected frame is dropped only for a later selected
        one, so the frame that others are compared with is never lost.
        """
        self.latest = max(self.latest, inbound.time)
        if inbound.is_frame:
            self.latest_frame = max(self.latest_frame, inbound.time)
            self._limit_rate(inbound)
            if not inbound.unseen:
                self._select(inbound)
        heapq.heappush(self._inbox, inbound)
        if inbound.is_frame and inbound.unseen != "rate" and self.config.clock == "realtime":
            waiting = [i for i in self._inbox if i.is_frame and i.unseen != "rate"]
            if len(waiting) > self.config.inbox_frames:
                older = [i for i in waiting if i is not inbound]
                dropped = min([i for i in waiting if i.unseen] or older)
                self._inbox.remove(dropped)
                heapq.heapify(self._inbox)
                self._counts["frames_dropped"] += 1
                self._passed.append(FrameDropped(**self._stamp(), time=dropped.time))

    def _limit_rate(self, frame: Inbound) -> None:
        """Skips a frame that comes too soon after the previous one."""
        if self.config.max_fps is None or self.config.clock == "lockstep":
            return
        if frame.time < self._next_frame - INSTANT:
            frame.unseen, frame.rgb = "rate", None
        else:
            # In steps from the previous frame, so that a little jitter doesn't halve the rate.
            gap = 1 / self.config.max_fps
            self._next_frame = max(self._next_frame, frame.time - gap / 2) + gap

    def _select(self, frame: Inbound) -> None:
        """Decides whether a frame is encoded."""
        if frame.thumbnail is None:
            return
        frame.unseen, self._selection = selection.select(
            self.config.selection, self._selection, frame.time, frame.thumbnail
        )
        if frame.unseen:
            frame.rgb = None

    @property
    def is_asked(self) -> bool:
        """Whether a prompt is queued in the inbox."""
        return any(not i.is_frame for i in self._inbox)

    def unclaimed_frames(self) -> list[Inbound]:
        """Frames in the inbox that the perception thread has not claimed."""
        return [i for i in self._inbox if i.rgb is not None and not i.claimed]

    def plan(
        self, wall: float, in_flight: Plan | None, *, may_continue: bool, perception_async: bool
    ) -> Plan | None:
        """Plans the next action; None if there is nothing to do yet.

        Args:
          wall: seconds since the session began.
          in_flight: this slot's plan in the step in flight, whose token isn't known yet.
          may_continue: whether an answer may get its next token now.
          perception_async: whether frames stay in the inbox until the perception thread has encoded them.
        """
        self._wall = wall
        if self.stopped:
            return self._end("stopped")
        if reason := self._expired(wall):
            return self._end(reason)
        if self._end_reason:
            return self._end(self._end_reason)
        if self._opening is not None:
            tokens, self._opening = self._opening, None
            self._contents.append([Kind.PINNED] * len(tokens))
            return Plan([self._turn(self._prompt)], tokens, new_turn=True)
        if self.interrupted and not in_flight:
            self.interrupted = False
            if self.speaking:
                return Plan(list(self._cut()))
        if due := self._pop_due(perception_async):
            return self._append(due, in_flight)
        if self.speaking and may_continue and self._may_sample() and not self._is_held(wall, in_flight):
            return self._append([], in_flight)
        if self.finished and not self._inbox and not in_flight:
            return self._end("finished")
        if self._passed and not in_flight:
            return Plan()
        return None

    def deadline(self, wall: float) -> float | None:
        """Seconds until a timer of the stream fires (rate limit or timeout); None without a timer."""
        times = [at for _, at in self._expiries()]
        if self.speaking and wall < self._next_token:
            times.append(self._next_token)
        return min(times) - wall if times else None

    def _expiries(self) -> Iterator[tuple[EndReason, float]]:
        """The timeouts of a realtime stream, each with the wall time at which it expires."""
        if self.config.clock == "lockstep":
            return
        if self.config.idle_seconds is not None:
            yield "idle", max(self.latest, self.start_time) + self.config.idle_seconds
        if self.config.lifetime_seconds is not None:
            yield "lifetime", self.start_time + self.config.lifetime_seconds

    def _expired(self, wall: float) -> EndReason | None:
        return next((reason for reason, at in self._expiries() if wall >= at), None)

    def _is_held(self, wall: float, in_flight: Plan | None) -> bool:
        """Whether the rate limit delays the next token of an answer."""
        limit = self.config.max_tokens_per_second
        if limit is None or self.config.clock == "lockstep":
            return False
        return in_flight is not None or wall < self._next_token

    def fail(self, message: str, wall: float) -> Iterator[Event]:
        """Ends the stream with an error; yields its last events."""
        self._wall, self.ended, self.has_failed = wall, True, True
        yield Failed(**self._stamp(), message=message)
        yield from self._last_events("failed")

    def _last_events(self, reason: EndReason) -> Iterator[Event]:
        for prompt in sorted(i for i in self._inbox if not i.is_frame):
            yield NotAsked(**self._stamp(), prompt=prompt.prompt, time=prompt.time)
        figures = self.speed.figures() if self.config.clock == "realtime" else None
        yield End(**self._stamp(), reason=reason, counters=Counters(**self._counts), figures=figures)

    def events(self, plan: Plan) -> Iterator[Event]:
        """Yields the events of a plan, which must be read after those of the tokens before it."""
        while self._passed:
            yield self._passed.pop(0)
        for event in plan.events:
            if isinstance(event, Turn):
                yield from self._interrupt()
            yield event
        if plan.end:
            yield from self._last_events(plan.end)

    def on_token(self, plan: Plan, token: int, wall: float) -> Iterator[Event]:
        """Processes the token sampled after a plan's row; yields its events."""
        if token == NOT_FINITE or self._end_reason == "not_finite":
            self._end_reason = "not_finite"
            return
        if plan.speculative and not self.speaking:
            # The row was the last token of the answer: it is appended, and the sample after it is dropped.
            self._pending, self._pending_kinds = self._after_dropped()
            return
        self._wall, self._is_cut = wall, False
        self.speed.on_sample(wall, [frame.time for frame in plan.seen], plan.asked_at)
        at = self._now()
        self._ticks += 1
        kind = Kind.SILENCE if token == self._special.silence else Kind.ASSISTANT
        self._pending, self._pending_kinds = [PENDING], [kind]
        if self._unknown is not None:
            self._contents.kinds[self._unknown], self._unknown = kind, None
        if kind is Kind.SILENCE:
            self._hush()
            self._counts["silences"] += 1
            yield Silence(slot=self.slot, stream_time=at, wall_time=wall)
            return
        self.speaking = True
        self.speed.on_token(wall, is_first=not self._said_tokens)
        if self.config.max_tokens_per_second:
            self._next_token = wall + 1 / self.config.max_tokens_per_second
        self._said_tokens += 1
        self._counts["tokens"] += 1
        if text := self._detokenizer.push(token):
            self._said += text
            yield Text(slot=self.slot, stream_time=at, wall_time=wall, text=text)
        if self.interrupted:
            self.interrupted = False
            yield from self._cut()
        elif self._said_tokens >= self.config.max_tokens_per_turn:
            yield TurnLimit(slot=self.slot, stream_time=at, wall_time=wall, tokens=self._said_tokens)
            self._cut_off()
            self._counts["silences"] += 1
            yield Silence(slot=self.slot, stream_time=at, wall_time=wall)

    def _cut(self) -> Iterator[Event]:
        """Ends the answer in progress at the pending token."""
        yield from self._interrupt()
        self._cut_off()

    def _cut_off(self) -> None:
        """Makes silence follow the pending token, as if the model had stopped there."""
        self._hush()
        self._is_cut = True
        self._pending = [*self._pending, self._special.silence]
        self._pending_kinds = [*self._pending_kinds, Kind.SILENCE]

    def _after_dropped(self) -> tuple[list[int], list[Kind]]:
        """The first tokens of a row after a dropped sample: none, or the silence after a cut."""
        return [self._special.silence] * self._is_cut, [Kind.SILENCE] * self._is_cut

    def _hush(self) -> None:
        """Resets the state of the answer: none is in progress any more."""
        self.speaking, self._said, self._said_tokens = False, "", 0
        self._detokenizer.flush()

    def _pop_due(self, perception_async: bool) -> list[Inbound]:
        """Removes from the inbox and returns the items that are due."""
        if not self._inbox:
            return []
        limit = np.inf
        if self.config.clock == "lockstep":
            first, now = self._inbox[0].time, self._now()
            if self.speaking and first > now + INSTANT:
                return []
            # A silent stream has nothing to do before the next item, so its clock jumps there.
            limit = max(first, now) + INSTANT
            # Until something later has been pushed, more may come for this instant.
            if not self.finished and self.latest <= limit:
                return []
        due = []
        while (
            self._inbox
            and self._inbox[0].time <= limit
            and self._inbox[0].can_be_shown(encodes_apart=perception_async)
        ):
            if self._inbox[0].unseen != "rate":
                due.append(heapq.heappop(self._inbox))
            elif not due:
                self._pass_over(heapq.heappop(self._inbox))
            else:
                break  # Events are emitted in the order of the frames.
        return due

    def _pass_over(self, frame: Inbound) -> None:
        """Records the event of a frame that came too early and enters no row."""
        if frame.time > self._now():
            self._instant, self._ticks = frame.time, 0
        self._passed.append(self._frame_event(frame))

    def _frame_event(self, frame: Inbound) -> FrameSeen | FrameUnseen:
        """Counts a frame and returns its event."""
        number = sum(self._counts[f"frames{suffix}"] for suffix in ("", "_still", "_alike", "_rate"))
        if frame.unseen:
            self._counts[f"frames_{frame.unseen}"] += 1
            return FrameUnseen(**self._stamp(), index=number, time=frame.time, reason=frame.unseen)
        self._counts["frames"] += 1
        return FrameSeen(**self._stamp(), index=number, time=frame.time)

    def withdraw(self, plan: Plan, frame: Inbound) -> None:
        """Removes a frame that is too similar to the previous one from a plan whose events are unread."""
        frame.unseen = "alike"
        events = [i for i, event in enumerate(plan.events) if isinstance(event, FrameSeen | FrameUnseen)]
        place = events[plan.frames.index(frame)]
        seen = plan.events[place]
        assert isinstance(seen, FrameSeen)
        plan.events[place] = FrameUnseen(**vars(seen), reason="alike")
        self._counts["frames"] -= 1
        self._counts["frames_alike"] += 1
        self._contents.frame_room += 1
        self.moments.forget(frame.position)

    def _append(self, due: list[Inbound], in_flight: Plan | None) -> Plan | None:
        """Plans a row and events for the due items, as far as they fit; plans the end if none does."""
        begin, kinds = self._pending, self._pending_kinds
        if in_flight:
            # Its token will be pending, unless it is dropped; see `on_token`.
            is_dropped = in_flight.speculative and not self.speaking
            begin, kinds = self._after_dropped() if is_dropped else ([PENDING], [Kind.UNKNOWN])
        plan, kinds = Plan(tokens=[*begin], speculative=bool(in_flight) and not due), [*kinds]
        if not self._make_room(plan, len(kinds)):
            if plan.speculative:
                self._end_reason = None  # If it is silence, nothing needs the room.
                return None
            self._inbox += due
            return self._end("text_capacity")
        for index, inbound in enumerate(due):
            is_frame = inbound.is_frame
            tokens = [self._special.image] if is_frame else inbound.tokens
            is_seen = is_frame and not inbound.unseen
            if not self._make_room(plan, len(kinds) + len(tokens), is_frame=is_seen):
                # Back into the inbox, for the next row, or so that unasked prompts are reported at the end.
                for left in due[index:]:
                    heapq.heappush(self._inbox, left)
                break
            if is_seen:
                inbound.position = self._contents.position + len(kinds)
                self.moments.add(inbound.position, inbound.time)
            plan.tokens += tokens
            kinds += [Kind.FRAME if is_frame else Kind.USER] * len(tokens)
            if inbound.time > self._instant:
                self._instant, self._ticks = inbound.time, 0
            if is_frame:
                plan.frames.append(inbound)
                plan.events.append(self._frame_event(inbound))
                self._contents.append([], frames=int(is_seen))
            else:
                plan.new_turn, plan.asked_at = True, inbound.time
                plan.events.append(self._turn(inbound.prompt))
        if self._end_reason and not plan.events:
            return self._end(self._end_reason)
        self._is_cut = False
        if Kind.UNKNOWN in kinds:
            self._unknown = len(self._contents.kinds)
        self._contents.append(kinds)
        plan.events += self._warnings()
        return plan

    def _make_room(self, plan: Plan, tokens: int, *, is_frame: bool = False) -> bool:
        """`SlotContents.make_room`: whether a row fits; if it never will, sets the end reason."""
        fit = self._contents.make_room(plan, tokens, is_frame=is_frame)
        if fit in ("bank_capacity", "text_capacity"):
            self._end_reason = fit
        return fit == "fits"

    def _warnings(self) -> Iterator[Event]:
        """Yields one event, once, for each capacity that will end the stream and is nearly full."""
        capacity, memory = self.capacity, self.capacity.memory
        used = {}
        if memory.policy == "full":
            used["bank_capacity"] = self._counts["frames"]
        if memory.text == "full":
            used["text_capacity"] = len(self._contents.kinds)
        for setting, count in used.items():
            size = getattr(capacity, setting)
            if count >= NEARLY * size and setting not in self._warned:
                self._warned.add(setting)
                yield NearCapacity(**self._stamp(), setting=setting, left=size - count, capacity=size)

    def _interrupt(self) -> Iterator[Event]:
        """Cuts the answer in progress, if any."""
        if self.speaking:
            self._counts["interruptions"] += 1
            yield Interrupted(**self._stamp(), said=self._said)
        self._hush()

    def _may_sample(self) -> bool:
        """Whether an answer in progress gets another token now."""
        if self.finished and not self._inbox:
            end_of_input = self._instant if self.config.clock == "lockstep" else self._finished_at
            return self._now() + INSTANT < end_of_input + self.config.tail_seconds
        if self.config.clock == "realtime":
            return True
        # A lockstep stream must know that nothing is due before this token.
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
        if self.config.clock == "realtime":
            return self._wall
        return self._instant + self._ticks / self.config.tokens_per_second
