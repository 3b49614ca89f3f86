"""The contract of the linear map and what follows it against float64 numpy, its gradients, which
implementation takes a call, what is refused.

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
from moss_jax.ops.fused_linear import IMPLEMENTATIONS, Arguments, choose, fused_linear, mosaic_gpu, xla
from moss_jax.ops.gelu import gelu as gelu_op

from moss_jax.ops.dispatch import Unsupported

K, N = 768, 128
BFLOAT16, FLOAT8 = jnp.dtype("bfloat16"), jnp.dtype("float8_e4m3fn")

# Hopper's tensor core does not add up 8 bits in all of float32, and `xla` rounds before it adds the bias. For
# results in 8 bits rounding alone makes 0.026.
TOLERANCE = {BFLOAT16: 8e-3, FLOAT8: 0.035}

# The kernel by interpretation.
on_gpu = functools.partial(interpreted.kernel_on_gpu, mosaic_gpu)


def inputs(rows, *, K=K, N=N, dtype=FLOAT8, bias=True, out_scale=None, residual=None):
    """The arguments of a call, for outputs of 0.01 to 10, by row; `residual` is the dtype of one."""
    rng = np.random.default_rng(0)
    size = 10.0 ** rng.integers(-2, 2, (*rows, 1))
    vector = rng.standard_normal(N).astype(BFLOAT16) if bias else None
    rest = {"bias": vector, "out_scale": None if out_scale is None else np.float32([out_scale])}
    if residual is not None:
        stream = np.random.default_rng(1).standard_normal((*rows, N))
        rest["residual"] = stream.astype(residual)
    if dtype != FLOAT8:
        x, kernel = rng.standard_normal((*rows, K)) * size, rng.standard_normal((K, N)) / K**0.5
        return jax.tree.map(jnp.asarray, {"x": x.astype(dtype), "kernel": kernel.astype(dtype)} | rest)

    def draw(shape):
        return rng.uniform(-448, 448, shape)

    given = {
        "x": (draw((*rows, K)) * size / 10).astype(FLOAT8),
        "kernel": draw((N, K)).astype(FLOAT8),
        "scale": np.float32(rng.uniform(0.5, 1.5, N) / (25 * 250 * K**0.5)),
    }
    return jax.tree.map(jnp.asarray, given | rest)


def exact(given, gelu=False):
    given = jax.tree.map(np.float64, given)
    wide = given.get("scale") is None
    y = given["x"] @ given["kernel"] if wide else given["x"] @ given["kernel"].T * given["scale"]
    y = y if given["bias"] is None else y + given["bias"]
    y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2 if gelu else y
    y = y if given["out_scale"] is None else y * given["out_scale"]
    return y + given.get("residual", 0)


def off(actual, expected):
    """As a share of all; rounding to bfloat16 makes 1.7e-3."""
    return np.linalg.norm(np.float64(actual) - expected) / np.linalg.norm(expected)


@contextlib.contextmanager
def able(name, platform):
    """Kernels for a GPU run interpreted on others."""
    with on_gpu() if name == "mosaic_gpu" and platform != "gpu" else contextlib.nullcontext():
        yield name


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, platform):
    """Each by name."""
    with able(request.param, platform) as name:
        yield name


@pytest.mark.parametrize("out_dtype", [BFLOAT16, FLOAT8], ids=str)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT8], ids=str)
def test_is_the_map_and_what_follows(implementation, dtype, out_dtype):
    given = inputs((2, 68), dtype=dtype, out_scale=8 if out_dtype == FLOAT8 else None)
    y = fused_linear(**given, gelu=True, out_dtype=out_dtype, implementation=implementation)
    assert (y.shape, y.dtype) == ((2, 68, N), out_dtype)
    assert off(y, exact(given, gelu=True)) < TOLERANCE[out_dtype]


@pytest.mark.parametrize("out_dtype", [BFLOAT16, FLOAT8], ids=str)
def test_in_8_bits_without_a_gelu(implementation, out_dtype):
    given = inputs((136,), bias=False)
    y = fused_linear(**given, out_dtype=out_dtype, implementation=implementation)
    assert off(y, exact(given)) < TOLERANCE[out_dtype]


@pytest.mark.parametrize("out_scale", [None, 0.25])
def test_adds_a_residual(implementation, out_scale):
    given = inputs((2, 68), out_scale=out_scale, residual=BFLOAT16)
    y = fused_linear(**given, out_dtype=BFLOAT16, implementation=implementation)
    assert (y.shape, y.dtype) == ((2, 68, N), BFLOAT16)
    assert off(y, exact(given)) < TOLERANCE[BFLOAT16]


def test_what_is_added_to_a_residual_is_not_rounded(implementation):
    """Not where `out_scale` makes it smaller, whose results are in float32."""
    given = inputs((136,), out_scale=0.25, residual=BFLOAT16)
    y = fused_linear(**given, out_dtype=BFLOAT16, implementation=implementation)
    assert off(y[:, 5], exact(given)[:, 5]) < 3e-3


@pytest.mark.parametrize("name", ["xla", "reference"])
@pytest.mark.parametrize("dtype", ["float32", FLOAT8], ids=str)
@pytest.mark.parametrize(
    ("rows", "bias", "gelu", "out_scale", "residual"),
    [
        ((3,), False, True, 3, None),
        ((2, 5, 1), True, True, None, "float32"),
        ((), True, False, 0.5, "float32"),
        ((7,), False, False, None, None),
    ],
    ids=str,
)
def test_plain_implementations(name, dtype, rows, bias, gelu, out_scale, residual):
    given = inputs(rows, K=64, N=24, dtype=dtype, bias=bias, out_scale=out_scale, residual=residual)
    y = fused_linear(**given, gelu=gelu, out_dtype="float32", implementation=name)
    assert (y.shape, y.dtype) == ((*rows, 24), jnp.float32)
    assert off(y, exact(given, gelu)) < 1e-5


def test_rows_by_themselves(implementation):
    """A row of zeros gives zeros, and a row that is NaN tells in no other."""
    given = inputs((128,), bias=False)
    given["x"] = given["x"].at[1].set(0).at[2, 7].set(np.nan)
    y = np.float32(fused_linear(**given, out_dtype=BFLOAT16, implementation=implementation))
    assert not y[1].any()
    assert np.isnan(y[2]).all()
    assert off(y[3:], exact(given)[3:]) < TOLERANCE[BFLOAT16]


def one_after_the_other(x, kernel, bias, gelu):
    over = ((x.ndim - 1,), (0,))
    y = jax.lax.dot_general(x, kernel, (over, ((), ())), preferred_element_type=kernel.dtype)
    return gelu_op(y, bias, implementation="xla") if gelu else y + bias


@pytest.mark.parametrize("dtype", ["float32", BFLOAT16], ids=str)
@pytest.mark.parametrize("gelu", [False, True])
def test_xla_is_one_after_the_other_bit_for_bit(dtype, gelu):
    given = inputs((2, 68), dtype=dtype)
    x, kernel, bias = given["x"], given["kernel"], given["bias"].astype(dtype)
    results = [
        pulled(lambda *a: fused_linear(*a[:2], bias=a[2], gelu=gelu, implementation="xla"), x, kernel, bias),
        pulled(lambda *a: one_after_the_other(*a, gelu), x, kernel, bias),
    ]
    assert all(y.dtype == dtype for y in results[0])
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT8], ids=str)
def test_xla_adds_what_it_has_rounded_to_a_residual(dtype):
    given = inputs((2, 68), dtype=dtype, residual=BFLOAT16) | {"out_dtype": BFLOAT16}
    y = fused_linear(**given, implementation="xla")
    residual = given.pop("residual")
    np.testing.assert_array_equal(y, residual + fused_linear(**given, implementation="xla"))


def pulled(function, *arguments):
    """The result and what a cotangent becomes; not jitted, so nothing is fused in another way."""
    y, pull = jax.vjp(function, *arguments)
    weights = np.random.default_rng(1).standard_normal(y.shape)
    return y, *pull(jnp.asarray(weights, y.dtype))


@pytest.mark.parametrize(
    ("dtype", "out_scale", "residual"),
    [(BFLOAT16, None, None), (BFLOAT16, 0.25, None), (FLOAT8, None, None), (FLOAT8, 0.25, BFLOAT16)],
    ids=str,
)
def test_what_is_differentiated_is_xlas(platform, dtype, out_scale, residual):
    """Value and gradients: training computes the same on all platforms."""
    given = inputs((136,), dtype=dtype, out_scale=out_scale, residual=residual)
    given = {name: x for name, x in given.items() if x is not None}

    def run(name, given):
        return fused_linear(**given, gelu=True, out_dtype=BFLOAT16, implementation=name)

    with able("mosaic_gpu", platform):
        found = pulled(functools.partial(run, "mosaic_gpu"), given)
        value = run("mosaic_gpu", given)
    expected = pulled(functools.partial(run, "xla"), given)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    # Without gradients it is the kernel, which rounds once.
    assert (value != expected[0]).any()


def test_gradients_pass_through_8_bits():
    given = inputs((3,), K=64, N=24)

    def loss(x, name):
        return fused_linear(**given | {"x": x.astype(FLOAT8)}, out_dtype="float32", implementation=name).sum()

    x = given["x"].astype(jnp.float32)
    gradients = jax.jit(jax.grad(loss), static_argnums=1)
    gradient, expected = (gradients(x, name) for name in ("xla", "reference"))
    assert off(gradient, np.float64(expected)) < 0.05
    assert jnp.abs(expected).max() > 0


def test_rows_stay_where_a_mesh_has_put_them():
    """A reshape would bring together axes that are split over devices."""
    given = inputs((2, 68), dtype=BFLOAT16)
    for rest in (given, inputs((2, 68)) | {"out_dtype": BFLOAT16}):
        a = Arguments(**{"out_dtype": BFLOAT16} | rest, gelu=True)
        assert "reshape" not in jax.jit(xla.apply).lower(a).as_text()


def abstract(
    *, M=1608, K=1280, N=1280, dtype="float8_e4m3fn", out_dtype="bfloat16", gelu=False, residual=False
):
    def s(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    in_8_bits = jnp.dtype(dtype) == FLOAT8
    kernel, scale = (s(N, K), s(N, dtype="float32")) if in_8_bits else (s(K, N), None)
    out_scale = s(1, dtype="float32") if jnp.dtype(out_dtype) == FLOAT8 else None
    x, bias = s(*np.atleast_1d(M), K), s(N, dtype="bfloat16")
    stream = s(*np.atleast_1d(M), N, dtype=out_dtype) if residual else None
    return Arguments(x, kernel, scale, bias, out_scale, stream, gelu=gelu, out_dtype=jnp.dtype(out_dtype))


@pytest.mark.parametrize(
    ("platform", "arguments", "expected"),
    [
        ("gpu", {}, "mosaic_gpu"),
        ("gpu", {"M": 128, "K": 5120}, "mosaic_gpu"),
        ("gpu", {"M": (16, 1608), "N": 3840}, "mosaic_gpu"),
        ("gpu", {"N": 5120, "gelu": True, "out_dtype": "float8_e4m3fn"}, "mosaic_gpu"),
        ("gpu", {"N": 5120, "dtype": "bfloat16", "gelu": True}, "mosaic_gpu"),
        ("gpu", {"M": 128, "K": 384, "dtype": "bfloat16", "gelu": True}, "mosaic_gpu"),
        ("gpu", {"M": (16, 1608), "K": 5120, "residual": True}, "mosaic_gpu"),
        ("gpu", {"N": 5120, "dtype": "bfloat16"}, "xla"),
        ("gpu", {"K": 5120, "dtype": "bfloat16", "residual": True}, "xla"),
        ("gpu", {"N": 5120, "dtype": "bfloat16", "residual": True, "gelu": True}, "xla"),
        ("gpu", {"N": 5120, "dtype": "float32", "gelu": True}, "xla"),
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
        ({"M": (3, 67)}, "it takes 128 rows or more, in multiples of 8, not 201"),
        ({"N": 1344}, "N = 1344 is not a multiple of 128"),
        ({"K": 640}, "K = 640 is not a multiple of 128, 768 at least"),
        ({"K": 1344}, "K = 1344 is not a multiple of 128, 768 at least"),
        (
            {"K": 320, "dtype": "bfloat16", "gelu": True},
            "K = 320 is not a multiple of 64, 384 at least",
        ),
        ({"dtype": "float32", "gelu": True}, "it takes bfloat16 or float8_e4m3fn, not float32"),
        ({"out_dtype": "float32"}, "it gives bfloat16 or float8_e4m3fn, not float32"),
        (
            {"dtype": "bfloat16"},
            "in bfloat16 it takes calls with a gelu; without one XLA's matmul is as fast",
        ),
        (
            {"dtype": "bfloat16", "residual": True},
            "in bfloat16 it takes no residual; XLA's matmul is as fast, and adds it too",
        ),
    ],
)
def test_a_forced_name_that_cannot_fails_with_the_reason(arguments, reason):
    with pytest.raises(Unsupported, match=f"'mosaic_gpu' cannot be used: {reason}"):
        choose(abstract(**arguments), "mosaic_gpu", platform="gpu")


@pytest.mark.parametrize(
    ("dtype", "changes", "message"),
    [
        ("float8_e4m3fn", {"kernel": (24, 32)}, "kernel [N, K] must share K; got (3, 64) and (24, 32)"),
        ("bfloat16", {"kernel": (24, 64)}, "kernel [K, N] must share K; got (3, 64) and (24, 64)"),
        ("bfloat16", {"kernel": (1, 64, 24)}, "must share K"),
        ("float8_e4m3fn", {"scale": (64,)}, "scale must be (24,); got (64,)"),
        ("bfloat16", {"bias": (1, 24)}, "bias must be (24,); got (1, 24)"),
        ("float8_e4m3fn", {"out_scale": (24,)}, "out_scale must be (1,); got (24,)"),
        (
            "bfloat16",
            {"scale": (24,)},
            "kernels in float8_e4m3fn have a scale, others none; this is in bfloat16",
        ),
        ("float8_e4m3fn", {"scale": None}, "others none; this is in float8_e4m3fn"),
        (
            "float8_e4m3fn",
            {"residual": (3, 24)},
            "residual is as the results, bfloat16 (3, 24); got float32 (3, 24)",
        ),
        ("bfloat16", {"residual": (24,)}, "bfloat16 (3, 24); got float32 (24,)"),
    ],
)
def test_shapes_that_do_not_fit(dtype, changes, message):
    given = inputs((3,), K=64, N=24, dtype=dtype)
    kinds = {"kernel": dtype}
    changes = {
        name: shape and jnp.zeros(shape, kinds.get(name, "float32")) for name, shape in changes.items()
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        fused_linear(**given | changes, out_dtype=BFLOAT16)


def test_results_in_8_bits_take_no_residual():
    with pytest.raises(ValueError, match="of 16 bits or more, not for float8_e4m3fn"):
        fused_linear(**inputs((3,), K=64, N=24, residual=FLOAT8), out_dtype=FLOAT8)


@pytest.mark.parametrize(
    ("x", "kernel"), [("float32", "bfloat16"), ("float8_e4m3fn", "int8"), ("int8", "int8")], ids=str
)
def test_dtypes_that_do_not_fit(x, kernel):
    with pytest.raises(ValueError, match=f"of 16 bits or more, not {x} and {kernel}"):
        fused_linear(jnp.zeros((3, 64), x), jnp.zeros((64, 64), kernel), out_dtype=BFLOAT16)


def test_the_dtype_of_the_result():
    given = inputs((3,), K=64, N=24, dtype=BFLOAT16)
    assert fused_linear(**given).dtype == BFLOAT16
    assert fused_linear(**given, out_dtype="float32").dtype == jnp.float32
    with pytest.raises(ValueError, match="out_dtype must be named for inputs in float8_e4m3fn"):
        fused_linear(**inputs((3,), K=64, N=24))
