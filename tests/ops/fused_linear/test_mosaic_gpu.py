"""The kernel for Hopper beyond the contract: how a call is cut, its gelu for 8 bits, what a GPU is given,
real shapes.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moss_jax.ops.fused_linear import Arguments, mosaic_gpu
from moss_jax.ops.fused_linear.mosaic_gpu import (
    LARGEST,
    LOG2_TAIL_IN_8_BITS,
    Config,
    default_config,
    many_rows,
)
from ops.fused_linear.test_fused_linear import (
    BFLOAT16,
    FLOAT8,
    TOLERANCE,
    abstract,
    exact,
    inputs,
    off,
    on_gpu,
)
from scipy.special import ndtr

# Calls of the vision encoder's layers; rows of its batches, 1, 8 and 32 frames.
LAYERS = {
    "queries and keys": {"K": 1280, "N": 2560, "out_dtype": FLOAT8},
    "values": {"K": 1280, "N": 1280},
    "out": {"K": 1280, "N": 1280, "residual": True},
    "fc1": {"K": 1280, "N": 5120, "gelu": True, "out_dtype": FLOAT8},
    "fc2": {"K": 5120, "N": 1280, "residual": True},
    "fc1 in bfloat16": {"K": 1280, "N": 5120, "gelu": True, "dtype": BFLOAT16},
}
ROWS = (1608, 8 * 1608, 32 * 1608)

SMALL = functools.partial(Config, columns=64, cluster=None, slots=1)


def call(given, gelu=False, out_dtype=BFLOAT16):
    return Arguments(**given, gelu=gelu, out_dtype=jnp.dtype(out_dtype))


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT8], ids=str)
@pytest.mark.parametrize("out_dtype", [BFLOAT16, FLOAT8], ids=str)
@pytest.mark.parametrize(
    ("M", "steps", "N", "config"),
    [
        (168, 3, 256, SMALL(blocks=1, columns=128, stages=3, chunk=32, slots=4, lag=1)),
        (264, 4, 128, SMALL(blocks=2, cluster="rows", lag=3)),
        (136, 2, 256, SMALL(blocks=4, cluster="columns", stages=2, lag=0)),
    ],
    ids=["1 thread block, 4 slots", "2 tiles share weights", "2 tiles share inputs"],
)
def test_cut_in_many_ways(M, steps, N, config, dtype, out_dtype):
    given = inputs((M,), K=steps * 128 // dtype.itemsize, N=N, dtype=dtype, out_scale=4)
    with on_gpu():
        y = many_rows(call(given, gelu=True, out_dtype=out_dtype), config)
    assert y.dtype == out_dtype
    assert off(y, exact(given, gelu=True)) < (2.5e-3 if out_dtype == BFLOAT16 else TOLERANCE[FLOAT8])


@pytest.mark.parametrize("out_scale", [None, 0.25])
@pytest.mark.parametrize(
    ("M", "steps", "N", "config"),
    [
        (168, 3, 256, SMALL(blocks=1, columns=128, stages=3, chunk=32, slots=2, lag=1)),
        (168, 3, 256, SMALL(blocks=1, columns=128, stages=3, chunk=32, slots=4, lag=0)),
        (264, 4, 128, SMALL(blocks=2, cluster="rows", chunk=32, lag=3)),
        (136, 2, 256, SMALL(blocks=4, cluster="columns", stages=2, lag=1)),
    ],
    ids=["4 chunks, 2 slots", "a slot each", "2 tiles share weights, 1 slot", "2 tiles share inputs"],
)
def test_a_residual_comes_into_the_slots(M, steps, N, config, out_scale):
    """Tile after tile, of which the last are moved back."""
    given = inputs((M,), K=steps * 128, N=N, out_scale=out_scale, residual=BFLOAT16)
    with on_gpu():
        y = many_rows(call(given), config)
    assert off(y, exact(given)) < 2.5e-3


@pytest.mark.parametrize("out_scale", [1 / 64, 1, 16, 448])
def test_the_gelu_for_8_bits_is_good_enough_for_them(out_scale):
    """It is off by less than a seventh of their half step, in float32, wherever they have numbers."""
    x = np.unique(np.r_[np.linspace(-20, 20, 200_001), np.geomspace(1e-6, 1e6, 1000)])
    y, expected = np.float64(mosaic_gpu._gelu(np.float32(x), LOG2_TAIL_IN_8_BITS)), x * ndtr(x)
    exponent = np.maximum(np.frexp(np.abs(out_scale * expected))[1] - 1, -6)
    assert (out_scale * np.abs(y - expected) < 2.0 ** (exponent - 4) / 7).all()


def test_the_gelu_for_8_bits_vanishes():
    given = np.float32([-np.inf, -1e30, -LARGEST, 0, np.inf, np.nan])
    y = mosaic_gpu._gelu(given, LOG2_TAIL_IN_8_BITS)
    np.testing.assert_allclose(y, [0, 0, 0, 0, np.inf, np.nan], rtol=0, atol=1e-37)


def test_the_default_keeps_the_multiprocessors_busy():
    """With few rows, 130 tiles for 132 of them, small or large; or 260 large ones."""
    narrow, wide = Config(columns=128, stages=6, cluster=None), Config(cluster=None)
    configs = {name: default_config(abstract(**layer)) for name, layer in LAYERS.items()}
    wider = ("queries and keys", "fc1", "fc1 in bfloat16")
    assert configs == dict.fromkeys(LAYERS, narrow) | dict.fromkeys(wider, wide)
    assert default_config(abstract(N=128)) == narrow
    for M in ROWS[1:]:
        many = {name: default_config(abstract(**layer, M=M)) for name, layer in LAYERS.items()}
        own = {"fc1": Config(cluster="columns"), "fc1 in bfloat16": Config()}
        assert many == dict.fromkeys(LAYERS, Config(lag=1)) | own


def test_configurations_are_checked():
    def refused(message, **changes):
        with pytest.raises(ValueError, match=re.escape(message)):
            Config(**changes)

    refused("columns is a multiple of 64 up to 256, not 320", columns=320)
    refused("lag is less than stages, 4, not 4", lag=4)
    refused("128 columns are not made of 4 chunks of 64 each", columns=128, slots=4)
    refused("278528 bytes of shared memory are more than 231424", stages=5)
    with pytest.raises(ValueError, match="N = 128 is not a multiple of 256"):
        many_rows(call(inputs((256,))), Config())


@pytest.mark.parametrize("M", [*ROWS, (2, 804)], ids=str)
def test_lowers_for_a_gpu_without_one(M):
    """As far as that goes: to the kernels' modules, not to machine code."""
    calls = [abstract(**layer, M=M) for layer in LAYERS.values()]
    assert not any(mosaic_gpu.unsupported(each, "gpu") for each in calls)
    program = jax.jit(lambda calls: [mosaic_gpu.apply(each) for each in calls])
    text = program.trace(calls).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == len(calls)


@pytest.mark.gpu
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("frames", [1, 32])
def test_real_shapes(frames, layer):
    sizes = dict(LAYERS[layer])
    gelu, out_dtype = sizes.pop("gelu", False), sizes.pop("out_dtype", BFLOAT16)
    sizes["residual"] = BFLOAT16 if sizes.get("residual") else None
    given = inputs((1608,), **sizes, out_scale=4 if out_dtype == FLOAT8 else None)  # No result is beyond 448.
    expected = exact(given, gelu)
    for name in {"x", "residual"} & given.keys():
        given[name] = jnp.tile(given[name], (frames, 1, 1))
    run = jax.jit(mosaic_gpu.apply)
    y = run(call(given, gelu, out_dtype))
    for frame in np.float32(y):
        # The longer the sums, the more the tensor core's own rounding tells.
        assert off(frame, expected) < (1.5e-2 if out_dtype == BFLOAT16 else TOLERANCE[FLOAT8])
    assert all(bool((run(call(given, gelu, out_dtype)) == y).all()) for _ in range(30))
