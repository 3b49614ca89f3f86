"""The language decoder: self-attention over text, cross-attention over the memory bank.

B batch/slot, R rows, T tokens of a row, F frames, N vectors a frame, K kv heads, G query heads per kv head,
H = K * G, D width
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from moss_jax.config import DecoderConfig, Remat, RowsBeforeFirstFrame
from moss_jax.memory import MemoryBank, StreamState, TextCache, remember_frames, vectors_visible
from moss_jax.nn.layers import INITIAL_GATE, GatedMLP, Linear, RMSNorm, gate, normal, remat
from moss_jax.nn.rope import rotation
from moss_jax.ops.attention import KeyRange, append, attention, tag_projection
from moss_jax.ops.linear import norm_linear
from moss_jax.ops.norm import Norm, Residual, add_norm
from moss_jax.ops.post_attention import post_attention
from moss_jax.ops.qarray import QArray
from moss_jax.ops.rotary import Rotation, rotate
from moss_jax.sharding import constrain


class KeysValues(NamedTuple):
    """Keys and values of one layer, [B, K, S, D]."""

    keys: Float[Array, "B K S D"] | QArray
    values: Float[Array, "B K S D"] | QArray


class Rows(NamedTuple):
    """Rows of tokens to append to slots.

    Attributes:
      count: number of tokens of each row that are appended.
      slots: slot of each row; None if row `b` continues slot `b`.
      before: number of tokens that earlier rows append to the same slot in the same call; None if there are
        none.
    """

    tokens: Int[Array, "R T"]
    count: Int[Array, " R"]
    slots: Int[Array, " R"] | None = None
    before: Int[Array, " R"] | None = None

    def of_slots(self, x: Array) -> Array:
        """Gathers per-slot entries into per-row entries."""
        return x if self.slots is None else x[self.slots]


class RowsInCall(NamedTuple):
    """Rows of queries in one call, with the inputs that layers need in addition to hidden states.

    Attributes:
      rope: rotation of their positions.
      frame_range: range of vectors in their slot's bank that they attend to.
      slots: as in `Rows`.
      start: number of tokens in the cache before each row; None without a cache.
      count: number of tokens of each row that are appended to it.
    """

    rope: Rotation
    frame_range: KeyRange
    slots: Int[Array, " R"] | None = None
    start: Int[Array, " R"] | None = None
    count: Int[Array, " R"] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[R, T]."""
        R, T = self.frame_range.end.shape
        return R, T


def join(parts: Sequence[Array]) -> Array:
    """Concatenates arrays of rows, [R, T, ...], to [1, N, ...]; a single array is returned unchanged."""
    if len(parts) == 1:
        return parts[0]
    return jnp.concatenate([x.reshape(1, -1, *x.shape[2:]) for x in parts], axis=1)


def split(x: Array, rows: Sequence[RowsInCall]) -> list[Array]:
    """Reverses `join`."""
    if len(rows) == 1:
        return [x]
    sizes = [math.prod(part.shape) for part in rows]
    parts = jnp.split(x, list(itertools.accumulate(sizes))[:-1], axis=1)
    return [x.reshape(*part.shape, *x.shape[2:]) for x, part in zip(parts, rows, strict=True)]


class SelfAttention(nnx.Module):
    """Causal GQA over the text, with its norm prologue; `out` is applied by the layer."""

    def __init__(
        self, config: DecoderConfig, implementation: str | None, *, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        self.config = config
        self.implementation = implementation
        group = config.num_heads // config.num_kv_heads
        kv_heads, head = {"kv_heads": config.num_kv_heads}, {"head_dim": config.head_dim}
        embed = {"embed": config.hidden_size}
        self.qkv = Linear(embed, {**kv_heads, "group_and_kv": group + 2, **head}, rngs=rngs, dtype=dtype)
        self.out = Linear({"heads": config.num_heads, **head}, embed, rngs=rngs, dtype=dtype)

    @jax.named_scope("attention")
    def __call__(
        self,
        residual: Residual,
        norm: Norm,
        rows: Sequence[RowsInCall],
        past: KeysValues | None,
        capacity: int,
    ) -> tuple[Float[Array, "B T H head"], Float[Array, "B T D"], KeysValues]:
        """Attends among the tokens or, given a KV cache, appends them to it and attends to the cache.

        Returns:
          Outputs of all heads, the residual sum, and the keys and values.
        """
        qkv, x = norm_linear(residual, norm, self.qkv.weights)  # [B, T, K, G + 2, head]
        assert isinstance(qkv, Array)
        if past is not None:
            keys, values = past
            attends = []
            for part, qkv_part in zip(rows, split(qkv, rows), strict=True):
                assert part.start is not None
                assert part.count is not None
                keys, values, attend = append(
                    qkv_part,
                    part.rope,
                    keys,
                    values,
                    part.start,
                    part.count,
                    slots=part.slots,
                    capacity=capacity,
                    implementation=self.implementation,
                )
                attends.append(attend)
            heads = [attend(keys, values) for attend in attends]
            return join(heads), x, KeysValues(keys, values)
        (rope,) = (part.rope for part in rows)
        B, T = x.shape[:2]
        qkv = tag_projection(qkv)
        q = rotate(qkv[..., :-2, :].reshape(B, T, -1, self.config.head_dim), rope)
        k = rotate(qkv[..., -2, :], rope).swapaxes(1, 2)  # [B, K, T, head]
        v = qkv[..., -1, :].swapaxes(1, 2)
        return attention(q, k, v, causal=True, implementation=self.implementation), x, KeysValues(k, v)


class CrossAttention(nnx.Module):
    """GQA over the frames, with a norm per head on queries and keys; `out` is applied by the layer."""

    def __init__(
        self, config: DecoderConfig, implementation: str | None, *, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        self.config = config
        self.implementation = implementation
        kv_heads, head = {"kv_heads": config.num_kv_heads}, {"head_dim": config.head_dim}
        heads, embed = {"heads": config.num_heads}, {"embed": config.hidden_size}
        self.q = Linear(embed, {**heads, **head}, rngs=rngs, dtype=dtype)
        self.kv = Linear(embed, {**kv_heads, "key_value": 2, **head}, rngs=rngs, dtype=dtype)
        self.out = Linear({**heads, **head}, embed, rngs=rngs, dtype=dtype)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, dtype=dtype)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, dtype=dtype)

    @jax.named_scope("keys_and_values")
    def project(self, features: Float[Array, "B F N D"], rope: Rotation) -> KeysValues:
        """Projects frames to keys and values, [B, K, F*N, D]; all vectors of a frame share its position."""
        kv = self.kv(features)  # [B, F, N, K, 2, D]
        # Keys are rotated before their norm, queries after theirs, as in the original's training.
        keys = self.k_norm(rotate(kv[..., 0, :], rope))

        def flat(x):
            B, F, N, K, D = x.shape
            return x.reshape(B, F * N, K, D).swapaxes(1, 2)

        return KeysValues(flat(keys), flat(kv[..., 1, :]))

    def queries(
        self, residual: Residual, norm: Norm, rows: Sequence[RowsInCall]
    ) -> tuple[list[Float[Array, "..."]], Float[Array, "... D"]]:
        """Projects the queries of each of the rows; also returns the residual sum."""
        q, x = norm_linear(residual, norm, self.q.weights)
        assert isinstance(q, Array)
        parts = zip(rows, split(self.q_norm(q), rows), strict=True)
        return [rotate(q, part.rope) for part, q in parts], x

    @jax.named_scope("attention")
    def __call__(
        self,
        residual: Residual,
        norm: Norm,
        rows: Sequence[RowsInCall],
        frames: KeysValues,
        bias: Float[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "R T H head"], Float[Array, "R T D"]]:
        """Attends to the frames in range; returns the outputs of all heads and the residual sum."""
        queries, x = self.queries(residual, norm, rows)
        heads = [
            attention(
                q,
                *frames,
                part.frame_range,
                slots=part.slots,
                bias=bias,
                implementation=self.implementation,
            )
            for part, q in zip(rows, queries, strict=True)
        ]
        return join(heads), x


class SelfLayer(nnx.Module):
    """A pre-norm layer with self-attention over the text."""

    def __init__(
        self, config: DecoderConfig, implementation: str | None, *, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.attention = SelfAttention(config, implementation, rngs=rngs, dtype=dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, rngs=rngs, dtype=dtype)

    @jax.named_scope("self_layer")
    def __call__(
        self, residual: Residual, rows: Sequence[RowsInCall], past: KeysValues | None, capacity: int
    ) -> tuple[Residual, KeysValues]:
        heads, x, now = self.attention(residual, self.attention_norm.params, rows, past, capacity)
        residual = post_attention(
            x,
            heads,
            out=self.attention.out.weights,
            norm=self.mlp_norm.params,
            up=self.mlp.gate_up.weights,
            down=self.mlp.down.weights,
        )
        return residual, now


class CrossLayer(nnx.Module):
    """A pre-norm layer with cross-attention to the frames and tanh-gated branches."""

    def __init__(
        self, config: DecoderConfig, implementation: str | None, *, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.attention = CrossAttention(config, implementation, rngs=rngs, dtype=dtype)
        self.attention_gate = gate(INITIAL_GATE, dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, rngs=rngs, dtype=dtype)
        self.mlp_gate = gate(INITIAL_GATE, dtype)

    @jax.named_scope("cross_layer")
    def __call__(
        self,
        residual: Residual,
        rows: Sequence[RowsInCall],
        frames: KeysValues,
        sees: Bool[Array, "R T"],
        bias: Float[Array, "B S"] | None = None,
    ) -> Residual:
        """Applies the layer; tokens that see no frame skip the MLP; attention to an empty range is 0."""
        heads, x = self.attention(residual, self.attention_norm.params, rows, frames, bias)
        return post_attention(
            x,
            heads,
            out=self.attention.out.weights,
            norm=self.mlp_norm.params,
            up=self.mlp.gate_up.weights,
            down=self.mlp.down.weights,
            attention_gate=jnp.tanh(self.attention_gate[...]),
            mlp_gate=jnp.where(sees[..., None], jnp.tanh(self.mlp_gate[...]), 0),  # [B, T, 1]
        )


class Decoder(nnx.Module):
    """The decoder, from tokens and frames to hidden states; its three calls share the layers."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rows_before_first_frame: RowsBeforeFirstFrame,
        implementation: str | None,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        self.config = config
        self.rows_before_first_frame = rows_before_first_frame
        rows = config.vocab_size + config.extra_embeddings
        # Not sharded over "vocab": a lookup would then gather from every device.
        self.embedding = normal(rngs, (rows, config.hidden_size), (None, "embed"), dtype)
        self.layers = nnx.List(
            (CrossLayer if i in config.cross_attention_layers else SelfLayer)(
                config, implementation, rngs=rngs, dtype=dtype
            )
            for i in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.lm_head = Linear(
            {"embed": config.hidden_size}, {"vocab": config.vocab_size}, rngs=rngs, dtype=dtype
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        features: Float[Array, "B F N D"],
        frame_positions: Int[Array, "B F"],
        keep: Remat = "none",
    ) -> Float[Array, "B T D"]:
        """Runs a whole sequence in one pass; frames ordered by position, `keep` as in `ModelConfig.remat`."""
        B, T = tokens.shape
        vectors = features.shape[2]
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        visible = vectors_visible(frame_positions, positions)  # Counts frames here.
        attended = visible
        if self.rows_before_first_frame == "attend":
            present = (frame_positions < T).sum(axis=-1, dtype=jnp.int32)
            attended = jnp.where(visible > 0, visible, present[:, None])
        rope = self._rotation(frame_positions)
        frames = [remat(layer.attention.project, keep)(features, rope) for layer in self._cross_layers()]
        end = attended * vectors
        rows = RowsInCall(self._rotation(positions), KeyRange(jnp.zeros_like(end), end))
        hidden, _ = self._run(tokens, (rows,), frames, visible > 0, keep=keep)
        return hidden

    @jax.named_scope("remember")
    def remember(
        self,
        bank: MemoryBank,
        features: Float[Array, "R F N D"],
        positions: Int[Array, "R F"],
        count: Int[Array, " R"],
        slots: Int[Array, " R"] | None = None,
        before: Int[Array, " R"] | None = None,
    ) -> MemoryBank:
        """Projects frames for every cross-attention layer and appends the first `count` of each row.

        Args:
          slots, before: as in `memory.remember_frames`.
        """
        rope = self._rotation(positions)
        projected = [layer.attention.project(features, rope) for layer in self._cross_layers()]
        keys, values = zip(*projected, strict=True)
        return remember_frames(bank, keys, values, positions, count, slots, before)

    def decode(
        self, state: StreamState, tokens: Int[Array, "B T"], count: Int[Array, " B"]
    ) -> tuple[Float[Array, "B T D"], StreamState]:
        """Appends the first `count` tokens of each slot, then attends to the updated text and the bank."""
        return self.decode_rows(state, [Rows(tokens, count)])

    def decode_rows(
        self, state: StreamState, rows: Sequence[Rows]
    ) -> tuple[Float[Array, "R T D"], StreamState]:
        """Appends rows of tokens, then attends to the updated text cache and the bank.

        GEMMs run over all tokens together, attention over rows of one length at a time. All rows of a slot
        are in the same element of `rows`, in order.

        Returns:
          Hidden states: [R, T, D], or [1, N, D] of all tokens, row after row, if there are several `rows`.
        """
        text, bank = state.text, state.bank
        added = jnp.zeros_like(text.length)
        in_call, sees = [], []
        for part in rows:
            before = 0 if part.before is None else part.before
            token = jnp.arange(part.tokens.shape[1], dtype=jnp.int32)
            positions = (part.of_slots(text.position) + before)[:, None] + token
            is_real = token < part.count[:, None]
            visible = jnp.where(is_real, vectors_visible(part.of_slots(bank.positions), positions), 0)
            frame_range = KeyRange(jnp.zeros_like(visible), visible)
            start = part.of_slots(text.length) + before
            in_call.append(RowsInCall(self._rotation(positions), frame_range, part.slots, start, part.count))
            sees.append(visible > 0)
            added = added + part.count if part.slots is None else added.at[part.slots].add(part.count)
        past = [KeysValues(k, v) for k, v in zip(text.keys, text.values, strict=True)]
        frames = [KeysValues(k, v) for k, v in zip(bank.keys, bank.values, strict=True)]
        tokens = join([part.tokens for part in rows])
        hidden, now = self._run(tokens, in_call, frames, join(sees), bank.bias, past, text.capacity)
        keys, values = zip(*now, strict=True)
        length = jnp.minimum(text.length + added, text.capacity)
        text = TextCache(keys, values, length, text.position + length - text.length, text.capacity)
        return hidden, StreamState(text=text, bank=bank)

    @jax.named_scope("lm_head")
    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of the next token, float32."""
        return self.lm_head(hidden, out_dtype=jnp.float32)

    def _run(
        self,
        tokens,
        rows: Sequence[RowsInCall],
        frames,
        sees,
        bias=None,
        past=None,
        capacity=0,
        keep: Remat = "none",
    ):
        """Runs all layers; returns the final hidden states and each text layer's keys and values."""
        past = iter(past or [None] * self.config.num_self_attention_layers)
        frames = iter(frames)
        now = []
        # Without this, the compiler may shard the width, as in the embedding, instead of the batch.
        residual = Residual(constrain(self.embedding[tokens], ("batch", None, None)))
        for layer in self.layers:
            if isinstance(layer, CrossLayer):
                residual = remat(layer, keep)(residual, rows, next(frames), sees, bias)
            else:
                residual, kv = remat(layer, keep)(residual, rows, next(past), capacity)
                now.append(kv)
        return add_norm(residual, self.norm.params)[0], now

    def _cross_layers(self):
        return [layer for layer in self.layers if isinstance(layer, CrossLayer)]

    def _rotation(self, positions):
        return rotation(positions, self.config.rope, self.config.head_dim)
