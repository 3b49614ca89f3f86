"""The frame compressor against plain numpy, on grids that the stride divides and on others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moss_jax.config import PRESETS, CompressorConfig
from moss_jax.nn.compressor import Compressor, stack

WIDTH, COUNT = 16, 3  # Of the encoder's states.


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
        vision = small_config().vision
        vision = dataclasses.replace(vision, image_size=14 * grid, intermediate_layers=(0, 1))
        return Compressor(CompressorConfig(mode, stride), vision, rngs=nnx.Rngs(0), dtype=dtype)

    return make


def random_states(grid, dtype="float32"):
    """The encoder's states: the final one and the inputs of two layers."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((2, 1 + grid**2, WIDTH)), dtype) for _ in range(COUNT)]


def test_the_states_of_layers_are_interleaved_behind_the_final_one():
    last, first, second = states = random_states(3)
    stacked = stack(states)
    np.testing.assert_array_equal(stacked[..., :WIDTH], last)
    np.testing.assert_array_equal(stacked[..., WIDTH::2], first)
    np.testing.assert_array_equal(stacked[..., WIDTH + 1 :: 2], second)


@pytest.mark.parametrize("mode", DEFINITIONS)
@pytest.mark.parametrize(("grid", "stride"), [(4, 2), (5, 2), (7, 3), (3, 1)])
def test_pools_the_stacked_states_as_defined(compressor, mode, grid, stride):
    module, states = compressor(mode, grid, stride), random_states(grid)
    channels, kernel = COUNT * WIDTH, None
    if mode == "channelFusion":
        kernel = np.asarray(module.merger.kernel[...]).reshape(stride, stride, channels, channels)
        kernel = kernel.transpose(3, 2, 0, 1)
    out, x = module(states), np.float64(stack(states))
    pooled = DEFINITIONS[mode](x[:, 1:].reshape(2, grid, grid, channels), stride, kernel)
    np.testing.assert_array_equal(out[:, 0], stack(states)[:, 0])
    # Of K = stride² channels products, a sum is off by K units of float32 times the length of their vector:
    # 432 * 2^-24 * 0.02 sqrt(432), of which numbers are up to 4 times as large.
    np.testing.assert_allclose(out[:, 1:], pooled.reshape(2, -1, channels), rtol=0, atol=5e-5)
    assert out.shape[1] == 1 + CompressorConfig(mode, stride).output_grid(grid) ** 2


@pytest.mark.parametrize("mode", DEFINITIONS)
def test_keeps_the_dtype(compressor, mode):
    assert compressor(mode, 4, 2, "bfloat16")(random_states(4, "bfloat16")).dtype == jnp.bfloat16


@pytest.mark.parametrize("mode", DEFINITIONS)
def test_only_channel_fusion_has_parameters(compressor, mode):
    sizes = [x.size for x in jax.tree.leaves(nnx.state(compressor(mode, 4, 2)))]
    assert sizes == ([4 * (COUNT * WIDTH) ** 2] if mode == "channelFusion" else [])


def test_vectors_of_the_released_model():
    config = PRESETS["moss_video_11b"]()
    assert config.vectors_per_frame == 101
    abstract = nnx.eval_shape(
        lambda x: Compressor(config.compressor, config.vision, rngs=nnx.Rngs(0), dtype="float32")(x),
        [jax.ShapeDtypeStruct((1, 1601, 1280), jnp.float32)] * 6,
    )
    assert abstract.shape == (1, 101, 7680)
