"""The contract of the attention op, held by every implementation against float64 numpy.

B batch, T queries, S keys, K kv heads, G query heads per kv head, D head
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from unittest import mock

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.ops.attention import (
    IMPLEMENTATIONS,
    Arguments,
    KeyRange,
    Unsupported,
    attention,
    choose,
    mosaic_gpu,
    xla,
)

ALL = ("float32", "bfloat16", "float16")

# Largest error of an output and of a gradient, as a share of the largest number in it (or of 1).
TOLERANCE = {"float32": (1e-5, 5e-5), "bfloat16": (1.5e-2, 3e-2), "float16": (2e-3, 4e-3)}


@dataclasses.dataclass(frozen=True)
class Must:
    """What an implementation has to take; only what is not claimed here may it refuse."""

    platforms: tuple[str, ...] = ("cpu", "gpu")
    dtypes: tuple[str, ...] = ALL
    ranges: bool = True
    bias: bool = True
    quantized: bool = True


MUST = {
    "reference": Must(),
    "xla": Must(),
    "cudnn": Must(("gpu",), ("bfloat16", "float16"), ranges=False, bias=False, quantized=False),
    "mosaic_gpu": Must(("gpu",), ("bfloat16", "float16")),
    "mosaic_tpu": Must(("tpu",), ("float32", "bfloat16")),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """An implementation, and how it is run.

    Attributes:
      changed: a context in which it is traced and run, to hold it to small blocks, or to one of its kernels.
      interpreted: a context in which it runs on the CPU, whatever its own platform.
      quantized: whether the change leaves it with K and V in 8 bits.
      few: only the first few shapes, because it is slow.
      ranges: only these, because it is very slow.
    """

    name: str
    changed: Callable = contextlib.nullcontext
    interpreted: Callable | None = None
    quantized: bool = True
    few: bool = False
    ranges: tuple[str, ...] = ()

    @property
    def must(self) -> Must:
        must = MUST[self.name]
        return dataclasses.replace(must, quantized=must.quantized and self.quantized)

    @property
    def platforms(self) -> tuple[str, ...]:
        return ("cpu",) if self.interpreted else self.must.platforms

    @contextlib.contextmanager
    def context(self):
        with self.changed(), (self.interpreted or contextlib.nullcontext)():
            yield


def many_queries():
    """The kernel for many queries, though there are few."""
    return mock.patch.object(mosaic_gpu, "ROWS", 0)


VARIANTS = {name: Variant(name) for name in MUST} | {
    "xla_by_block": Variant("xla", lambda: mock.patch.multiple(xla, MAX_SCORES=1, MIN_BLOCK=BLOCK), few=True),
    "mosaic_gpu_staircase": Variant("mosaic_gpu", many_queries, quantized=False),
    "mosaic_gpu_interpreted": Variant(
        "mosaic_gpu",
        interpreted=interpreted.on_gpu,
        few=True,
        ranges=(
            "empty inside",
            "one key inside",
            "start > 0",
            "ragged",
            "ragged over the batch",
            "staircase",
        ),
    ),
    "mosaic_gpu_staircase_interpreted": Variant(
        "mosaic_gpu",
        many_queries,
        interpreted.on_gpu,
        quantized=False,
        few=True,
        ranges=("ragged", "staircase"),
    ),
    "mosaic_tpu_interpreted": Variant("mosaic_tpu", interpreted=interpreted.on_tpu, few=True),
}

# dtype, query heads per kv head, head_dim, with a bias
SHAPES = [
    ("float32", 4, 80, True),
    ("bfloat16", 1, 64, True),
    ("float16", 4, 128, False),
    ("float32", 1, 128, False),
    ("bfloat16", 4, 80, False),
    ("float16", 1, 64, True),
]
GRADIENT_SHAPES = [("float32", 4, 64, True), ("float16", 1, 80, True), ("bfloat16", 4, 128, False)]
DENSE_SHAPES = [shape[:3] for shape in SHAPES]
DENSE_GRADIENT_SHAPES = [shape[:3] for shape in GRADIENT_SHAPES]

B, T, S, K = 3, 6, 40, 2
BLOCK = 16  # Does not divide S.


def every_variant(names, shapes, few=3):
    """Each variant where it runs, over the shapes that it takes; the slow ones over the first few of them."""
    return pytest.mark.parametrize(
        f"variant, platform, {names}",
        [
            pytest.param(name, platform, *shape, marks=[pytest.mark.gpu] if platform == "gpu" else [])
            for name, variant in VARIANTS.items()
            for platform in variant.platforms
            for shape in [shape for shape in shapes if shape[0] in variant.must.dtypes][
                : few if variant.few else None
            ]
        ],
    )


def key_ranges(variant, gradients=False):
    """Name -> (start, end), int32 [B, T]; those that a variant is held to."""
    rng = np.random.default_rng(1)
    a, b = np.sort(rng.integers(0, S + 1, (2, B, T)), axis=0)
    grows = np.sort(rng.integers(0, S + 1, (B, T)), axis=1)
    grows[0, 0], grows[1] = 0, 0  # A query, and a row, that see nothing yet.

    def spread(*bounds):
        return tuple(np.full((B, T), bound) for bound in bounds)

    ranges = {
        "empty": spread(0, 0),
        "empty inside": spread(7, 7),
        "one key": spread(0, 1),
        "block - 1": spread(0, BLOCK - 1),
        "block": spread(0, BLOCK),
        "block + 1": spread(0, BLOCK + 1),
        "full": spread(0, S),
        "start > 0": spread(5, 33),
        "one key inside": spread(BLOCK + 5, BLOCK + 6),
        "second block": spread(BLOCK, 2 * BLOCK),
        "last, shorter block": spread(2 * BLOCK, S),
        "ragged": (a, b),
        "ragged over the batch": (np.full((B, T), 3), np.array([[3], [20], [S]]).repeat(T, axis=1)),
        "staircase": (np.zeros((B, T)), grows),
    }
    held = VARIANTS[variant].ranges or ranges
    if gradients and VARIANTS[variant].interpreted:
        held = ("ragged", "staircase")
    return {name: tuple(np.int32(bound) for bound in ranges[name]) for name in held}


def inputs(dtype, G, D, *, queries=T, keys=S, seed=0):
    """q, k, v in `dtype`, a bias that hides one key, and the gradient of the output."""
    rng = np.random.default_rng(seed)
    q, d_out = rng.standard_normal((2, B, queries, K * G, D))
    k, v = rng.standard_normal((2, B, K, keys, D))
    bias = rng.standard_normal((B, keys)).astype(np.float32)
    bias[0, 2] = -np.inf
    q, k, v, d_out = (np.array(jnp.asarray(x, dtype)) for x in (q, k, v, d_out))
    return q, k, v, bias, d_out


def poisoned(k, v, bias, start, end):
    """What no query sees becomes NaN or infinite."""
    keys = np.arange(k.shape[2])
    unseen = ~((start[..., None] <= keys) & (keys < end[..., None])).any(axis=1)  # [B, S]
    k, v, bias = k.copy(), v.copy(), None if bias is None else bias.copy()
    k.swapaxes(1, 2)[unseen] = np.nan
    v.swapaxes(1, 2)[unseen] = np.inf
    if bias is not None:
        bias[unseen] = np.nan
    return k, v, bias, unseen


def definition(q, k, v, bias, start, end, scale, d_out=None):
    """The output, or the gradients of q, k, v and bias, query by query in float64."""
    q, k, v, d_out = (None if x is None else x.astype(np.float64) for x in (q, k, v, d_out))
    bias = np.zeros((len(k), k.shape[2])) if bias is None else bias.astype(np.float64)
    out, d_q, d_k, d_v, d_bias = (np.zeros_like(x) for x in (q, q, k, v, bias))
    for b, t in np.ndindex(q.shape[:2]):
        at = slice(start[b, t], end[b, t])
        if at.start >= at.stop:
            continue
        heads = (k.shape[1], -1, q.shape[-1])
        query, keys, values = q[b, t].reshape(heads), k[b, :, at], v[b, :, at]
        scores = scale * np.einsum("kgd,ksd->kgs", query, keys) + bias[b, at]
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[b, t] = np.einsum("kgs,ksd->kgd", weights, values).reshape(q.shape[2:])
        if d_out is None:
            continue
        d_o = d_out[b, t].reshape(heads)
        d_weights = np.einsum("kgd,ksd->kgs", d_o, values)
        d_scores = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True))
        d_q[b, t] = scale * np.einsum("kgs,ksd->kgd", d_scores, keys).reshape(q.shape[2:])
        d_k[b, :, at] += scale * np.einsum("kgs,kgd->ksd", d_scores, query)
        d_v[b, :, at] += np.einsum("kgs,kgd->ksd", weights, d_o)
        d_bias[b, at] += d_scores.sum(axis=(0, 1))
    return out if d_out is None else (d_q, d_k, d_v, d_bias)


@functools.partial(jax.jit, static_argnames=("variant", "causal", "scale", "gradients"))
def run(q, k, v, bias, key_range, d_out, *, variant, causal=False, scale=None, scales=None, gradients=False):
    """The output of an implementation, or the gradients of q, k, v and bias."""
    variant = VARIANTS[variant]

    def call(q, k, v, bias):
        k_scale, v_scale = scales or (None, None)
        return attention(
            q,
            k,
            v,
            key_range,
            bias=bias,
            k_scale=k_scale,
            v_scale=v_scale,
            causal=causal,
            scale=scale,
            implementation=variant.name,
        )

    with variant.context():
        if not gradients:
            return call(q, k, v, bias)
        return jax.vjp(call, q, k, v, bias)[1](d_out)


def close(actual, expected, tolerance, what):
    actual = np.asarray(actual, np.float64)
    assert np.isfinite(actual).all(), what
    worst = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1)
    assert worst <= tolerance, f"{what}: off by {worst:.2e}"


def need(variant, platform, dtype, G, D, *, ranges=False, causal=False, bias=False, stored=None):
    """Skips what the implementation says it cannot take and what `MUST` does not claim."""
    if platform != jax.default_backend():
        pytest.skip(f"runs on {platform}")
    variant = VARIANTS[variant]
    must = variant.must
    arguments = abstract(dtype, G, D, ranges=ranges, causal=causal, bias=bias, stored=stored)
    with variant.context():
        reason = IMPLEMENTATIONS[variant.name].unsupported(arguments, platform)
    if reason is None:
        return
    assert (
        dtype not in must.dtypes
        or (ranges and not must.ranges)
        or (bias and not must.bias)
        or (stored and not must.quantized)
    ), reason
    pytest.skip(reason)


def abstract(dtype, G, D, *, ranges=False, causal=False, bias=False, stored=None):
    """Arguments without numbers."""
    queries = S if causal else T
    bound = jax.ShapeDtypeStruct((B, queries), jnp.int32)
    kv = jax.ShapeDtypeStruct((B, K, S, D), stored or dtype)
    scale = jax.ShapeDtypeStruct((B, K, S), jnp.float32) if stored else None
    return Arguments(
        q=jax.ShapeDtypeStruct((B, queries, K * G, D), dtype),
        k=kv,
        v=kv,
        kv_range=KeyRange(bound, bound) if ranges else None,
        bias=jax.ShapeDtypeStruct((B, S), jnp.float32) if bias else None,
        scale=1.0,
        causal=causal,
        k_scale=scale,
        v_scale=scale,
    )


def test_every_implementation_is_held_to_the_contract():
    assert set(MUST) == set(IMPLEMENTATIONS) == {variant.name for variant in VARIANTS.values()}


@pytest.mark.parametrize("name", MUST)
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(("dtype", "G", "D"), DENSE_SHAPES)
def test_takes_what_it_must(name, platform, dtype, G, D):
    must = MUST[name]
    for ranges in (False, True):
        for causal in (False,) if ranges else (False, True):
            for bias in (False, True):
                arguments = abstract(dtype, G, D, ranges=ranges, causal=causal, bias=bias)
                reason = IMPLEMENTATIONS[name].unsupported(arguments, platform)
                claimed = platform in must.platforms and dtype in must.dtypes
                claimed = claimed and (must.ranges or not ranges) and (must.bias or not bias)
                if claimed:
                    assert reason is None
                    assert choose(arguments, name, platform) == name
                elif reason is not None:
                    with pytest.raises(Unsupported) as error:
                        choose(arguments, name, platform)
                    assert reason in str(error.value)


def test_the_small_blocks_are_small():
    with mock.patch.multiple(xla, MAX_SCORES=1, MIN_BLOCK=BLOCK):
        assert xla.block_size(B * T * K, S) == BLOCK
    assert xla.block_size(B * T * K, S) == S


@every_variant("dtype, G, D, with_bias", SHAPES)
def test_ranges(variant, platform, dtype, G, D, with_bias):
    need(variant, platform, dtype, G, D, ranges=True, bias=with_bias)
    q, k, v, bias, _ = inputs(dtype, G, D)
    bias = bias if with_bias else None
    for what, (start, end) in key_ranges(variant).items():
        expected = definition(q, k, v, bias, start, end, D**-0.5)
        bad_k, bad_v, bad_bias, _ = poisoned(k, v, bias, start, end)
        out = run(q, bad_k, bad_v, bad_bias, KeyRange(start, end), None, variant=variant)
        assert out.dtype == dtype
        close(out, expected, TOLERANCE[dtype][0], what)
        assert not np.asarray(out)[start >= end].any(), f"{what}: an empty range gives exact zeros"


@every_variant("dtype, G, D", DENSE_SHAPES, few=1)
@pytest.mark.parametrize("mask", ["every key", "causal"])
def test_dense(variant, platform, dtype, G, D, mask):
    causal = mask == "causal"
    need(variant, platform, dtype, G, D, causal=causal)
    queries = S if causal else T
    q, k, v, _, _ = inputs(dtype, G, D, queries=queries)
    start = np.zeros((B, queries), int)
    end = start + (np.arange(1, S + 1) if causal else S)
    out = run(q, k, v, None, None, None, variant=variant, causal=causal)
    assert out.dtype == dtype
    close(out, definition(q, k, v, None, start, end, D**-0.5), TOLERANCE[dtype][0], mask)


@every_variant("dtype, G, D", [("float32", 1, 64), ("bfloat16", 1, 64)])
def test_large_scores_and_a_scale(variant, platform, dtype, G, D):
    """Scores near 1000, whose exponentials overflow, and growing, so that a running maximum has to move."""
    need(variant, platform, dtype, G, D)
    q, k, v, _, _ = inputs(dtype, G, D)
    k = (k * np.linspace(0, 8, S)[:, None]).astype(k.dtype)
    start, end = np.zeros((B, T), int), np.full((B, T), S)
    out = run(q, k, v, None, None, None, variant=variant, scale=4.0)
    close(out, definition(q, k, v, None, start, end, 4.0), max(1e-3, TOLERANCE[dtype][0]), "scale")


@every_variant("dtype, G, D, with_bias", GRADIENT_SHAPES, few=1)
def test_gradients_of_ranges(variant, platform, dtype, G, D, with_bias):
    need(variant, platform, dtype, G, D, ranges=True, bias=with_bias)
    q, k, v, bias, d_out = inputs(dtype, G, D, seed=2)
    bias = bias if with_bias else None
    for what, (start, end) in key_ranges(variant, gradients=True).items():
        expected = definition(q, k, v, bias, start, end, D**-0.5, d_out)
        bad_k, bad_v, bad_bias, unseen = poisoned(k, v, bias, start, end)
        gradients = run(
            q, bad_k, bad_v, bad_bias, KeyRange(start, end), d_out, variant=variant, gradients=True
        )
        for name, actual, of in zip("qkv", gradients, expected, strict=False):
            assert actual.dtype == dtype
            close(actual, of, TOLERANCE[dtype][1], f"{what}: d_{name}")
        d_q, d_k, d_v, d_bias = (None if x is None else np.asarray(x) for x in gradients)
        assert not d_q[start >= end].any(), what
        assert not d_k.swapaxes(1, 2)[unseen].any(), what
        assert not d_v.swapaxes(1, 2)[unseen].any(), what
        if with_bias:
            close(d_bias, expected[3], TOLERANCE[dtype][1], f"{what}: d_bias")
            assert not d_bias[unseen].any(), what


@every_variant("dtype, G, D", DENSE_GRADIENT_SHAPES, few=0)
@pytest.mark.parametrize("mask", ["every key", "causal"])
def test_gradients_of_dense(variant, platform, dtype, G, D, mask):
    causal = mask == "causal"
    need(variant, platform, dtype, G, D, causal=causal)
    queries = S if causal else T
    q, k, v, _, d_out = inputs(dtype, G, D, queries=queries, seed=3)
    start = np.zeros((B, queries), int)
    end = start + (np.arange(1, S + 1) if causal else S)
    expected = definition(q, k, v, None, start, end, D**-0.5, d_out)
    gradients = run(q, k, v, None, None, d_out, variant=variant, causal=causal, gradients=True)
    for name, actual, of in zip("qkv", gradients, expected, strict=False):
        assert actual.dtype == dtype
        close(actual, of, TOLERANCE[dtype][1], f"d_{name}")


def quantized(x, dtype):
    """x in 8 bits, with the largest number of each vector at the end of the dtype's scale, and the scales."""
    top = 127 if dtype == "int8" else 448
    scale = np.abs(x).max(axis=-1) / top
    stored = x / scale[..., None]
    stored = jnp.asarray(np.round(stored) if dtype == "int8" else stored, dtype)
    return np.array(stored), scale.astype(np.float32)


@every_variant("dtype, G, D", [("bfloat16", 4, 128), ("float32", 1, 64)])
@pytest.mark.parametrize("stored", ["int8", "float8_e4m3fn"])
def test_quantized(variant, platform, dtype, G, D, stored):
    """What is compared with is attention over what the 8 bits stand for."""
    need(variant, platform, dtype, G, D, ranges=True, bias=True, stored=stored)
    q, k, v, bias, _ = inputs("float32", G, D)
    q = np.array(jnp.asarray(q, dtype))
    (k, k_scale), (v, v_scale) = quantized(k, stored), quantized(v, stored)
    wide_k, wide_v = (x.astype(np.float64) * s[..., None] for x, s in ((k, k_scale), (v, v_scale)))
    for what, (start, end) in key_ranges(variant).items():
        expected = definition(q, wide_k, wide_v, bias, start, end, D**-0.5)
        bad_k, bad_v, bad_bias, unseen = poisoned(wide_k, wide_v, bias, start, end)
        scales = [np.where(unseen[:, None], np.nan, s).astype(np.float32) for s in (k_scale, v_scale)]
        stored_k, stored_v = k, v
        if stored != "int8":
            stored_k, stored_v = (
                np.where(np.isfinite(bad), x, np.nan).astype(x.dtype) for bad, x in ((bad_k, k), (bad_v, v))
            )
        out = run(q, stored_k, stored_v, bad_bias, KeyRange(start, end), None, variant=variant, scales=scales)
        assert out.dtype == dtype
        close(out, expected, TOLERANCE[dtype][0], what)


def test_quantized_has_no_gradients():
    q = jnp.ones((1, 1, 1, 8))
    (k, scale) = quantized(np.ones((1, 1, 4, 8)), "int8")

    def loss(q):
        return attention(q, k, k, k_scale=scale, v_scale=scale).sum()

    with pytest.raises(Unsupported, match="no gradients"):
        jax.grad(loss)(q)
