"""The fused residual add and norm."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from ops.contract import Case, Contract, Draw, refuses
from ops.definitions import Rounded, exact, norm

from moss_jax.ops.norm import ADD_NORM, Norm, Residual, add_norm
from moss_jax.ops.norm.base import Arguments
from moss_jax.ops.norm.mosaic_gpu import Config, apply, default_config

KERNEL, FLOAT8 = "mosaic_gpu", "float8_e4m3fn"
Layer = functools.partial(Case, norm="layer")


class TestAddNorm(Contract):
    """Cases cover both ways to deal rows, blocks that move back, loads of 4 to 16 bytes."""

    op = ADD_NORM
    rows = ("x", "add", "scale")
    keeps_float32 = supports_vjp = (KERNEL,)
    cases = (
        Layer("a warp a row", KERNEL, shape=(2, 3, 256), scale="rows"),
        Case("4 warps a row", KERNEL, shape=(1, 1, 512), scale="gate"),
        Layer("no branch", KERNEL, shape=(5, 256), add=False),
        Layer("to 8 bits", KERNEL, shape=(6, 256), scale="number", out_dtype=FLOAT8),
        Layer("far from zero", KERNEL, shape=(4, 512), centre=512.0, add=False),
        Case("float32", shape=(2, 5, 48), dtype="float32", scale="rows"),
        Layer("layer norm in float32", shape=(5, 48), dtype="float32"),
        Layer("a block moves back", KERNEL, Config(4), shape=(9, 256)),
        Case("loads of 4 bytes", KERNEL, Config(4), shape=(2, 1280)),
        Layer("loads of 16 bytes", KERNEL, Config(4), shape=(1, 4096), scale="rows"),
        Layer("many rows a warp", KERNEL, Config(1, resident=2), shape=(21, 256), add=False),
        Case("as many rows a warp", KERNEL, Config(1, resident=2), shape=(8, 256), add=False),
    )
    real = (
        Case("a token", KERNEL, shape=(1, 4096)),
        Case("3 tokens", KERNEL, shape=(3, 4096), scale="rows"),
        Case("a prompt", KERNEL, shape=(64, 4096), scale="rows"),
        Case("a long prompt", None, shape=(4096, 4096)),
        Case("2 rows", KERNEL, shape=(2, 1280)),
        Layer("a frame", KERNEL, shape=(1608, 1280), scale="gate"),
        Layer("16 frames and a row", KERNEL, shape=(16 * 1608 + 1, 1280)),
        Layer("16 frames to 8 bits", KERNEL, shape=(16 * 1608, 1280), add=False, out_dtype=FLOAT8),
        Layer("the widest", KERNEL, shape=(1, 8192), scale="number"),
    )
    unsupported = (
        (KERNEL, {"shape": (1, 1300)}, "D = 1300 is not a multiple of 256 up to 8192"),
        (KERNEL, {"shape": (1, 16384)}, "D = 16384 is not a multiple of 256 up to 8192"),
        (KERNEL, {"shape": (0, 4096)}, "there are no rows"),
        (KERNEL, {"shape": (2, 1024, 4096)}, "with D = 4096 it takes up to 1024 rows, not 2048"),
        (KERNEL, {"shape": (1, 4096), "dtype": "float32"}, "it takes bfloat16, not float32"),
        (KERNEL, {"shape": (1, 4096), "out_dtype": "int8"}, "it gives bfloat16 and float8_e4m3fn, not int8"),
    )

    def make(self, draw: Draw, *, shape, norm="rms", scale=None, add=True, dtype="bfloat16", **options):
        each = {"gate": (1,), "number": (1, 1), "rows": (*shape[:-1], 1)}.get(scale)
        each = draw.rows(*each, dtype=dtype) if each is not None else None
        return Arguments(
            draw.rows(*shape, dtype=dtype, centre=options.get("centre", 0.3)),
            draw.rows(*shape, dtype=dtype) if add else None,
            each[0, 0] if scale == "number" else each,
            draw(shape[-1], dtype=dtype, size=0.2, centre=1.0),
            draw(shape[-1], dtype=dtype) if norm == "layer" else None,
            eps=1e-5,
            out_dtype=jnp.dtype(options.get("out_dtype", dtype)),
        )

    def define(self, a: Arguments, kept):
        y = Rounded(a.x)
        if a.add is not None:
            branch = Rounded(a.add)
            y += branch if a.scale is None else (branch * a.scale).rounded(kept)
        return norm(y.rounded(a.x.dtype) if a.add is not None else y, Norm(a.weight, a.bias, eps=a.eps)), y


def call(*, out_scale=None, **changes):
    """`add_norm` of [2, 3, 256], with some arrays of other shapes."""
    a = TestAddNorm().make(Draw(), shape=(2, 3, 256), norm="layer", scale="rows")
    arrays = {"x": a.x, "branch": a.add, "scale": a.scale, "weight": a.weight, "bias": a.bias}
    arrays |= {name: shape and jnp.zeros(shape, "bfloat16") for name, shape in changes.items()}
    residual = Residual(*map(arrays.get, Residual._fields))
    return add_norm(residual, Norm(arrays["weight"], arrays["bias"], eps=a.eps), out_scale=out_scale)


def test_what_does_not_fit():
    for changes, message in (
        ({"weight": (8,), "bias": (8,)}, "weight is one number a column, [D] = (256,); got (8,)"),
        ({"branch": (1, 3, 256)}, "the branch is like the stream, bfloat16 (2, 3, 256); got bfloat16 (1, 3"),
        ({"scale": (2, 3, 256)}, "scale broadcasts to [..., 1] = (2, 3, 1); got (2, 3, 256)"),
        ({"scale": (1, 2, 3, 1)}, "scale broadcasts to [..., 1]"),
        ({"branch": None}, "a residual without a branch has no scale"),
    ):
        with refuses(message):
            call(**changes)


def test_results_in_8_bits_are_divided_by_their_scale():
    (expected, _), (normed, _) = call(), call(out_scale=jnp.float32(2**-3))
    assert (normed.dtype, normed.scale) == (FLOAT8, 2**-3)
    Rounded(exact(expected) * 8).rounded("bfloat16").check(normed.values)


def test_a_row_has_a_warp_if_there_are_enough():
    shapes = ((1, 4096), (64, 4096), (3, 1280), (4, 1280), (1608, 1280), (9, 2304))
    assert [default_config(TestAddNorm().abstract(shape=x)).warps for x in shapes] == [4, 4, 4, 1, 1, 4]
    with refuses("a row is shared by 1 or 4 warps, not 2"):
        Config(2)
    with refuses("with 1 warp a row there must be 4 rows, not 3"):
        apply(TestAddNorm().make(Draw(), shape=(3, 256)), Config(1))


def test_lowers_under_remat():
    """With gradients: the first layer forward, then both again; nobody asks for the loss itself."""

    @jax.checkpoint
    def layer(x, a):
        normed, y = apply(dataclasses.replace(a, x=x))
        return jnp.sin(normed) + y

    a = TestAddNorm().abstract(shape=(2, 64, 4096))
    gradients = jax.grad(lambda x, a: layer(layer(x, a), a).astype(jnp.float32).sum(), (0, 1))
    lowered = jax.jit(gradients).trace(a.x, a).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("call @one_pass") == 3
