"""The kernels for Hopper beyond the contract: many tiles, long banks, what a GPU is given, gradients.

B batch, T queries, S keys, K kv heads, G query heads per kv head, D head
"""

import functools

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moss_jax.ops.attention.arguments import QUANTIZED
from moss_jax.ops.attention.mosaic_gpu.bank import DecodeConfig
from ops.attention.test_contract import TOLERANCE, close, poisoned, quantized

from moss_jax.config import moss_tiny, moss_video_11b
from moss_jax.ops.attention import Arguments, KeyRange, attention, mosaic_gpu, reference, xla
from moss_jax.ops.attention.mosaic_gpu.decode import decode
from moss_jax.ops.attention.mosaic_gpu.staircase import StaircaseConfig, staircase

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
        "windows that move": (t * (S // 2) // T, t * (S // 2) // T + S // 2),
        "gaps": (np.where(t % 2, 3, S - 70), np.where(t % 2, 90, S - 5)),
    }
    shifted = {
        name: (np.stack([start, start + 1]), np.stack([end, np.maximum(end - 9, 0)]))
        for name, (start, end) in ranges.items()
    }
    return {name: (np.int32(start), np.int32(end)) for name, (start, end) in shifted.items()}


def compare(kernel, q, k, v, bias, d_out, start, end, what):
    """With plain XLA on float32, forward and, if there is a `d_out`, backward; what no query sees is NaN."""
    bad_k, bad_v, bad_bias, unseen = poisoned(k, v, bias, start, end)

    def call(attend, q, k, v, bias):
        return attend(Arguments(q, k, v, KeyRange(start, end), bias, q.shape[-1] ** -0.5, causal=False))

    exact = [None if x is None else jnp.asarray(x, jnp.float32) for x in (q, k, v, bias)]
    if d_out is None:
        out = jax.jit(functools.partial(call, kernel))(q, bad_k, bad_v, bad_bias)
        close(out, np.float64(call(reference.attend, *exact)), TOLERANCE[q.dtype.name][0], what)
        return
    out, pull = jax.vjp(jax.jit(functools.partial(call, kernel)), q, bad_k, bad_v, bad_bias)
    exact_out, exact_pull = jax.vjp(functools.partial(call, xla.attend), *exact)
    close(out, np.float64(exact_out), TOLERANCE[q.dtype.name][0], what)
    gradients = zip("qkvb", pull(d_out), exact_pull(jnp.float32(d_out)), strict=True)
    for name, actual, expected in gradients:
        if expected is not None:
            close(actual, np.float64(expected), TOLERANCE[q.dtype.name][1], f"{what}: d_{name}")
    d_k = np.asarray(pull(d_out)[1], np.float32)
    assert not d_k.swapaxes(1, 2)[unseen].any(), what


@pytest.mark.parametrize("what", ["windows that move", "gaps"])
def test_decode_over_many_tiles(what):
    """Several splits of several tiles, with fewer rooms for tiles than tiles."""
    T, S = 3, 429
    with interpreted.on_gpu():
        compare(
            lambda a: decode(a, DecodeConfig(block_kv=64, stages=2, blocks=8)),
            *inputs(T, S)[:4],
            None,
            *key_ranges(T, S)[what],
            what,
        )


def test_staircase_over_many_tiles():
    """Two blocks of queries, five tiles of keys, gradients too."""
    T, S = 140, 290
    small = StaircaseConfig(block_kv=64)
    start, end = (x[:1] for x in key_ranges(T, S)["windows that move"])
    with interpreted.on_gpu():
        compare(
            lambda a: staircase(a, small), *inputs(T, S, batch=1, kv_heads=1), start, end, "windows that move"
        )


def abstract(T, S, heads, kv_heads, head_dim, dtype="bfloat16", stored=None, bias=False):
    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    kv = array(1, kv_heads, S, head_dim, dtype=stored or dtype)
    scale = array(1, kv_heads, S, dtype="float32") if stored else None
    bounds = KeyRange(array(1, T, dtype="int32"), array(1, T, dtype="int32"))
    b = array(1, S, dtype="float32") if bias else None
    return Arguments(array(1, T, heads, head_dim), kv, kv, bounds, b, 0.1, False, scale, scale)


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
    yield abstract(1608, 1608, 16, 16, 80, dtype="float16")


@pytest.mark.parametrize(
    "arguments", list(shapes()), ids=lambda a: f"{a.q.shape[1]}x{a.k.shape[2]}-{a.k.dtype}"
)
def test_lowers_for_a_gpu_without_one(arguments):
    """As far as that goes: to the kernel's module, not to machine code."""

    def call(a):
        return mosaic_gpu.attend(a)

    assert mosaic_gpu.unsupported(arguments, "gpu") is None
    text = jax.jit(call).trace(arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_configurations_are_checked():
    with pytest.raises(ValueError, match="block_kv is a multiple of 64, not 96"):
        DecodeConfig(block_kv=96)
    with pytest.raises(ValueError, match="block_q_dq is a multiple of 64, not 32"):
        StaircaseConfig(block_q_dq=32)


def test_quantized_has_no_gradients():
    q, k, v, _, _ = inputs(1, 64)
    (k, k_scale), (v, v_scale) = (quantized(x.astype(np.float32), "int8") for x in (k, v))

    def loss(q):
        return attention(q, k, v, k_scale=k_scale, v_scale=v_scale, implementation="mosaic_gpu").sum()

    with interpreted.on_gpu(), pytest.raises(ValueError, match="int8 has no gradients"):
        jax.grad(loss)(jnp.asarray(q))


LENGTHS = (1, 7, 64, 101, 1616, 25_856, 500_000)


def test_decode_for_a_prompt():
    """More rows than fit a block; the last block is not full, and the blocks of a slot share its keys."""
    T, S = 37, 300
    q, k, v, _, _ = inputs(T, S, kv_heads=1, group=4)
    start, end = key_ranges(T, S)["windows that move"]
    with interpreted.on_gpu():
        compare(mosaic_gpu.attend, q, k, v, None, None, start, end, "a prompt")


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 2, 5, 16, 40, 64])
@pytest.mark.parametrize("S", LENGTHS)
def test_banks_of_every_length(S, T):
    """32 query heads on 8 kv heads; ranges that differ, and don't fall on tiles."""
    rng = np.random.default_rng(S)
    q, k, v, bias, _ = inputs(T, S, batch=1, kv_heads=8, group=4, head_dim=128)
    end = rng.integers((S + 1) // 2, S + 1, (1, T)).astype(np.int32)
    start = np.minimum(rng.integers(0, S // 2 + 1, (1, T)), end - 1).astype(np.int32)
    compare(mosaic_gpu.attend, q, k, v, bias if S < 2000 else None, None, start, end, f"{S} keys")


@pytest.mark.gpu
@pytest.mark.parametrize("stored", QUANTIZED)
@pytest.mark.parametrize("S", LENGTHS)
def test_quantized_banks_of_every_length(S, stored):
    q, k, v, _, _ = inputs(2, S, batch=1, kv_heads=8, group=4, head_dim=128)
    (k, k_scale), (v, v_scale) = (quantized(x.astype(np.float32), stored) for x in (k, v))
    end = np.array([[S, max(S - 3, 0)]], np.int32)
    a = Arguments(q, k, v, KeyRange(0 * end, end), None, 128**-0.5, False, k_scale, v_scale)
    exact = jax.jit(reference.attend)(
        Arguments(jnp.float32(q), k, v, KeyRange(0 * end, end), None, 128**-0.5, False, k_scale, v_scale)
    )
    close(jax.jit(mosaic_gpu.attend)(a), np.float64(exact), TOLERANCE["bfloat16"][0], stored)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("what", ["staircase", "windows that move", "gaps"])
def test_many_queries(what, head_dim):
    """Hundreds of queries over thousands of keys, with a bias, forward and backward."""
    T, S = 700, 3000
    these = inputs(T, S, kv_heads=2, group=4, head_dim=head_dim)
    compare(mosaic_gpu.attend, *these, *key_ranges(T, S)[what], what)
