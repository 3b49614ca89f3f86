"""The kernels for Hopper beyond the contract: how the weights are cut, what a GPU is given, real shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moss_jax.ops.linear.arguments import QUANTIZED
from ops.linear.test_linear import abstract, close, exact, inputs, on_gpu

from moss_jax.ops.linear import Arguments, mosaic_gpu
from moss_jax.ops.linear.mosaic_gpu import LinearConfig

SHAPES = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256))


@pytest.mark.parametrize("stored", QUANTIZED)
@pytest.mark.parametrize(
    "config",
    [
        LinearConfig(part=256, stages=3, blocks=4),
        LinearConfig(block_k=64, part=512, stages=2, blocks=1),
        LinearConfig(block_k=256, part=256, stages=1, blocks=100),
    ],
    ids=["2 parts, 2 blocks each", "1 thread block", "a tile a thread block"],
)
def test_cut_in_many_ways(config, stored):
    """Blocks that end early too, and fewer rooms for tiles than tiles."""
    given = inputs((5, 512), stored)
    with on_gpu():
        out = mosaic_gpu.few_rows(Arguments(*given, out_dtype=jnp.dtype("float32")), config)
    close(out, exact(*given), 1e-5)


def test_how_the_weights_are_cut():
    config = LinearConfig(block_k=128, part=1024, blocks=264)
    assert [config.splits(K) for K in (128, 1024, 4096, 14336, 128 * 37)] == [1, 1, 4, 14, 37]
    assert [config.tiles_a_block(*shape) for shape in SHAPES] == [2, 1, 7, 4, 31]


def test_configurations_are_checked():
    with pytest.raises(ValueError, match="block_k is a multiple of 64, not 96"):
        LinearConfig(block_k=96)
    with pytest.raises(ValueError, match="part is at least block_k, 128, not 64"):
        LinearConfig(part=64)
    with pytest.raises(ValueError, match="stages and blocks are at least 1, not 0 and 264"):
        LinearConfig(stages=0)
    with pytest.raises(ValueError, match="K = 384 is not a multiple of block_k, 256"):
        mosaic_gpu.few_rows(Arguments(*inputs((1, 384), "int8"), out_dtype="bfloat16"), LinearConfig(256))


@pytest.mark.parametrize("stored", QUANTIZED)
@pytest.mark.parametrize("rows", [1, 64])
def test_lowers_for_a_gpu_without_one(rows, stored):
    """As far as that goes: to the kernels' modules, not to machine code."""
    calls = [abstract(stored, rows=rows, inputs=K, outputs=N) for K, N in SHAPES]
    assert not any(mosaic_gpu.unsupported(call, "gpu") for call in calls)
    program = jax.jit(lambda calls: [mosaic_gpu.apply(call) for call in calls])
    text = program.trace(calls).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == len(SHAPES)


@pytest.mark.gpu
@pytest.mark.parametrize("stored", QUANTIZED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_real_shapes(shape, stored):
    K, N = shape
    x, kernel, scale = inputs((64, K), stored, outputs=N)
    # Every 61st output, the last one among them: it falls on every position in a tile.
    some = np.arange(N - 1, 0, -61)
    for rows in (1, 5, 64):
        call = Arguments(x[:rows], kernel, scale, out_dtype=jnp.dtype("float32"))
        out = jax.jit(mosaic_gpu.apply)(call)
        close(out[:, some], exact(x[:rows], kernel[some], scale[some]), 3e-5, f"{stored}, {rows} rows")
