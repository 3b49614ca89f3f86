"""The kernel for Hopper beyond the contract: how the weights are dealt, what a GPU is given, real shapes."""

import dataclasses

import jax
import numpy as np
import pytest
from moss_jax.ops.linear.arguments import QUANTIZED
from moss_jax.ops.norm_linear import mosaic_gpu
from moss_jax.ops.norm_linear.mosaic_gpu import Config, default_config
from ops.norm_linear.test_norm_linear import abstract, close, make_arguments, on_gpu

K = 4096
OUTPUTS = (6144, 4096)  # The 11B's queries, keys and values, and its queries alone.


@pytest.mark.parametrize(
    ("rows", "stored", "K", "config"),
    [
        (1, "int8", 2048, Config(1, each=2, block_k=128, stages=3)),
        (8, "float8_e4m3fn", 1024, Config(2, each=2, block_k=256, stages=2)),
        (2, "int8", 4096, Config(1, each=1, block_k=128, stages=9)),
    ],
    ids=["fewer slots than tiles of a unit", "blocks that end early", "tiles in a loop"],
)
def test_dealt_in_many_ways(rows, stored, K, config):
    a = make_arguments(rows, stored, K=K, N=80)
    with on_gpu():
        close(mosaic_gpu.few_rows(a, config), a)


@pytest.mark.parametrize(
    ("rows", "config"),
    [
        (1, Config(132, 3, 256, 4)),
        (2, Config(132, 3, 256, 3)),
        (4, Config(132, 3, 256, 2)),
        (5, Config(132, 2, 128, 8)),
        (8, Config(132, 2, 128, 5)),
    ],
)
def test_the_default_fills_shared_memory(rows, config):
    assert default_config(abstract(rows=rows, K=K)) == config


def test_inputs_that_small_tiles_alone_divide():
    assert default_config(abstract(K=512)).block_k == 128


def test_configurations_are_checked():
    a = make_arguments(1, K=2048)

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            mosaic_gpu.few_rows(a, dataclasses.replace(default_config(a), **changes))

    refused("K = 2048 does not fall into quarters of tiles of 384", block_k=384)
    refused("as one of 3 it has 76672", stages=9)


@pytest.mark.parametrize("stored", QUANTIZED)
@pytest.mark.parametrize("rows", [1, 8])
def test_lowers_for_a_gpu_without_one(rows, stored):
    """As far as that goes: to the kernels' modules, not to machine code."""
    calls = [abstract(rows=rows, stored=stored, K=K, N=N) for N in OUTPUTS]
    assert not any(mosaic_gpu.unsupported(call, "gpu") for call in calls)
    program = jax.jit(lambda calls: [mosaic_gpu.apply(call) for call in calls])
    text = program.trace(calls).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == len(OUTPUTS)


@pytest.mark.gpu
@pytest.mark.parametrize("stored", QUANTIZED)
@pytest.mark.parametrize("N", [*OUTPUTS, 16384], ids=str)
def test_real_shapes(N, stored):
    """And one of which every block has several units. Always the same, bit for bit."""
    most = make_arguments(8, stored, K=K, N=N)
    run = jax.jit(mosaic_gpu.apply)
    for rows in (1, 2, 3, 8):
        a = dataclasses.replace(most, x=most.x[-rows:])
        out = run(a)
        close(out, a)
        for _ in range(50):
            np.testing.assert_array_equal(run(a), out)
