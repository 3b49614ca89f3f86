"""The kernel for Hopper beyond the contract: how a call is cut, what a GPU is given, real shapes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.fp8_linear.test_fp8_linear import abstract, exact, inputs, off, on_gpu

from moss_jax.ops.fp8_linear import Arguments, mosaic_gpu
from moss_jax.ops.fp8_linear.mosaic_gpu import Config, default_config, many_rows
from moss_jax.ops.rounding import Rounded

# (K, N) of the vision encoder's layers, and whether a gelu follows; rows of 1, 8 and 16 frames.
LAYERS = (((1280, 3840), False), ((1280, 1280), False), ((1280, 5120), True), ((5120, 1280), False))
ROWS = (1608, 8 * 1608, 16 * 1608)

SMALL = functools.partial(Config, columns=64, cluster=None, slots=1)


def call(given, gelu=False):
    return Arguments(**given, gelu=gelu, out_dtype=jnp.dtype("bfloat16"))


@pytest.mark.parametrize(
    ("M", "K", "N", "config"),
    [
        (168, 384, 256, SMALL(blocks=1, columns=128, stages=3, chunk=32, slots=4, lag=1)),
        (264, 512, 128, SMALL(blocks=2, cluster="rows", lag=3)),
        (136, 256, 256, SMALL(blocks=4, cluster="columns", stages=2, lag=0)),
    ],
    ids=["1 thread block, 4 slots", "2 tiles share weights", "2 tiles share inputs"],
)
def test_cut_in_many_ways(M, K, N, config):
    given = inputs((M,), K=K, N=N)
    with on_gpu():
        y = many_rows(call(given, gelu=True), config)
    assert off(y, exact(given, gelu=True)) < 2.5e-3


def test_the_default_keeps_the_multiprocessors_busy():
    """With few rows, 130 tiles for 132 of them, or 390; or 260, larger ones."""
    narrow, wide = Config(columns=128, stages=6, cluster=None), Config(cluster=None)
    configs = [default_config(abstract(K=K, N=N)) for (K, N), _ in LAYERS]
    assert configs == [narrow, narrow, wide, narrow]
    assert default_config(abstract(N=128)) == narrow
    assert {default_config(abstract(M=M, N=N)) for M in ROWS[1:] for N in (1280, 3840, 5120)} == {Config()}


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


def test_lowers_for_a_gpu_without_one():
    """As far as that goes: to the kernels' modules, not to machine code."""
    calls = [abstract(M=M, K=K, N=N, gelu=gelu) for M in ROWS for (K, N), gelu in LAYERS]
    assert not any(mosaic_gpu.unsupported(each, "gpu") for each in calls)
    calls = [calls[1], calls[2], calls[-2]]  # Each configuration.
    program = jax.jit(lambda calls: [mosaic_gpu.apply(each) for each in calls])
    text = program.trace(calls).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == len(calls)


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "gelu"), LAYERS, ids=str)
@pytest.mark.parametrize("M", [1608, 25728])
def test_real_shapes(M, shape, gelu):
    given = inputs((1608,), K=shape[0], N=shape[1])
    expected = exact(given, gelu)
    given["x"] = Rounded(*(jnp.tile(x, (M // 1608, *[1] * (x.ndim - 1))) for x in given["x"]))
    run = jax.jit(mosaic_gpu.apply)
    y = run(call(given, gelu))
    for frame in np.split(np.float32(y), M // 1608):
        # The longer the sums, the more the tensor core's own rounding tells.
        assert off(frame, expected) < 1.5e-2
    assert all(bool((run(call(given, gelu)) == y).all()) for _ in range(30))
