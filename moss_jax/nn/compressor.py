"""The frame compressor: the class token and a pooled patch grid.

B frames, P positions, H W patch grid, S stride, C channels, N vectors a frame
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from moss_jax.config import CompressorConfig, VisionConfig
from moss_jax.nn.layers import Linear


class Compressor(nnx.Module):
    """Pools the patch grid by `mode`; only channelFusion, a strided convolution, has parameters."""

    def __init__(self, config: CompressorConfig, vision: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.config = config
        self.grid = vision.grid
        width = vision.output_size
        # Assigned once: NNX treats an attribute that was None as static.
        self.merger = (
            Linear({"window": config.stride**2, "channels": width}, {"embed": width}, rngs=rngs, dtype=dtype)
            if config.mode == "channelFusion"
            else None
        )

    @jax.named_scope("compressor")
    def __call__(self, states: Sequence[Float[Array, "B P D"]]) -> Float[Array, "B N C"]:
        """Compresses the encoder's states, [B, 1 + grid², D] each, and stacks their channels."""
        if self.merger is not None:
            return self._pool(stack(states))
        # Modes that treat channels alike pool each state before stacking, so that the stacked arrays are
        # small. Without the barrier, XLA would pool the stack one channel after the other.
        return stack(jax.lax.optimization_barrier([self._pool(state) for state in states]))

    def _pool(self, x):
        """Pools the patch grid of [B, 1 + grid², C] to [B, N, C]; the class token is kept."""
        grid, size = self.grid, self.config.output_grid(self.grid)
        frames, _, channels = x.shape
        patches = x[:, 1:].reshape(frames, grid, grid, channels)
        if self.config.mode == "bilinear":
            pooled = jax.image.resize(patches, (frames, size, size, channels), "linear", antialias=False)
        else:
            pooled = self._pool_windows(patches, size)
        return jnp.concatenate([x[:, :1], pooled.reshape(frames, size * size, channels)], axis=1)

    def _pool_windows(self, patches, size):
        stride = self.config.stride
        # Patches beyond the last whole window are left out, as strided pooling does.
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
                assert self.merger is not None
                return self.merger(windows)
            case mode:
                raise ValueError(f"no pooling mode {mode!r}")


def stack(states: Sequence[Float[Array, "B P D"]]) -> Float[Array, "B P C"]:
    """The final state, then the others interleaved: channel `c` of state `i` is at `D + c * count + i`."""
    last, *others = states
    return jnp.concatenate([last, jax.lax.collapse(jnp.stack(others, axis=-1), 2)], axis=-1)
