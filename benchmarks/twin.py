"""The decoder-only twin of a model: the same parts, with its frames inside the token sequence.

    twin = Twin(twin_of(moss_video_11b()), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    engine = Engine(twin, tokenizer, room(twin.config, tokens=4096, frames=256))

Vision encoder, compressor, projector, vocabulary and self-attention layers are the model's; cross-attention
layers are left out, so the 11B's decoder becomes one of the shape of Llama 3.1 8B. The N projected vectors of
a frame replace its `<|image|>` token, each at its own position, and go through every layer into the KV cache
of the text. So a token attends to one sequence of text and vectors.

`Engine` and `Session` run the twin unmodified, for one stream only: in steps over several slots, rows name
their slots, which the twin ignores. They count an `<|image|>` as one token, so `room` enlarges the cache by
the vectors that it stands for.

B slots, T tokens and F frames of a row, N vectors a frame, E = T + F * (N - 1) places, S sequence, D width
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from moss_jax.config import ConfigError, DecoderConfig, EngineConfig, MemoryConfig, ModelConfig
from moss_jax.memory import MemoryBank, StreamState, TextCache
from moss_jax.nn.compressor import Compressor
from moss_jax.nn.decoder import KeysValues, Rows, RowsInCall, SelfLayer
from moss_jax.nn.layers import Linear, RMSNorm, normal
from moss_jax.nn.rope import rotation
from moss_jax.nn.vision import VisionEncoder
from moss_jax.ops.attention import KeyRange
from moss_jax.ops.norm import Residual, add_norm

# Prefill kernels copy a cache whose capacity is not a multiple of their tiles.
TILE = 128


@dataclasses.dataclass(frozen=True)
class TwinDecoderConfig(DecoderConfig):
    """A decoder without cross-attention layers, which `DecoderConfig` rejects."""

    def __post_init__(self):
        if self.cross_attention_layers:
            raise ConfigError(f"a twin has no cross-attention; got {self.cross_attention_layers}")


def twin_of(config: ModelConfig) -> ModelConfig:
    """The config of a model's twin: only its self-attention layers."""
    decoder = {f.name: getattr(config.decoder, f.name) for f in dataclasses.fields(config.decoder)}
    decoder |= {"num_layers": config.decoder.num_self_attention_layers, "cross_attention_layers": ()}
    return dataclasses.replace(config, decoder=TwinDecoderConfig(**decoder))


def room(config: ModelConfig, *, tokens: int, frames: int) -> EngineConfig:
    """Capacities of a twin for this many tokens and frames."""
    places = tokens + frames * config.vectors_per_frame
    # The rows of its cache are tokens and frame vectors alike; a session cannot tell their kinds.
    memory = MemoryConfig("full", text="full")
    return EngineConfig(1, -(-places // TILE) * TILE, frames, memory)


class Arrivals(NamedTuple):
    """Stands in for the bank between `remember` and `decode`: the frames of the tokens decoded next."""

    bank: MemoryBank
    features: Float[Array, "B F N D"]
    count: Int[Array, " B"]


class TwinDecoder(nnx.Module):
    """Decoder over tokens and vectors. A step with frames calls `remember` before `decode`."""

    def __init__(
        self, config: DecoderConfig, *, implementation: str | None, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        self.config = config
        rows = config.vocab_size + config.extra_embeddings
        self.embedding = normal(rngs, (rows, config.hidden_size), (None, "embed"), dtype)
        self.layers = nnx.List(
            SelfLayer(config, implementation, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.lm_head = Linear(
            {"embed": config.hidden_size}, {"vocab": config.vocab_size}, rngs=rngs, dtype=dtype
        )

    def __call__(self, vectors: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Computes a whole sequence of embedded tokens and frame vectors in one pass."""
        positions = jnp.broadcast_to(jnp.arange(vectors.shape[1], dtype=jnp.int32), vectors.shape[:2])
        return self._run(vectors, positions, [None] * self.config.num_layers)[0]

    def remember(
        self,
        bank: MemoryBank,
        features: Float[Array, "B F N D"],
        positions: Int[Array, "B F"],
        count: Int[Array, " B"],
        slots: None = None,
        before: None = None,
    ) -> Arrivals:
        """Holds the first `count` frames for `decode`, which places them at the `<|image|>` tokens."""
        del positions, slots, before
        held = bank.length + count * features.shape[2]
        bank = dataclasses.replace(bank, length=jnp.minimum(held, bank.capacity))
        return Arrivals(bank, features, count)

    def decode_rows(
        self, state: StreamState, rows: Sequence[Rows]
    ) -> tuple[Float[Array, "B T D"], StreamState]:
        """Appends the first tokens of each slot, with the vectors of the remembered frames.

        Args:
          rows: those of a step over one slot.

        Returns:
          The hidden state of each token, for an `<|image|>` that of its frame's last vector; and the state.

        Raises:
          ConfigError: the step is over several slots.
        """
        if len(state.text.length) > 1:
            raise ConfigError(f"a twin runs one stream; engine.slots must be 1, not {len(state.text.length)}")
        ((tokens, count, _, _),) = rows
        text, bank, frames = state.text, state.bank, None
        if isinstance(bank, Arrivals):
            bank, frames = bank.bank, bank
        vectors, last, count = self._spread(tokens, count, frames)
        place = jnp.arange(vectors.shape[1], dtype=jnp.int32)
        positions = text.length[:, None] + place
        past = [KeysValues(k, v) for k, v in zip(text.keys, text.values, strict=True)]
        hidden, now = self._run(vectors, positions, past, text, count)
        keys, values = zip(*now, strict=True)
        length = jnp.minimum(text.length + count, text.capacity)
        hidden = jnp.take_along_axis(hidden, last[..., None], axis=1)  # [B, T, D]
        text = TextCache(keys, values, length, length, text.capacity)
        return hidden, StreamState(text=text, bank=bank)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of the next token, float32."""
        return self.lm_head(hidden, out_dtype=jnp.float32)

    def _spread(self, tokens, count, frames):
        """Embeds a row, each frame as N vectors.

        Returns:
          Vectors [B, E, D], the last place of each token [B, T], and the number of places of each slot [B].
        """
        B, T = tokens.shape
        row = jnp.arange(T, dtype=jnp.int32)
        if frames is None:
            return self.embedding[tokens], jnp.broadcast_to(row, (B, T)), count
        _, F, N, _ = frames.features.shape
        is_frame = tokens == self.config.image_token_id
        nth = jnp.cumsum(is_frame, axis=1) - 1
        is_frame &= nth < frames.count[:, None]
        width = jnp.where(is_frame, N, 1)
        end = jnp.cumsum(width, axis=1)
        places = jnp.sum(jnp.where(row < count[:, None], width, 0), axis=1, dtype=jnp.int32)

        place = jnp.arange(T + F * (N - 1), dtype=jnp.int32)
        # [B, E] the token that each place belongs to; places past the row go with its last.
        token = jnp.minimum((end[:, None, :] <= place[:, None]).sum(axis=-1), T - 1)

        def spread(x):
            return jnp.take_along_axis(x, token, axis=1)

        inside = jnp.clip(place - spread(end - width), 0, N - 1)
        slot = jnp.arange(B)[:, None]
        of_frames = frames.features[slot, jnp.clip(spread(nth), 0, F - 1), inside]  # [B, E, D]
        of_tokens = self.embedding[spread(tokens)]
        vectors = jnp.where(spread(is_frame)[..., None], of_frames.astype(of_tokens.dtype), of_tokens)
        return vectors, end - 1, places

    def _run(self, x, positions, past, text=None, count=None):
        """Runs all layers; returns the final hidden states and each layer's keys and values."""
        rope = rotation(positions, self.config.rope, self.config.head_dim)
        no_frames = jnp.zeros_like(positions)
        start, capacity = (text.length, text.capacity) if text else (None, 0)
        rows = [RowsInCall(rope, KeyRange(no_frames, no_frames), start=start, count=count)]
        residual, now = Residual(x), []
        for layer, before in zip(self.layers, past, strict=True):
            residual, kv = layer(residual, rows, before, capacity)
            now.append(kv)
        return add_norm(residual, self.norm.params)[0], now


class Twin(nnx.Module):
    """A decoder-only video model from the parts of `MossVideo`, with the interface that `Engine` needs."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        self.vision = VisionEncoder(config.vision, config.attention, rngs=rngs, dtype=dtype)
        self.compressor = Compressor(config.compressor, config.vision, rngs=rngs, dtype=dtype)
        self.projector = Linear(
            {"features": config.vision.output_size},
            {"embed": config.decoder.hidden_size},
            bias=True,
            rngs=rngs,
            dtype=dtype,
        )
        self.decoder = TwinDecoder(config.decoder, implementation=config.attention, rngs=rngs, dtype=dtype)

    @property
    def dtype(self) -> jnp.dtype:
        return self.projector.kernel.dtype

    def encode(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B N D"]:
        """The vectors of normalised frames, each on its own."""
        return self.projector(self.compressor(self.vision(pixels.astype(self.dtype))))
