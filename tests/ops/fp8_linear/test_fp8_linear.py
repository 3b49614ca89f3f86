"""The contract of the linear map in float8 against float64 numpy, which implementation takes a call, what is
refused.

M rows, K inputs, N outputs
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

from moss_jax.ops.dispatch import Unsupported
from moss_jax.ops.fp8_linear import IMPLEMENTATIONS, Arguments, choose, fp8_linear, mosaic_gpu
from moss_jax.ops.rounding import Rounded, round_rows

K, N = 768, 128

# Hopper's tensor core does not add up 8 bits in all of float32, and `xla` rounds before it adds the bias.
TOLERANCE = 8e-3

# The kernel by interpretation.
on_gpu = functools.partial(interpreted.kernel_on_gpu, mosaic_gpu)


def inputs(rows, *, K=K, N=N, bias=True):
    """The arguments of a call, for outputs of 0.01 to 10, by row."""
    rng = np.random.default_rng(0)

    def draw(shape):
        return rng.uniform(-448, 448, shape).astype(jnp.float8_e4m3fn)

    given = {
        "x": Rounded(draw((*rows, K)), np.float32(10.0 ** rng.integers(-2, 2, rows) / 250)),
        "kernel": draw((N, K)),
        "scale": np.float32(rng.uniform(0.5, 1.5, N) / (250 * K**0.5)),
        "bias": rng.standard_normal(N).astype(jnp.bfloat16) if bias else None,
    }
    return jax.tree.map(jnp.asarray, given)


def exact(given, gelu=False):
    given = jax.tree.map(np.float64, given)
    y = given["x"].numbers @ given["kernel"].T * given["scale"] * given["x"].scale[..., None]
    y = y if given["bias"] is None else y + given["bias"]
    return y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2 if gelu else y


def off(actual, expected):
    """As a share of all; rounding to bfloat16 makes 1.7e-3."""
    return np.linalg.norm(np.float64(actual) - expected) / np.linalg.norm(expected)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, platform):
    """Each by name; kernels for a GPU run interpreted on others."""
    with on_gpu() if request.param == "mosaic_gpu" and platform != "gpu" else contextlib.nullcontext():
        yield request.param


def test_is_the_map_and_what_follows(implementation):
    given = inputs((2, 68))
    y = fp8_linear(**given, gelu=True, out_dtype=jnp.bfloat16, implementation=implementation)
    assert (y.shape, y.dtype) == ((2, 68, N), jnp.bfloat16)
    assert off(y, exact(given, gelu=True)) < TOLERANCE


@pytest.mark.parametrize("name", ["xla", "reference"])
@pytest.mark.parametrize(
    ("rows", "bias", "gelu"), [((3,), False, True), ((2, 5, 1), True, True), ((), True, False)], ids=str
)
def test_plain_implementations(name, rows, bias, gelu):
    given = inputs(rows, K=64, N=24, bias=bias)
    y = fp8_linear(**given, gelu=gelu, out_dtype="float32", implementation=name)
    assert (y.shape, y.dtype) == ((*rows, 24), jnp.float32)
    assert off(y, exact(given, gelu)) < 1e-5


def test_rows_by_themselves(implementation):
    """A row of zeros gives zeros, and a row that is NaN tells in no other."""
    given = inputs((128,), bias=False)
    numbers, scale = given["x"]
    given["x"] = Rounded(numbers.at[1].set(0).at[2, 7].set(np.nan), scale)
    y = np.float32(fp8_linear(**given, out_dtype=jnp.bfloat16, implementation=implementation))
    assert not y[1].any()
    assert np.isnan(y[2]).all()
    assert off(y[3:], exact(given)[3:]) < TOLERANCE


def test_gradients_reach_what_was_rounded():
    given = inputs((3,), K=64, N=24)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 64)), jnp.float32)

    def loss(x, name):
        y = fp8_linear(**given | {"x": round_rows(x)}, out_dtype="float32", implementation=name)
        return y.sum()

    gradients = jax.jit(jax.grad(loss), static_argnums=1)
    gradient, expected = (gradients(x, name) for name in ("xla", "reference"))
    # They pass through 8 bits as the rows did.
    assert off(gradient, np.float64(expected)) < 0.05
    assert jnp.abs(expected).max() > 0


def abstract(*, M=1608, K=1280, N=1280, out_dtype="bfloat16", gelu=False):
    s = jax.ShapeDtypeStruct
    x = Rounded(s((M, K), jnp.float8_e4m3fn), s((M,), jnp.float32))
    kernel, scale, bias = s((N, K), jnp.float8_e4m3fn), s((N,), jnp.float32), s((N,), jnp.bfloat16)
    return Arguments(x, kernel, scale, bias, gelu=gelu, out_dtype=jnp.dtype(out_dtype))


@pytest.mark.parametrize(
    ("platform", "arguments", "expected"),
    [
        ("gpu", {}, "mosaic_gpu"),
        ("gpu", {"M": 128, "K": 5120}, "mosaic_gpu"),
        ("gpu", {"M": 25728, "N": 3840}, "mosaic_gpu"),
        ("gpu", {"M": 64}, "xla"),
        ("gpu", {"out_dtype": "float32"}, "xla"),
        ("cpu", {}, "xla"),
        ("tpu", {}, "xla"),
    ],
)
def test_the_first_of_the_platforms_order_that_can(platform, arguments, expected):
    assert choose(abstract(**arguments), platform=platform) == expected


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"M": 120}, "it takes 128 rows or more, in multiples of 8, not 120"),
        ({"M": 1601}, "it takes 128 rows or more, in multiples of 8, not 1601"),
        ({"N": 1344}, "N = 1344 is not a multiple of 128"),
        ({"K": 640}, "K = 640 is not a multiple of 128, 768 at least"),
        ({"K": 1344}, "K = 1344 is not a multiple of 128, 768 at least"),
        ({"out_dtype": "float32"}, "it gives bfloat16, not float32"),
    ],
)
def test_a_forced_name_that_cannot_fails_with_the_reason(arguments, reason):
    with pytest.raises(Unsupported, match=f"'mosaic_gpu' cannot be used: {reason}"):
        choose(abstract(**arguments), "mosaic_gpu", platform="gpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": ((24, 32), "float8_e4m3fn")}, "kernel [N, K] must share K; got (3, 64) and (24, 32)"),
        ({"kernel": ((1, 24, 64), "float8_e4m3fn")}, "must share K"),
        ({"kernel": ((24, 64), "int8")}, "are in float8_e4m3fn, not float8_e4m3fn and int8"),
        ({"scale": ((64,), "float32")}, "scale must be (24,); got (64,)"),
        ({"bias": ((1, 24), "float32")}, "bias must be (24,); got (1, 24)"),
    ],
)
def test_what_does_not_fit(changes, message):
    given = inputs((3,), K=64, N=24) | {name: jnp.zeros(*x) for name, x in changes.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        fp8_linear(**given, out_dtype=jnp.bfloat16)
    numbers, scale = inputs((3,), K=64, N=24)["x"]
    with pytest.raises(ValueError, match=re.escape("x.scale must be (3,); got (2,)")):
        fp8_linear(**inputs((3,), K=64, N=24) | {"x": Rounded(numbers, scale[:2])}, out_dtype=jnp.bfloat16)
