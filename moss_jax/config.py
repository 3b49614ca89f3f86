"""All settings as frozen dataclasses that validate themselves, and the model presets."""

import dataclasses
import functools
import itertools
import math
import numbers
import os
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

PoolMode = Literal["average", "max", "bilinear", "channelFusion"]
RowsBeforeFirstFrame = Literal["skip", "attend"]
Clock = Literal["lockstep", "realtime"]
Remat = Literal["none", "dots", "full"]
DecoderWeights = Literal["int8", "fp8"]
EncoderWeights = Literal["fp8"]
ModelPart = Literal["vision", "compressor", "projector", "decoder"]
ComputeDtype = Literal["bfloat16", "float32"]
DataKind = Literal["tabletop", "conversations"]
TextMemory = Literal["full", "window"]
BankDtype = Literal["int8", "fp8"]
UnseenReason = Literal["still", "alike", "rate"]

MODEL_PARTS: tuple[ModelPart, ...] = get_args(ModelPart)


# Seeds that JAX and numpy both take.
SEEDS = range(2**63)


class ConfigError(ValueError):
    """An invalid setting; the message begins with the name of the field and says what would be valid."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_at_least(least: int, settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        _require(value >= least, f"{name} must be at least {least}, not {value}")


def _require_share(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        _require(0 <= value <= 1, f"{name} must be in [0, 1], not {value}")


def _require_seed(seed: int) -> None:
    _require(seed in SEEDS, f"seed must be at least 0 and less than 2**63, not {seed}")


def _convert_fields(settings: Any) -> None:
    """Converts the values of a frozen dataclass to the types of its fields, where nothing is lost by it.

    A whole number may be written as 1e4, a list stands for a tuple, a dict for a tuple of pairs, and a string
    for a tuple with this one string.

    Raises:
      ConfigError: a value is of another type.
    """
    for name, kind in _field_types(type(settings)).items():
        value = getattr(settings, name)
        try:
            object.__setattr__(settings, name, _convert(value, kind))
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"{name} must be {_describe(kind)}; got {value!r}") from None


@functools.cache
def _field_types(settings: type) -> dict[str, Any]:
    return get_type_hints(settings)


def _convert(value: Any, kind: Any) -> Any:
    """Converts a value to a type, as `_convert_fields` says; raises TypeError or ValueError if it can't."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _convert(value, arguments[0])
    if origin is Literal:
        return arguments[arguments.index(value)]
    if origin is tuple:
        if isinstance(value, str) and (arguments[0] is str or get_origin(arguments[0]) is Literal):
            value = (value,)
        if isinstance(value, dict) and get_origin(arguments[0]) is tuple:
            value = tuple(value.items())
        if not isinstance(value, list | tuple):
            raise TypeError
        elements = itertools.repeat(arguments[0], len(value)) if arguments[-1] is ... else arguments
        return tuple(_convert(v, element) for v, element in zip(value, elements, strict=True))
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind in (int, float):
        if type(value) is bool or not issubclass(type(value), numbers.Real):
            raise TypeError
        number = kind(value)
        if number != value:  # A fraction, or NaN.
            raise ValueError
        return number
    if not isinstance(value, kind):
        raise TypeError
    return value


def _describe(kind: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return f"{_describe(arguments[0])} or None"
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is tuple and arguments[-1] is ...:
        return f"a tuple with each element {_describe(arguments[0])}"
    if origin is tuple:
        return f"({', '.join(map(_describe, arguments))})"
    return {int: "a whole number", float: "a number", str: "a string"}.get(kind) or kind.__name__


# ---------------------------------------------------------------------------------------- model


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision encoder: pre-norm ViT layers, then global layers with tanh-gated residual branches.

    Attributes:
      image_size: side in pixels of the single square tile that a frame is resized and padded to.
      intermediate_layers: layers whose *inputs* are stacked and concatenated to the final hidden state.
      max_num_tiles: tiles per image in the checkpoint's embedding tables. A frame uses one.
      image_mean: per RGB channel, for pixels scaled to [0, 1].
      image_std: per RGB channel, for pixels scaled to [0, 1].
    """

    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_global_layers: int
    num_heads: int
    intermediate_layers: tuple[int, ...]
    max_num_tiles: int = 4
    norm_eps: float = 1e-5
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        _convert_fields(self)
        sizes = ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        _require_at_least(1, self, *sizes, "max_num_tiles")
        _require_at_least(0, self, "num_global_layers")
        _require(
            self.image_size % self.patch_size == 0,
            f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}",
        )
        _require(
            self.hidden_size % self.num_heads == 0,
            f"vision hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}",
        )
        _require(
            all(0 <= i < self.num_layers for i in self.intermediate_layers),
            f"intermediate_layers {self.intermediate_layers} must be in [0, {self.num_layers})",
        )
        _require(all(s > 0 for s in self.image_std), f"image_std {self.image_std} must be positive")

    @property
    def grid(self) -> int:
        """Patches along one side of the tile."""
        return self.image_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """Sequence length of a tile: its patches and the class token."""
        return self.grid**2 + 1

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def output_size(self) -> int:
        """Width of a feature vector: the final hidden state and the stacked intermediate ones."""
        return self.hidden_size * (1 + len(self.intermediate_layers))

    @property
    def supported_aspect_ratios(self) -> tuple[tuple[int, int], ...]:
        """Tile arrangements (width, height) of at most `max_num_tiles` tiles, in the order of their ids."""
        tiles = range(1, self.max_num_tiles + 1)
        return tuple((w, h) for w in tiles for h in tiles if w * h <= self.max_num_tiles)

    @property
    def num_aspect_ratio_ids(self) -> int:
        """Rows of the aspect-ratio embedding tables; id 0 is padding."""
        return len(self.supported_aspect_ratios) + 1


@dataclasses.dataclass(frozen=True)
class CompressorConfig:
    """Pooling of a frame's patch grid; the class token is kept.

    Attributes:
      mode: how the patches of a window become one vector.
      stride: side of the window, in patches.
    """

    mode: PoolMode = "average"
    stride: int = 4

    def __post_init__(self):
        _convert_fields(self)
        _require_at_least(1, self, "stride")

    def output_grid(self, grid: int) -> int:
        """Returns the side of the pooled grid."""
        return math.ceil(grid / self.stride) if self.mode == "bilinear" else grid // self.stride


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding with llama3 frequency scaling; `factor=1` disables the scaling."""

    theta: float = 500_000.0
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        _convert_fields(self)
        _require(
            self.high_freq_factor > self.low_freq_factor,
            f"high_freq_factor {self.high_freq_factor} must exceed low_freq_factor {self.low_freq_factor}",
        )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The language decoder; layers in `cross_attention_layers` attend to the memory bank *instead of* text.

    Attributes:
      vocab_size: tokens that can be predicted. `<|image|>` has this id, the first of the extra embeddings.
      extra_embeddings: rows of the embedding table after the vocabulary.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    cross_attention_layers: tuple[int, ...]
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-5
    max_positions: int = 131_072
    extra_embeddings: int = 8

    def __post_init__(self):
        _convert_fields(self)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        _require_at_least(1, self, *sizes, "max_positions", "extra_embeddings")
        _require(
            self.hidden_size % self.num_heads == 0,
            f"decoder hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}",
        )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}",
        )
        _require(
            self.head_dim % 2 == 0,
            f"head_dim {self.head_dim} (hidden_size / num_heads) must be even: RoPE rotates channel pairs",
        )
        _require(
            all(0 <= i < self.num_layers for i in self.cross_attention_layers),
            f"cross_attention_layers {self.cross_attention_layers} must be in [0, {self.num_layers})",
        )
        _require(
            all(a < b for a, b in itertools.pairwise(self.cross_attention_layers)),
            f"cross_attention_layers {self.cross_attention_layers} must be ascending",
        )
        _require(
            0 < len(self.cross_attention_layers) < self.num_layers,
            f"cross_attention_layers {self.cross_attention_layers} must name some, but not all, of the "
            f"{self.num_layers} layers",
        )

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def image_token_id(self) -> int:
        """Id of `<|image|>`, the token that stands for a frame."""
        return self.vocab_size

    @property
    def num_self_attention_layers(self) -> int:
        """Layers with self-attention over the text."""
        return self.num_layers - len(self.cross_attention_layers)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The whole model.

    Attributes:
      rows_before_first_frame: cross-attention of tokens before the first frame. "skip" leaves out the whole
        layer, which is causal; "attend" attends to every frame of the sequence without the MLP branch, as
        the original's training forward pass does.
      attention: name of an attention implementation to force everywhere; None chooses by platform.
      remat: rematerialisation in the backward pass of the one-pass call. "none" saves all activations,
        "dots" the outputs of matmuls, "full" only the inputs of each layer.
    """

    vision: VisionConfig
    compressor: CompressorConfig
    decoder: DecoderConfig
    rows_before_first_frame: RowsBeforeFirstFrame = "skip"
    attention: str | None = None
    remat: Remat = "none"

    def __post_init__(self):
        _convert_fields(self)
        _require(
            self.compressor.stride <= self.vision.grid,
            f"pool stride {self.compressor.stride} exceeds the patch grid of {self.vision.grid}",
        )

    @property
    def vectors_per_frame(self) -> int:
        """N, the feature vectors of a frame: the class token and the pooled grid."""
        return 1 + self.compressor.output_grid(self.vision.grid) ** 2


def moss_video_11b() -> ModelConfig:
    """The released MOSS-Video-Preview: 10.67 B parameters, 101 vectors per frame."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=560,
            patch_size=14,
            hidden_size=1280,
            intermediate_size=5120,
            num_layers=32,
            num_global_layers=8,
            num_heads=16,
            intermediate_layers=(3, 7, 15, 23, 30),
        ),
        compressor=CompressorConfig(mode="average", stride=4),
        decoder=DecoderConfig(
            vocab_size=128_256,
            hidden_size=4096,
            intermediate_size=14_336,
            num_layers=40,
            num_heads=32,
            num_kv_heads=8,
            cross_attention_layers=(3, 8, 13, 18, 23, 28, 33, 38),
        ),
    )


def moss_tiny() -> ModelConfig:
    """The same architecture at a size that streams in real time on two CPU cores: 17 vectors per frame."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=112,
            patch_size=14,
            hidden_size=192,
            intermediate_size=768,
            num_layers=6,
            num_global_layers=2,
            num_heads=6,
            intermediate_layers=(1, 3),
        ),
        compressor=CompressorConfig(mode="average", stride=2),
        decoder=DecoderConfig(
            vocab_size=1024,
            hidden_size=256,
            intermediate_size=768,
            num_layers=8,
            num_heads=8,
            num_kv_heads=2,
            cross_attention_layers=(1, 4, 7),
            max_positions=8192,
        ),
    )


PRESETS = {"moss_video_11b": moss_video_11b, "moss_tiny": moss_tiny}


# ------------------------------------------------------------------------------ frames and tokens


@dataclasses.dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video are sampled.

    Attributes:
      fps: frames per second of video, by timestamp.
      min_frames: lower bound, met by an offline clip by sampling it more densely.
      max_frames: upper bound, met by an offline clip by sampling it more sparsely; None for no bound. A live
        stream has none.
    """

    fps: float = 1.0
    min_frames: int = 1
    max_frames: int | None = 256

    def __post_init__(self):
        _convert_fields(self)
        _require(
            math.isfinite(self.fps) and self.fps > 0,
            f"fps must be a positive number of frames per second, not {self.fps:g}",
        )
        _require(
            1 <= self.min_frames <= (self.min_frames if self.max_frames is None else self.max_frames),
            f"min_frames {self.min_frames} must be at least 1 and at most max_frames {self.max_frames}",
        )


@dataclasses.dataclass(frozen=True)
class TokenSampling:
    """How the next token is sampled.

    Attributes:
      temperature: 0 for greedy decoding.
      top_k: sample among the k likeliest tokens, and those as likely as the last of them; 0 for all.
      top_p: nucleus sampling, among the likeliest tokens that hold this share of the probability.
      repetition_penalty: above 1, lowers the scores of tokens that the current turn already contains.
        Silence, control and punctuation tokens are exempt, since a stream repeats them all the time.
      seed: a sample depends on the seed and the position in the stream alone, not on other slots.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        _convert_fields(self)
        _require(self.temperature >= 0, f"temperature {self.temperature} must not be negative")
        _require_seed(self.seed)
        _require(self.top_k >= 0, f"top_k {self.top_k} must not be negative; 0 disables it")
        # It is a number of 32 bits on the device.
        _require(self.top_k < 2**31, f"top_k {self.top_k} must be below 2**31; 0 disables it")
        _require(0 < self.top_p <= 1, f"top_p {self.top_p} must be in (0, 1]")
        _require(
            self.repetition_penalty > 0, f"repetition_penalty {self.repetition_penalty} must be positive"
        )


# ------------------------------------------------------------------------------------ live stream


# Policies of the memory bank that leave each vector as it is, or forget it.
NEVER_MERGE = ("full", "window")


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Compaction of the memory bank and eviction from the KV cache, which a stream out of room goes on by.

    Attributes:
      policy: for the frames, a name in `memory.policies`. "full" forgets nothing, so the stream ends when the
        bank is full. "window" keeps the newest frames. "pyramid" keeps the newest whole, older ones coarser,
        and merges the oldest. "merge" merges vectors at the same place of neighbouring frames that are alike.
      low_water: share of the bank and of the text cache that a compaction leaves in use.
      pyramid_shares: of what is left, the share of each level: whole frames, 1/4, 1/16 of the grid, one
        vector. If they are fewer, the last is divided evenly among the levels that are left.
      bank_dtype: stores keys and values of the bank in 8 bits; None for the dtype of the model.
      text: for the tokens. "full" forgets none, so the stream ends when the text cache is full. "window"
        keeps the opening and the newest; of older ones silences and frames go first, then what was asked,
        and what the model said last.
      text_recent: share of the text cache whose newest tokens are all kept.
      text_assistant: share of the text cache for what the model has said before.
    """

    policy: str = "pyramid"
    low_water: float = 0.875
    pyramid_shares: tuple[float, ...] = (0.5, 0.25, 0.125, 0.125)
    bank_dtype: BankDtype | None = None
    text: TextMemory = "window"
    text_recent: float = 0.5
    text_assistant: float = 0.25

    def __post_init__(self):
        _convert_fields(self)
        _require(0 < self.low_water < 1, f"low_water {self.low_water} must be in (0, 1)")
        _require(
            0 < self.text_recent < self.low_water and 0 <= self.text_assistant <= 1,
            f"text_recent {self.text_recent} must be between 0 and low_water {self.low_water}, "
            f"and text_assistant {self.text_assistant} in [0, 1]",
        )
        _require(
            len(self.pyramid_shares) >= 2
            and all(share > 0 for share in self.pyramid_shares)
            and sum(self.pyramid_shares) <= 1 + 1e-6,
            "pyramid_shares are at least two positive numbers whose sum is at most 1, "
            f"not {self.pyramid_shares}",
        )

    def low_mark(self, capacity: int) -> int:
        """Low-water mark of a capacity, in whole frames or tokens: what a compaction leaves in use."""
        # Never all of it, or nothing could be appended.
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
      memory: what a slot keeps beyond that.
      policies: names of memory policies that a stream may have in the place of `memory.policy`, each of which
        is compiled; "full" is always allowed. See `stream.stream_config`.
    """

    slots: int = 1
    text_capacity: int = 4096
    bank_capacity: int = 256
    memory: MemoryConfig = MemoryConfig()
    policies: tuple[str, ...] = ()

    def __post_init__(self):
        _convert_fields(self)
        _require_at_least(1, self, "slots", "text_capacity", "bank_capacity")

    @property
    def allowed_policies(self) -> tuple[str, ...]:
        """Names of the policies that streams may have, `memory.policy` first, each once."""
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
      max_gap: seconds after which a frame is encoded whatever its change.
      min_distance: distance to the features of the frame that was remembered last, as
        `memory.selection.feature_distance` measures it, below which a frame is not remembered; None does not
        measure it, which would have the host wait for the features of each frame.
      fps: frames per second that enter while nothing changes. Applies where there is a `max_fps`.
      max_fps: frames per second that enter while something changes; None leaves the rate to the source.
    """

    enabled: bool = False
    min_change: float = 0.08
    max_gap: float = 3.0
    min_distance: float | None = None
    fps: float = 1.0
    max_fps: float | None = None

    def __post_init__(self):
        _convert_fields(self)
        _require(0 <= self.min_change <= 1, f"min_change must be in [0, 1], not {self.min_change:g}")
        _require(self.max_gap > 0, f"max_gap must be a positive number of seconds, not {self.max_gap:g}")
        _require(
            self.min_distance is None or self.min_distance >= 0,
            f"min_distance must be at least 0, or None; got {self.min_distance}",
        )
        _require(0 < self.fps < math.inf, f"fps must be a positive number, not {self.fps:g}")
        _require(
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
      max_tokens_per_turn: tokens after which an answer is cut and the stream goes on silent.
      selection: which frames are shown to the model.
      max_tokens_per_second: speed that a realtime answer is held to; None for none.
      max_fps: frames a second beyond which a realtime stream is not shown more; None for no limit.
      idle_seconds: a realtime stream ends when nothing has been pushed for so long; None for never.
      lifetime_seconds: a realtime stream ends at this age; None for never.
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
        _convert_fields(self)
        for name in ("max_tokens_per_second", "max_fps", "idle_seconds", "lifetime_seconds"):
            limit = getattr(self, name)
            _require(limit is None or limit > 0, f"{name} must be positive, or None; got {limit}")
        _require_at_least(1, self, "tokens_per_second", "inbox_frames", "max_tokens_per_turn")
        _require(self.tail_seconds >= 0, f"tail_seconds {self.tail_seconds} must not be negative")


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """How the streams of one engine are run.

    Attributes:
      clock: of all streams; see `SessionConfig`.
      max_stall_ms: while a stream talks, frames are encoded in batches that hold its text up for no longer,
        or one by one.
    """

    clock: Clock = "realtime"
    max_stall_ms: float = 25.0

    def __post_init__(self):
        _convert_fields(self)
        _require(self.max_stall_ms > 0, f"max_stall_ms must be positive, not {self.max_stall_ms}")


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """The live server.

    Attributes:
      grace_seconds: how long the stream of a lost connection waits to be resumed.
      replay_events: events that a session keeps, to send them again after a lost connection.
      queue_events: events that may wait for a client that reads slowly, before its connection is closed.
      max_message_bytes: of a message of a client.
      max_image_pixels: of a frame as it comes; all are scaled to fit the model.
      history_items: items of the conversation that can be asked for.
      decode_threads: threads that decode images.
      counters_seconds: between two `moss.counters` events.
      save_seconds: between two saves of a running stream, where there is a folder for them.
      keep_seconds: how long a saved stream that nobody resumes is kept.
      restart_seconds: after which streams can be opened again when a step has failed.
      drain_seconds: how long running streams may take to be told and saved at the end of the server.
      correction: the words by which the model begins to take back what it was saying; empty for none.
    """

    grace_seconds: float = 60.0
    replay_events: int = 4096
    queue_events: int = 1024
    max_message_bytes: int = 8 * 2**20
    max_image_pixels: int = 16 * 2**20
    history_items: int = 256
    decode_threads: int = 2
    counters_seconds: float = 1.0
    save_seconds: float = 30.0
    keep_seconds: float = 86400.0
    restart_seconds: float = 0.5
    drain_seconds: float = 10.0
    correction: str = " - wait, "

    def __post_init__(self):
        _convert_fields(self)
        for name in ("counters_seconds", "save_seconds", "restart_seconds", "drain_seconds"):
            _require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        for name in ("grace_seconds", "keep_seconds"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative; got {getattr(self, name)}")
        _require_at_least(
            1,
            self,
            "replay_events",
            "queue_events",
            "max_message_bytes",
            "max_image_pixels",
            "history_items",
            "decode_threads",
        )


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Chat completions of the live server.

    Attributes:
      max_tokens: of an answer whose request says nothing.
      max_streams: completions at once, so that live streams find free slots; 0 for as many as there are.
      queue: requests that may wait in line.
      queue_seconds: how long each may wait there, and then for a free stream.
      max_body_bytes: of a request, with its data URLs.
      max_image_bytes, max_video_bytes: of an image and of a video.
      max_video_seconds: of a video.
      max_frames: of all images and videos of a request; longer videos are sampled more sparsely.
      decode_seconds: that the decoding of a video may take.
      decode_threads: threads that decode videos.
      file_bytes, files: that uploads may have together, and their number.
      keep_seconds: how long an upload is kept.
      file_roots: folders below which `file://` URLs are allowed.
      fetch_hosts: from which media are fetched, each with `:port` if that is not the scheme's own.
      fetch_seconds: that it may take to fetch one.
    """

    max_tokens: int = 512
    max_streams: int = 0
    queue: int = 64
    queue_seconds: float = 30.0
    max_body_bytes: int = 64 * 2**20
    max_image_bytes: int = 16 * 2**20
    max_video_bytes: int = 200 * 2**20
    max_video_seconds: float = 3600.0
    max_frames: int = 256
    decode_seconds: float = 120.0
    decode_threads: int = 2
    file_bytes: int = 2 * 2**30
    files: int = 1024
    keep_seconds: float = 86400.0
    file_roots: tuple[str, ...] = ()
    fetch_hosts: tuple[str, ...] = ()
    fetch_seconds: float = 20.0

    def __post_init__(self):
        _convert_fields(self)
        for name in ("queue_seconds", "max_video_seconds", "decode_seconds", "keep_seconds", "fetch_seconds"):
            _require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        _require_at_least(
            1,
            self,
            "max_tokens",
            "max_body_bytes",
            "max_image_bytes",
            "max_video_bytes",
            "max_frames",
            "decode_threads",
            "file_bytes",
            "files",
        )
        _require_at_least(0, self, "queue", "max_streams")


@dataclasses.dataclass(frozen=True)
class SecurityConfig:
    """Access control and rate limits of the live server; `ServerConfig` limits the size of a message.

    Attributes:
      max_connections: connections and requests at once, of all.
      max_connections_per_address: of one address.
      connections_per_second: new connections and requests of one address, on average.
      connection_burst: those that may come at once.
      messages_per_second: of a WebSocket; what comes faster is read later.
      message_burst: those that are read at once.
      max_body_bytes: of a request that is no WebSocket.
    """

    max_connections: int = 1024
    max_connections_per_address: int = 128
    connections_per_second: float = 50.0
    connection_burst: int = 200
    messages_per_second: float = 100.0
    message_burst: int = 200
    max_body_bytes: int = 256 * 2**20

    def __post_init__(self):
        _convert_fields(self)
        for name in ("connections_per_second", "messages_per_second"):
            _require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        _require_at_least(
            1,
            self,
            "max_connections",
            "max_connections_per_address",
            "connection_burst",
            "message_burst",
            "max_body_bytes",
        )


# --------------------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class InitialModelConfig:
    """The model that training starts from.

    Attributes:
      preset: a name in `PRESETS`, initialised at random.
      checkpoint: a folder in Hugging Face layout, used instead of the preset.
      pool: overrides the frame compressor's mode.
      stride: overrides the frame compressor's stride.
      attention: see `ModelConfig`.
      remat: see `ModelConfig`.
    """

    preset: str | None = "moss_tiny"
    checkpoint: str | None = None
    pool: PoolMode | None = None
    stride: int | None = None
    attention: str | None = None
    remat: Remat = "none"

    def __post_init__(self):
        _convert_fields(self)
        _require(
            bool(self.checkpoint) or self.preset in PRESETS,
            f"preset must be one of {', '.join(map(repr, PRESETS))}; got {self.preset!r}",
        )
        if self.stride is not None:
            _require_at_least(1, self, "stride")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one axis may be 0 to take all devices that the others leave.

    Attributes:
      data: data parallelism; parameters are replicated.
      fsdp: data parallelism with sharded parameters and optimizer state.
      tensor: tensor parallelism, over heads, MLP width and vocabulary.
    """

    data: int = 1
    fsdp: int = 0
    tensor: int = 1

    def __post_init__(self):
        _convert_fields(self)
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            _require(size >= 0, f"{name} must be at least 1 device, or 0 for all the rest; got {size}")
        free = [name for name, size in sizes.items() if size == 0]
        _require(
            len(free) <= 1,
            f"{' and '.join(free)} are 0: only one mesh axis can be 0, which takes all the rest",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with gradient clipping, linear warm-up and cosine decay.

    Attributes:
      learning_rate: at its peak.
      warmup_share: share of the steps over which the learning rate rises from 0.
      final_share: learning rate after the last step, as a share of the peak.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: of matrices; norms, biases, gates and embeddings are not decayed.
      clip_norm: maximum global norm of the gradient.
    """

    learning_rate: float = 2e-5
    warmup_share: float = 0.1
    final_share: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self):
        _convert_fields(self)
        for name in ("learning_rate", "eps"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"{name} {value} must be positive")
        _require_share(self, "warmup_share", "final_share")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name} must be in [0, 1), not {value}")
        _require(0 <= self.weight_decay < math.inf, f"weight_decay {self.weight_decay} must not be negative")
        _require(self.clip_norm > 0, f"clip_norm {self.clip_norm} must be positive")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
      steps: optimizer steps.
      batch_size: sequences per step, over all devices and processes.
      accumulate: micro-batches per step, whose gradients are accumulated to save memory.
      trainable: parts of the model that are trained; the others are frozen.
      compute_dtype: of the forward and backward pass. Master weights, optimizer and loss are float32.
      silence_weight: loss weight of `<|silence|>` targets (0.1 in arXiv 2606.07639).
      loss_terms: names and weights of terms added to the cross-entropy, of those in
        `moss_jax.train.losses.LOSS_TERMS`; a dict in gin files: `{'z_loss': 1e-4}`.
      seed: of the initial parameters and of the data.
      log_every: steps between two log lines.
      checkpoint_every: steps between two checkpoints.
      keep_checkpoints: number of recent checkpoints to keep.
    """

    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    trainable: tuple[ModelPart, ...] = MODEL_PARTS
    compute_dtype: ComputeDtype = "bfloat16"
    silence_weight: float = 0.1
    loss_terms: tuple[tuple[str, float], ...] = ()
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self):
        _convert_fields(self)
        counts = ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints")
        _require_at_least(1, self, *counts)
        _require_seed(self.seed)
        _require(
            self.batch_size % self.accumulate == 0,
            f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}",
        )
        _require(bool(self.trainable), f"trainable must name at least one of {', '.join(MODEL_PARTS)}")
        _require(
            0 <= self.silence_weight < math.inf, f"silence_weight {self.silence_weight} must not be negative"
        )
        for name, weight in self.loss_terms:
            _require(
                math.isfinite(weight), f"loss_terms has {weight} for {name!r}; a weight is a finite number"
            )


@dataclasses.dataclass(frozen=True)
class SegmentsConfig:
    """Training on long tabletop streams segment by segment, with the memory carried from one to the next.

    Each row of a batch goes through one stream after another. A step continues every row by some segments,
    with gradients through all of them, compactions included; what was carried in has none (truncated
    backpropagation through time). Memories differ from row to row, so that one model serves all.

    Attributes:
      per_step: segments of a step and row; 0 trains on whole sequences in one pass.
      frames: of a segment, at most; the bank is compacted where a segment would not fit.
      tokens: of a segment, at most. A segment ends before a frame.
      streams: lengths of streams in segments, of which each row has one.
      memories: policy, whole frames in the bank and storage ("model", "int8" or "fp8"), of which each row has
        one, in turn; with as many rows as memories times lengths, there is one row of each pair.
      text_capacities: tokens that a text cache holds; each stream draws one.
      max_skip: the largest gap in a stream's positions, which makes the model used to distances far beyond
        the segments that it is trained on; drawn log-uniformly for `skips` of the segments.
      skips: share of the segments that begin with a gap, in half of the streams.
      selected: share of the streams in which `<|image|>` tokens come without a frame where nothing changes,
        as in a session whose frames are selected (`SelectionConfig`), but by the truth of the stream.
      past: share of questions about the past among the requests of streams of more than 40 seconds.
      paces: of those streams, the shortest and the longest mean time between two requests, in seconds; each
        stream draws one, log-uniformly.
    """

    per_step: int = 0
    frames: int = 8
    tokens: int = 128
    streams: tuple[int, ...] = (4, 8, 24, 80)
    memories: tuple[tuple[str, int, Literal["model", "int8", "fp8"]], ...] = (("pyramid", 64, "model"),)
    text_capacities: tuple[int, ...] = (384, 768, 1536)
    max_skip: int = 2**17
    skips: float = 0.125
    selected: float = 0.3
    past: float = 0.5
    paces: tuple[float, float] = (3.0, 30.0)

    def __post_init__(self):
        _convert_fields(self)
        _require_at_least(0, self, "per_step")
        _require_at_least(1, self, "frames", "tokens", "max_skip")
        _require_share(self, "skips", "selected", "past")
        _require(
            len(self.paces) == 2 and 1 <= self.paces[0] <= self.paces[1],
            f"paces are the shortest and the longest, of at least 1 second; got {self.paces}",
        )
        for name in ("streams", "text_capacities", "memories"):
            _require(bool(getattr(self, name)), f"{name} must not be empty")
        _require(min(self.streams) >= 1, f"streams {self.streams} have at least one segment each")
        _require(
            min(self.text_capacities) > 2 * self.tokens,
            f"text_capacities {self.text_capacities} must have room for two segments of {self.tokens} tokens",
        )
        for policy, frames, _ in self.memories:
            _require(
                frames > self.frames,
                f"memories has {policy!r} of {frames} frames; it must hold more than the {self.frames} of a "
                "segment",
            )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The source of training batches.

    Attributes:
      kind: "tabletop", streams of the generated world, or "conversations", rows in JSON files.
      workers: processes that make batches; 0 makes them in the training process. The batches are the same. Of
        long streams each makes some rows, so a number that divides those of a batch serves best.
      read_ahead: batches that each worker prefetches.
      max_dropped_share: share of the rows that may be dropped before the run is aborted.
    """

    kind: DataKind = "tabletop"
    workers: int = 0
    read_ahead: int = 4
    max_dropped_share: float = 0.1

    def __post_init__(self):
        _convert_fields(self)
        _require(self.workers >= 0, f"workers {self.workers} must not be negative")
        _require_at_least(1, self, "read_ahead")
        _require_share(self, "max_dropped_share")


@dataclasses.dataclass(frozen=True)
class ConversationConfig:
    """Conversations about videos, as ShareGPT rows.

    Attributes:
      files: JSON or JSON-lines files of rows; docs/data.md describes them.
      media_root: folder that media paths in the rows are relative to.
      max_tokens: longer rows are dropped.
      token_buckets: sequence lengths to pad to, ascending; the largest is at least `max_tokens`. A batch has
        one length.
      frame_buckets: numbers of frames to pad to, ascending. A batch has one.
      swap_probability: probability of swapping a frame inside running text with the token before it, so that
        frames are seen at every token boundary.
    """

    files: tuple[str, ...] = ()
    media_root: str = "."
    max_tokens: int = 4096
    token_buckets: tuple[int, ...] = (1024, 4096)
    frame_buckets: tuple[int, ...] = (16, 64, 256)
    swap_probability: float = 0.5

    def __post_init__(self):
        _convert_fields(self)
        for name in ("token_buckets", "frame_buckets"):
            sizes = getattr(self, name)
            _require(
                bool(sizes) and sizes[0] >= 1 and all(a < b for a, b in itertools.pairwise(sizes)),
                f"{name} {sizes} must be positive and ascending",
            )
        _require(
            self.token_buckets[-1] >= self.max_tokens,
            f"token_buckets {self.token_buckets} must reach max_tokens {self.max_tokens}",
        )
        _require_at_least(1, self, "max_tokens")
        _require_share(self, "swap_probability")


@dataclasses.dataclass(frozen=True)
class TabletopConfig:
    """Streams of the tabletop world.

    Attributes:
      image_size: side of the square frames, in pixels.
      min_seconds: minimum length of a stream; it has one frame per second, from second 0 on.
      max_seconds: maximum length of a stream.
      max_tokens: tokens that a sequence is padded or truncated to.
      warmup_batches: number of initial batches with short clips and dense questions, a curriculum for seeing.
      warmup_seconds: length of a short clip.
      warmup_tokens: tokens that the sequence of a short clip is padded or truncated to.
      warmup_factor: short clips per sequence of a normal batch.
      offline_share: share of the streams that are seen whole before the question is asked.
    """

    image_size: int = 112
    min_seconds: int = 8
    max_seconds: int = 32
    max_tokens: int = 512
    warmup_batches: int = 0
    warmup_seconds: int = 4
    warmup_tokens: int = 256
    warmup_factor: int = 1
    offline_share: float = 0.15

    def __post_init__(self):
        _convert_fields(self)
        _require(self.image_size >= 32, f"image_size must be at least 32 pixels, not {self.image_size}")
        _require(
            1 <= self.min_seconds <= self.max_seconds,
            f"min_seconds {self.min_seconds} must be at least 1 and at most max_seconds {self.max_seconds}",
        )
        _require_share(self, "offline_share")
        _require_at_least(0, self, "warmup_batches")
        _require_at_least(1, self, "max_tokens", "warmup_seconds", "warmup_tokens", "warmup_factor")
