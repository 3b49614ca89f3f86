"""Events of a session, each with its stream time and its wall time."""

import dataclasses
from typing import Any, ClassVar, Literal

from moss_jax.config import UnseenReason

EndReason = Literal[
    "finished",
    "stopped",
    "text_capacity",
    "bank_capacity",
    "not_finite",
    "token_limit",
    "idle",
    "lifetime",
    "failed",
]


@dataclasses.dataclass(frozen=True)
class Counters:
    """Totals of a stream.

    Attributes:
      frames, frames_dropped: shown to the model, and dropped from a full inbox.
      frames_still, frames_alike, frames_rate: not shown to the model, by the reason of their `FrameUnseen`.
      prompts: user turns that were not empty.
      tokens: tokens of text.
      silences: times that the model had nothing (more) to say.
      interruptions: answers that a prompt cut.
    """

    frames: int = 0
    frames_dropped: int = 0
    frames_still: int = 0
    frames_alike: int = 0
    frames_rate: int = 0
    prompts: int = 0
    tokens: int = 0
    silences: int = 0
    interruptions: int = 0


@dataclasses.dataclass(frozen=True)
class Figures:
    """Latency and throughput of a realtime stream, in wall-clock seconds; None where nothing was measured.

    Attributes:
      ttft, ttft_worst: from a prompt to the first text after it (time to first token), mean and largest.
      frame_to_token, frame_to_token_worst: from a frame to the first token sampled with it in context.
      tokens_per_second: within answers.
      bytes: device memory of the stream's slot.
    """

    ttft: float | None = None
    ttft_worst: float | None = None
    frame_to_token: float | None = None
    frame_to_token_worst: float | None = None
    tokens_per_second: float | None = None
    bytes: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events.

    Attributes:
      slot: of the session.
      stream_time: seconds on the stream's clock.
      wall_time: seconds since the session began.
    """

    type: ClassVar[str]
    slot: int = 0
    stream_time: float
    wall_time: float

    def to_dict(self) -> dict[str, Any]:
        """The event as JSON-ready values, its type first."""
        return {"type": self.type} | dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameSeen(Event):
    """Frame number `index` of the stream, taken at `time`, was shown to the model."""

    type: ClassVar[str] = "frame"
    index: int
    time: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameUnseen(Event):
    """Frame number `index` of the stream, taken at `time`, was not shown to the model (`SelectionConfig`).

    Attributes:
      reason: "still" if it looks like the frame that was encoded last, "alike" if its features are like those
        of the frame that was remembered last; only its `<|image|>` token enters the context. "rate" if it
        came too early; nothing enters the context.
    """

    type: ClassVar[str] = "unseen"
    index: int
    time: float
    reason: UnseenReason


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameDropped(Event):
    """A frame taken at `time` was dropped from a full inbox for a newer one; it has no number."""

    type: ClassVar[str] = "dropped"
    time: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class FramesSkipped(Event):
    """The file has `count` undecodable frames from `time` on; the frame before them stayed in view."""

    type: ClassVar[str] = "skipped"
    time: float
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn(Event):
    """A user turn has entered the context, and the assistant's turn has begun."""

    type: ClassVar[str] = "turn"
    prompt: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(Event):
    """A piece of the model's text: whole characters, not whole words."""

    type: ClassVar[str] = "text"
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Silence(Event):
    """The model has nothing (more) to say until something happens."""

    type: ClassVar[str] = "silence"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interrupted(Event):
    """A prompt or the caller has cut an answer; `said` is its text so far, which stays in the context."""

    type: ClassVar[str] = "interrupted"
    said: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurnLimit(Event):
    """An answer has been cut after `tokens` (`SessionConfig.max_tokens_per_turn`); silence follows."""

    type: ClassVar[str] = "turn_limit"
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearCapacity(Event):
    """The stream will end soon: `left` of `capacity` remain of a capacity that ends it when full.

    Attributes:
      setting: the field of `EngineConfig`, in frames or tokens.
    """

    type: ClassVar[str] = "near_capacity"
    setting: Literal["bank_capacity", "text_capacity"]
    left: int
    capacity: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class NotAsked(Event):
    """A prompt that was due at `time` is not asked, because the stream ends first; precedes `End`."""

    type: ClassVar[str] = "not_asked"
    prompt: str
    time: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """An error, described by `message`, ends the stream; precedes `End`."""

    type: ClassVar[str] = "failed"
    message: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class End(Event):
    """The slot's stream is over; its last event.

    Attributes:
      reason: "finished" at the end of the input, "stopped" by the caller, "text_capacity" or "bank_capacity"
        when the slot is full (`EngineConfig`), "not_finite" when the logits hold NaN or an infinity,
        "token_limit" when an offline answer has reached its `max_tokens`, "idle" or "lifetime" by the
        timeouts of `SessionConfig`, "failed" by an error.
      figures: of a realtime stream.
    """

    type: ClassVar[str] = "end"
    reason: EndReason
    counters: Counters
    figures: Figures | None = None
