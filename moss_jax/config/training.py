"""Settings of training runs and of their data."""

import dataclasses
import itertools
import math
from typing import Literal, get_args

from moss_jax.config.fields import (
    convert_fields,
    require,
    require_at_least,
    require_seed,
    require_share,
)
from moss_jax.config.model import PRESETS, PoolMode, Remat

ModelPart = Literal["vision", "compressor", "projector", "decoder"]
ComputeDtype = Literal["bfloat16", "float32"]
MomentDType = Literal["bfloat16", "float32"]
DataKind = Literal["tabletop", "conversations"]

MODEL_PARTS: tuple[ModelPart, ...] = get_args(ModelPart)


@dataclasses.dataclass(frozen=True)
class InitialModelConfig:
    """The model that training starts from.

    Attributes:
      preset: a name in `PRESETS`, initialised at random.
      checkpoint: a folder in Hugging Face layout, used instead of the preset.
      pool: overrides the frame compressor's mode.
      stride: overrides the frame compressor's stride.
      attention: see `ModelConfig`.
      remat, vision_remat: see `ModelConfig`.
    """

    preset: str | None = "moss_tiny"
    checkpoint: str | None = None
    pool: PoolMode | None = None
    stride: int | None = None
    attention: str | None = None
    remat: Remat = "none"
    vision_remat: Remat | None = None

    def __post_init__(self):
        convert_fields(self)
        require(
            bool(self.checkpoint) or self.preset in PRESETS,
            f"preset must be one of {', '.join(map(repr, PRESETS))}; got {self.preset!r}",
        )
        if self.stride is not None:
            require_at_least(1, self, "stride")


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
        convert_fields(self)
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size >= 0, f"{name} must be at least 1 device, or 0 for all the rest; got {size}")
        free = [name for name, size in sizes.items() if size == 0]
        require(
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
      first_moment_dtype: storage of the first moment. bfloat16 saves 2 bytes a parameter; the second moment
        is float32 in any case, since its small changes would be lost.
      eps: added to the root of the second moment.
      weight_decay: of matrices; norms, biases, gates and embeddings are not decayed.
      clip_norm: maximum global norm of the gradient.
    """

    learning_rate: float = 2e-5
    warmup_share: float = 0.1
    final_share: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    first_moment_dtype: MomentDType = "float32"
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self):
        convert_fields(self)
        for name in ("learning_rate", "eps"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} {value} must be positive")
        require_share(self, "warmup_share", "final_share")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} must be in [0, 1), not {value}")
        require(0 <= self.weight_decay < math.inf, f"weight_decay {self.weight_decay} must not be negative")
        require(self.clip_norm > 0, f"clip_norm {self.clip_norm} must be positive")


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
        convert_fields(self)
        counts = ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints")
        require_at_least(1, self, *counts)
        require_seed(self.seed)
        require(
            self.batch_size % self.accumulate == 0,
            f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}",
        )
        require(bool(self.trainable), f"trainable must name at least one of {', '.join(MODEL_PARTS)}")
        require(
            0 <= self.silence_weight < math.inf, f"silence_weight {self.silence_weight} must not be negative"
        )
        for name, weight in self.loss_terms:
            require(
                math.isfinite(weight), f"loss_terms has {weight} for {name!r}; a weight is a finite number"
            )


@dataclasses.dataclass(frozen=True)
class SegmentsConfig:
    """Training on long tabletop streams segment by segment, with the memory carried from one to the next.

    Each row of a batch goes through one stream after another. A step advances every row by some segments,
    with gradients through all of them, compactions included, but not into the memory carried in (truncated
    backpropagation through time). Memory settings differ from row to row, so that one model serves all.

    Attributes:
      per_step: segments per step and row; 0 trains on whole sequences in one pass.
      frames: maximum frames per segment; the bank is compacted if a segment would not fit.
      tokens: maximum tokens per segment. A segment ends before a frame.
      streams: stream lengths in segments, one for each row.
      memories: policy, whole frames in the bank and storage ("model", "int8" or "fp8"), assigned to the rows
        in turn; with as many rows as memories times lengths, there is one row of each pair.
      text_capacities: tokens that a text cache holds; each stream draws one.
      max_skip: the largest gap in a stream's positions, which exposes the model to distances far beyond the
        segments that it is trained on; drawn log-uniformly for `skips` of the segments.
      skips: share of the segments that begin with a gap, in half of the streams.
      selected: share of the streams in which `<|image|>` tokens come without a frame while nothing changes,
        as in a session with frame selection (`SelectionConfig`), but by the ground truth of the stream.
      usual: share of the streams of more than 80 seconds in which the user asks for what is asked for in
        shorter ones, mostly about the present; `past`, `old` and `late` concern the others.
      past: share of questions about the past among the requests of the others.
      old: share of those questions that are drawn again for old evidence; see `draw_stream`.
      late: share of the others in which the user says nothing before a time drawn uniformly, so that only the
        bank remembers what was seen until then.
      narrated: share of the streams, of any length, in which the user first asks for a narration and then
        says nothing before a time drawn uniformly, so that the model learns to narrate for long.
      paces: in streams of more than a minute, the shortest and the longest mean time between two requests, in
        seconds; each stream draws one, log-uniformly.
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
    usual: float = 0.0
    past: float = 0.5
    old: float = 0.0
    late: float = 0.0
    narrated: float = 0.0
    paces: tuple[float, float] = (3.0, 30.0)

    def __post_init__(self):
        convert_fields(self)
        require_at_least(0, self, "per_step")
        require_at_least(1, self, "frames", "tokens", "max_skip")
        require_share(self, "skips", "selected", "usual", "past", "old", "late", "narrated")
        require(
            len(self.paces) == 2 and 1 <= self.paces[0] <= self.paces[1],
            f"paces are the shortest and the longest, of at least 1 second; got {self.paces}",
        )
        for name in ("streams", "text_capacities", "memories"):
            require(bool(getattr(self, name)), f"{name} must not be empty")
        require(min(self.streams) >= 1, f"streams {self.streams} have at least one segment each")
        require(
            min(self.text_capacities) > 2 * self.tokens,
            f"text_capacities {self.text_capacities} must have room for two segments of {self.tokens} tokens",
        )
        for policy, frames, _ in self.memories:
            require(
                frames > self.frames,
                f"memories has {policy!r} of {frames} frames; it must hold more than the {self.frames} of a "
                "segment",
            )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The source of training batches.

    Attributes:
      kind: "tabletop", streams of the generated world, or "conversations", rows in JSON files.
      workers: processes that build batches; 0 builds them in the training process. The batches are the same.
        With long streams each builds some of the rows, so a divisor of the batch size works best.
      read_ahead: batches that each worker prefetches.
      max_dropped_share: share of the rows that may be dropped before the run is aborted.
    """

    kind: DataKind = "tabletop"
    workers: int = 0
    read_ahead: int = 4
    max_dropped_share: float = 0.1

    def __post_init__(self):
        convert_fields(self)
        require(self.workers >= 0, f"workers {self.workers} must not be negative")
        require_at_least(1, self, "read_ahead")
        require_share(self, "max_dropped_share")


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
        convert_fields(self)
        for name in ("token_buckets", "frame_buckets"):
            sizes = getattr(self, name)
            require(
                bool(sizes) and sizes[0] >= 1 and all(a < b for a, b in itertools.pairwise(sizes)),
                f"{name} {sizes} must be positive and ascending",
            )
        require(
            self.token_buckets[-1] >= self.max_tokens,
            f"token_buckets {self.token_buckets} must reach max_tokens {self.max_tokens}",
        )
        require_at_least(1, self, "max_tokens")
        require_share(self, "swap_probability")


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
        convert_fields(self)
        require(self.image_size >= 32, f"image_size must be at least 32 pixels, not {self.image_size}")
        require(
            1 <= self.min_seconds <= self.max_seconds,
            f"min_seconds {self.min_seconds} must be at least 1 and at most max_seconds {self.max_seconds}",
        )
        require_share(self, "offline_share")
        require_at_least(0, self, "warmup_batches")
        require_at_least(1, self, "max_tokens", "warmup_seconds", "warmup_tokens", "warmup_factor")
