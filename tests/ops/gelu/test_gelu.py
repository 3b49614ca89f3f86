"""The exact gelu against float64 for every bfloat16 number, its gradients, which implementation takes a call.

N columns
"""

import contextlib
import functools
import math
import re

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moss_jax.ops.gelu import IMPLEMENTATIONS, Arguments, choose, gelu, mosaic_gpu

from moss_jax.ops.dispatch import Unsupported

N = 256
# In rows, so that every implementation takes them.
NUMBERS = np.arange(1 << 16, dtype=np.uint16).view(jnp.bfloat16).reshape(-1, N)


# The kernel by interpretation.
on_gpu = functools.partial(interpreted.kernel_on_gpu, mosaic_gpu, widen=lambda x: x.astype(jnp.float32))


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, platform):
    """Each by name; kernels for a GPU run interpreted on others."""
    with on_gpu() if request.param == "mosaic_gpu" and platform != "gpu" else contextlib.nullcontext():
        yield request.param


def normal(x: np.ndarray) -> np.ndarray:
    """Phi(x) in float64."""
    return np.vectorize(math.erfc, otypes=[np.float64])(-x / math.sqrt(2)) / 2


def draw(*shape, size=2.0, dtype="bfloat16", seed=0):
    return jnp.asarray(size * np.random.default_rng(seed).standard_normal(shape), dtype)


def close(result, expected):
    """Off by the last bit at most, and seldom by that."""
    result, expected = np.float32(result), np.float32(expected)
    # What is subnormal may be taken for zero.
    np.testing.assert_allclose(result, expected, rtol=2**-7, atol=1e-36)
    assert (result == expected).mean() > 0.95


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])
def test_every_bfloat16_number(implementation, jitted):
    def run(x):
        return gelu(x, implementation=implementation)

    result = (jax.jit(run) if jitted else run)(NUMBERS)
    assert result.dtype == jnp.bfloat16
    finite = np.isfinite(NUMBERS)
    result, x = np.float64(np.asarray(result)[finite]), np.float64(NUMBERS[finite])
    expected = x * normal(x)
    normals = np.abs(expected) > 2e-37  # below, Phi may be subnormal, which XLA may take for zero
    np.testing.assert_allclose(result[~normals], expected[~normals], rtol=0, atol=2e-37)
    result, expected, x = result[normals], expected[normals], x[normals]
    unit = np.spacing(np.abs(np.float32(expected))) * 2**16  # bfloat16 has 16 bits less
    errors = np.abs(result - expected) / unit  # half a unit of them is rounding
    assert errors[np.abs(x) <= 5].max() < 0.56
    assert errors.max() < 1.1


def test_what_is_not_finite(implementation):
    given = np.resize(np.float32([np.inf, np.nan, -0.0, 0.0, 3e38, -3e38]), (16, N))
    result = gelu(jnp.asarray(given, jnp.bfloat16), implementation=implementation)
    expected = jnp.asarray(np.resize(np.float32([np.inf, np.nan, 0, 0, 3e38, 0]), (16, N)), jnp.bfloat16)
    np.testing.assert_array_equal(np.float32(result), np.float32(expected))


@pytest.mark.parametrize("shape", [(16, N), (2, 3, 7, 2 * N), (37, 3 * N)], ids=str)
def test_adds_the_bias_first(implementation, shape):
    x, bias = draw(*shape), draw(shape[-1], seed=1)
    result = gelu(x, bias, implementation=implementation)
    assert (result.shape, result.dtype) == (shape, jnp.bfloat16)
    close(result, gelu(x + bias, implementation="reference"))


@pytest.mark.parametrize("name", ["xla", "reference"])
def test_float32_is_exact_too(name):
    x = np.linspace(-14, 14, 100_000, dtype=np.float32).reshape(-1, 10)
    bias = np.linspace(-1, 1, 10, dtype=np.float32)
    wide = np.float64(x + bias)
    result = gelu(x, bias, implementation=name)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, wide * normal(wide), rtol=3e-7, atol=2e-7)


def test_a_bias_of_another_dtype():
    """Is added in the wider one; the result is in that of x."""
    x, bias = draw(4, N), draw(N, dtype="float32")
    result = gelu(x, bias)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result, gelu((x + bias).astype(jnp.bfloat16)))


def slope(x: np.ndarray) -> np.ndarray:
    return normal(x) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("name", ["mosaic_gpu", "xla"])
def test_the_gradient_of_every_bfloat16_number(platform, name):
    x = jnp.where(np.isfinite(NUMBERS), NUMBERS, 0)
    with on_gpu() if name == "mosaic_gpu" and platform != "gpu" else contextlib.nullcontext():
        gradient = jax.grad(lambda x: gelu(x, implementation=name).sum())(x)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(gradient), slope(np.float64(x)), rtol=2**-8, atol=3e-4)


def test_gradients_reach_x_and_bias(implementation):
    x, bias, weights = draw(21, N), draw(N, seed=1), draw(21, N, seed=2)

    def loss(x, bias):
        return (gelu(x, bias, implementation=implementation) * weights).astype(jnp.float32).sum()

    dx, dbias = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, bias)
    assert (dx.dtype, dbias.dtype) == (jnp.bfloat16, jnp.bfloat16)
    expected = slope(np.float64(x + bias)) * np.float64(weights)
    np.testing.assert_allclose(np.float64(dx), expected, rtol=2**-6, atol=4e-3)
    np.testing.assert_allclose(np.float64(dbias), expected.sum(axis=0), rtol=2**-4, atol=0.2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gradients_forwards_and_backwards_are_the_slope_between_values(dtype):
    x = jnp.asarray(np.linspace(-6, 6, 97), dtype)
    tangent = jnp.asarray(np.random.default_rng(0).standard_normal(x.shape), dtype)
    value, forwards = jax.jvp(gelu, (x,), (tangent,))
    _, pull = jax.vjp(gelu, x)
    np.testing.assert_array_equal(value, gelu(x))
    np.testing.assert_allclose(np.float32(forwards), np.float32(pull(tangent)[0]), rtol=2e-6, atol=1e-10)
    wide, step = np.float64(x), 1e-5
    above, below = ((wide + d) * normal(wide + d) for d in (step, -step))
    expected = (above - below) / (2 * step) * np.float64(tangent)
    tolerance = {"rtol": 2**-7, "atol": 1e-3} if dtype == jnp.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(np.float64(forwards), expected, **tolerance)


@pytest.mark.parametrize("name", ["mosaic_gpu", "xla"])
def test_the_backward_pass_keeps_one_array_of_the_inputs_size(platform, name):
    x, bias = jnp.ones((16, N), jnp.bfloat16), jnp.ones(N, jnp.bfloat16)
    with on_gpu() if name == "mosaic_gpu" and platform != "gpu" else contextlib.nullcontext():
        _, pull = jax.vjp(jax.jit(lambda x, bias: gelu(x, bias, implementation=name)), x, bias)
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "size", 0) > 1]
    assert [(leaf.shape, leaf.dtype) for leaf in kept] == [((16, N), jnp.bfloat16)]


def abstract(*shape, dtype="bfloat16", bias="bfloat16"):
    shape = shape or (16, N)
    return Arguments(jax.ShapeDtypeStruct(shape, dtype), bias and jax.ShapeDtypeStruct(shape[-1:], bias))


@pytest.mark.parametrize(
    ("platform", "arguments", "expected"),
    [
        ("gpu", abstract(), "mosaic_gpu"),
        ("gpu", abstract(2, 804, 5120, bias=None), "mosaic_gpu"),
        ("gpu", abstract(dtype="float32"), "xla"),
        ("gpu", abstract(1, N), "xla"),
        ("cpu", abstract(), "xla"),
        ("tpu", abstract(), "xla"),
    ],
)
def test_the_first_of_the_platforms_order_that_can(platform, arguments, expected):
    assert choose(arguments, platform=platform) == expected


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (abstract(dtype="float32"), "it takes bfloat16, not float32"),
        (abstract(bias="float32"), "it takes bfloat16, not float32"),
        (abstract(16, 384), "N = 384 is not a multiple of 256"),
        (abstract(3, 5, N), "it takes 16 rows or more, not 15"),
    ],
)
def test_a_forced_name_that_cannot_fails_with_the_reason(arguments, reason):
    with pytest.raises(Unsupported, match=f"'mosaic_gpu' cannot be used: {reason}"):
        choose(arguments, "mosaic_gpu", platform="gpu")


def test_a_bias_that_does_not_fit():
    with pytest.raises(ValueError, match=re.escape("bias is one number a column, [N] = (256,); got (128,)")):
        gelu(draw(4, N), draw(128))
