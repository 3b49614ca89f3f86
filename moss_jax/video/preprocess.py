"""Preprocessing: resizes frames to the square tile of the vision encoder, pads and normalises them.

Axes: H, W height and width of the frame, S side of the tile, `...` any leading axes.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

# Maximum number of taps that `preprocess` unrolls. XLA compiles 64 in a second, thousands in minutes.
_MAX_TAPS = 64


def fitted_size(height: int, width: int, image_size: int) -> tuple[int, int]:
    """Returns height and width, in pixels, of a frame scaled to fit a tile of `image_size`; at least 1."""
    # In floats and in this order, to round as the original's processor: 640 x 360 becomes 112 x 62.
    scale_height, scale_width = image_size / height, image_size / width
    if scale_width < scale_height:
        return max(1, math.floor(height * scale_width)), image_size
    return image_size, max(1, math.floor(width * scale_height))


def preprocess(
    rgb: UInt8[Array | np.ndarray, "... H W 3"],
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Array, "... S S 3"]:
    """Resizes frames to fit a tile (bilinear, antialiased), zero-pads right and below, and normalises.

    Args:
      rgb: uint8 [..., H, W, 3].
      image_size: S; static under jit, like H and W.
      mean, std: per channel, for values scaled to [0, 1].

    Returns:
      float32 [..., S, S, 3]; the padding is (0 - mean) / std.

    Raises:
      ValueError: `rgb` is not uint8 [..., H, W, 3] with at least one pixel.
    """
    _check(rgb)
    *batch, height, width, channels = rgb.shape
    new_height, new_width = fitted_size(height, width, image_size)
    x = jnp.asarray(rgb)
    if (new_height, new_width) != (height, width):
        x = _resize(x.reshape(*batch, height, width * channels), new_height)
        # If XLA fused the two passes, it would recompute the first for every tap of the second.
        x = jax.lax.optimization_barrier(x)
        x = _resize(x.reshape(*batch, new_height, width, channels), new_width)
        x = jnp.round(x)  # the model was trained on resized 8-bit images
    padding = [(0, 0)] * len(batch) + [(0, image_size - new_height), (0, image_size - new_width), (0, 0)]
    x = jnp.pad(x, padding).astype(jnp.float32)  # [..., S, S, 3]
    return (x / 255 - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def fit_frame(rgb: UInt8[np.ndarray, "H W 3"], image_size: int) -> UInt8[np.ndarray, "S S 3"]:
    """Resizes and pads a frame on the host, in 8 bits, as `preprocess` does before it normalises.

    `preprocess` of the result, which has the size of the tile, equals `preprocess` of the frame, except for
    values halfway between two levels, which may be rounded either way.

    Raises:
      ValueError: `rgb` is not uint8 [H, W, 3] with at least one pixel.
    """
    _check(rgb)
    height, width, channels = rgb.shape
    new_height, new_width = fitted_size(height, width, image_size)
    tile = np.zeros((image_size, image_size, channels), np.uint8)
    if (new_height, new_width) == (height, width):
        tile[:height, :width] = rgb
        return tile
    for channel in range(channels):
        # In float32, so that nothing is rounded between the two passes. NumPy's matmul would do it, too, but
        # its threads, which spin while they wait, can take twenty times as long and all cores.
        plane = Image.fromarray(rgb[:, :, channel].astype(np.float32))
        resized = plane.resize((new_width, new_height), Image.Resampling.BILINEAR)
        tile[:new_height, :new_width, channel] = np.rint(np.asarray(resized))
    return tile


def _resize(x: Array, new_size: int) -> Float[Array, "..."]:
    """Resizes the second-to-last axis linearly, with antialiasing, in float32."""
    size = x.shape[-2]
    weights = _weights(size, new_size)
    taps = np.count_nonzero(weights, axis=1).max()
    if taps > _MAX_TAPS:
        return jnp.matmul(weights.astype(np.float32), x.astype(jnp.float32), precision="highest")
    # XLA fuses the sum over taps into one loop, which reads the input once.
    first = np.minimum((weights > 0).argmax(axis=1), size - taps)  # [new_size], first input of each output
    resized = jnp.float32(0)
    for inputs in (first + tap for tap in range(taps)):
        weight = weights[np.arange(new_size), inputs].astype(np.float32)
        resized += weight[:, None] * jnp.take(x, inputs, axis=-2, mode="clip").astype(jnp.float32)
    return resized


def _weights(size: int, new_size: int) -> Float[np.ndarray, "new_size size"]:
    """Weights of a linear resize with antialiasing: a triangle filter, two of the larger pixels wide."""
    scale = size / new_size
    centres = (np.arange(new_size) + 0.5) * scale - 0.5
    distances = np.abs(centres[:, None] - np.arange(size)) / max(scale, 1.0)
    weights = np.maximum(0.0, 1.0 - distances)
    return weights / weights.sum(axis=1, keepdims=True)


def _check(rgb: Array | np.ndarray) -> None:
    if rgb.dtype != jnp.uint8 or rgb.ndim < 3 or rgb.shape[-1] != 3 or 0 in rgb.shape[-3:-1]:
        given = f"{rgb.dtype} {list(rgb.shape)}"
        raise ValueError(f"frames must be uint8 [..., H, W, 3] and not empty, not {given}")
