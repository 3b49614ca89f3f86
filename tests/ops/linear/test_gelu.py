"""The exact GELU behind a bias."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.contract import Case, Contract, Draw, on_cpu, refuses
from ops.definitions import Rounded, exact, half_step
from ops.definitions import gelu as define_gelu
from scipy.special import ndtr

from moss_jax.ops.linear import GELU, gelu
from moss_jax.ops.linear.gelu_base import Arguments
from moss_jax.ops.linear.mosaic_gpu.bias_gelu import Config, biased_gelu

KERNEL, N = "bias_gelu", 256
BIASED = {"bias": "bfloat16"}
# In rows, so that every implementation takes them.
NUMBERS = np.arange(1 << 16, dtype=np.uint16).view(jnp.bfloat16).reshape(-1, N)


class TestGelu(Contract):
    op = GELU
    keeps_float32 = supports_vjp = (KERNEL,)
    cases = (
        Case("bias", KERNEL, shape=(2, 3, 7, 2 * N), **BIASED),
        Case("no bias", KERNEL, shape=(37, 3 * N)),
        Case("one block", KERNEL, Config(32), shape=(33, N), **BIASED),
        Case("blocks of 4 rows", KERNEL, Config(4), shape=(33, N)),
        Case("a wider bias", shape=(5, N), bias="float32"),
        Case("float32", shape=(5, 24), bias="float32", dtype="float32"),
    )
    real = tuple(
        Case(f"{frames} frames", KERNEL, shape=(frames * 1608, 5120), bias=bias)
        for frames, bias in ((1, "bfloat16"), (1, None), (8, "bfloat16"))
    )
    unsupported = (
        (KERNEL, {"dtype": "float32"}, "it takes bfloat16, not float32"),
        (KERNEL, {"bias": "float32"}, "it takes bfloat16, not float32"),
        (KERNEL, {"shape": (16, 384)}, "N = 384 is not a multiple of 256"),
        (KERNEL, {"shape": (3, 5, N)}, "it takes 16 rows or more, not 15"),
    )

    def make(self, draw: Draw, *, shape=(16, N), dtype="bfloat16", bias=None):
        return Arguments(draw.rows(*shape, dtype=dtype), draw(shape[-1], dtype=bias) if bias else None)

    def define(self, a: Arguments, kept):
        y = Rounded(a.x) if a.bias is None else (Rounded(a.x) + a.bias).rounded(kept)
        return define_gelu(y.rounded(a.x.dtype) if a.bias is not None else y, a.x.dtype)


@pytest.fixture(params=[KERNEL, "xla", "reference"])
def run(request):
    with on_cpu(request.param):
        yield functools.partial(gelu, implementation=request.param)


def test_every_bfloat16_number(run):
    """Beside rounding, the fit of Phi's tail is off by a tenth of a half step up to 5, and one beyond."""
    x, found = exact(NUMBERS), exact(run(NUMBERS))
    np.testing.assert_array_equal(found[np.isnan(x) | (x == np.inf)], x[np.isnan(x) | (x == np.inf)])
    found, x = found[np.isfinite(x)], x[np.isfinite(x)]
    bound = half_step(x * ndtr(x), "bfloat16") * np.where(np.abs(x) <= 5, 1.12, 2.2)
    assert (np.abs(found - x * ndtr(x)) <= bound + 2e-37).all()  # Below, Phi is subnormal in float32.


def test_the_slope_of_every_bfloat16_number(run):
    """Forwards and backwards."""
    x = jnp.where(jnp.isfinite(NUMBERS), NUMBERS, 0)
    expected = ndtr(exact(x)) + exact(x) * np.exp(-(exact(x) ** 2) / 2) / math.sqrt(2 * math.pi)
    _, forwards = jax.jvp(run, (x,), (jnp.ones_like(x),))
    for slope in (forwards, jax.grad(lambda x: run(x).sum())(x)):
        # Rounded, and off by the fit of Phi's tail.
        assert (np.abs(exact(slope) - expected) <= half_step(expected, "bfloat16") + 2.5e-4).all()


def test_the_backward_pass_keeps_one_array_of_the_inputs_size():
    x, bias = jnp.ones((16, N), jnp.bfloat16), jnp.ones(N, jnp.bfloat16)
    for implementation in (KERNEL, "xla"):
        with on_cpu(implementation):
            _, pull = jax.vjp(jax.jit(functools.partial(gelu, implementation=implementation)), x, bias)
        kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "size", 0) > 1]
        assert [(leaf.shape, leaf.dtype) for leaf in kept] == [((16, N), jnp.bfloat16)]


def test_what_does_not_fit():
    with refuses("bias has the trailing axes of x, (4, 256); got (128,)"):
        gelu(jnp.ones((4, N)), jnp.ones(128))
    with refuses("rows is a multiple of 4, not 6"):
        Config(6)
    with refuses("15 rows are fewer than a block's 16"):
        biased_gelu(Arguments(jnp.ones((15, N), jnp.bfloat16)), Config(16))
