"""The contract of a norm and the linear map behind it, which implementation takes a call, what is refused.

M rows, K inputs, N outputs
"""

import contextlib
import dataclasses
import functools
import re

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moss_jax.ops.norm_linear import IMPLEMENTATIONS, Arguments, choose, mosaic_gpu, norm_linear

from moss_jax.ops.dispatch import Unsupported
from moss_jax.ops.linear import linear
from moss_jax.ops.norm import rms_norm

K, N = 512, 96
EPS = 1e-5


def scale(factor, scale_ref, cols):
    spread = jnp.repeat(scale_ref[...], cols)
    return factor * jnp.pad(spread, (0, factor.size - spread.size))


def finish(sums, sums_ref, factor, y_ref):
    cols, rows = sums_ref.shape[1], y_ref.shape[0]
    sums_ref[...] = sums[:, :cols]
    total = sums_ref[...].reshape(4, 16, cols).sum(axis=0) * factor[: 16 * cols].reshape(16, cols)
    y_ref[...] = total.T[:rows].astype(y_ref.dtype)


# The kernel by interpretation; `interpreted` says what else is replaced.
on_gpu = functools.partial(interpreted.kernel_on_gpu, mosaic_gpu, scale=scale, finish=finish)


def make_arguments(rows=1, stored="int8", *, K=K, N=N) -> Arguments:
    """Outputs are about as large as 1."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (N, K), np.uint8)
    if stored == "float8_e4m3fn":
        codes[codes % 128 == 127] = 0  # NaN.
    codes = codes.view(stored)
    scale = rng.uniform(0.5, 1.5, N) / (np.std(np.float32(codes[:8])) * np.sqrt(K))
    # Rows of different sizes, which the norm takes away.
    x = rng.standard_normal((rows, K)) * np.arange(1, rows + 1)[:, None]
    return Arguments(
        jnp.asarray(x, jnp.bfloat16),
        jnp.asarray(rng.uniform(0.5, 1.5, K), jnp.bfloat16),
        jnp.asarray(codes),
        jnp.asarray(scale, jnp.float32),
        eps=EPS,
    )


def call(a: Arguments, shape=None, **options):
    """By the public function, with rows of this shape."""
    x = a.x.reshape(*(shape or (a.x.shape[0],)), -1)
    return norm_linear(x, a.norm, a.weights, a.scale, eps=a.eps, **options)


def close(actual, a: Arguments, tolerance=8e-3):
    """To the reference, every row by itself."""
    assert actual.dtype == a.x.dtype
    expected = np.float64(jax.jit(IMPLEMENTATIONS["reference"].apply)(a))
    error = np.linalg.norm(np.float64(actual).reshape(expected.shape) - expected, axis=1)
    error /= np.linalg.norm(expected, axis=1)
    assert error.max() < tolerance, f"off by {error}"


@pytest.fixture(params=["mosaic_gpu", "xla"])
def implementation(request, platform):
    """Each by name; the kernel for a GPU runs interpreted on others."""
    with on_gpu() if request.param == "mosaic_gpu" and platform != "gpu" else contextlib.nullcontext():
        yield request.param


@pytest.mark.parametrize(("shape", "stored"), [((1, 1), "int8"), ((3,), "float8_e4m3fn")], ids=str)
def test_is_the_reference(implementation, shape, stored):
    a = make_arguments(np.prod(shape), stored)
    out = call(a, shape, implementation=implementation)
    assert out.shape == (*shape, N)
    close(out, a)


def test_the_definition():
    """In float64, of float32 rows."""
    a = make_arguments(2)
    a = dataclasses.replace(a, x=a.x.astype(jnp.float32))
    x, norm, weights = (np.float64(y.astype(jnp.float32)) for y in (a.x, a.norm, a.weights))
    normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPS) * norm
    for implementation in ("reference", "xla"):
        y = call(a, implementation=implementation)
        np.testing.assert_allclose(y, normed @ weights.T * np.float64(a.scale), rtol=1e-4, atol=1e-5)


def test_plain_is_the_norm_and_the_map():
    """Bit for bit."""
    a = make_arguments(9, "float8_e4m3fn")
    normed, _ = rms_norm(a.x, a.norm, eps=EPS)
    np.testing.assert_array_equal(call(a, (3, 3)), linear(normed, a.weights, a.scale).reshape(3, 3, N))


def test_gradients_reach_the_rows():
    a = make_arguments(2)
    a = dataclasses.replace(a, x=a.x.astype(jnp.float32), norm=a.norm.astype(jnp.float32))

    def total(implementation, x, norm):
        return (call(dataclasses.replace(a, x=x, norm=norm), implementation=implementation) ** 2).sum()

    xla, reference = (jax.grad(total, (1, 2))(name, a.x, a.norm) for name in ("xla", "reference"))
    for actual, expected in zip(xla, reference, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


def abstract(*, rows=1, K=K, N=N, stored="int8", dtype="bfloat16") -> Arguments:
    shape = jax.ShapeDtypeStruct
    x, norm = shape((rows, K), dtype), shape((K,), "bfloat16")
    return Arguments(x, norm, shape((N, K), stored), shape((N,), "float32"), eps=EPS)


@pytest.mark.parametrize(
    ("platform", "arguments", "expected"),
    [
        ("gpu", {}, "mosaic_gpu"),
        ("gpu", {"stored": "float8_e4m3fn", "rows": 8}, "mosaic_gpu"),
        ("gpu", {"rows": 9}, "xla"),
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
        ({"rows": 9}, "it takes 1 to 8 rows, not 9"),
        ({"rows": 0}, "it takes 1 to 8 rows, not 0"),
        ({"K": 256}, "K = 256 is not a multiple of 512"),
        ({"N": 72}, "N = 72 is not a multiple of 16"),
        ({"dtype": "float32"}, "it takes x in bfloat16, not float32"),
        ({"rows": 8, "K": 16384}, "shared memory has no room for 8 rows of 16384"),
    ],
)
def test_a_forced_name_that_cannot_fails_with_the_reason(arguments, reason):
    with pytest.raises(Unsupported, match=f"'mosaic_gpu' cannot be used: {reason}"):
        choose(abstract(**arguments), "mosaic_gpu", platform="gpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (N, 256)}, "x [..., K] and weights [N, K] must share K; got (2, 512) and (96, 256)"),
        ({"weights": (1, N, K)}, "must share K"),
        ({"norm": (N,)}, "with weights (96, 512), norm must be (512,); got (96,)"),
        ({"scale": (N, 1)}, "scale must be (96,); got (96, 1)"),
        ({"weights": "bfloat16"}, "weights are in int8 or float8_e4m3fn, not bfloat16"),
    ],
)
def test_what_does_not_fit(changes, message):
    a = abstract(rows=2)
    for name, change in changes.items():
        old = getattr(a, name)
        shape, dtype = (old.shape, change) if isinstance(change, str) else (change, old.dtype)
        changes = {name: jax.ShapeDtypeStruct(shape, dtype)}
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(a, **changes)
