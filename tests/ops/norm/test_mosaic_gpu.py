"""The kernel for Hopper beyond the contract: how rows are dealt, what a GPU is given, real shapes."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.norm.test_norm import (
    EIGHT_BITS,
    EPS,
    KINDS,
    TOLERANCE,
    abstract,
    call,
    check_rows_in_8_bits,
    close,
    exact,
    inputs,
    on_gpu,
)

from moss_jax.ops.norm import Arguments, mosaic_gpu

# Shapes of the decoder and of the vision encoder, one of few rows among them.
ENCODER = ((1608, 1280), (16 * 1608, 1280))
SHAPES = ((1, 4096), (3, 4096), (64, 4096), (2, 1280), (1608, 1280), (1609, 1280))


@pytest.mark.parametrize(("norm", "scale"), KINDS)
@pytest.mark.parametrize(
    ("rows", "width", "warps"),
    [(4, 256, 1), (6, 768, 1), (9, 256, 4), (2, 1280, 4), (1, 4096, 4)],
    ids=["whole block", "last block moves back", "4 warps a row", "runs of 4 bytes", "runs of 16 bytes"],
)
def test_dealt_in_many_ways(rows, width, warps, norm, scale):
    x, given = inputs((rows, width), norm=norm, scale=scale)
    arguments = Arguments(x, **{"bias": None} | given, eps=EPS)
    with on_gpu():
        results = mosaic_gpu.one_pass(arguments.flat(), warps)
    for result, expected in zip(results, exact(x, given), strict=True):
        close(result, expected, TOLERANCE["bfloat16"])


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("rows", [8, 12, 21, 26])
def test_without_a_sum_a_warp_has_many_rows(rows, norm):
    """Each as many, or some one more; the last ones move back."""
    x, given = inputs((rows, 256), norm=norm, add=False)
    arguments = Arguments(x, **{"add": None, "scale": None, "bias": None} | given, eps=EPS)
    with on_gpu(), mock.patch.object(mosaic_gpu, "RESIDENT", 2):
        normed, same = mosaic_gpu.one_pass.__wrapped__(arguments.flat(), 1)
    close(normed, exact(x, given)[0], TOLERANCE["bfloat16"])
    np.testing.assert_array_equal(same, x)


def test_a_warp_a_row_if_there_are_enough():
    shapes = ((1, 4096), (64, 4096), (3, 1280), (4, 1280), (1608, 1280), (9, 2304))
    assert [mosaic_gpu.default_warps(abstract(shape)) for shape in shapes] == [4, 4, 4, 1, 1, 4]
    x, given = inputs((3, 256))
    with pytest.raises(ValueError, match="1 warp a row, if there are 4 rows, or 4; not 1 for 3"):
        mosaic_gpu.one_pass(Arguments(x, bias=None, **given, eps=EPS).flat(), 1)


@pytest.mark.parametrize(("norm", "scale"), KINDS)
def test_lowers_for_a_gpu_without_one(norm, scale):
    """As far as that goes: to the kernels' modules, not to machine code."""
    shapes = (*SHAPES, (16 * 1608, 1280), (4, 256), (1, 8192))
    calls = []
    for rows, width in shapes:
        _, given = inputs((1, 256), norm=norm, scale=scale)
        x, vector = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((rows, width), (width,)))
        each = {None: None, "rows": jax.ShapeDtypeStruct((rows, 1), jnp.bfloat16)}.get(scale, given["scale"])
        calls.append(Arguments(x, x, each, vector, vector if norm == "layer" else None, eps=EPS))
    calls += [dataclasses.replace(each, out_dtype=EIGHT_BITS) for each in calls if each.x.shape in ENCODER]
    assert not any(mosaic_gpu.unsupported(each, "gpu") for each in calls)
    program = jax.jit(lambda calls: [mosaic_gpu.apply(each) for each in calls])
    text = program.trace(calls).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == len(calls)


def test_lowers_under_remat():
    """With the gradients: the first layer forward, then both again; nobody asks for the loss itself."""

    @jax.checkpoint
    def layer(x, arguments):
        normed, y = mosaic_gpu.apply(dataclasses.replace(arguments, x=x))
        return jnp.sin(normed) + y

    def loss(x, arguments):
        return layer(layer(x, arguments), arguments).astype(jnp.float32).sum()

    given = abstract((2, 64, 4096))
    program = jax.jit(jax.grad(loss, (0, 1))).trace(given.x, given)
    assert program.lower(lowering_platforms=("cuda",)).as_text().count("call @one_pass") == 3


@pytest.mark.gpu
@pytest.mark.parametrize(("norm", "scale"), KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 1608, 1280), (5, 256), (1, 8192)], ids=str)
def test_real_shapes(shape, norm, scale):
    x, given = inputs(shape, norm=norm, scale=scale)
    results = jax.jit(lambda x, given: call(x, given, implementation="mosaic_gpu"))(x, given)
    for result, expected in zip(results, exact(x, given), strict=True):
        close(result, expected, TOLERANCE["bfloat16"])
    normed, y = call(x, {**given, "add": None, "scale": None}, implementation="mosaic_gpu")
    close(normed, exact(x, {**given, "add": None, "scale": None})[0], TOLERANCE["bfloat16"])
    np.testing.assert_array_equal(y, x)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*ENCODER, (3, 4096)], ids=str)
def test_rows_in_8_bits_of_real_shapes(shape):
    x, given = inputs(shape, norm="layer", scale="scalar")
    check_rows_in_8_bits(x, given, implementation="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("rows", [2112, 2113, 16 * 1608])
def test_many_rows_without_a_sum(rows, norm):
    x, given = inputs((rows, 1280), norm=norm, add=False)
    for _ in range(3):
        normed, _ = call(x, given, implementation="mosaic_gpu")
        close(normed, exact(x, given)[0], TOLERANCE["bfloat16"])
    if norm == "layer":
        check_rows_in_8_bits(x, given, implementation="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("warps", [1, 4])
def test_many_wide_rows(warps):
    x, given = inputs((4096, 4096))
    arguments = Arguments(x, bias=None, **given, eps=EPS)
    for result, expected in zip(mosaic_gpu.one_pass(arguments, warps), exact(x, given), strict=True):
        close(result, expected, TOLERANCE["bfloat16"])
