"""The model: encode, remember, decode over an explicit state, and the whole sequence in one pass.

B batch/slot, S T tokens, F frames, H W pixels, N vectors a frame, D width, V vocabulary
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from moss_jax.config import ModelConfig
from moss_jax.memory import StreamState, check_room, init_state
from moss_jax.nn.compressor import Compressor
from moss_jax.nn.decoder import Decoder
from moss_jax.nn.layers import Linear
from moss_jax.nn.vision import VisionEncoder


class MossVideo(nnx.Module):
    """MOSS-Video-Preview; holds only parameters, state is passed in and returned.

    Args:
      config: the model's architecture.
      rngs: for the initial parameters.
      dtype: of the parameters, and so of everything computed with them.
    """

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
        self.decoder = Decoder(
            config.decoder,
            rows_before_first_frame=config.rows_before_first_frame,
            implementation=config.attention,
            rngs=rngs,
            dtype=dtype,
        )

    @property
    def dtype(self) -> jnp.dtype:
        return self.projector.kernel.dtype

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        pixels: Float[Array, "B F H W 3"],
        frame_positions: Int[Array, "B F"],
    ) -> Float[Array, "B S V"]:
        """Logits of a whole sequence in one pass.

        Args:
          tokens: with one `<|image|>` for each frame.
          pixels: normalised frames.
          frame_positions: index of each frame's `<|image|>` among the tokens, ascending; an index past the
            sequence marks a padding frame.

        Returns:
          float32 [B, S, V].
        """
        return self.decoder.logits(self.hidden(tokens, pixels, frame_positions))

    def hidden(
        self,
        tokens: Int[Array, "B S"],
        pixels: Float[Array, "B F H W 3"],
        frame_positions: Int[Array, "B F"],
    ) -> Float[Array, "B S D"]:
        """Hidden states of the one-pass call, from which `decoder.logits` computes its logits."""
        self._check_tokens(tokens)
        if pixels.ndim != 5 or pixels.shape[:2] != frame_positions.shape or len(pixels) != len(tokens):
            raise ValueError(
                "frames are pixels [B, F, H, W, 3] with frame_positions [B, F] for tokens [B, S]; "
                f"got {pixels.shape}, {frame_positions.shape} and {tokens.shape}"
            )
        B, F = frame_positions.shape
        keep = self.config.remat
        features = self._encode(pixels.reshape(B * F, *pixels.shape[2:]), self.config.vision_remat or keep)
        features = features.reshape(B, F, *features.shape[1:])
        return self.decoder(tokens, features, frame_positions, keep)

    def encode(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B N D"]:
        """Encodes frames independently; the frames of a batch may come from any streams.

        Args:
          pixels: normalised frames, from `video.preprocess`.

        Raises:
          ValueError: they are integers, or their size is not the config's.
        """
        return self._encode(pixels, "none")

    def _encode(self, pixels, keep):
        size = self.config.vision.image_size
        if not jnp.issubdtype(pixels.dtype, jnp.floating):
            raise ValueError(
                f"encode takes normalised pixels in floating point, but got {pixels.dtype}; normalise frames "
                "by moss_jax.video.preprocess with image_size, image_mean and image_std of config.vision"
            )
        if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
            raise ValueError(f"encode takes normalised pixels [B, {size}, {size}, 3]; got {pixels.shape}")
        states = self.compressor(self.vision(pixels.astype(self.dtype), keep))
        with jax.named_scope("projector"):
            return self.projector(states)

    def init_state(self, slots: int, *, text_capacity: int, bank_capacity: int) -> StreamState:
        """An empty state of `slots` streams, with these capacities in tokens and frames for each."""
        return init_state(
            self.config, slots, text_capacity=text_capacity, bank_capacity=bank_capacity, dtype=self.dtype
        )

    def remember(
        self,
        state: StreamState,
        features: Float[Array, "B N D"] | Float[Array, "B F N D"],
        position: Int[Array, " B"] | Int[Array, "B F"],
        *,
        mask: Bool[Array, " B"] | Bool[Array, "B F"] | None = None,
    ) -> StreamState:
        """Appends a frame, or F of them, to the memory bank of each slot.

        Args:
          features: from `encode`.
          position: that of the frame's `<|image|>` token. That token and all later ones see the frame.
            Never before the frames already in the bank.
          mask: which slots remember; with F frames, which of the frames are real, real ones first.

        Raises:
          CapacityError: the bank is full (inside `jax.jit`, the frame is dropped instead).
        """
        position = jnp.asarray(position, jnp.int32)
        mask = jnp.ones(position.shape, bool) if mask is None else jnp.asarray(mask)
        vector = (self.config.vectors_per_frame, self.config.decoder.hidden_size)
        if (
            position.ndim not in (1, 2)
            or len(position) != state.slots
            or features.shape != (*position.shape, *vector)
            or mask.shape != position.shape
        ):
            raise ValueError(
                f"remember takes features [B, N, D] with position and mask [B], or [B, F, N, D] with [B, F], "
                f"for B = {state.slots} slots and [N, D] = {list(vector)}; got features {features.shape}, "
                f"position {position.shape} and mask {mask.shape}"
            )
        if position.ndim == 1:
            features, position, mask = features[:, None], position[:, None], mask[:, None]
        count = jnp.sum(mask, axis=-1, dtype=jnp.int32)
        vectors = count * self.config.vectors_per_frame
        check_room("memory bank", state.bank.length, vectors, state.bank.capacity)
        bank = self.decoder.remember(state.bank, features.astype(self.dtype), position, count)
        return dataclasses.replace(state, bank=bank)

    def decode(
        self,
        state: StreamState,
        tokens: Int[Array, "B T"],
        *,
        lengths: Int[Array, " B"] | None = None,
        mask: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T V"], StreamState]:
        """Appends tokens to each slot and returns the logits of the token after each of them.

        Args:
          lengths: how many of the T tokens of each slot are real, the rest being padding; all if None. The
            logits of padding are meaningless.
          mask: which slots decode; the others are unchanged.

        Returns:
          float32 logits [B, T, V], and the state.

        Raises:
          CapacityError: the text cache is full (inside `jax.jit`, the tokens are dropped instead).
        """
        self._check_tokens(tokens)
        if len(tokens) != state.slots:
            raise ValueError(f"the state has {state.slots} slots, but tokens are {tokens.shape}")
        count = self._check_lengths(tokens, lengths, mask)
        check_room("text cache", state.text.length, count, state.text.capacity)
        hidden, state = self.decoder.decode(state, tokens, count)
        return self.decoder.logits(hidden), state

    def _check_lengths(self, tokens, lengths, mask):
        """Number of tokens that each slot decodes."""
        B, T = tokens.shape
        lengths = jnp.full(B, T, jnp.int32) if lengths is None else jnp.asarray(lengths)
        mask = jnp.ones(B, bool) if mask is None else jnp.asarray(mask)
        if lengths.shape != (B,) or mask.shape != (B,):
            raise ValueError(f"lengths and mask are [B] = {[B]}; got {lengths.shape} and {mask.shape}")
        if not isinstance(lengths, Tracer) and not all(0 <= n <= T for n in np.asarray(lengths)):
            raise ValueError(f"lengths must lie in [0, {T}], the tokens given; got {lengths.tolist()}")
        return jnp.where(mask, lengths, 0).astype(jnp.int32)

    def _check_tokens(self, tokens):
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens are integers [B, T]; got {tokens.dtype} {tokens.shape}")
        if isinstance(tokens, Tracer):
            return
        ids, rows = np.asarray(tokens), self.decoder.embedding.shape[0]
        if ids.size and not (ids.min() >= 0 and ids.max() < rows):
            raise ValueError(f"token ids must lie in [0, {rows}); got {ids.min()} to {ids.max()}")
