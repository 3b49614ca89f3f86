"""Fits frames into the square tile of the vision encoder and normalises them.

Axes: H, W height and width of the frame, S side of the tile, `...` any leading axes.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

# Outputs of one matrix product of `fit_frame`.
_BAND = 32
# Terms of one sum of `preprocess`. XLA compiles 64 in a second, and takes minutes for thousands.
_MAX_TAPS = 64


def fitted_size(height: int, width: int, image_size: int) -> tuple[int, int]:
    """Height and width, in whole pixels, of a frame scaled to fit a tile of `image_size`; never 0."""
    # In floats and in this order, because the original's processor rounds so: 640 x 360 becomes 112 x 62.
    scale_height, scale_width = image_size / height, image_size / width
    if scale_width < scale_height:
        return max(1, math.floor(height * scale_width)), image_size
    return image_size, max(1, math.floor(width * scale_height))


def preprocess(
    rgb: UInt8[Array, "... H W 3"], *, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "... S S 3"]:
    """Resizes frames to fit a tile, pads them right and below with black, scales to [0, 1] and normalises.

    Args:
      rgb: uint8 [..., H, W, 3].
      image_size: S, static under jit, as H and W are.
      mean, std: per channel, for values in [0, 1].

    Returns float32 [..., S, S, 3]; the padding is (0 - mean) / std.

    Raises:
      ValueError: if `rgb` is not uint8 [..., H, W, 3] with at least one pixel.
    """
    _check(rgb)
    *batch, height, width, channels = rgb.shape
    new_height, new_width = fitted_size(height, width, image_size)
    x = jnp.asarray(rgb)
    if (new_height, new_width) != (height, width):
        x = _resize(x.reshape(*batch, height, width * channels), new_height)
        # One loop for both passes would compute a value of the first again for every tap of the second.
        x = jax.lax.optimization_barrier(x)
        x = _resize(x.reshape(*batch, new_height, width, channels), new_width)
        x = jnp.round(x)  # the model was trained on resized 8-bit images
    padding = [(0, 0)] * len(batch) + [(0, image_size - new_height), (0, image_size - new_width), (0, 0)]
    x = jnp.pad(x, padding).astype(jnp.float32)  # [..., S, S, 3]
    return (x / 255 - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def fit_frame(rgb: UInt8[np.ndarray, "H W 3"], image_size: int) -> UInt8[np.ndarray, "S S 3"]:
    """Does on the host, in 8 bit, what `preprocess` does before it normalises.

    `preprocess` of the result, which has the size of the tile, is `preprocess` of the frame, but for values
    that lie halfway between two levels.

    Raises:
      ValueError: if `rgb` is not uint8 [H, W, 3] with at least one pixel.
    """
    _check(rgb)
    height, width, channels = rgb.shape
    new_height, new_width = fitted_size(height, width, image_size)
    tile = np.zeros((image_size, image_size, channels), np.uint8)
    if (new_height, new_width) == (height, width):
        tile[:height, :width] = rgb
        return tile
    rows = rgb.reshape(height, width * channels)
    shrunk = np.empty((new_height, width * channels), np.float32)
    for new, old, weights in _bands(height, new_height, 1):
        np.matmul(weights, rows[old].astype(np.float32), out=shrunk[new])
    fitted = np.empty((new_height, new_width * channels), np.float32)
    for new, old, weights in _bands(width, new_width, channels):
        np.matmul(shrunk[:, old], weights.T, out=fitted[:, new])
    tile[:new_height, :new_width] = np.rint(fitted).reshape(new_height, new_width, channels)
    return tile


def _resize(x: Array, new_size: int) -> Float[Array, "..."]:
    """Resizes the axis before the last linearly, with antialiasing; in float32."""
    size = x.shape[-2]
    weights = _weights(size, new_size)
    taps = np.count_nonzero(weights, axis=1).max()
    if taps > _MAX_TAPS:
        return jnp.matmul(weights.astype(np.float32), x.astype(jnp.float32), precision="highest")
    # XLA makes one loop of the sum, which reads the input once and writes nothing in between.
    first = np.minimum((weights > 0).argmax(axis=1), size - taps)  # [new_size], of the inputs of each output
    resized = 0.0
    for inputs in (first + tap for tap in range(taps)):
        weight = weights[np.arange(new_size), inputs].astype(np.float32)
        resized += weight[:, None] * jnp.take(x, inputs, axis=-2, mode="clip").astype(jnp.float32)
    return resized


def _weights(size: int, new_size: int) -> Float[np.ndarray, "new_size size"]:
    """What each input weighs in each output of a resized axis: a triangle, two of the larger pixels wide."""
    scale = size / new_size
    centres = (np.arange(new_size) + 0.5) * scale - 0.5
    distances = np.abs(centres[:, None] - np.arange(size)) / max(scale, 1.0)
    weights = np.maximum(0.0, 1.0 - distances)
    return weights / weights.sum(axis=1, keepdims=True)


@functools.lru_cache(maxsize=32)
def _bands(size: int, new_size: int, channels: int) -> list[tuple[slice, slice, np.ndarray]]:
    """Resizing of one axis, with channels behind it, as matrices for a few outputs each: (to, from, matrix).

    One matrix for all outputs would be nearly all zeros, as each depends on a few neighbouring inputs.
    """
    weights = _weights(size, new_size)
    bands = []
    for start in range(0, new_size, _BAND):
        band = weights[start : start + _BAND]
        (used,) = np.nonzero(band.any(axis=0))
        first, last = used[0], used[-1] + 1
        matrix = np.kron(band[:, first:last], np.eye(channels)).astype(np.float32)
        to = slice(start * channels, (start + len(band)) * channels)
        bands.append((to, slice(first * channels, last * channels), matrix))
    return bands


def _check(rgb: Array | np.ndarray) -> None:
    if rgb.dtype != jnp.uint8 or rgb.ndim < 3 or rgb.shape[-1] != 3 or 0 in rgb.shape[-3:-1]:
        given = f"{rgb.dtype} {list(rgb.shape)}"
        raise ValueError(f"frames must be uint8 [..., H, W, 3] and not empty, not {given}")
