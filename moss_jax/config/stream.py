"""Settings of streams: frames and tokens, memory, sessions and the scheduler."""

import dataclasses
import math
from typing import Literal

from moss_jax.config.fields import (
    convert_fields,
    require,
    require_at_least,
    require_seed,
)

Clock = Literal["lockstep", "realtime"]
TextMemory = Literal["full", "window"]
KVDtype = Literal["int8", "fp8"]
UnseenReason = Literal["still", "alike", "rate"]

# Memory policies that keep or drop vectors, but never merge them.
NEVER_MERGE = ("full", "window")


@dataclasses.dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video are sampled.

    Attributes:
      fps: frames per second of video, by timestamp.
      min_frames: lower bound; shorter offline clips are sampled more densely.
      max_frames: upper bound; longer offline clips are sampled more sparsely; None for no bound. Does not
        apply to a live stream.
    """

    fps: float = 1.0
    min_frames: int = 1
    max_frames: int | None = 256

    def __post_init__(self):
        convert_fields(self)
        require(
            math.isfinite(self.fps) and self.fps > 0,
            f"fps must be a positive number of frames per second, not {self.fps:g}",
        )
        require(
            1 <= self.min_frames <= (self.min_frames if self.max_frames is None else self.max_frames),
            f"min_frames {self.min_frames} must be at least 1 and at most max_frames {self.max_frames}",
        )


@dataclasses.dataclass(frozen=True)
class TokenSampling:
    """How the next token is sampled.

    Attributes:
      temperature: 0 for greedy decoding.
      top_k: samples among the k likeliest tokens, ties included; 0 for all.
      top_p: nucleus sampling, among the likeliest tokens that hold this share of the probability.
      repetition_penalty: above 1, lowers the logits of tokens that the current turn already contains.
        Silence, control and punctuation tokens are exempt, since a stream repeats them all the time.
      seed: a draw depends only on the seed and the position in the stream, not on other slots.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        convert_fields(self)
        require(self.temperature >= 0, f"temperature {self.temperature} must not be negative")
        require_seed(self.seed)
        require(self.top_k >= 0, f"top_k {self.top_k} must not be negative; 0 disables it")
        # It is int32 on the device.
        require(self.top_k < 2**31, f"top_k {self.top_k} must be below 2**31; 0 disables it")
        require(0 < self.top_p <= 1, f"top_p {self.top_p} must be in (0, 1]")
        require(self.repetition_penalty > 0, f"repetition_penalty {self.repetition_penalty} must be positive")


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Compaction of the memory bank and eviction from the KV cache, which keep a full stream running.

    Attributes:
      policy: for the frames, a name in `memory.policies`. "full" forgets nothing, so the stream ends when the
        bank is full. "window" keeps the newest frames. "pyramid" keeps the newest whole, older ones coarser,
        and merges the oldest. "merge" merges similar vectors at the same place of neighbouring frames.
      low_water: share of the bank and of the text cache that is in use after a compaction.
      pyramid_shares: of that, the share of each level: whole frames, 1/4, 1/16 of the grid, one vector. If
        there are fewer, the last is divided evenly among the remaining levels.
      bank_dtype: 8-bit dtype for keys and values of the bank; None for the dtype of the model.
      text_dtype: likewise of the text cache.
      text: for the tokens. "full" evicts none, so the stream ends when the text cache is full. "window" keeps
        the opening, the first tokens after it, and the newest; of the others, silences and frames are evicted
        first, then user turns, and answers last.
      text_first: share of the text cache for the first tokens after the opening, which are all kept.
      text_recent: share of the text cache for the newest tokens, which are all kept.
      text_assistant: share of the text cache for older answers of the model.
    """

    policy: str = "pyramid"
    low_water: float = 0.875
    pyramid_shares: tuple[float, ...] = (0.5, 0.25, 0.125, 0.125)
    bank_dtype: KVDtype | None = None
    text_dtype: KVDtype | None = None
    text: TextMemory = "window"
    text_first: float = 0.125
    text_recent: float = 0.5
    text_assistant: float = 0.25

    def __post_init__(self):
        convert_fields(self)
        require(0 < self.low_water < 1, f"low_water {self.low_water} must be in (0, 1)")
        require(
            0 < self.text_recent < self.low_water and 0 <= self.text_assistant <= 1,
            f"text_recent {self.text_recent} must be between 0 and low_water {self.low_water}, "
            f"and text_assistant {self.text_assistant} in [0, 1]",
        )
        require(0 <= self.text_first < 1, f"text_first {self.text_first} must be in [0, 1)")
        require(
            len(self.pyramid_shares) >= 2
            and all(share > 0 for share in self.pyramid_shares)
            and sum(self.pyramid_shares) <= 1 + 1e-6,
            "pyramid_shares are at least two positive numbers whose sum is at most 1, "
            f"not {self.pyramid_shares}",
        )

    def low_mark(self, capacity: int) -> int:
        """Low-water mark of a capacity, in whole frames or tokens: what is in use after a compaction."""
        # Always below the capacity, or nothing could be appended.
        return min(int(self.low_water * capacity), capacity - 1)

    @property
    def merges(self) -> bool:
        """Whether vectors of the bank may stand for several, so that their counts are kept."""
        return self.policy not in NEVER_MERGE


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Capacities of the engine's state; a stream that reaches one ends, and says so.

    Attributes:
      slots: concurrent streams.
      text_capacity: tokens in the text cache of a slot, including the `<|image|>` token of each frame.
      bank_capacity: whole frames in the memory bank of a slot.
      memory: what a full slot keeps.
      policies: names of memory policies that a stream may use instead of `memory.policy`, each of which is
        compiled; "full" is always allowed. See `stream.stream_config`.
    """

    slots: int = 1
    text_capacity: int = 4096
    bank_capacity: int = 256
    memory: MemoryConfig = MemoryConfig()
    policies: tuple[str, ...] = ()

    def __post_init__(self):
        convert_fields(self)
        require_at_least(1, self, "slots", "text_capacity", "bank_capacity")

    @property
    def allowed_policies(self) -> tuple[str, ...]:
        """Names of the policies that streams may use, without duplicates, `memory.policy` first."""
        return tuple(dict.fromkeys((self.memory.policy, *self.policies)))

    @property
    def merges(self) -> bool:
        """Whether vectors of a bank may stand for several, so that their counts are kept."""
        return any(name not in NEVER_MERGE for name in self.allowed_policies)


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """Which frames of a live stream are shown to the model.

    Attributes:
      enabled: whether frames are selected; if not, every frame is shown.
      min_change: change since the frame that was encoded last, as `memory.selection.change` measures it,
        below which a frame is not encoded.
      max_gap: seconds after which a frame is encoded regardless of its change.
      min_distance: distance to the features of the frame that was remembered last, as
        `memory.selection.feature_distance` measures it, below which a frame is not remembered. None disables
        the check, which makes the host wait for the features of each frame.
      fps: frames per second that enter while nothing changes; applies only with `max_fps`.
      max_fps: frames per second that enter while something changes; None for the rate of the source.
    """

    enabled: bool = False
    min_change: float = 0.08
    max_gap: float = 3.0
    min_distance: float | None = None
    fps: float = 1.0
    max_fps: float | None = None

    def __post_init__(self):
        convert_fields(self)
        require(0 <= self.min_change <= 1, f"min_change must be in [0, 1], not {self.min_change:g}")
        require(self.max_gap > 0, f"max_gap must be a positive number of seconds, not {self.max_gap:g}")
        require(
            self.min_distance is None or self.min_distance >= 0,
            f"min_distance must be at least 0, or None; got {self.min_distance}",
        )
        require(0 < self.fps < math.inf, f"fps must be a positive number, not {self.fps:g}")
        require(
            self.max_fps is None or self.fps <= self.max_fps < math.inf,
            f"max_fps must be a number from fps {self.fps:g} on, or None; got {self.max_fps}",
        )


@dataclasses.dataclass(frozen=True)
class SessionConfig:
    """The clock and the queue of a live session.

    Attributes:
      clock: "realtime" is the wall clock. "lockstep" is the stream's own, on which a token takes
        1 / tokens_per_second, so that the outcome depends on the input alone.
      tokens_per_second: decoding speed on the lockstep clock.
      tail_seconds: how long an answer may continue after the end of the stream.
      inbox_frames: frames that may be queued in a realtime session before the oldest is dropped. Prompts are
        never dropped, and a lockstep session drops nothing.
      max_tokens_per_turn: tokens after which an answer is cut, and silence follows.
      selection: which frames are shown to the model.
      max_tokens_per_second: rate limit of a realtime answer; None for no limit.
      max_fps: rate limit of frames shown in a realtime stream; None for no limit.
      idle_seconds: idle timeout of a realtime stream, since the last push; None for never.
      lifetime_seconds: maximum age of a realtime stream; None for no limit.
    """

    clock: Clock = "lockstep"
    tokens_per_second: int = 32
    tail_seconds: float = 1.0
    inbox_frames: int = 8
    max_tokens_per_turn: int = 1024
    selection: SelectionConfig = SelectionConfig()
    max_tokens_per_second: float | None = None
    max_fps: float | None = None
    idle_seconds: float | None = None
    lifetime_seconds: float | None = None

    def __post_init__(self):
        convert_fields(self)
        for name in ("max_tokens_per_second", "max_fps", "idle_seconds", "lifetime_seconds"):
            limit = getattr(self, name)
            require(limit is None or limit > 0, f"{name} must be positive, or None; got {limit}")
        require_at_least(1, self, "tokens_per_second", "inbox_frames", "max_tokens_per_turn")
        require(self.tail_seconds >= 0, f"tail_seconds {self.tail_seconds} must not be negative")


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Scheduling of the streams of one engine.

    Attributes:
      clock: of all streams; see `SessionConfig`.
      max_stall_ms: while a stream talks, the longest that a batch of frames may stall its text; frames that
        take longer are encoded one by one.
    """

    clock: Clock = "realtime"
    max_stall_ms: float = 25.0

    def __post_init__(self):
        convert_fields(self)
        require(self.max_stall_ms > 0, f"max_stall_ms must be positive, not {self.max_stall_ms}")
