"""The contract of what follows attention, which implementation takes a call, what is refused.

B batch/slot, T tokens, M = B * T rows, D embedding, K numbers of all heads, F hidden
"""

import contextlib
import dataclasses
import re
from unittest import mock

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.ops.dispatch import Unsupported
from moss_jax.ops.post_attention import IMPLEMENTATIONS, Arguments, choose, mosaic_gpu, post_attention
from moss_jax.ops.post_attention.mosaic_gpu import Config

D = K = F = 256
EPS = 1e-5


# Three blocks of several units each, of `down` at most 8; fewer stages than tiles.
SMALL = Config(blocks=3, block_k=128, stages=2, part=128, part_down=128)
MOST_UNITS = 8


@contextlib.contextmanager
def on_gpu(config=SMALL):
    """The kernel by interpretation; `interpreted` says what else is replaced.

    The blocks run one after the other, so none may wait for another: each phase has a pass over all of them,
    or there is only one block, which runs as on a GPU.
    """

    def apply(a):
        return mosaic_gpu.few_rows(a, config, passes=1 if config.blocks == 1 else 3)

    def arrive(counters, counter, expected):
        def one(thread, last):
            at, there = jnp.maximum(counter[thread], 0), counter[thread] >= 0
            old = counters[at]
            counters[at] = jnp.where(there, (old + 1) % expected, old)
            return last.at[thread].set(there & (old + 1 == expected))

        return jax.lax.fori_loop(0, MOST_UNITS, one, jnp.zeros(counter.shape, jnp.int32))

    replaced = {
        "apply": apply,
        "unsupported": lambda arguments, _: refuses(arguments, "gpu"),
        "arrive": arrive,
        "prefetch": lambda ref: None,
        "grid_barrier": lambda counters, blocks: None,
    }
    refuses = mosaic_gpu.unsupported
    with interpreted.on_gpu(), mock.patch.multiple(mosaic_gpu, **replaced):
        yield


def make_arguments(rows=1, stored="int8", *, D=D, K=K, F=F, gates=(None, None)) -> Arguments:
    """Both branches are about as large as x."""
    rng = np.random.default_rng(0)

    def weights(outputs, inputs, size):
        codes = rng.integers(0, 256, (outputs, inputs), np.uint8)
        if stored == "float8_e4m3fn":
            codes[codes % 128 == 127] = 0  # NaN.
        codes = codes.view(stored)
        scale = size * rng.uniform(0.5, 1.5, outputs) / (np.std(np.float32(codes[:8])) * np.sqrt(inputs))
        return jnp.asarray(codes), jnp.asarray(scale, jnp.float32)

    def bfloat16(x):
        return jnp.asarray(x, jnp.bfloat16)

    out, out_scale = weights(D, K, 1)
    gate_up, gate_up_scale = weights(2 * F, D, 1)
    down, down_scale = weights(D, F, 4)
    return Arguments(
        bfloat16(rng.standard_normal((rows, D))),
        bfloat16(rng.standard_normal((rows, K))),
        out=out,
        out_scale=out_scale,
        norm=bfloat16(rng.uniform(0.5, 1.5, D)),
        gate_up=gate_up,
        gate_up_scale=gate_up_scale,
        down=down,
        down_scale=down_scale,
        attention_gate=gates[0],
        mlp_gate=gates[1],
        eps=EPS,
    )


def call(a: Arguments, shape=None, **options):
    """By the public function, with rows of this shape."""
    given = {field.name: getattr(a, field.name) for field in dataclasses.fields(a)} | options
    shape = shape or (1, a.x.shape[0])
    x, heads = (given.pop(name).reshape(*shape, -1) for name in ("x", "heads"))
    return post_attention(x, heads, **given)


def close(actual, a: Arguments, tolerance=8e-3):
    """To the reference: the error is small beside what was added to x."""
    assert actual.dtype == a.x.dtype
    expected = np.float64(jax.jit(IMPLEMENTATIONS["reference"].apply)(a))
    error = np.linalg.norm(np.float64(actual).reshape(expected.shape) - expected)
    error /= np.linalg.norm(expected - np.float64(a.x))
    assert error < tolerance, f"off by {error:.2e}"


@pytest.fixture(params=["mosaic_gpu", "xla"])
def implementation(request, platform):
    """Each by name; the kernel for a GPU runs interpreted on others."""
    with on_gpu() if request.param == "mosaic_gpu" and platform != "gpu" else contextlib.nullcontext():
        yield request.param


def test_is_the_reference(implementation):
    a = make_arguments(1, "int8")
    out = call(a, (1, 1), implementation=implementation)
    assert out.shape == (1, 1, D)
    close(out, a)


def test_gates(implementation):
    """A number for all rows, or one for each; nothing comes through one that is 0."""
    a = make_arguments(3, "float8_e4m3fn")
    one, each = jnp.full(1, -0.5, jnp.bfloat16), jnp.asarray([[0.0], [2.0], [0.0]])
    out = call(a, (3, 1), attention_gate=one, mlp_gate=each, implementation=implementation)
    assert out.shape == (3, 1, D)
    close(out, dataclasses.replace(a, attention_gate=jnp.full(3, -0.5), mlp_gate=each[:, 0]))
    branch = jnp.float32(out[::2, 0]) - jnp.float32(a.x[::2])
    heads = a.heads[::2].astype(jnp.float32) @ a.out.T.astype(jnp.float32) * a.out_scale
    np.testing.assert_allclose(branch, -0.5 * heads, atol=0.04)


def test_the_definition():
    """In float64, of float32 weights and rows."""
    a = dataclasses.replace(make_arguments(2), mlp_gate=jnp.asarray([0.5, 2.0]))
    a = dataclasses.replace(a, x=a.x.astype(jnp.float32), heads=a.heads.astype(jnp.float32))
    x, heads, norm, out, gate_up, down = (
        np.float64(y.astype(jnp.float32)) for y in (a.x, a.heads, a.norm, a.out, a.gate_up, a.down)
    )
    x = x + heads @ out.T * np.float64(a.out_scale)
    n = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPS) * norm
    g, u = np.split(n @ gate_up.T * np.float64(a.gate_up_scale), 2, axis=1)
    y = x + np.array([[0.5], [2]]) * ((g / (1 + np.exp(-g)) * u) @ down.T * np.float64(a.down_scale))
    for implementation in ("reference", "xla"):
        np.testing.assert_allclose(call(a, implementation=implementation)[0], y, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_rows():
    a = make_arguments(2)
    a = dataclasses.replace(a, x=a.x.astype(jnp.float32), heads=a.heads.astype(jnp.float32))

    def total(implementation, x, heads):
        return (call(dataclasses.replace(a, x=x, heads=heads), implementation=implementation) ** 2).sum()

    xla, reference = (jax.grad(total, (1, 2))(name, a.x, a.heads) for name in ("xla", "reference"))
    for actual, expected in zip(xla, reference, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


def abstract(*, rows=1, D=D, K=K, F=F, stored="int8", dtype="bfloat16", mixed=False) -> Arguments:
    shape = jax.ShapeDtypeStruct
    return Arguments(
        shape((rows, D), dtype),
        shape((rows, K), dtype),
        out=shape((D, K), "float8_e4m3fn" if mixed else stored),
        out_scale=shape((D,), "float32"),
        norm=shape((D,), "bfloat16"),
        gate_up=shape((2 * F, D), stored),
        gate_up_scale=shape((2 * F,), "float32"),
        down=shape((D, F), stored),
        down_scale=shape((D,), "float32"),
        eps=EPS,
    )


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
        ({"K": 192}, "K = 192 is not a multiple of 128"),
        ({"D": 192}, "D = 192 is not a multiple of 128"),
        ({"F": 320}, "F = 320 is not a multiple of 128"),
        ({"dtype": "float32"}, "it takes x and heads in bfloat16, not float32 and float32"),
        ({"mixed": True}, "it takes weights of one dtype, not float8_e4m3fn, int8, int8"),
        ({"rows": 8, "D": 128, "K": 128, "F": 128 * 20001}, "a block takes .* bytes of shared memory"),
    ],
)
def test_a_forced_name_that_cannot_fails_with_the_reason(arguments, reason):
    with pytest.raises(Unsupported, match=f"'mosaic_gpu' cannot be used: {reason}"):
        choose(abstract(**arguments), "mosaic_gpu", platform="gpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"heads": (2, 128)},
            "with 2 rows, 256 embedding, 128 in the heads, 256 hidden, out must be (256, 128)",
        ),
        ({"gate_up": (F, D)}, "gate_up must be (512, 256); got (256, 256)"),
        ({"down_scale": (F, 1)}, "down_scale must be (256,); got (256, 1)"),
        ({"norm": (1,)}, "norm must be (256,); got (1,)"),
        ({"down": "bfloat16"}, "weights are in int8 or float8_e4m3fn, not bfloat16"),
    ],
)
def test_what_does_not_fit(changes, message):
    for name, change in changes.items():
        old = getattr(abstract(rows=2), name)
        shape, dtype = (old.shape, change) if isinstance(change, str) else (change, old.dtype)
        changes = {name: jax.ShapeDtypeStruct(shape, dtype)}
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(abstract(rows=2), **changes)
