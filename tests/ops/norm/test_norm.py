"""The contract of the norms against float64 numpy, which implementation takes a call, what is refused.

M rows, D width
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
from moss_jax.ops.norm import IMPLEMENTATIONS, Arguments, choose, layer_norm, mosaic_gpu, rms_norm

EPS = 1e-5
NORMS = ("rms", "layer")
KINDS = (("rms", None), ("rms", "rows"), ("layer", "gate"), ("layer", "scalar"))

# Largest error, as a share of a row's largest number.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1.2e-2}


# The kernel by interpretation.
on_gpu = functools.partial(interpreted.kernel_on_gpu, mosaic_gpu)


def inputs(shape, *, norm="rms", scale=None, add=True, dtype="bfloat16", seed=0):
    """x and the keyword arguments; rows of very different sizes, the first so small that eps tells."""
    rng = np.random.default_rng(seed)

    def draw(*shape, spread=1.0, centre=0.0):
        return jnp.asarray(centre + spread * rng.standard_normal(shape, np.float32), dtype)

    *rows, width = shape
    sizes = np.resize(np.float32([2e-3, 1, 50]), (*rows, 1))
    given = {"weight": draw(width, spread=0.2, centre=1.0)}
    if norm == "layer":
        given["bias"] = draw(width)
    if add:
        given["add"] = draw(*shape, spread=sizes)
        # Every second row takes nothing of the branch.
        each = draw(*rows, 1) * (np.arange(rows[-1]) % 2)[:, None].astype(dtype)
        given["scale"] = {None: None, "scalar": jnp.asarray(0.7, dtype), "gate": draw(1), "rows": each}[scale]
    return draw(*shape, spread=sizes, centre=0.3 * sizes), given


def call(x, given, **options):
    op = layer_norm if "bias" in given else rms_norm
    return op(x, **given, eps=EPS, **options)


def exact(x, given):
    x, given = np.float64(x), {name: np.float64(y) for name, y in given.items() if y is not None}
    y = x + given.get("scale", 1) * given.get("add", 0)
    centred = y - y.mean(axis=-1, keepdims=True) if "bias" in given else y
    normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPS)
    return normed * given["weight"] + given.get("bias", 0), y


def close(actual, expected, tolerance):
    actual = np.float64(actual)
    error = np.abs(actual - expected).max(axis=-1) / np.abs(expected).max(axis=-1)
    assert (error <= tolerance).all(), f"off by {error.max():.2e}"


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, platform):
    """Each by name; the kernel for a GPU runs interpreted on others."""
    with on_gpu() if request.param == "mosaic_gpu" and platform != "gpu" else contextlib.nullcontext():
        yield request.param


@pytest.mark.parametrize(("norm", "scale"), KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 512), (2, 3, 256)], ids=str)
def test_is_the_norm_of_the_sum(implementation, norm, scale, shape):
    x, given = inputs(shape, norm=norm, scale=scale)
    for result, expected in zip(call(x, given, implementation=implementation), exact(x, given), strict=True):
        assert (result.shape, result.dtype) == (x.shape, x.dtype)
        close(result, expected, TOLERANCE["bfloat16"])


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_branch(implementation, norm):
    """Then the sum is x itself."""
    x, given = inputs((5, 256), norm=norm, add=False)
    normed, y = call(x, given, implementation=implementation)
    close(normed, exact(x, given)[0], TOLERANCE["bfloat16"])
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("norm", NORMS)
def test_rows_by_themselves(implementation, norm):
    """A row that is NaN tells in no other, one of zeros is bias, and a scale of 0 leaves x as it is."""
    x, given = inputs((6, 256), norm=norm, scale="rows")
    x = x.at[1, 7].set(np.nan).at[4].set(0)
    normed, y = call(x, given, implementation=implementation)
    assert np.isnan(np.float32(normed)).any(axis=1).tolist() == [False, True] + [False] * 4
    np.testing.assert_array_equal(y[::2], x[::2])
    np.testing.assert_array_equal(normed[4], given.get("bias", jnp.zeros(256)))


EIGHT_BITS = jnp.float8_e4m3fn


def check_rows_in_8_bits(x, given, **options):
    """They are those in bfloat16, rounded once more, or less often."""
    numbers, y = call(x, given, out_dtype=EIGHT_BITS, **options)
    assert (numbers.shape, numbers.dtype) == (x.shape, EIGHT_BITS)
    normed, same = call(x, given, **options)
    np.testing.assert_array_equal(y, same)
    normed = np.float64(normed)
    half_step = 2.0 ** np.floor(np.log2(np.maximum(np.abs(normed), 2.0**-6))) / 16
    # Rounding to bfloat16 is a sixteenth as large, but can be the last straw for both.
    assert (np.abs(np.float64(numbers) - normed) <= 1.2 * half_step).all()


def test_rows_in_8_bits(implementation):
    x, given = inputs((2, 3, 256), norm="layer", scale="scalar")
    check_rows_in_8_bits(x, given, implementation=implementation)


def test_rows_far_from_zero(implementation):
    """The variance is the mean of squared differences: the difference of squared means would be far off."""
    x = jnp.full((4, 512), 4096, jnp.bfloat16).at[:, ::64].set(4128)
    given = {"weight": jnp.ones(512, jnp.bfloat16), "bias": jnp.zeros(512, jnp.bfloat16)}
    close(call(x, given, implementation=implementation)[0], exact(x, given)[0], 4e-3)


@pytest.mark.parametrize("name", ["xla", "reference"])
@pytest.mark.parametrize(("norm", "scale"), KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 4096), (3, 4096), (2, 32, 128), (1608, 1280)], ids=str)
def test_plain_implementations(name, norm, scale, dtype, shape):
    x, given = inputs(shape, norm=norm, scale=scale, dtype=dtype)
    for result, expected in zip(call(x, given, implementation=name), exact(x, given), strict=True):
        assert result.dtype == x.dtype
        close(result, expected, TOLERANCE[dtype])


def gradients(implementation, uses, x, given):
    """In all that is given, of a sum over the results that are used."""
    towards = np.random.default_rng(2).standard_normal((2, *x.shape), np.float32)
    given = {name: y for name, y in given.items() if y is not None}

    def loss(x, given):
        results = call(x, given, implementation=implementation)
        return sum((towards[i] * results[i].astype(jnp.float32)).sum() for i in uses)

    return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(x, given))


@pytest.mark.parametrize("uses", [(0, 1), (0,), (1,)], ids=["both", "normed", "sum"])
@pytest.mark.parametrize(("norm", "scale"), KINDS)
def test_gradients(norm, scale, uses):
    arguments = inputs((2, 2, 256), norm=norm, scale=scale, dtype="float32")
    both = (gradients(name, uses, *arguments) for name in ("xla", "reference"))
    for actual, expected in zip(*both, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(("norm", "scale"), KINDS)
def test_gradients_of_the_kernel(norm, scale, platform):
    """Those of XLA's, also if only one result is used."""
    arguments = inputs((2, 3, 256), norm=norm, scale=scale)
    for uses in ((0, 1), (0,)):
        expected = gradients("xla", uses, *arguments)
        with on_gpu() if platform != "gpu" else contextlib.nullcontext():
            actual = gradients("mosaic_gpu", uses, *arguments)
        for got, wanted in zip(actual, expected, strict=True):
            assert got.dtype == jnp.bfloat16
            got, wanted = np.float32(got), np.float32(wanted)
            np.testing.assert_allclose(got, wanted, rtol=0.02, atol=0.02 * np.abs(wanted).max())


def abstract(shape=(1, 4096), dtype="bfloat16", out_dtype=None):
    x, weight = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[-1:], dtype)
    return Arguments(x, x, None, weight, None, eps=EPS, out_dtype=out_dtype and jnp.dtype(out_dtype))


@pytest.mark.parametrize(
    ("platform", "arguments", "expected"),
    [
        ("gpu", {}, "mosaic_gpu"),
        ("gpu", {"shape": (16, 1608, 1280)}, "mosaic_gpu"),
        ("gpu", {"shape": (1, 64, 8192)}, "mosaic_gpu"),
        ("gpu", {"shape": (1, 1, 32, 128)}, "xla"),
        ("gpu", {"dtype": "float32"}, "xla"),
        ("gpu", {"shape": (1, 1608, 1280), "out_dtype": "float8_e4m3fn"}, "mosaic_gpu"),
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
        ({"shape": (1, 1300)}, "D = 1300 is not a multiple of 256 up to 8192"),
        ({"shape": (1, 16384)}, "D = 16384 is not a multiple of 256 up to 8192"),
        ({"shape": (0, 4096)}, "there are no rows"),
        ({"shape": (2, 1024, 4096)}, "with D = 4096 it takes up to 1024 rows, not 2048"),
        ({"dtype": "float16"}, "it takes bfloat16, not float16"),
        ({"out_dtype": "int8"}, "it gives bfloat16 and float8_e4m3fn, not int8"),
    ],
)
def test_a_forced_name_that_cannot_fails_with_the_reason(arguments, reason):
    with pytest.raises(Unsupported, match=f"'mosaic_gpu' cannot be used: {reason}"):
        choose(abstract(**arguments), "mosaic_gpu", platform="gpu")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"weight": (8,)}, "weight is one number a column, [D] = (16,); got (8,)"),
        ({"bias": (1, 16)}, "bias is one number a column, [D] = (16,); got (1, 16)"),
        ({"add": (1, 3, 16)}, "add is as x, bfloat16 (2, 3, 16); got bfloat16 (1, 3, 16)"),
        ({"add": (2, 3, 16), "scale": (2, 3, 16)}, "broadcasts to [..., 1] = (2, 3, 1); got (2, 3, 16)"),
        ({"add": (2, 3, 16), "scale": (2,)}, "broadcasts to [..., 1] = (2, 3, 1); got (2,)"),
        ({"add": (2, 3, 16), "scale": (1, 2, 3, 1)}, "broadcasts to [..., 1]"),
        ({"scale": ()}, "scale is what `add` is multiplied with, and there is no `add`"),
    ],
)
def test_what_does_not_fit(shapes, message):
    shapes = {"weight": (16,), "bias": (16,)} | shapes
    given = {name: jnp.zeros(shape, jnp.bfloat16) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        layer_norm(jnp.zeros((2, 3, 16), jnp.bfloat16), **given, eps=EPS)
    mixed = jnp.zeros((2, 3, 16), jnp.float32)
    with pytest.raises(ValueError, match="add is as x, bfloat16"):
        rms_norm(mixed.astype(jnp.bfloat16), jnp.ones(16), eps=EPS, add=mixed)
