"""Merging of rows: each implementation against a loop in float64."""

import interpreted
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ops.contract import on_cpu, refuses

from moss_jax.ops.merge_rows import MERGE_ROWS, merge_rows
from moss_jax.ops.merge_rows.base import Arguments
from moss_jax.ops.merge_rows.mosaic_gpu import CHUNK

DTYPES = ("bfloat16", "float16", "int8", "float8_e4m3fn")


def inputs(S, M, *, B=2, K=2, D=32, dtype="int8", heads=True, seed=0):
    """Rows, a third of them NaN where the dtype has one, and sums of up to M of the others."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-127, 128, (B, K, S, D)).astype(np.int8)
    if dtype != "int8":
        x = (x / 32).astype(jnp.dtype(dtype))
    used = [np.flatnonzero(rng.random(S) < 2 / 3) for _ in range(B)]
    if dtype != "int8":
        for row, there in zip(x, used, strict=True):
            row[:, np.setdiff1d(np.arange(S), there)] = np.nan
    count = np.where(rng.random((B, S)) < 0.2, rng.integers(0, M + 1, (B, S)), 1).astype(np.int32)
    count[:, S - S // 4 :] = 0
    count[:, :CHUNK] = np.minimum(count[:, :CHUNK], 1)  # A chunk that gathers once.
    # Beyond the count, sources are anything, and weights too.
    source = np.stack([rng.choice(there, (M, S)) for there in used], axis=1).astype(np.int32)
    source = np.where(np.arange(M)[:, None, None] < count, source, rng.integers(0, S, source.shape, np.int32))
    weights = rng.dirichlet(np.ones(M), (B, K if heads else 1, S)).astype(np.float32)
    weights = np.moveaxis(weights, 3, 0)
    weights[0] = np.where(count[:, None] == 1, 1, weights[0])
    return x, weights, source, count


def check(x, weights, source, count, *, implementation):
    """The error of a sum of M products and of one rounding; of a single row none."""
    with on_cpu(implementation):
        found = merge_rows(
            *map(jnp.asarray, (x, weights, source, count)), out_dtype=x.dtype, implementation=implementation
        )
    assert found.dtype == x.dtype
    found = np.asarray(found).astype(np.float64)
    exact, size = np.zeros(x.shape), np.zeros(x.shape)
    for m, (weight, at) in enumerate(zip(weights, source, strict=True)):
        rows = np.take_along_axis(x, at[:, None, :, None], axis=2).astype(np.float64)
        part = np.where((m < count)[:, None, :, None], weight[..., None] * rows, 0)
        exact, size = exact + part, size + np.abs(part)
    single = np.broadcast_to((count <= 1)[:, None, :, None], x.shape)
    np.testing.assert_array_equal(found[single], exact[single])
    in_sum = len(weights) * 2.0**-23 * size
    if x.dtype == np.int8:
        rounding = 0.5
    else:
        info = ml_dtypes.finfo(x.dtype)
        rounding = np.maximum(float(info.eps) / 2 * np.abs(exact), float(info.smallest_subnormal) / 2)
    assert np.all(np.abs(found - exact) <= rounding + in_sum * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_against_a_loop(dtype, implementation):
    """The last of three chunks shares rows with the one before."""
    check(*inputs(2 * CHUNK + 9, 3, dtype=dtype), implementation=implementation)


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "int8"), (128, "bfloat16")])
def test_weights_for_all_heads(head_dim, dtype, implementation):
    these = inputs(CHUNK + 8, 2, B=1, D=head_dim, dtype=dtype, heads=False)
    check(*these, implementation=implementation)


def abstract(S=7272, M=10, B=1, K=8, D=128, dtype="int8", out_dtype=None):
    array = jax.ShapeDtypeStruct
    return Arguments(
        array((B, K, S, D), dtype),
        array((M, B, K, S), "float32"),
        array((M, B, S), "int32"),
        array((B, S), "int32"),
        jnp.dtype(out_dtype or dtype),
    )


def test_choices():
    assert [MERGE_ROWS.choose(abstract(), platform=p) for p in ("cpu", "tpu", "gpu")] == [
        "xla",
        "xla",
        "mosaic_gpu",
    ]
    for sizes, reason in (
        ({"dtype": "float32"}, "it takes bfloat16, float16, int8 and float8_e4m3fn, not float32"),
        ({"out_dtype": "float32"}, "its result has the dtype of x, int8, not float32"),
        ({"D": 80}, "it takes heads of 32, 64 and 128, not of 80"),
        ({"S": 60}, "it takes 64 rows and more, not 60"),
    ):
        a = abstract(**sizes)
        assert MERGE_ROWS.choose(a, platform="gpu") == "xla"
        with refuses(f"merge_rows implementation 'mosaic_gpu' cannot be used: {reason}"):
            MERGE_ROWS.choose(a, "mosaic_gpu", "gpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_lowers_for_a_gpu_without_one(dtype, head_dim):
    with interpreted.lowering_for("gpu"):
        program = jax.jit(lambda a: MERGE_ROWS(a)).trace(abstract(dtype=dtype, D=head_dim))
        text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1


def test_shapes_that_do_not_fit():
    x, weights, source, count = map(jnp.asarray, inputs(5 + CHUNK, 2))
    with refuses("count has one entry for each of 2 x 69 rows; got (2, 68)"):
        merge_rows(x, weights, source, count[:, 1:], out_dtype=x.dtype)
    with refuses("source has M indices of each of 2 x 69 rows; got (2, 2, 68)"):
        merge_rows(x, weights, source[:, :, 1:], count, out_dtype=x.dtype)
    with refuses(
        "weights are one for each source, of shape (2, 2, 1, 69) or (2, 2, 2, 69); got (1, 2, 2, 69)"
    ):
        merge_rows(x, weights[1:], source, count, out_dtype=x.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_on_gpu(dtype, head_dim):
    for seed, M in enumerate((1, 4, 10)):
        these = inputs(3000 + seed, M, B=2, K=8, D=head_dim, dtype=dtype, seed=seed)
        check(*these, implementation="mosaic_gpu")
