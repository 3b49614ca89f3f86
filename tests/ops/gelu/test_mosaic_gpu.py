"""The kernel for Hopper beyond the contract: how the numbers are cut, what a GPU is given, real shapes."""

import jax
import jax.numpy as jnp
import pytest
from moss_jax.ops.gelu import Arguments, gelu, mosaic_gpu
from moss_jax.ops.gelu.mosaic_gpu import GeluConfig
from ops.gelu.test_gelu import N, abstract, close, draw, on_gpu

# One frame and sixteen.
SHAPES = ((1, 1608, 5120), (16, 1608, 5120))


@pytest.mark.parametrize("rows", [4, 8, 32])
@pytest.mark.parametrize("bias", [True, False])
def test_cut_in_many_ways(rows, bias):
    """The last block overlaps with another, or there is one block alone."""
    a = Arguments(draw(33, N), draw(N, seed=1) if bias else None)
    with on_gpu():
        out = mosaic_gpu.biased_gelu(a, GeluConfig(rows=rows))
    close(out, gelu(a.x, a.bias, implementation="reference"))


def test_configurations_are_checked():
    with pytest.raises(ValueError, match="rows is a multiple of 4, not 6"):
        GeluConfig(rows=6)
    with pytest.raises(ValueError, match="15 rows are fewer than a block's 16"):
        mosaic_gpu.biased_gelu(Arguments(draw(15, N)), GeluConfig(rows=16))


@pytest.mark.parametrize("bias", ["bfloat16", None])
def test_lowers_for_a_gpu_without_one(bias):
    """As far as that goes: to the kernel's module, not to machine code."""
    calls = [abstract(*shape, bias=bias) for shape in SHAPES]
    assert not any(mosaic_gpu.unsupported(call, "gpu") for call in calls)
    program = jax.jit(lambda calls: [mosaic_gpu.apply(call) for call in calls])
    text = program.trace(calls).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == len(SHAPES)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_real_shapes(shape):
    frames, *frame = shape
    x, bias = jnp.tile(draw(1, *frame), (frames, 1, 1)), draw(shape[-1], seed=1)
    out = jax.jit(lambda x, bias: gelu(x, bias, implementation="mosaic_gpu"))(x, bias)
    assert (out == out[:1]).all()
    close(out[0], gelu(x[0], bias, implementation="reference"))
