"""Fits frames into the square tile of the vision encoder and normalises them.

Axes: H, W height and width of the frame, S side of the tile, `...` any leading axes.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


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
    if rgb.dtype != jnp.uint8 or rgb.ndim < 3 or rgb.shape[-1] != 3 or 0 in rgb.shape[-3:-1]:
        given = f"{rgb.dtype} {list(rgb.shape)}"
        raise ValueError(f"frames must be uint8 [..., H, W, 3] and not empty, not {given}")
    *batch, height, width, channels = rgb.shape
    new_height, new_width = fitted_size(height, width, image_size)
    x = jnp.asarray(rgb, jnp.float32)
    x = jax.image.resize(x, (*batch, new_height, new_width, channels), "linear", antialias=True)
    x = jnp.round(x)  # the model was trained on resized 8-bit images
    padding = [(0, 0)] * len(batch) + [(0, image_size - new_height), (0, image_size - new_width), (0, 0)]
    x = jnp.pad(x, padding)  # [..., S, S, 3]
    return (x / 255 - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
