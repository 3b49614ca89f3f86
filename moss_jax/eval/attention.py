"""Attention maps: the weights of cross-attention over the frames of a stream.

A `Recorder` between a session and its engine keeps the sequence that the model reads. `frame_attention` runs
such a sequence in one pass and returns the attention weights, which a live step never materializes.

B sequences, T tokens, F frames, N vectors a frame, S = F * N keys, L cross-attention layers, K kv heads,
G query heads per kv head, H = K * G, D head
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from moss_jax.nn import MossVideo
from moss_jax.nn.decoder import CrossAttention, CrossLayer, KeysValues, RowsInCall
from moss_jax.ops.attention import KeyRange
from moss_jax.ops.norm import Norm, Residual
from moss_jax.ops.rotary import Rotation
from moss_jax.stream import PENDING, Engine, EngineState, Row, Sampled
from moss_jax.video import preprocess


def frame_attention(
    model: MossVideo,
    tokens: Int[Array, "B T"],
    pixels: Float[Array, "B F H W 3"],
    frame_positions: Int[Array, "B F"],
    *,
    per_vector: bool = False,
) -> Float[np.ndarray, "B L H T F"] | Float[np.ndarray, "B L H T F N"]:
    """Attention weights of each token over the frames, by cross-attention layer and head.

    All scores of a layer are in memory at once. The weights of a token add up to 1 over the frames that it
    sees. Before the first frame they are all 0, or with `rows_before_first_frame="attend"` cover all frames.

    Args:
      model: whose attention weights are computed.
      tokens: as in the model's one-pass call.
      pixels: as in the model's one-pass call.
      frame_positions: as in the model's one-pass call.
      per_vector: whether to keep the vectors of a frame apart: the class token, then the pooled grid row by
        row.

    Returns:
      float32 [B, L, H, T, F], or with `per_vector` [B, L, H, T, F, N].
    """
    graph, params = nnx.split(model)
    return np.asarray(_frame_attention(graph, per_vector, params, tokens, pixels, frame_positions))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _frame_attention(graph, per_vector, params, tokens, pixels, frame_positions):
    model = nnx.merge(graph, params)
    # The recorded weights could not leave a rematerialized layer; without a backward pass none is needed.
    model.config = dataclasses.replace(model.config, remat="none")
    layers = [layer for layer in model.decoder.layers if isinstance(layer, CrossLayer)]
    recorded = [_RecordedAttention(layer.attention, frame_positions.shape[1], per_vector) for layer in layers]
    for layer, attention in zip(layers, recorded, strict=True):
        layer.attention = cast(CrossAttention, attention)
    model.hidden(tokens, pixels, frame_positions)
    return jnp.stack([attention.weights[...] for attention in recorded], axis=1)


class _RecordedAttention(nnx.Module):
    """Stands in for a cross-attention and keeps its attention weights of the last call in `weights`."""

    def __init__(self, attention: CrossAttention, num_frames: int, per_vector: bool):
        self.attention, self.q, self.out = attention, attention.q, attention.out
        self.num_frames, self.per_vector = num_frames, per_vector

    def project(self, features: Float[Array, "B F N D"], rope: Rotation) -> KeysValues:
        return self.attention.project(features, rope)

    def __call__(
        self,
        residual: Residual,
        norm: Norm,
        rows: Sequence[RowsInCall],
        frames: KeysValues,
        bias: None = None,
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T E"]]:
        (queries,), _ = self.attention.queries(residual, norm, rows)
        assert isinstance(frames.keys, Array)
        weights = _softmax_over_range(queries, frames.keys, rows[0].frame_range)
        weights = weights.reshape(*weights.shape[:-1], self.num_frames, -1)  # [B, H, T, F, N]
        self.weights = nnx.Intermediate(weights if self.per_vector else weights.sum(axis=-1))
        return self.attention(residual, norm, rows, frames, bias)


def _softmax_over_range(
    q: Float[Array, "B T H D"], k: Float[Array, "B K S D"], kv_range: KeyRange
) -> Float[Array, "B H T S"]:
    """The softmax weights of the attention op; all 0 for a query with an empty range."""
    (B, T, H, D), (K, S) = q.shape, k.shape[1:3]
    q, k = q.astype(jnp.float32).reshape(B, T, K, H // K, D), k.astype(jnp.float32)
    scores = jnp.einsum("BTKGD,BKSD->BKGTS", q, k).reshape(B, H, T, S) / D**0.5
    keys = jnp.arange(S)
    seen = (kv_range.start[..., None] <= keys) & (keys < kv_range.end[..., None])  # [B, T, S]
    seen = seen[:, None]
    return jnp.where(seen, jax.nn.softmax(scores, axis=-1, where=seen), 0)


class Recorder:
    """A wrapper of an engine of one slot that records the sequence the model reads.

    Args:
      engine: to be wrapped; sessions use the recorder instead.

    Attributes:
      tokens: read by the model, in order. A sampled token is read with the next row.
      said: index of each token of its own text; it sampled token `i` after reading those before it.
      frames: seen by the model, in order.

    Raises:
      ValueError: the engine has more than one slot.
    """

    def __init__(self, engine: Engine):
        if engine.config.slots != 1:
            raise ValueError(f"a recorder needs an engine of 1 slot, not of {engine.config.slots}")
        self._engine = engine
        self.config, self.tokenizer = engine.config, engine.tokenizer
        self.perception_device = engine.perception_device
        self.tokens: list[int] = []
        self.said: list[int] = []
        self.frames: list[UInt8[np.ndarray, "H W 3"]] = []
        self._positions: list[int] = []
        self._encoded: Sequence[UInt8[np.ndarray, "H W 3"]] = ()
        self._sampled = PENDING

    def start(self) -> EngineState:
        """Starts the engine and a new recording."""
        self.tokens, self.said, self.frames, self._positions = [], [], [], []
        return self._engine.start()

    def encode(self, frames: Sequence[UInt8[np.ndarray, "H W 3"]]) -> Float[Array, "P N D"]:
        """Encodes frames and keeps them for the rows that refer to them."""
        self._encoded = frames
        return self._engine.encode(frames)

    def distance(self, *frames: Any) -> float:
        """Forwards to the engine."""
        return self._engine.distance(*frames)

    def step(
        self, state: EngineState, rows: Sequence[Row | None], features: Float[Array, "P N D"] | None = None
    ) -> tuple[EngineState, Sampled]:
        """Steps the engine and records its row."""
        (row,) = rows
        assert row
        state, sampled = self._engine.step(state, rows, features)
        for offset, index in row.placed(self.tokenizer.special.image).items():
            self._positions.append(len(self.tokens) + offset)
            self.frames.append(self._encoded[index])
        for token in row.tokens:
            if token == PENDING:
                self.said.append(len(self.tokens))
                token = self._sampled
            self.tokens.append(token)
        self._sampled = int(sampled.tokens[0])
        return state, sampled

    def sequence(
        self,
    ) -> tuple[Int[np.ndarray, "1 T"], Float[Array, "1 F H W 3"], Int[np.ndarray, "1 F"]]:
        """The recorded tokens, pixels and frame positions, as the model's one-pass call takes them."""
        tokens = np.asarray([self.tokens], np.int32)
        vision = self._engine.model_config.vision
        size = vision.image_size
        fitted = [
            preprocess(jnp.asarray(frame), image_size=size, mean=vision.image_mean, std=vision.image_std)
            for frame in self.frames
        ]
        return tokens, jnp.stack(fitted)[None], np.asarray([self._positions], np.int32)
