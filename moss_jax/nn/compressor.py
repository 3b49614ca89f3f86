"""The frame compressor: the class token and a pooled patch grid.

B frames, P positions, H W patch grid, S stride, C channels, N vectors a frame
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from moss_jax.config import CompressorConfig, Remat, VisionConfig
from moss_jax.nn.layers import Linear
from moss_jax.nn.vision import VisionEncoder


class Compressor(nnx.Module):
    """Pools the patch grid by `mode`; only channelFusion, a strided convolution, has parameters."""

    def __init__(self, config: CompressorConfig, vision: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.config = config
        self.grid = vision.grid
        width = vision.output_size
        # Assigned once: NNX takes an attribute that was None for a static one.
        self.merger = (
            Linear({"window": config.stride**2, "channels": width}, {"embed": width}, rngs=rngs, dtype=dtype)
            if config.mode == "channelFusion"
            else None
        )

    def __call__(self, x: Float[Array, "B P C"]) -> Float[Array, "B N C"]:
        """Compresses [B, 1 + grid², C] to [B, N, C]."""
        grid, size = self.grid, self.config.output_grid(self.grid)
        frames, _, channels = x.shape
        patches = x[:, 1:].reshape(frames, grid, grid, channels)
        if self.config.mode == "bilinear":
            pooled = jax.image.resize(patches, (frames, size, size, channels), "linear", antialias=False)
        else:
            pooled = self._pool_windows(patches, size)
        return jnp.concatenate([x[:, :1], pooled.reshape(frames, size * size, channels)], axis=1)

    def of_frames(
        self, encoder: VisionEncoder, pixels: Float[Array, "B H W 3"], keep: Remat = "none"
    ) -> Float[Array, "B N C"]:
        """What the encoder gives, compressed.

        Where a channel's result is of that channel alone, the encoder's states are compressed one by one, so
        that it is small ones that are put side by side.
        """
        if self.merger is not None:
            return self(encoder(pixels, keep))
        return encoder(pixels, keep, each=self)

    def _pool_windows(self, patches, size):
        stride = self.config.stride
        # Patches that fill no whole window are left out, as strided pooling does.
        windows = patches[:, : size * stride, : size * stride]
        frames, _, _, channels = patches.shape
        windows = windows.reshape(frames, size, stride, size, stride, channels).swapaxes(2, 3)
        windows = windows.reshape(frames, size, size, stride * stride, channels)  # [B, H, W, S*S, C]
        match self.config.mode:
            case "average":
                return windows.mean(axis=3, dtype=jnp.float32).astype(windows.dtype)
            case "max":
                return windows.max(axis=3)
            case "channelFusion":
                return self.merger(windows)
