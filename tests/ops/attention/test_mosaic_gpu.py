"""Split-K decode and staircase kernels beyond the contract: many tiles, long banks, lowering, gradients.

B batch, T queries, S keys, K kv heads, G query heads per kv head, D head
"""

import dataclasses

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.attention import exact
from ops.attention.exact import Exact, close
from ops.attention.test_contract import poisoned

from moss_jax.config import moss_tiny, moss_video_11b
from moss_jax.ops.attention import Arguments, KeyRange, mosaic_gpu
from moss_jax.ops.attention.mosaic_gpu import DecodeConfig, StaircaseConfig
from moss_jax.ops.qarray import QUANTIZED, QArray, dequantize, quantize

B, K, G, D = 2, 2, 2, 64


def inputs(T, S, *, batch=B, kv_heads=K, group=G, head_dim=D, dtype="bfloat16", seed=0):
    """q, k, v in `dtype`, a bias and the gradient of the output."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return np.array(jnp.asarray(rng.standard_normal(shape, np.float32), dtype))

    q, d_out = (draw(batch, T, kv_heads * group, head_dim) for _ in range(2))
    k, v = (draw(batch, kv_heads, S, head_dim) for _ in range(2))
    return q, k, v, rng.standard_normal((batch, S)).astype(np.float32), d_out


def key_ranges(T, S):
    """Name -> (start, end), int32 [B, T]; the second row of the batch is shifted."""
    t = np.arange(T)
    ranges = {
        "staircase": (0 * t, (t + 1) * S // T),
        "moving windows": (t * (S // 2) // T, t * (S // 2) // T + S // 2),
        "gaps": (np.where(t % 2, 3, S - 70), np.where(t % 2, 90, S - 5)),
    }
    shifted = {
        name: (np.stack([start, start + 1]), np.stack([end, np.maximum(end - 9, 0)]))
        for name, (start, end) in ranges.items()
    }
    return {name: (np.int32(start), np.int32(end)) for name, (start, end) in shifted.items()}


def hold(config, q, k, v, bias, d_out, start, end, what):
    """Compares output and gradients with exact ones; what no query sees is NaN."""
    scale = q.shape[-1] ** -0.5
    share = exact.tolerance(q.dtype, q, k, scale)
    bad_k, bad_v, bad_bias, unseen = poisoned(k, v, bias, start, end)

    @jax.jit
    def call(q, k, v, bias):
        return mosaic_gpu.apply(Arguments(q, k, v, KeyRange(start, end), bias, scale), config)

    if d_out is None:
        out = call(q, bad_k, bad_v, bad_bias)
        return close(out, exact.attend(q, k, v, bias, start, end, scale), share, what)
    out, pull = jax.vjp(call, q, bad_k, bad_v, bad_bias)
    close(out, exact.attend(q, k, v, bias, start, end, scale), share, what)
    found = pull(d_out)
    expected = exact.gradients(q, k, v, bias, start, end, scale, d_out)
    for name, actual, of in zip("qkvb", found, expected, strict=True):
        close(actual, of, share, f"{what}: d_{name}")
    assert not np.asarray(found[1], np.float32).swapaxes(1, 2)[unseen].any(), what
    return None


def test_decode_over_many_tiles():
    """Several splits of several tiles, with fewer pipeline stages than tiles."""
    T, S = 3, 429
    config = DecodeConfig(block_kv=64, stages=2, blocks=8)
    with interpreted.on_gpu():
        for what in ("moving windows", "gaps"):
            hold(config, *inputs(T, S)[:4], None, *key_ranges(T, S)[what], what)


def test_decode_for_a_prompt():
    """More rows than fit a block; the last block is not full, and the blocks of a slot share its keys."""
    T, S = 37, 300
    q, k, v, _, _ = inputs(T, S, kv_heads=1, group=4)
    with interpreted.on_gpu():
        hold(DecodeConfig(), q, k, v, None, None, *key_ranges(T, S)["moving windows"], "a prompt")


@pytest.mark.parametrize("what", ["staircase", "moving windows", "gaps"])
@pytest.mark.parametrize("splits", [1, 2])
def test_decode_in_8_bits_for_a_prompt(what, splits):
    """Two blocks of queries, the last not full, whose ranges leave gaps; what no query sees is NaN."""
    T, S = 11, 300
    q, k, v, _, _ = inputs(T, S, kv_heads=1, group=4)
    start, end = key_ranges(T, S)[what]
    k, v = (quantize(jnp.float32(x), "int8", axes=3) for x in (k, v))
    scale = q.shape[-1] ** -0.5
    expected = exact.attend(q, *map(np.asarray, map(dequantize, (k, v))), None, start, end, scale)
    share = exact.tolerance(q.dtype, q, np.asarray(dequantize(k)), scale, score_eps=2.0**-11)
    bad = [dataclasses.replace(x, scale=poisoned_scale(x.scale, start, end)) for x in (k, v)]
    with interpreted.on_gpu():
        config = DecodeConfig(block_kv=128, stages=1, blocks=4 * splits)
        out = jax.jit(
            lambda q, k, v: mosaic_gpu.apply(Arguments(q, k, v, KeyRange(start, end), None, scale), config)
        )(q, *bad)
    close(out, expected, share, what)


def poisoned_scale(scale, start, end):
    """Scales [B, K, S] with NaN for keys that no query sees."""
    key = np.arange(scale.shape[-1])
    seen = ((start[..., None] <= key) & (key < end[..., None])).any(axis=1)
    return jnp.where(seen[:, None], scale, jnp.nan)


def test_staircase_over_many_tiles():
    """Two blocks of queries, five tiles of keys, gradients too."""
    T, S = 140, 290
    start, end = (x[:1] for x in key_ranges(T, S)["moving windows"])
    with interpreted.on_gpu():
        these = inputs(T, S, batch=1, kv_heads=1)
        hold(StaircaseConfig(block_kv=64), *these, start, end, "moving windows")


def abstract(T, S, heads, kv_heads, head_dim, dtype="bfloat16", stored=None, bias=False, rows=None):
    """Arguments without numbers: one slot, and that many rows of it if any are named."""

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    kv = array(1, kv_heads, S, head_dim, dtype=stored or dtype)
    kv = QArray(kv, array(1, kv_heads, S, dtype="float32")) if stored else kv
    R = rows or 1
    bounds = KeyRange(array(R, T, dtype="int32"), array(R, T, dtype="int32"))
    bias, slots = array(1, S, dtype="float32") if bias else None, array(R, dtype="int32") if rows else None
    return Arguments(array(R, T, heads, head_dim), kv, kv, bounds, bias, 0.1, slots=slots)


def shapes():
    """The cross-attention of both models, and the vision encoder's head_dim."""
    for preset in (moss_video_11b, moss_tiny):
        config = preset()
        d = config.decoder
        keys = 256 * config.vectors_per_frame
        heads = (d.num_heads, d.num_kv_heads, d.head_dim)
        yield abstract(1, keys, *heads)
        yield abstract(512, keys, *heads, bias=True)
        if d.head_dim % 64 == 0:
            yield from (abstract(4, keys, *heads, stored=stored) for stored in QUANTIZED)
        yield abstract(32, keys, *heads, rows=9, bias=True)
        yield abstract(512, keys, *heads, rows=3)
    yield abstract(4, 1616, 32, 8, 128, stored="int8", rows=9)
    yield abstract(1608, 1608, 16, 16, 80, dtype="float16")


@pytest.mark.parametrize(
    "arguments", list(shapes()), ids=lambda a: f"{len(a.q)}x{a.q.shape[1]}x{a.k.shape[2]}-{a.k.dtype}"
)
def test_lowers_for_a_gpu_without_one(arguments):
    """To the kernel's module, not to machine code."""

    def call(a):
        return mosaic_gpu.apply(a)

    assert mosaic_gpu.unsupported(arguments, "gpu") is None
    text = jax.jit(call).trace(arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_configurations_are_checked():
    with pytest.raises(ValueError, match="block_kv is a multiple of 64, not 96"):
        DecodeConfig(block_kv=96)
    with pytest.raises(ValueError, match="block_q_dq is a multiple of 64, not 32"):
        StaircaseConfig(block_q_dq=32)


def hold_on_device(a: Arguments, what: str):
    """Compares outputs with exact ones, computed where the kernel runs."""
    # float16, in which queries over K and V in 8 bits are multiplied, has 11 bits.
    score_eps = 2.0**-11 if a.quantized else 0
    k = dequantize(a.k) if a.slots is None else dequantize(a.k)[a.slots]
    share = exact.tolerance(a.q.dtype, a.q, k, a.scale, score_eps=score_eps)
    out = jax.jit(lambda a: mosaic_gpu.apply(a))(a)
    close(out, Exact(*map(np.float64, exact.attend_on_device(a))), share, what)


def kv_heads(S):
    """The 11B's 8; one for the longest bank, which NumPy takes long to draw."""
    return 8 if S < 100_000 else 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("T", "S"),
    [(1, 1), (2, 7), (16, 64), (5, 101), (1, 1616), (40, 1616), (1, 25_856), (64, 25_856), (1, 500_000)],
)
def test_banks_of_every_length(T, S):
    """Ranges that differ, and are not aligned with tiles."""
    rng = np.random.default_rng(S)
    q, k, v, bias, _ = inputs(T, S, batch=1, kv_heads=kv_heads(S), group=4, head_dim=128)
    end = rng.integers((S + 1) // 2, S + 1, (1, T)).astype(np.int32)
    start = np.minimum(rng.integers(0, S // 2 + 1, (1, T)), end - 1).astype(np.int32)
    bias = bias if S < 2000 else None
    hold_on_device(Arguments(q, k, v, KeyRange(start, end), bias, 128**-0.5), f"{S} keys")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("stored", "S"), [("int8", 1), ("float8_e4m3fn", 7), ("int8", 1616), *((x, 500_000) for x in QUANTIZED)]
)
def test_quantized_banks_of_every_length(S, stored):
    q, k, v, _, _ = inputs(2, S, batch=1, kv_heads=kv_heads(S), group=4, head_dim=128)
    k, v = (quantize(jnp.float32(x), stored, axes=3) for x in (k, v))
    end = np.array([[S, max(S - 3, 0)]], np.int32)
    hold_on_device(Arguments(q, k, v, KeyRange(0 * end, end), None, 128**-0.5), stored)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("T", "S", "stored", "rows"),
    [
        (1, 101, None, 8),
        (1, 25_856, None, 8),
        (1, 2000, None, 160),
        (32, 4096, None, 8),
        (90, 3000, None, 8),
        (300, 3000, None, 8),
        (1, 25_856, "int8", 8),
        (1, 2000, "int8", 160),
        (16, 4096, "int8", 8),
        (16, 2000, "int8", 80),
        (16, 4096, "float8_e4m3fn", 8),
    ],
)
def test_rows_with_slots(T, S, stored, rows):
    """Rows of one token and chunks of many over four slots, one of which nobody names, and which is NaN.

    With many rows, their keys are not split.
    """
    slots = np.resize(np.int32([2, 0, 1, 1, 1, 2, 0, 1]), rows)
    rng = np.random.default_rng(T)
    _, k, v, bias, _ = inputs(T, S, batch=4, kv_heads=2, group=4, head_dim=128)
    k[3], v[3], bias[3] = np.nan, np.nan, np.nan
    if stored:
        k, v = (quantize(jnp.float32(x), stored, axes=3) for x in (k, v))
    q = jnp.asarray(rng.standard_normal((len(slots), T, 8, 128)), "bfloat16")
    end = rng.integers(0, S + 1, (len(slots), 1)) + np.arange(T)
    tokens = np.where(np.arange(len(slots)) % 3, T, 1)[:, None]
    end = np.where(np.arange(T) < tokens, end, 0).clip(0, S).astype(np.int32)
    ranges = KeyRange(np.zeros_like(end), end)
    a = Arguments(q, k, v, ranges, bias, 128**-0.5, slots=slots)
    hold_on_device(jax.tree.map(jnp.asarray, a), f"{T} x {S}")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_many_queries(head_dim):
    """Hundreds of queries over thousands of keys, with a bias, forward and backward."""
    T, S = 700, 3000
    these = inputs(T, S, kv_heads=2, group=4, head_dim=head_dim)
    for what, bounds in key_ranges(T, S).items():
        hold(None, *these, *bounds, what)
