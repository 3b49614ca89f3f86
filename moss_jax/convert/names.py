"""Mapping between Hugging Face tensors and the model's parameters.

Fused parameters hold several tensors side by side. Axes: D input, F MLP hidden, H heads, R head.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from flax import nnx
from flax.typing import PathParts

from moss_jax.config import ModelConfig

Tensors = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter and the tensors that store it.

    Attributes:
      path: of the parameter in the model.
      names, shapes: of the tensors in a checkpoint.
      join: converts the tensors to the parameter.
      split: converts the parameter to the tensors.
    """

    path: PathParts
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    join: Callable[[Tensors], np.ndarray]
    split: Callable[[np.ndarray], Tensors]


def canonical(name: str) -> str:
    """Converts a tensor's name in transformers 4.46 or 5 to that in transformers 4.46."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    rest = name.removeprefix("language_model.")
    if rest != name and not rest.startswith(("model.", "lm_head.")):
        return f"language_model.model.{rest}"
    return name


def entries(config: ModelConfig) -> Iterator[Entry]:
    """Yields an entry for every parameter of the model."""
    yield from _vision(config)
    yield from _compressor(config)
    yield from _linear(
        ("projector",),
        "multi_modal_projector",
        config.vision.output_size,
        config.decoder.hidden_size,
        bias=True,
    )
    yield from _decoder(config)


def to_hugging_face(config: ModelConfig, params: nnx.State) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a tree of parameters (or of their gradients), one by one, in checkpoint order."""
    values = dict(nnx.to_flat_state(params))
    for entry in entries(config):
        for name, tensor in zip(entry.names, entry.split(np.asarray(values[entry.path][...])), strict=True):
            yield name, np.ascontiguousarray(tensor)


def _vision(config: ModelConfig) -> Iterator[Entry]:
    c = config.vision
    root, name, width = ("vision",), "vision_model", c.hidden_size
    patch, ids, tiles = c.patch_size, c.num_aspect_ratio_ids, c.max_num_tiles
    yield Entry(
        path=(*root, "patch_embedding", "kernel"),
        names=(f"{name}.patch_embedding.weight",),
        shapes=((width, 3, patch, patch),),
        join=lambda t: t[0].transpose(2, 3, 1, 0).reshape(-1, width),
        split=lambda x: [x.reshape(patch, patch, 3, width).transpose(3, 2, 0, 1)],
    )
    yield _same((*root, "class_embedding"), f"{name}.class_embedding", (width,))
    gated = f"{name}.gated_positional_embedding"
    yield _same((*root, "position_embedding"), f"{gated}.embedding", (c.num_positions, width))
    yield _reshaped(
        (*root, "tile_position_embedding"),
        f"{gated}.tile_embedding.weight",
        ids,
        (tiles, c.num_positions, width),
    )
    yield _same((*root, "position_gate"), f"{gated}.gate", (1,))
    for side in ("pre", "post"):
        tile = f"{name}.{side}_tile_positional_embedding"
        yield _reshaped((*root, f"{side}_tile_embedding"), f"{tile}.embedding.weight", ids, (tiles, width))
        yield _same((*root, f"{side}_tile_gate"), f"{tile}.gate", (1,))
        yield from _layer_norm((*root, f"{side}_norm"), f"{name}.layernorm_{side}", width)
    for stack, layers, count in (
        ("transformer", "layers", c.num_layers),
        ("global_transformer", "global_layers", c.num_global_layers),
    ):
        for i in range(count):
            here, there = (*root, layers, i), f"{name}.{stack}.layers.{i}"
            yield from _layer_norm((*here, "attention_norm"), f"{there}.input_layernorm", width)
            yield from _layer_norm((*here, "mlp_norm"), f"{there}.post_attention_layernorm", width)
            yield _vision_qkv(here, there, width, c.num_heads, c.head_dim)
            yield _kernel(
                (*here, "attention", "out"), f"{there}.self_attn.o_proj", (c.num_heads, c.head_dim), width
            )
            yield from _linear(
                (*here, "mlp", "fc1"), f"{there}.mlp.fc1", width, c.intermediate_size, bias=True
            )
            yield from _linear(
                (*here, "mlp", "fc2"), f"{there}.mlp.fc2", c.intermediate_size, width, bias=True
            )
            if stack == "global_transformer":
                yield _same((*here, "attention_gate"), f"{there}.gate_attn", (1,))
                yield _same((*here, "mlp_gate"), f"{there}.gate_ffn", (1,))


def _compressor(config: ModelConfig) -> Iterator[Entry]:
    if config.compressor.mode != "channelFusion":
        return
    stride, width = config.compressor.stride, config.vision.output_size
    yield Entry(
        path=("compressor", "merger", "kernel"),
        names=("patch_merger.weight",),
        shapes=((width, width, stride, stride),),
        join=lambda t: t[0].transpose(2, 3, 1, 0).reshape(stride * stride, width, width),
        split=lambda x: [x.reshape(stride, stride, width, width).transpose(3, 2, 0, 1)],
    )


def _decoder(config: ModelConfig) -> Iterator[Entry]:
    c = config.decoder
    root, name, width = ("decoder",), "language_model.model", c.hidden_size
    head, heads, kv_heads = c.head_dim, c.num_heads, c.num_kv_heads
    rows = c.vocab_size + c.extra_embeddings
    yield _same((*root, "embedding"), f"{name}.embed_tokens.weight", (rows, width))
    for i in range(c.num_layers):
        here, there = (*root, "layers", i), f"{name}.layers.{i}"
        cross = i in c.cross_attention_layers
        block = f"{there}.{'cross_attn' if cross else 'self_attn'}"
        attention = (*here, "attention")
        yield _same((*here, "attention_norm", "weight"), f"{there}.input_layernorm.weight", (width,))
        yield _same((*here, "mlp_norm", "weight"), f"{there}.post_attention_layernorm.weight", (width,))
        if cross:
            yield _same((*attention, "q_norm", "weight"), f"{block}.q_norm.weight", (head,))
            yield _same((*attention, "k_norm", "weight"), f"{block}.k_norm.weight", (head,))
            yield _kernel((*attention, "q"), f"{block}.q_proj", width, (heads, head))
            yield _decoder_heads((*attention, "kv"), block, "kv", width, heads, kv_heads, head)
            yield _same((*here, "attention_gate"), f"{there}.cross_attn_attn_gate", (1,))
            yield _same((*here, "mlp_gate"), f"{there}.cross_attn_mlp_gate", (1,))
        else:
            yield _decoder_heads((*attention, "qkv"), block, "qkv", width, heads, kv_heads, head)
        yield _kernel((*attention, "out"), f"{block}.o_proj", (heads, head), width)
        yield Entry(
            path=(*here, "mlp", "gate_up", "kernel"),
            names=(f"{there}.mlp.gate_proj.weight", f"{there}.mlp.up_proj.weight"),
            shapes=((c.intermediate_size, width),) * 2,
            join=lambda t: np.stack([part.T for part in t], axis=1),  # [D, 2, F]
            split=lambda x: [x[:, 0].T, x[:, 1].T],
        )
        yield _kernel((*here, "mlp", "down"), f"{there}.mlp.down_proj", c.intermediate_size, width)
    yield _same((*root, "norm", "weight"), f"{name}.norm.weight", (width,))
    yield _kernel((*root, "lm_head"), "language_model.lm_head", width, c.vocab_size)


def _same(path: PathParts, name: str, shape: tuple[int, ...]) -> Entry:
    return Entry(path, (name,), (shape,), lambda t: t[0], lambda x: [x])


def _reshaped(path: PathParts, name: str, rows: int, inner: tuple[int, ...]) -> Entry:
    """An embedding table whose rows are flattened arrays."""
    shape = (rows, int(np.prod(inner)))
    return Entry(path, (name,), (shape,), lambda t: t[0].reshape(rows, *inner), lambda x: [x.reshape(shape)])


def _kernel(
    path: PathParts, name: str, inputs: int | tuple[int, ...], outputs: int | tuple[int, ...]
) -> Entry:
    """The kernel of a linear layer, stored transposed as [out, in]."""
    inputs, outputs = (size if isinstance(size, tuple) else (size,) for size in (inputs, outputs))
    shape = (int(np.prod(outputs)), int(np.prod(inputs)))
    return Entry(
        path=(*path, "kernel"),
        names=(f"{name}.weight",),
        shapes=(shape,),
        join=lambda t: t[0].T.reshape(*inputs, *outputs),
        split=lambda x: [x.reshape(shape[::-1]).T],
    )


def _linear(path: PathParts, name: str, inputs: int, outputs: int, *, bias: bool) -> Iterator[Entry]:
    yield _kernel(path, name, inputs, outputs)
    if bias:
        yield _same((*path, "bias"), f"{name}.bias", (outputs,))


def _layer_norm(path: PathParts, name: str, size: int) -> Iterator[Entry]:
    for part in ("weight", "bias"):
        yield _same((*path, part), f"{name}.{part}", (size,))


def _vision_qkv(path: PathParts, name: str, width: int, heads: int, head: int) -> Entry:
    return Entry(
        path=(*path, "attention", "qkv", "kernel"),
        names=tuple(f"{name}.self_attn.{part}_proj.weight" for part in "qkv"),
        shapes=((width, width),) * 3,
        join=lambda t: np.stack([part.T.reshape(width, heads, head) for part in t], axis=1),  # [D, 3, H, R]
        split=lambda x: [x[:, i].reshape(width, width).T for i in range(3)],
    )


def _decoder_heads(
    path: PathParts, name: str, parts: str, width: int, heads: int, kv_heads: int, head: int
) -> Entry:
    """Fused projections, for each KV head side by side: its query heads (if any), its key, its value."""
    per_kv_head = [heads // kv_heads if part == "q" else 1 for part in parts]
    ends = np.cumsum(per_kv_head)

    def join(tensors: Tensors) -> np.ndarray:
        return np.concatenate([t.T.reshape(width, kv_heads, -1, head) for t in tensors], axis=2)

    def split(x: np.ndarray) -> Tensors:
        return [x[:, :, end - n : end].reshape(width, -1).T for n, end in zip(per_kv_head, ends, strict=True)]

    return Entry(
        path=(*path, "kernel"),
        names=tuple(f"{name}.{part}_proj.weight" for part in parts),
        shapes=tuple((kv_heads * n * head, width) for n in per_kv_head),
        join=join,
        split=split,
    )
