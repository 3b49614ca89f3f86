"""The frame compressor against plain numpy, on grids that the stride divides and on others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moss_jax.config import PRESETS, CompressorConfig
from moss_jax.nn.compressor import Compressor


def windows(patches, stride):
    """[B, size, size, stride, stride, C]: the whole windows; what is left at the edges is dropped."""
    size = patches.shape[1] // stride
    rows = [
        [patches[:, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride] for j in range(size)]
        for i in range(size)
    ]
    return np.stack([np.stack(row, axis=1) for row in rows], axis=1)


def average(patches, stride, kernel):
    return windows(patches, stride).mean(axis=(3, 4))


def maximum(patches, stride, kernel):
    return windows(patches, stride).max(axis=(3, 4))


def convolution(patches, stride, kernel):
    """`kernel` in the layout of the checkpoint: [out, in, rows, columns]."""
    return np.einsum("bhwijc,ocij->bhwo", windows(patches, stride), kernel)


def bilinear(patches, stride, kernel):
    """Half-pixel centres, no antialiasing, ceil(grid / stride) samples a side."""
    grid = patches.shape[1]
    size = -(-grid // stride)
    at = np.maximum((np.arange(size) + 0.5) * grid / size - 0.5, 0)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, grid - 1)
    share = at - low

    def blend(x, axis):
        weight = share.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        return np.take(x, low, axis) * (1 - weight) + np.take(x, high, axis) * weight

    return blend(blend(patches, 1), 2)


DEFINITIONS = {"average": average, "max": maximum, "bilinear": bilinear, "channelFusion": convolution}


@pytest.fixture
def compressor(small_config):
    def make(mode, grid, stride, dtype="float32"):
        vision = dataclasses.replace(small_config().vision, image_size=14 * grid)
        return Compressor(CompressorConfig(mode, stride), vision, rngs=nnx.Rngs(0), dtype=dtype)

    return make


@pytest.mark.parametrize("mode", DEFINITIONS)
@pytest.mark.parametrize(("grid", "stride"), [(4, 2), (5, 2), (7, 3), (3, 1), (5, 5)])
def test_pools_as_defined(compressor, mode, grid, stride):
    module = compressor(mode, grid, stride)
    width = 32
    x = np.random.default_rng(0).standard_normal((2, 1 + grid**2, width)).astype(np.float32)
    kernel = None
    if mode == "channelFusion":
        kernel = (
            np.asarray(module.merger.kernel[...]).reshape(stride, stride, width, width).transpose(3, 2, 0, 1)
        )
    out = module(jnp.asarray(x))
    pooled = DEFINITIONS[mode](x[:, 1:].reshape(2, grid, grid, width).astype(np.float64), stride, kernel)
    np.testing.assert_array_equal(out[:, 0], x[:, 0])
    np.testing.assert_allclose(out[:, 1:], pooled.reshape(2, -1, width), atol=1e-5)
    assert out.shape[1] == 1 + CompressorConfig(mode, stride).output_grid(grid) ** 2


@pytest.mark.parametrize("mode", DEFINITIONS)
def test_of_frames_it_is_what_the_encoder_gives_compressed(compressor, mode):
    """Whichever is done first, compressing states or putting them side by side."""
    module = compressor(mode, 4, 2)
    states = jax.random.normal(jax.random.key(0), (2, 17, 2, 16))

    def encoder(pixels, keep, each=lambda state: state):
        assert (pixels, keep) == ("pixels", "full")
        return jnp.concatenate([each(states[:, :, i]) for i in range(2)], axis=-1)

    found = module.of_frames(encoder, "pixels", "full")
    np.testing.assert_allclose(found, module(states.reshape(2, 17, 32)), atol=1e-6)


@pytest.mark.parametrize("mode", DEFINITIONS)
def test_keeps_the_dtype(compressor, mode):
    assert compressor(mode, 4, 2, "bfloat16")(jnp.ones((1, 17, 32), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("mode", DEFINITIONS)
def test_only_channel_fusion_has_parameters(compressor, mode):
    sizes = [x.size for x in jax.tree.leaves(nnx.state(compressor(mode, 4, 2)))]
    assert sizes == ([4 * 32 * 32] if mode == "channelFusion" else [])


def test_vectors_of_the_released_model():
    config = PRESETS["moss_video_11b"]()
    assert config.vectors_per_frame == 101
    abstract = nnx.eval_shape(
        lambda x: Compressor(config.compressor, config.vision, rngs=nnx.Rngs(0), dtype="float32")(x),
        jax.ShapeDtypeStruct((1, 1601, 7680), jnp.float32),
    )
    assert abstract.shape == (1, 101, 7680)
