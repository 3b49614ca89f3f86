"""The exact gelu: against float64 for every bfloat16 number, its gradient too."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.nn.activations import gelu

NUMBERS = np.arange(1 << 16, dtype=np.uint16).view(jnp.bfloat16)


def normal(x: np.ndarray) -> np.ndarray:
    """Phi(x) in float64."""
    return np.vectorize(math.erfc, otypes=[np.float64])(-x / math.sqrt(2)) / 2


@pytest.mark.parametrize("run", [gelu, jax.jit(gelu)], ids=["eager", "jitted"])
def test_every_bfloat16_number(run):
    x = NUMBERS[np.isfinite(NUMBERS)]
    result = run(x)
    assert result.dtype == jnp.bfloat16
    result, x = np.float64(result), np.float64(x)
    expected = x * normal(x)
    normals = np.abs(expected) > 2e-37  # below, Phi may be subnormal, which XLA may take for zero
    np.testing.assert_allclose(result[~normals], expected[~normals], rtol=0, atol=2e-37)
    result, expected, x = result[normals], expected[normals], x[normals]
    unit = np.spacing(np.abs(np.float32(expected))) * 2**16  # bfloat16 has 16 bits less
    errors = np.abs(result - expected) / unit  # half a unit of them is rounding
    assert errors[np.abs(x) <= 5].max() < 0.56
    assert errors.max() < 1.1


def test_what_is_not_finite():
    result = np.float32(gelu(jnp.asarray([np.inf, np.nan, -0.0, 0.0, 3e38, -3e38], jnp.bfloat16)))
    np.testing.assert_array_equal(
        result, np.float32(jnp.asarray([np.inf, np.nan, 0, 0, 3e38, 0], jnp.bfloat16))
    )


def test_float32_is_exact_too():
    x = np.linspace(-14, 14, 100_001, dtype=np.float32)
    expected = np.float64(x) * normal(np.float64(x))
    np.testing.assert_allclose(gelu(x), expected, rtol=3e-7, atol=2e-7)


def slope(x: np.ndarray) -> np.ndarray:
    return normal(x) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def test_the_gradient_of_every_bfloat16_number():
    x = jnp.asarray(NUMBERS[np.isfinite(NUMBERS)])
    gradient = jax.grad(lambda x: gelu(x).sum())(x)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(gradient), slope(np.float64(x)), rtol=2**-8, atol=3e-4)


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


def test_the_backward_pass_keeps_one_array_of_the_inputs_size():
    _, pull = jax.vjp(jax.jit(gelu), jnp.ones((4, 8), jnp.bfloat16))
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "size", 0) > 1]
    assert [(leaf.shape, leaf.dtype) for leaf in kept] == [((4, 8), jnp.bfloat16)]
