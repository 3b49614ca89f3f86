"""Model FLOPs of a training step and peak FLOPS of devices, whose ratio is the MFU.

Model FLOPs utilisation (Chowdhery et al., arXiv 2204.02311, appendix B) counts the operations of the model,
not of its implementation: recomputation by remat doesn't count, and in attention every pair of a query and a
key does, masked or not.
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from moss_jax.config import DecoderConfig, ModelConfig, ModelPart, VisionConfig
from moss_jax.nn.vision import POSITION_MULTIPLE

# Dense bfloat16 FLOPS from the vendors' data sheets, by prefix of `jax.Device.device_kind`.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "TPU v4": 275e12,
    "TPU v5": 459e12,  # the v5p
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v6": 918e12,  # the v6e
}


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 FLOPS of a device by its `jax.Device.device_kind`; None if unknown."""
    known = [kind for kind in PEAK_FLOPS if device_kind.startswith(kind)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


class Work(NamedTuple):
    """Forward FLOPs of a part of the model.

    Attributes:
      part: part of the model.
      matmul: FLOPs of matmuls with weights.
      attention: FLOPs of the products of attention.
    """

    part: ModelPart
    matmul: float
    attention: float = 0


def train_flops(
    config: ModelConfig, *, batch: int, tokens: int, frames: int, trained: Collection[ModelPart]
) -> float:
    """Returns the model FLOPs of one training step, forward and backward.

    The gradient of a matmul's input costs as much as its forward pass, if anything before it is trained, and
    so does that of its weights, if they are trained. Both inputs of attention's products have gradients.

    Args:
      config: the model's config.
      batch: number of sequences.
      tokens: tokens per sequence, including padding.
      frames: frames per sequence, including padding.
      trained: parts of the model that are trained.
    """
    before, *path = forward_work(config, tokens=tokens, frames=frames)
    # Before the first cross-attention layer text has no gradient, unless the decoder itself is trained.
    return batch * (_with_backward([before], trained) + _with_backward(path, trained))


def forward_work(config: ModelConfig, *, tokens: int, frames: int) -> list[Work]:
    """Returns the forward FLOPs of a sequence, in the order of the data flow.

    First the decoder's layers before the first cross-attention layer, then the path from frames to logits.
    """
    before, after = _decoder_work(config.decoder, tokens, frames * config.vectors_per_frame)
    compressor, vision, width = config.compressor, config.vision, config.vision.output_size
    pooled = 0
    if compressor.mode == "channelFusion":
        pooled = 2 * (config.vectors_per_frame - 1) * (compressor.stride * width) ** 2
    projected = 2 * config.vectors_per_frame * width * config.decoder.hidden_size
    return [
        before,
        _vision_work(vision, frames),
        Work("compressor", frames * pooled),
        Work("projector", frames * projected),
        after,
    ]


def _vision_work(config: VisionConfig, frames: int) -> Work:
    positions = config.num_positions + -config.num_positions % POSITION_MULTIPLE
    width, layers = config.hidden_size, config.num_layers + config.num_global_layers
    patches = 2 * config.grid**2 * config.patch_size**2 * 3 * width
    layer = 2 * positions * (4 * width**2 + 2 * width * config.intermediate_size)
    return Work("vision", frames * (patches + layers * layer), frames * layers * 4 * positions**2 * width)


def _decoder_work(config: DecoderConfig, tokens: int, vectors: int) -> tuple[Work, Work]:
    """Returns the FLOPs of the layers before the first cross-attention layer, and of the rest."""
    width, kv_width = config.hidden_size, config.num_kv_heads * config.head_dim
    mlp = 3 * width * config.intermediate_size
    text_layer = Work(
        "decoder", 2 * tokens * (width * (2 * width + 2 * kv_width) + mlp), 4 * tokens**2 * width
    )
    frame_layer = Work(
        "decoder",
        2 * tokens * (2 * width**2 + mlp) + 2 * vectors * width * 2 * kv_width,
        4 * tokens * vectors * width,
    )
    before = config.cross_attention_layers[0]
    text, cross = config.num_self_attention_layers - before, len(config.cross_attention_layers)
    head = 2 * tokens * width * config.vocab_size
    return (
        Work("decoder", before * text_layer.matmul, before * text_layer.attention),
        Work(
            "decoder",
            text * text_layer.matmul + cross * frame_layer.matmul + head,
            text * text_layer.attention + cross * frame_layer.attention,
        ),
    )


def _with_backward(path: Iterable[Work], trained: Collection[ModelPart]) -> float:
    """Returns the forward and backward FLOPs of consecutive parts."""
    total, reached = 0.0, False
    for part, matmul, attention in path:
        learns = part in trained and matmul > 0  # most pooling modes have no parameters
        reached = reached or learns
        total += matmul * (1 + reached + learns) + attention * (1 + 2 * reached)
    return total
