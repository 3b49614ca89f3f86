"""The contract of the linear map against float64 numpy, which implementation takes a call, what is refused.

M rows, K inputs, N outputs
"""

import contextlib
import functools
import re

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moss_jax.ops.linear.arguments import QUANTIZED

from moss_jax.ops.dispatch import Unsupported
from moss_jax.ops.linear import IMPLEMENTATIONS, Arguments, choose, linear, mosaic_gpu

K, N = 256, 128


# The kernel by interpretation.
on_gpu = functools.partial(interpreted.kernel_on_gpu, mosaic_gpu)


def inputs(shape, stored, *, outputs=N, size=1.0, dtype="bfloat16"):
    """x, the kernel and its scale."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(size * rng.standard_normal(shape), dtype)
    kernel = rng.integers(0, 256, (outputs, shape[-1]), np.uint8)
    if stored == "float8_e4m3fn":
        kernel[kernel % 128 == 127] = 0  # NaN.
    return x, jnp.asarray(kernel.view(stored)), jnp.asarray(rng.uniform(0.001, 0.1, outputs), jnp.float32)


def exact(x, kernel, scale):
    x, kernel = (np.float64(y.astype(jnp.float32)) for y in (x, kernel))
    return x @ kernel.T * np.float64(scale)


def close(actual, expected, tolerance, what=""):
    """The largest error is small beside the largest number."""
    error = np.abs(np.float64(actual) - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"{what}: off by {error:.2e}"


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, platform):
    """Each by name; kernels for a GPU run interpreted on others."""
    with on_gpu() if request.param == "mosaic_gpu" and platform != "gpu" else contextlib.nullcontext():
        yield request.param


@pytest.mark.parametrize("stored", QUANTIZED)
@pytest.mark.parametrize("shape", [(1, K), (2, K), (5, K), (2, 8, K), (64, K), (K,)], ids=str)
def test_is_the_product(implementation, stored, shape):
    given = inputs(shape, stored)
    out = linear(*given, implementation=implementation, out_dtype=jnp.float32)
    assert out.shape == (*shape[:-1], N)
    assert out.dtype == jnp.float32
    close(out, exact(*given), 1e-5)


@pytest.mark.parametrize("stored", QUANTIZED)
@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_large_and_small_inputs(implementation, stored, size):
    given = inputs((3, K), stored, size=size)
    out = linear(*given, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    close(out, exact(*given), 4e-3)


@pytest.mark.parametrize("stored", QUANTIZED)
def test_zeros_and_rows_by_themselves(implementation, stored):
    """A row of zeros gives zeros, and a row that is NaN tells in no other."""
    x, kernel, scale = inputs((3, K), stored)
    x = x.at[1].set(0).at[2, 7].set(np.nan)
    out = np.float64(linear(x, kernel, scale, implementation=implementation))
    close(out[0], exact(x[0], kernel, scale), 4e-3)
    assert not out[1].any()
    assert np.isnan(out[2]).all()


@pytest.mark.parametrize("stored", QUANTIZED)
def test_gradients_reach_x(stored):
    x, kernel, scale = inputs((3, K), stored, dtype="float32")
    gradient = jax.grad(lambda x: linear(x, kernel, scale, implementation="xla").sum())(x)
    close(gradient[0], np.float64(kernel.astype(jnp.float32)).T @ np.float64(scale), 1e-5)


def abstract(stored="int8", *, rows=1, inputs=K, outputs=N, dtype="bfloat16"):
    return Arguments(
        jax.ShapeDtypeStruct((rows, inputs), dtype),
        jax.ShapeDtypeStruct((outputs, inputs), stored),
        jax.ShapeDtypeStruct((outputs,), jnp.float32),
        out_dtype=jnp.dtype(dtype),
    )


@pytest.mark.parametrize(
    ("platform", "arguments", "expected"),
    [
        ("gpu", {}, "mosaic_gpu"),
        ("gpu", {"stored": "float8_e4m3fn", "rows": 64}, "mosaic_gpu"),
        ("gpu", {"rows": 65}, "xla"),
        ("gpu", {"rows": 0}, "xla"),
        ("gpu", {"dtype": "float32"}, "xla"),
        ("cpu", {}, "xla"),
        ("tpu", {}, "xla"),
    ],
)
def test_the_first_of_the_platforms_order_that_can(platform, arguments, expected):
    assert choose(abstract(**arguments), platform=platform) == expected


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"rows": 65}, "it takes 1 to 64 rows, not 65"),
        ({"inputs": 192}, "K = 192 is not a multiple of 128"),
        ({"outputs": 96}, "N = 96 is not a multiple of 64"),
        ({"dtype": "float16"}, "it takes x in bfloat16, not float16"),
    ],
)
def test_a_forced_name_that_cannot_fails_with_the_reason(arguments, reason):
    with pytest.raises(Unsupported, match=f"'mosaic_gpu' cannot be used: {reason}"):
        choose(abstract(**arguments), "mosaic_gpu", platform="gpu")


@pytest.mark.parametrize(
    ("shapes", "stored", "message"),
    [
        ({"kernel": (N, 128)}, "int8", "kernel [N, K] must share K; got (2, 256) and (128, 128)"),
        ({"kernel": (1, N, K)}, "int8", "must share K"),
        ({"scale": (K,)}, "int8", "scale is one number an output, [N] = (128,); got (256,)"),
        ({}, "bfloat16", "kernel is in int8 or float8_e4m3fn, not bfloat16"),
    ],
)
def test_what_does_not_fit(shapes, stored, message):
    shapes = {"x": (2, K), "kernel": (N, K), "scale": (N,)} | shapes
    dtypes = {"x": "bfloat16", "kernel": stored, "scale": "float32"}
    x, kernel, scale = (jnp.zeros(shapes[name], dtypes[name]) for name in shapes)
    with pytest.raises(ValueError, match=re.escape(message)):
        linear(x, kernel, scale)
