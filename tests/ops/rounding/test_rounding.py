"""Rows in 8 bits: their scales, what is rounded how, zeros and what is not finite; what the kernel takes.

M rows, K columns
"""

import contextlib
import functools
import re

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.ops.dispatch import Unsupported
from moss_jax.ops.rounding import IMPLEMENTATIONS, choose, mosaic_gpu, round_rows

K = 512


# The kernel by interpretation.
on_gpu = functools.partial(interpreted.kernel_on_gpu, mosaic_gpu, widen=lambda x: x.astype(jnp.float32))


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, platform):
    """Each by name; kernels for a GPU run interpreted on others."""
    with on_gpu() if request.param == "mosaic_gpu" and platform != "gpu" else contextlib.nullcontext():
        yield request.param


def draw(M, K=K, size=1.0):
    return jnp.asarray(size * np.random.default_rng(0).standard_normal((M, K)), jnp.bfloat16)


def off(x, rounded, scale):
    """How far each number is from its own, in units of half a step of the rounding."""
    x, scale = np.float64(x), np.float64(scale)[:, None]
    inner = np.maximum(np.abs(x / scale), 2.0**-6)  # Below, steps are as long as here.
    half_step = 2.0 ** np.floor(np.log2(inner)) / 16
    return np.abs(np.float64(rounded.astype(jnp.float32)) - x / scale) / half_step


@pytest.mark.parametrize(("M", "size"), [(4, 1.0), (11, 1e4), (5, 1e-4)])
def test_the_nearest_number_by_the_scale_of_the_row(implementation, M, size):
    x = draw(M, size=size)
    x *= 10.0 ** jnp.arange(M, dtype=x.dtype)[:, None]
    rounded, scale = jax.jit(lambda x: round_rows(x, implementation=implementation))(x)
    assert (rounded.shape, rounded.dtype) == (x.shape, jnp.float8_e4m3fn)
    assert (scale.shape, scale.dtype) == ((M,), jnp.float32)
    np.testing.assert_allclose(scale, np.abs(np.float32(x)).max(axis=1) / 448, rtol=1e-6)
    # Not all round alike what lies halfway.
    assert off(x, rounded, scale).max() <= 1 + 1e-4
    np.testing.assert_array_equal(np.abs(np.float32(rounded)).max(axis=1), 448)


def test_every_number_near_where_steps_change(implementation):
    """The numbers of a row cover what float8 has, from below its smallest up."""
    numbers = jnp.asarray(np.concatenate([2.0 ** np.linspace(-14, 8.8, K - 2), [0, 448]]), jnp.bfloat16)
    x = jnp.stack([numbers, -numbers] * 2)
    rounded, scale = round_rows(x, implementation=implementation)
    np.testing.assert_allclose(scale, 1, rtol=1e-6)
    assert off(x, rounded, scale).max() <= 1 + 1e-4


def test_zeros_and_what_is_not_finite(implementation):
    """Zeros stay zeros, and what is not finite in a row makes NaN there, and in no other row."""
    x = draw(6).at[1].set(0).at[2, 7].set(np.nan).at[3, 9].set(-np.inf).at[5, 0].set(1e-38)
    rounded, scale = round_rows(x, implementation=implementation)
    with np.errstate(invalid="ignore"):
        back = np.float32(rounded) * np.float32(scale)[:, None]
    assert not back[1].any()
    assert np.isnan(back[2, 7])
    assert np.isnan(back[3]).any()
    for row in (0, 4, 5):
        np.testing.assert_allclose(back[row], np.float32(x[row]), rtol=0, atol=0.16)


def test_gradients_are_xlas(implementation):
    x = draw(5)

    def loss(x, name):
        rounded, scale = round_rows(x, implementation=name)
        return (rounded.astype(jnp.float32) * scale[:, None]).sum()

    gradient = jax.grad(loss)(x, implementation)
    assert np.isfinite(np.float32(gradient)).all()
    np.testing.assert_array_equal(gradient, jax.grad(loss)(x, "xla"))


def abstract(M=8, K=K, dtype="bfloat16"):
    return jax.ShapeDtypeStruct((M, K), dtype)


def test_which_implementation_takes_it():
    assert choose(abstract(), platform="gpu") == "mosaic_gpu"
    assert choose(abstract(K=100), platform="gpu") == "xla"
    assert choose(abstract(), platform="cpu") == "xla"
    assert choose(abstract(), platform="tpu") == "xla"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"M": 3}, "it takes 4 rows or more, not 3"),
        ({"K": 384}, "K = 384 is not a multiple of 256 up to 6144"),
        ({"K": 8192}, "K = 8192 is not a multiple of 256 up to 6144"),
        ({"dtype": "float32"}, "it takes bfloat16, not float32"),
    ],
)
def test_a_forced_name_that_cannot_fails_with_the_reason(arguments, reason):
    with pytest.raises(Unsupported, match=re.escape(f"'mosaic_gpu' cannot be used: {reason}")):
        choose(abstract(**arguments), "mosaic_gpu", platform="gpu")


# Rows of a frame and of sixteen, the width of the vision encoder and of its MLP.
SHAPES = ((1608, 1280), (1608, 5120), (25728, 1280), (25728, 5120))


def test_lowers_for_a_gpu_without_one():
    """As far as that goes: to the kernel's module, not to machine code."""
    calls = [abstract(*shape) for shape in SHAPES]
    assert not any(mosaic_gpu.unsupported(call, "gpu") for call in calls)
    program = jax.jit(lambda calls: [mosaic_gpu.apply(call) for call in calls])
    text = program.trace(calls).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == len(SHAPES)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_real_shapes(shape):
    M, K = shape
    x = jnp.tile(draw(1608, K), (M // 1608, 1))
    (rounded, scale), (expected, expected_scale) = (
        jax.jit(lambda x, name=name: round_rows(x, implementation=name))(x) for name in ("mosaic_gpu", "xla")
    )
    np.testing.assert_allclose(scale, expected_scale, rtol=1e-6)
    # Not all round alike what lies halfway.
    rounded, expected = np.float32(rounded), np.float32(expected)
    np.testing.assert_allclose(rounded, expected, rtol=0.15, atol=2.0**-9)
    assert (rounded == expected).mean() > 0.99
