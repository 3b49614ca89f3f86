"""Every setting of the project as frozen dataclasses that refuse nonsense, and the model presets."""

import dataclasses
import itertools
import math
from typing import Literal

PoolMode = Literal["average", "max", "bilinear", "channelFusion"]
RowsBeforeFirstFrame = Literal["skip", "attend"]
Clock = Literal["lockstep", "realtime"]


class ConfigError(ValueError):
    """A setting that cannot work; the message says what would."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


# ---------------------------------------------------------------------------------------- model


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision encoder: pre-norm ViT layers, then global layers behind tanh gates.

    Attributes:
      image_size: side of the one square tile that a frame is fitted into, in pixels.
      intermediate_layers: the layers whose *inputs* are stacked behind the final hidden state.
      max_num_tiles: tiles per image in the checkpoint's embedding tables. A frame uses one.
      image_mean, image_std: normalisation per RGB channel, for pixels scaled to [0, 1].
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
            f"intermediate_layers {self.intermediate_layers} must lie in [0, {self.num_layers})",
        )
        _require(
            len(self.image_mean) == len(self.image_std) == 3,
            f"image_mean and image_std hold three numbers, not {self.image_mean} and {self.image_std}",
        )
        _require(all(s > 0 for s in self.image_std), f"image_std {self.image_std} must be positive")

    @property
    def grid(self) -> int:
        """Patches along one side of the tile."""
        return self.image_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """Patches of a tile and the class token."""
        return self.grid**2 + 1

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def output_size(self) -> int:
        """Width of a feature: the final hidden state and the stacked intermediate ones."""
        return self.hidden_size * (1 + len(self.intermediate_layers))

    @property
    def supported_aspect_ratios(self) -> tuple[tuple[int, int], ...]:
        """(width, height) in tiles of every arrangement of at most `max_num_tiles` tiles, in id order."""
        tiles = range(1, self.max_num_tiles + 1)
        return tuple((w, h) for w in tiles for h in tiles if w * h <= self.max_num_tiles)

    @property
    def num_aspect_ratio_ids(self) -> int:
        """Rows of the aspect-ratio tables; id 0 stands for a padded image."""
        return len(self.supported_aspect_ratios) + 1


@dataclasses.dataclass(frozen=True)
class CompressorConfig:
    """How the patch grid of a frame is pooled; the class token is kept beside it."""

    mode: PoolMode = "average"
    stride: int = 4

    def __post_init__(self):
        modes = ("average", "max", "bilinear", "channelFusion")
        _require(self.mode in modes, f"unknown pool mode {self.mode!r}; it is one of {', '.join(modes)}")
        _require(self.stride >= 1, f"pool stride {self.stride} must be at least 1")

    def output_grid(self, grid: int) -> int:
        """Side of the pooled grid."""
        return math.ceil(grid / self.stride) if self.mode == "bilinear" else grid // self.stride


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding with the llama3 frequency scaling; `factor=1` scales nothing."""

    theta: float = 500_000.0
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        _require(
            self.high_freq_factor > self.low_freq_factor,
            f"high_freq_factor {self.high_freq_factor} must exceed low_freq_factor {self.low_freq_factor}",
        )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The language decoder; layers in `cross_attention_layers` attend to the memory bank *instead of* text.

    Attributes:
      vocab_size: tokens that can be predicted. `<|image|>` has this id, and `extra_embeddings` rows follow.
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
            f"head_dim {self.head_dim} (hidden_size / num_heads) must be even: channels rotate in pairs",
        )
        _require(
            all(0 <= i < self.num_layers for i in self.cross_attention_layers),
            f"cross_attention_layers {self.cross_attention_layers} must lie in [0, {self.num_layers})",
        )
        _require(
            all(a < b for a, b in itertools.pairwise(self.cross_attention_layers)),
            f"cross_attention_layers {self.cross_attention_layers} must ascend",
        )
        _require(
            0 < len(self.cross_attention_layers) < self.num_layers,
            f"cross_attention_layers {self.cross_attention_layers} must name some of the {self.num_layers} "
            "layers and leave some to the text",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def image_token_id(self) -> int:
        return self.vocab_size

    @property
    def num_self_attention_layers(self) -> int:
        return self.num_layers - len(self.cross_attention_layers)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The whole model.

    Attributes:
      rows_before_first_frame: what a cross-attention layer does for tokens that see no frame yet. "skip"
        leaves them as they are, which is causal; "attend" lets them attend to every frame of the sequence
        without the MLP branch, which is what the original's training forward does.
      attention: name of an attention implementation to force everywhere; None picks by platform.
    """

    vision: VisionConfig
    compressor: CompressorConfig
    decoder: DecoderConfig
    rows_before_first_frame: RowsBeforeFirstFrame = "skip"
    attention: str | None = None

    def __post_init__(self):
        _require(
            self.rows_before_first_frame in ("skip", "attend"),
            f"rows_before_first_frame is 'skip' or 'attend', not {self.rows_before_first_frame!r}",
        )
        _require(
            self.compressor.stride <= self.vision.grid,
            f"pool stride {self.compressor.stride} exceeds the patch grid of {self.vision.grid}",
        )

    @property
    def vectors_per_frame(self) -> int:
        """N: the class token and the pooled grid."""
        return 1 + self.compressor.output_grid(self.vision.grid) ** 2


def moss_video_11b() -> ModelConfig:
    """The released MOSS-Video-Preview: 10.67 B parameters, 101 vectors a frame."""
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
    """A model of the same anatomy that streams in real time on two CPU cores: 17 vectors a frame."""
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
    """Which frames of a video are looked at.

    Attributes:
      fps: frames a second of video, taken by timestamp.
      min_frames, max_frames: bounds on their number. A clip read as a whole is spread over its length to
        meet them; a live one just ends after `max_frames`.
    """

    fps: float = 1.0
    min_frames: int = 1
    max_frames: int = 256

    def __post_init__(self):
        _require(
            math.isfinite(self.fps) and self.fps > 0,
            f"fps must be a positive number of frames a second, not {self.fps:g}",
        )
        _require(
            1 <= self.min_frames <= self.max_frames,
            f"min_frames {self.min_frames} must be at least 1 and at most max_frames {self.max_frames}",
        )


@dataclasses.dataclass(frozen=True)
class TokenSampling:
    """How the next token is drawn.

    Attributes:
      temperature: 0 takes the likeliest token.
      top_k: draw among the k likeliest; 0 for all.
      top_p: draw among the likeliest that hold this share of the probability.
      repetition_penalty: above 1, divides the score of what the current turn has said already. Silence,
        control and punctuation tokens are exempt: repeating them is how a stream goes on.
      seed: a draw depends on it and on the position in the stream alone, so slots don't disturb each other.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        _require(self.temperature >= 0, f"temperature {self.temperature} must not be negative")
        _require(self.top_k >= 0, f"top_k {self.top_k} must not be negative; 0 turns it off")
        _require(0 < self.top_p <= 1, f"top_p {self.top_p} must lie in (0, 1]")
        _require(
            self.repetition_penalty > 0, f"repetition_penalty {self.repetition_penalty} must be positive"
        )


# ------------------------------------------------------------------------------------ live stream


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Room that is set aside for a stream.

    Attributes:
      slots: streams side by side.
      text_capacity: tokens that a stream can hold, its frames' `<|image|>` tokens among them.
      bank_capacity: frames that a stream can hold.
    """

    slots: int = 1
    text_capacity: int = 4096
    bank_capacity: int = 256

    def __post_init__(self):
        for name in ("slots", "text_capacity", "bank_capacity"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class SessionConfig:
    """How a live session runs.

    Attributes:
      clock: "realtime" runs by the wall clock. "lockstep" runs by the stream's own: a token takes
        1 / tokens_per_second of it, so the outcome depends on the input alone.
      tokens_per_second: speed of speech on the lockstep clock.
      tail_seconds: how long an answer may still go on after the end of the stream.
      inbox_frames: frames that may wait in a realtime session; the oldest is dropped for one more. Prompts
        are never dropped, and a lockstep session drops nothing.
    """

    clock: Clock = "lockstep"
    tokens_per_second: int = 32
    tail_seconds: float = 1.0
    inbox_frames: int = 8

    def __post_init__(self):
        clocks = ("lockstep", "realtime")
        _require(self.clock in clocks, f"unknown clock {self.clock!r}; it is one of {', '.join(clocks)}")
        _require(
            self.tokens_per_second >= 1,
            f"tokens_per_second must be at least 1, not {self.tokens_per_second}",
        )
        _require(self.tail_seconds >= 0, f"tail_seconds {self.tail_seconds} must not be negative")
        _require(self.inbox_frames >= 1, f"inbox_frames must be at least 1, not {self.inbox_frames}")
