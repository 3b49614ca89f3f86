"""The vision encoder: frame pixels to patch features.

B frames, P positions (class token, patches, padding), H heads, D head or hidden width
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from moss_jax.config import Remat, VisionConfig
from moss_jax.nn.layers import INITIAL_GATE, GeluMLP, LayerNorm, Linear, gate, normal, remat
from moss_jax.ops.attention import norm_self_attention
from moss_jax.ops.norm import Norm, Residual, add_norm
from moss_jax.ops.post_attention import post_attention
from moss_jax.ops.qarray import QArray

# The original pads the positions to a multiple of this and does not mask the padding in attention.
POSITION_MULTIPLE = 8
# Row of the aspect-ratio tables for a single tile, which every frame is.
ONE_TILE = 1


class VisionAttention(nnx.Module):
    """Attention among all positions, with its norm prologue; `out` is applied by the layer."""

    def __init__(self, config: VisionConfig, implementation: str | None, *, rngs: nnx.Rngs, dtype: DTypeLike):
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        self.qkv = Linear({"embed": config.hidden_size}, {"qkv": 3, **heads}, rngs=rngs, dtype=dtype)
        self.out = Linear(heads, {"embed": config.hidden_size}, rngs=rngs, dtype=dtype)
        self.implementation = implementation

    @jax.named_scope("attention")
    def __call__(
        self, residual: Residual, norm: Norm
    ) -> tuple[Float[Array, "B P H head"] | QArray, Float[Array, "B P D"]]:
        """Outputs of all heads, before `out`, and the residual sum."""
        return norm_self_attention(
            residual, norm, self.qkv.kernel.get_value(), implementation=self.implementation
        )


class VisionLayer(nnx.Module):
    """A pre-norm transformer layer; global layers have tanh gates on both branches."""

    def __init__(
        self,
        config: VisionConfig,
        implementation: str | None,
        *,
        gated: bool,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.attention = VisionAttention(config, implementation, rngs=rngs, dtype=dtype)
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.mlp = GeluMLP(config.hidden_size, config.intermediate_size, rngs=rngs, dtype=dtype)
        self.attention_gate = gate(INITIAL_GATE, dtype) if gated else None
        self.mlp_gate = gate(INITIAL_GATE, dtype) if gated else None

    def __call__(self, residual: Residual) -> tuple[Residual, Float[Array, "B P D"]]:
        """Returns the residual stream after the layer, and the layer's input as a residual sum."""
        heads, inputs = self.attention(residual, self.attention_norm.params)
        residual = post_attention(
            inputs,
            heads,
            out=self.attention.out.weights,
            norm=self.mlp_norm.params,
            up=self.mlp.fc1.weights,
            down=self.mlp.fc2.weights,
            attention_gate=_tanh(self.attention_gate),
            mlp_gate=_tanh(self.mlp_gate),
        )
        return residual, inputs


def _tanh(branch_gate):
    return None if branch_gate is None else jnp.tanh(branch_gate[...])


def _run(layers, residual, keep):
    """Runs the layers; returns the residual stream after the last, and the input of each."""
    inputs = []
    for layer in layers:
        residual, x = remat(layer, keep)(residual)
        inputs.append(x)
    return residual, inputs


class VisionEncoder(nnx.Module):
    """The encoder, from pixels to hidden states: the final one and the inputs of some layers."""

    def __init__(self, config: VisionConfig, implementation: str | None, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.config = config
        width, positions, tiles = config.hidden_size, config.num_positions, config.max_num_tiles
        ids = config.num_aspect_ratio_ids
        self.patch_embedding = Linear(
            {"patch": config.patch_size**2 * 3}, {"embed": width}, rngs=rngs, dtype=dtype
        )
        self.class_embedding = normal(rngs, (width,), (None,), dtype)
        self.position_embedding = normal(rngs, (positions, width), (None, None), dtype)
        self.tile_position_embedding = normal(rngs, (ids, tiles, positions, width), (None,) * 4, dtype)
        self.position_gate = gate(0, dtype)
        self.pre_tile_embedding = normal(rngs, (ids, tiles, width), (None,) * 3, dtype)
        self.pre_tile_gate = gate(0, dtype)
        self.post_tile_embedding = normal(rngs, (ids, tiles, width), (None,) * 3, dtype)
        self.post_tile_gate = gate(0, dtype)
        self.pre_norm = LayerNorm(width, config.norm_eps, dtype=dtype)
        self.post_norm = LayerNorm(width, config.norm_eps, dtype=dtype)

        def layers(count: int, gated: bool) -> nnx.List:
            return nnx.List(
                VisionLayer(config, implementation, gated=gated, rngs=rngs, dtype=dtype) for _ in range(count)
            )

        self.layers = layers(config.num_layers, gated=False)
        self.global_layers = layers(config.num_global_layers, gated=True)

    @jax.named_scope("vision_encoder")
    def __call__(self, pixels: Float[Array, "B H W 3"], keep: Remat = "none") -> list[Float[Array, "B P D"]]:
        """Encodes normalised frames.

        Args:
          keep: `ModelConfig.remat`.

        Returns:
          [B, num_positions, hidden_size] each, the class token first: the final hidden state, then the inputs
          of `intermediate_layers`.
        """
        residual, inputs = _run(self.layers, Residual(self._embed(pixels)), keep)
        kept = [x for i, x in enumerate(inputs) if i in self.config.intermediate_layers]
        x, _ = add_norm(residual, self.post_norm.params)
        x += jnp.tanh(self.post_tile_gate[...]) * self.post_tile_embedding[ONE_TILE, 0]
        residual, _ = _run(self.global_layers, Residual(x), keep)
        return [x[:, : self.config.num_positions] for x in (residual.sum(), *kept)]

    def _embed(self, pixels):
        """Embeds patches and positions, normalises them, and pads with zeros."""
        grid, patch = self.config.grid, self.config.patch_size
        frames = pixels.shape[0]
        x = pixels.reshape(frames, grid, patch, grid, patch, 3).swapaxes(2, 3)
        kernel = self.patch_embedding.kernel[...]
        # Rows are padded to a multiple of 16 bytes; without it, XLA's matmul takes a GPU 3 times as long.
        missing = -len(kernel) % 8
        x = jnp.pad(x.reshape(frames, grid * grid, len(kernel)), ((0, 0), (0, 0), (0, missing)))
        kernel = jnp.pad(kernel, ((0, missing), (0, 0)))
        x = jnp.matmul(x, kernel, preferred_element_type=kernel.dtype)
        x += jnp.tanh(self.pre_tile_gate[...]) * self.pre_tile_embedding[ONE_TILE, 0]
        # A single pad adds both the class token's row and the padding: XLA fuses the sums with a pad, but not
        # with a concatenation.
        positions = self.config.num_positions
        padding = -positions % POSITION_MULTIPLE
        x = jnp.pad(x, ((0, 0), (1, padding), (0, 0)))
        position = jnp.arange(positions + padding)[:, None]
        x = jnp.where(position == 0, self.class_embedding[...], x)
        position_gate = jnp.tanh(self.position_gate[...])
        below = (0, padding), (0, 0)
        x += jnp.pad((1 - position_gate) * self.position_embedding[...], below)
        x += jnp.pad(position_gate * self.tile_position_embedding[ONE_TILE, 0], below)
        return jnp.where(position < positions, self.pre_norm(x), 0)
