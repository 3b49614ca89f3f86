"""Settings of the model, and the presets."""

import dataclasses
import itertools
import math
from typing import Literal

from moss_jax.config.fields import (
    convert_fields,
    require,
    require_at_least,
)

PoolMode = Literal["average", "max", "bilinear", "channelFusion"]
RowsBeforeFirstFrame = Literal["skip", "attend"]
Remat = Literal["none", "dots", "projections", "attention", "full"]
DecoderWeights = Literal["int8", "fp8"]
EncoderWeights = Literal["fp8"]


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
        convert_fields(self)
        sizes = ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        require_at_least(1, self, *sizes, "max_num_tiles")
        require_at_least(0, self, "num_global_layers")
        require(
            self.image_size % self.patch_size == 0,
            f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}",
        )
        require(
            self.hidden_size % self.num_heads == 0,
            f"vision hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}",
        )
        require(
            all(0 <= i < self.num_layers for i in self.intermediate_layers),
            f"intermediate_layers {self.intermediate_layers} must be in [0, {self.num_layers})",
        )
        require(all(s > 0 for s in self.image_std), f"image_std {self.image_std} must be positive")

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
        convert_fields(self)
        require_at_least(1, self, "stride")

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
        convert_fields(self)
        require(
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
        convert_fields(self)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        require_at_least(1, self, *sizes, "max_positions", "extra_embeddings")
        require(
            self.hidden_size % self.num_heads == 0,
            f"decoder hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}",
        )
        require(
            self.head_dim % 2 == 0,
            f"head_dim {self.head_dim} (hidden_size / num_heads) must be even: RoPE rotates channel pairs",
        )
        require(
            all(0 <= i < self.num_layers for i in self.cross_attention_layers),
            f"cross_attention_layers {self.cross_attention_layers} must be in [0, {self.num_layers})",
        )
        require(
            all(a < b for a, b in itertools.pairwise(self.cross_attention_layers)),
            f"cross_attention_layers {self.cross_attention_layers} must be ascending",
        )
        require(
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
        "dots" the outputs of matmuls and of attention, "projections" those of attention and of the fused
        projections before it, "attention" those of attention, "full" only the inputs of each layer.
      vision_remat: that of the vision encoder, whose activations are the largest; None for `remat`.
    """

    vision: VisionConfig
    compressor: CompressorConfig
    decoder: DecoderConfig
    rows_before_first_frame: RowsBeforeFirstFrame = "skip"
    attention: str | None = None
    remat: Remat = "none"
    vision_remat: Remat | None = None

    def __post_init__(self):
        convert_fields(self)
        require(
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
            # Stretched as in the original, only one of 16 wavelengths tells minutes from an hour; now four.
            rope=RopeConfig(factor=1),
            max_positions=8192,
        ),
    )


PRESETS = {"moss_video_11b": moss_video_11b, "moss_tiny": moss_tiny}
