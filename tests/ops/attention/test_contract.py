"""The contract of the attention op, held by every implementation against float64 NumPy.

B batch/slots, R rows of queries, T queries, S keys, K kv heads, G query heads per kv head, D head
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.attention import exact
from ops.attention.exact import close

from moss_jax.ops.attention import ATTENTION, Arguments, KeyRange, Unsupported, attention
from moss_jax.ops.attention.mosaic_gpu import StaircaseConfig
from moss_jax.ops.attention.xla import XlaConfig
from moss_jax.ops.qarray import QUANTIZED, QArray, quantize

ALL = ("float32", "bfloat16", "float16")
B, T, S, K = 3, 6, 40, 2
BLOCK = 16  # Does not divide S.


@dataclasses.dataclass(frozen=True)
class Supports:
    """Calls that an implementation must take; it may refuse others."""

    platforms: tuple[str, ...] = ("cpu", "gpu")
    dtypes: tuple[str, ...] = ALL
    ranges: bool = True
    bias: bool = True
    quantized: bool = True


SUPPORTS = {
    "reference": Supports(),
    "xla": Supports(),
    "cudnn": Supports(("gpu",), ("bfloat16", "float16"), ranges=False, bias=False, quantized=False),
    "mosaic_gpu": Supports(("gpu",), ("bfloat16", "float16")),
    "mosaic_tpu": Supports(("tpu",), ("float32", "bfloat16")),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """An implementation, and how it is run.

    Attributes:
      config: forces a kernel, or small blocks.
      interpreted: a context in which it runs on the CPU, whatever its own platform.
      quantized: whether the kernel takes K and V in 8 bits.
      shapes: of the shapes that it supports, how many are tested; on a GPU that is not its own, one is.
      ranges: of the ranges, those that are tested; all if empty.
      gradients_by_slot: whether calls with slots have gradients.
    """

    name: str
    config: object = None
    interpreted: Callable = contextlib.nullcontext
    quantized: bool = True
    shapes: int | None = None
    ranges: tuple[str, ...] = ()
    gradients_by_slot: bool = False

    @property
    def supports(self) -> Supports:
        claimed = SUPPORTS[self.name]
        return dataclasses.replace(claimed, quantized=claimed.quantized and self.quantized)

    @property
    def is_interpreted(self) -> bool:
        return self.interpreted is not contextlib.nullcontext

    @property
    def platforms(self) -> tuple[str, ...]:
        """Of CPUs and GPUs, and TPUs where there is one."""
        if self.is_interpreted:
            return ("cpu",)
        return tuple(p for p in self.supports.platforms if p != "tpu" or jax.default_backend() == "tpu")


VARIANTS = {name: Variant(name) for name in SUPPORTS} | {
    "reference": Variant("reference", gradients_by_slot=True),
    "xla": Variant("xla", gradients_by_slot=True),
    "xla_by_block": Variant(
        "xla", XlaConfig(max_scores=1, min_block=BLOCK), shapes=2, gradients_by_slot=True
    ),
    "mosaic_gpu_staircase": Variant("mosaic_gpu", StaircaseConfig(), quantized=False),
    "mosaic_gpu_interpreted": Variant(
        "mosaic_gpu",
        interpreted=interpreted.on_gpu,
        shapes=2,
        ranges=("empty inside", "one key inside", "ragged", "staircase"),
    ),
    "mosaic_gpu_staircase_interpreted": Variant(
        "mosaic_gpu",
        StaircaseConfig(),
        interpreted.on_gpu,
        quantized=False,
        shapes=1,
        ranges=("ragged", "staircase"),
    ),
    "mosaic_tpu_interpreted": Variant("mosaic_tpu", interpreted=interpreted.on_tpu, shapes=2),
}

# dtype, query heads per kv head, head_dim, with a bias
SHAPES = [
    ("bfloat16", 1, 64, True),
    ("float16", 4, 128, False),
    ("float32", 4, 80, True),
    ("bfloat16", 4, 80, False),
]
# Slots of the rows: in another order, several rows of one slot, fewer rows than slots.
SLOTS = {"permuted": (2, 0, 1), "shared": (1, 2, 1, 1, 0, 2, 1), "one of several": (2,)}
GRADIENT_SHAPES = [("float32", 4, 64, True), ("float16", 1, 80, True), ("bfloat16", 4, 128, False)]


def every_variant(names, shapes, most=None, *, interpreted=None, quantized=False):
    """Each variant on each platform that it runs on, over the shapes that it supports.

    Args:
      most: shapes of a variant at most.
      interpreted: shapes of an interpreted variant at most.
      quantized: only the variants that take K and V in 8 bits.
    """
    cases = []
    for name, variant in VARIANTS.items():
        if quantized and not variant.supports.quantized:
            continue
        for platform in variant.platforms:
            able = [shape for shape in shapes if shape[0] in variant.supports.dtypes]
            portable = platform == "gpu" and "cpu" in variant.platforms
            able = able[: 1 if portable else variant.shapes][:most]
            if variant.is_interpreted:
                able = able[:interpreted]
            marks = [pytest.mark.gpu] if platform == "gpu" else []
            cases += [pytest.param(name, platform, *shape, marks=marks) for shape in able]
    return pytest.mark.parametrize(f"variant, platform, {names}", cases)


def key_ranges(variant, gradients=False):
    """Name -> (start, end), int32 [B, T], for the ranges that are tested of a variant."""
    rng = np.random.default_rng(1)
    a, b = np.sort(rng.integers(0, S + 1, (2, B, T)), axis=0)
    grows = np.sort(rng.integers(0, S + 1, (B, T)), axis=1)
    grows[0, 0], grows[1] = 0, 0  # A query, and a row, that see nothing yet.

    def same(*bounds):
        return tuple(np.full((B, T), bound) for bound in bounds)

    ranges = {
        "empty": same(0, 0),
        "empty inside": same(7, 7),
        "one key": same(0, 1),
        "block - 1": same(0, BLOCK - 1),
        "block": same(0, BLOCK),
        "block + 1": same(0, BLOCK + 1),
        "full": same(0, S),
        "start > 0": same(5, 33),
        "one key inside": same(BLOCK + 5, BLOCK + 6),
        "second block": same(BLOCK, 2 * BLOCK),
        "last, shorter block": same(2 * BLOCK, S),
        "ragged": (a, b),
        "ragged over the batch": (np.full((B, T), 3), np.array([[3], [20], [S]]).repeat(T, axis=1)),
        "staircase": (np.zeros((B, T)), grows),
    }
    tested = VARIANTS[variant].ranges or ranges
    if gradients and VARIANTS[variant].is_interpreted:
        tested = ("ragged", "staircase")
    return {name: tuple(np.int32(bound) for bound in ranges[name]) for name in tested}


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
    """Keys, values and biases that no query sees become NaN or infinite."""
    keys = np.arange(k.shape[2])
    unseen = ~((start[..., None] <= keys) & (keys < end[..., None])).any(axis=1)  # [B, S]
    k, v, bias = k.copy(), v.copy(), None if bias is None else bias.copy()
    k.swapaxes(1, 2)[unseen] = np.nan
    v.swapaxes(1, 2)[unseen] = np.inf
    if bias is not None:
        bias[unseen] = np.nan
    return k, v, bias, unseen


def poisoned_quantized(x: QArray, unseen) -> QArray:
    """The same for a QArray: scales become NaN, and values where they can."""
    values, scale = np.array(x.values), np.where(unseen[:, None], np.nan, x.scale)
    if values.dtype != np.int8:
        values.swapaxes(1, 2)[unseen] = np.nan
    return QArray(jnp.asarray(values), jnp.asarray(scale, jnp.float32))


@functools.partial(jax.jit, static_argnames=("variant", "causal", "scale", "gradients"))
def run(q, k, v, bias, key_range, d_out, slots=None, *, variant, causal=False, scale=None, gradients=False):
    """The output of an implementation, or the gradients of q, k, v and bias."""
    variant = VARIANTS[variant]

    def call(q, k, v, bias):
        return attention(
            q,
            k,
            v,
            key_range,
            bias=bias,
            slots=slots,
            causal=causal,
            scale=scale,
            implementation=variant.name,
            config=variant.config,
        )

    with variant.interpreted():
        if not gradients:
            return call(q, k, v, bias)
        return jax.vjp(call, q, k, v, bias)[1](d_out)


def need(variant, platform, dtype, G, D, **call):
    """Skips calls that the implementation refuses, which it must not claim to support."""
    if platform != jax.default_backend():
        pytest.skip(f"runs on {platform}")
    variant, ranges, bias = VARIANTS[variant], call.get("ranges"), call.get("bias")
    claimed = variant.supports
    with variant.interpreted():
        unsupported = ATTENTION.implementations[variant.name].unsupported
        reason = unsupported(abstract(dtype, G, D, **call), platform)
    if reason is None:
        return
    assert dtype not in claimed.dtypes or (ranges and not claimed.ranges) or (bias and not claimed.bias), (
        reason
    )
    pytest.skip(reason)


def abstract(dtype, G, D, *, ranges=False, causal=False, bias=False, slots=False, stored=None):
    """Arguments without numbers."""
    queries = S if causal else T
    bound = jax.ShapeDtypeStruct((B, queries), jnp.int32)
    kv = jax.ShapeDtypeStruct((B, K, S, D), stored or dtype)
    if stored:
        kv = QArray(kv, jax.ShapeDtypeStruct((B, K, S), jnp.float32))
    return Arguments(
        q=jax.ShapeDtypeStruct((B, queries, K * G, D), dtype),
        k=kv,
        v=kv,
        kv_range=KeyRange(bound, bound) if ranges else None,
        bias=jax.ShapeDtypeStruct((B, S), jnp.float32) if bias else None,
        scale=1.0,
        causal=causal,
        slots=jax.ShapeDtypeStruct((B,), jnp.int32) if slots else None,
    )


def test_every_implementation_is_held_to_the_contract():
    assert set(SUPPORTS) == set(ATTENTION.implementations) == {v.name for v in VARIANTS.values()}


@pytest.mark.parametrize("name", SUPPORTS)
def test_takes_what_it_claims_to_support(name):
    claims = SUPPORTS[name]
    options = [(False, causal, bias) for causal in (False, True) for bias in (False, True)]
    options += [(True, False, bias) for bias in (False, True)]
    for platform in ("cpu", "gpu", "tpu"):
        for dtype, G, D, _ in [*SHAPES, ("float32", 1, 128, False), ("float16", 1, 64, True)]:
            for ranges, causal, bias in options:
                arguments = abstract(dtype, G, D, ranges=ranges, causal=causal, bias=bias)
                reason = ATTENTION.implementations[name].unsupported(arguments, platform)
                claimed = platform in claims.platforms and dtype in claims.dtypes
                if claimed and (claims.ranges or not ranges) and (claims.bias or not bias):
                    assert reason is None
                    assert ATTENTION.choose(arguments, name, platform) == name
                elif reason is not None:
                    with pytest.raises(Unsupported) as error:
                        ATTENTION.choose(arguments, name, platform)
                    assert reason in str(error.value)


def test_blocks_of_xla():
    assert VARIANTS["xla_by_block"].config.block_size(B * T * K, S) == BLOCK
    assert XlaConfig().block_size(B * T * K, S) == S


@every_variant("dtype, G, D, with_bias", SHAPES)
def test_ranges(variant, platform, dtype, G, D, with_bias):
    need(variant, platform, dtype, G, D, ranges=True, bias=with_bias)
    q, k, v, bias, _ = inputs(dtype, G, D)
    bias, scale = bias if with_bias else None, D**-0.5
    share = exact.tolerance(dtype, q, k, scale)
    for what, (start, end) in key_ranges(variant).items():
        expected = exact.attend(q, k, v, bias, start, end, scale)
        bad_k, bad_v, bad_bias, _ = poisoned(k, v, bias, start, end)
        out = run(q, bad_k, bad_v, bad_bias, KeyRange(start, end), None, variant=variant)
        assert out.dtype == dtype
        close(out, expected, share, what)
        assert not np.asarray(out)[start >= end].any(), f"{what}: an empty range gives exact zeros"


@every_variant("dtype, G, D", [shape[:3] for shape in SHAPES], 3, interpreted=1)
def test_dense(variant, platform, dtype, G, D):
    """Every key; causal; and scores near 1000, whose exponentials overflow, which grow from key to key."""
    need(variant, platform, dtype, G, D, causal=True)
    start, end = np.zeros((B, S), int), np.full((B, S), S)
    q, k, v, _, _ = inputs(dtype, G, D, queries=S)
    large_k = (k * np.linspace(0, 8, S)[:, None]).astype(k.dtype)
    cases = [
        ("every key", q[:, :T], k, False, None, end),
        ("large scores", q[:, :T], large_k, False, 4.0, end),
        ("causal", q, k, True, None, start + np.arange(1, S + 1)),
    ]
    # An interpreter takes its time for the many queries of the last.
    for what, q, k, causal, scale, end in cases[: 2 if VARIANTS[variant].is_interpreted else 3]:
        out = run(q, k, v, None, None, None, variant=variant, causal=causal, scale=scale)
        assert out.dtype == dtype
        scale = D**-0.5 if scale is None else scale
        expected = exact.attend(q, k, v, None, start[:, : q.shape[1]], end[:, : q.shape[1]], scale)
        close(out, expected, exact.tolerance(dtype, q, k, scale), what)


def hold_gradients(variant, dtype, scale, q, k, v, bias, bounds, d_out, found, what):
    """Compares gradients of q, k, v and bias with exact ones."""
    expected = exact.gradients(q, k, v, bias, *bounds, scale, d_out)
    share = exact.tolerance(dtype, q, k, scale)
    for name, actual, of in zip(("q", "k", "v", "bias"), found, expected, strict=True):
        if actual is None:
            assert bias is None
            continue
        assert actual.dtype == (np.float32 if name == "bias" else dtype)
        close(actual, of, share, f"{what}: d_{name}")


@every_variant("dtype, G, D, with_bias", GRADIENT_SHAPES, 2, interpreted=1)
def test_gradients_of_ranges(variant, platform, dtype, G, D, with_bias):
    need(variant, platform, dtype, G, D, ranges=True, bias=with_bias)
    q, k, v, bias, d_out = inputs(dtype, G, D, seed=2)
    bias = bias if with_bias else None
    for what, bounds in key_ranges(variant, gradients=True).items():
        bad_k, bad_v, bad_bias, unseen = poisoned(k, v, bias, *bounds)
        found = run(q, bad_k, bad_v, bad_bias, KeyRange(*bounds), d_out, variant=variant, gradients=True)
        hold_gradients(variant, dtype, D**-0.5, q, k, v, bias, bounds, d_out, found, what)
        d_q, d_k, d_v, d_bias = (None if x is None else np.asarray(x) for x in found)
        assert not d_q[bounds[0] >= bounds[1]].any(), what
        assert not d_k.swapaxes(1, 2)[unseen].any(), what
        assert not d_v.swapaxes(1, 2)[unseen].any(), what
        assert d_bias is None or not d_bias[unseen].any(), what


@every_variant("dtype, G, D", [shape[:3] for shape in GRADIENT_SHAPES], 2, interpreted=0)
def test_gradients_of_dense(variant, platform, dtype, G, D):
    need(variant, platform, dtype, G, D, causal=True)
    q, k, v, _, d_out = inputs(dtype, G, D, queries=S, seed=3)
    for causal in (False, True):
        end = np.full((B, S), np.arange(1, S + 1) if causal else S)
        found = run(q, k, v, None, None, d_out, variant=variant, causal=causal, gradients=True)
        bounds = np.zeros_like(end), end
        hold_gradients(variant, dtype, D**-0.5, q, k, v, None, bounds, d_out, found, f"{causal=}")


@every_variant("dtype, G, D", [("bfloat16", 4, 128), ("float16", 1, 64)], interpreted=1, quantized=True)
def test_quantized(variant, platform, dtype, G, D):
    """Compared with attention over what the QArrays stand for."""
    need(variant, platform, dtype, G, D, ranges=True, bias=True, stored="int8")
    q, wide_k, wide_v, bias, _ = inputs("float32", G, D)
    q = np.array(jnp.asarray(q, dtype))
    for stored in QUANTIZED:
        k, v = (quantize(x, stored, axes=3) for x in (wide_k, wide_v))
        exact_k, exact_v = (np.float64(x.values) * np.float64(x.scale)[..., None] for x in (k, v))
        # Keys, and queries, may be rounded once more for the product of the two.
        unit = float(jnp.finfo(dtype).eps)
        share = exact.tolerance(dtype, q, exact_k, D**-0.5, score_eps=unit)
        for what, (start, end) in key_ranges(variant).items():
            expected = exact.attend(q, exact_k, exact_v, bias, start, end, D**-0.5)
            _, _, bad_bias, unseen = poisoned(exact_k, exact_v, bias, start, end)
            bad_k, bad_v = (poisoned_quantized(x, unseen) for x in (k, v))
            out = run(q, bad_k, bad_v, bad_bias, KeyRange(start, end), None, variant=variant)
            assert out.dtype == dtype
            close(out, expected, share, f"{stored}: {what}")


@pytest.mark.parametrize("variant", ["xla", "mosaic_gpu_interpreted", "mosaic_tpu_interpreted"])
def test_quantized_has_no_gradients(variant):
    q = jnp.ones((1, 1, 1, 64), jnp.bfloat16)
    kv = quantize(jnp.ones((1, 1, 64, 64)), "int8", axes=3)

    def loss(q):
        return attention(q, kv, kv, implementation=VARIANTS[variant].name).sum()

    with VARIANTS[variant].interpreted(), pytest.raises(Unsupported, match="int8 has no gradients"):
        jax.grad(loss)(q)


def rows_of_slots(what, dtype, G, D):
    """Slots, queries and output gradients of rows, and ranges that differ; the last row sees nothing."""
    slots = np.int32(SLOTS[what])
    rng = np.random.default_rng(len(slots))
    q, d_out = (np.array(jnp.asarray(x, dtype)) for x in rng.standard_normal((2, len(slots), T, K * G, D)))
    start, end = np.sort(rng.integers(0, S + 1, (2, len(slots), T)), axis=0).astype(np.int32)
    if len(slots) > 1:
        end[-1] = start[-1]
    return slots, q, d_out, start, end


def unseen_by_slot(slots, start, end):
    """Which keys of each slot no query of any of its rows sees, [B, S]."""
    keys = np.arange(S)
    seen = ((start[..., None] <= keys) & (keys < end[..., None])).any(axis=1)
    return ~np.stack([seen[slots == slot].any(axis=0) for slot in range(B)])


def poison(x, unseen):
    """`x` [B, K, S, D] or a bias [B, S] with NaN in place of these keys, [B, S]."""
    if x is None:
        return None
    if isinstance(x, QArray):
        return poisoned_quantized(x, unseen)
    if x.ndim == 2:
        return np.where(unseen, np.nan, x)
    return np.where(unseen[:, None, :, None], np.nan, x).astype(x.dtype)


def hold_slots(variant, dtype, G, k, v, bias, *, stored=None, score_eps=0.0):
    """Compares rows with slots with exact ones over the keys and values of their slots.

    Args:
      k, v: of the exact results.
      stored: of the call, if they are not the same.
    """
    D = k.shape[-1]
    for what in ["shared"] if VARIANTS[variant].is_interpreted else SLOTS:
        slots, q, _, start, end = rows_of_slots(what, dtype, G, D)
        share = exact.tolerance(dtype, q, k, D**-0.5, score_eps=score_eps)
        own_bias = None if bias is None else bias[slots]
        expected = exact.attend(q, k[slots], v[slots], own_bias, start, end, D**-0.5)

        def attend(unseen, q=q, start=start, end=end, slots=slots):
            given = (poison(x, unseen) for x in (*(stored or (k, v)), bias))
            return run(q, *given, KeyRange(start, end), None, slots, variant=variant)

        out = attend(unseen_by_slot(slots, start, end))
        assert out.dtype == dtype
        close(out, expected, share, what)
        assert not np.asarray(out)[start >= end].any(), what
        # To the first row alone, keys that only others see are NaN.
        first = attend(unseen_by_slot(slots[:1], start[:1], end[:1]))[:1]
        close(first, exact.Exact(*(x[:1] for x in expected)), share, f"{what}: the first row")


@every_variant("dtype, G, D, with_bias", SHAPES, 2, interpreted=1)
def test_rows_with_slots(variant, platform, dtype, G, D, with_bias):
    need(variant, platform, dtype, G, D, ranges=True, bias=with_bias, slots=True)
    _, k, v, bias, _ = inputs(dtype, G, D)
    hold_slots(variant, dtype, G, k, v, bias if with_bias else None)


@every_variant("dtype, G, D", [("bfloat16", 4, 128)], interpreted=1, quantized=True)
def test_quantized_rows_with_slots(variant, platform, dtype, G, D):
    need(variant, platform, dtype, G, D, ranges=True, bias=True, slots=True, stored="int8")
    _, k, v, bias, _ = inputs("float32", G, D)
    for dtype_stored in QUANTIZED:
        stored = [quantize(x, dtype_stored, axes=3) for x in (k, v)]
        exact_k, exact_v = (np.float64(x.values) * np.float64(x.scale)[..., None] for x in stored)
        unit = float(jnp.finfo(dtype).eps)
        hold_slots(variant, dtype, G, exact_k, exact_v, bias, stored=stored, score_eps=unit)


@pytest.mark.parametrize("variant", ["reference", "xla", "xla_by_block"])
def test_slots_in_order_are_no_slots(variant):
    """Bit for bit, QArrays too."""
    q, k, v, bias, _ = inputs("bfloat16", 4, 64)
    ranges = KeyRange(*key_ranges(variant)["ragged"])
    for keys, values in ((k, v), [quantize(jnp.float32(x), "int8", axes=3) for x in (k, v)]):
        found = [
            run(q, keys, values, bias, ranges, None, slots, variant=variant) for slots in (None, np.arange(B))
        ]
        np.testing.assert_array_equal(*map(np.float32, found))


@pytest.mark.parametrize("variant", [name for name, x in VARIANTS.items() if x.gradients_by_slot])
@pytest.mark.parametrize("what", SLOTS)
def test_gradients_of_rows_with_slots(variant, what):
    """A slot's are the sum of its rows'."""
    dtype, G, D = "float32", 2, 64
    _, k, v, bias, _ = inputs(dtype, G, D)
    slots, q, d_out, start, end = rows_of_slots(what, dtype, G, D)
    unseen = unseen_by_slot(slots, start, end)
    given = (q, *(poison(x, unseen) for x in (k, v, bias)), KeyRange(start, end), d_out, slots)
    found = run(*given, variant=variant, gradients=True)
    d_q, *by_row = exact.gradients(q, k[slots], v[slots], bias[slots], start, end, D**-0.5, d_out)
    sums = [exact.Exact(*(np.zeros((B, *x.shape[1:])) for x in of)) for of in by_row]
    for total, of in zip(sums, by_row, strict=True):
        for x, rows in zip(total, of, strict=True):
            np.add.at(x, slots, rows)
    share = exact.tolerance(dtype, q, k, D**-0.5)
    for name, actual, of in zip(("q", "k", "v", "bias"), found, (d_q, *sums), strict=True):
        close(actual, of, share, f"{what}: d_{name}")
    for actual in found[1:]:
        actual = np.asarray(actual)
        assert not (actual if actual.ndim == 2 else actual.swapaxes(1, 2))[unseen].any()


@pytest.mark.parametrize(
    "variant", ["mosaic_gpu_interpreted", "mosaic_gpu_staircase_interpreted", "mosaic_tpu_interpreted"]
)
def test_kernels_have_no_gradients_of_rows_with_slots(variant):
    assert not VARIANTS[variant].gradients_by_slot
    q, kv, slots = (
        jnp.ones((1, 1, 1, 64), jnp.bfloat16),
        jnp.ones((2, 1, 64, 64), jnp.bfloat16),
        np.int32([1]),
    )
    name, config = VARIANTS[variant].name, VARIANTS[variant].config

    def loss(q):
        return attention(q, kv, kv, slots=slots, implementation=name, config=config).sum()

    with VARIANTS[variant].interpreted(), pytest.raises(Unsupported, match="no gradients of rows with slots"):
        jax.grad(loss)(q)
