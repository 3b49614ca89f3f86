"""The linear map of a normed residual sum."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from ops.contract import Case, Contract, Draw, refuses
from ops.definitions import Rounded, exact, linear, norm

from moss_jax.ops.linear import NORM_LINEAR, Weights, norm_linear
from moss_jax.ops.linear import linear as linear_op
from moss_jax.ops.linear.base import NormArguments
from moss_jax.ops.linear.mosaic_gpu.norm_matmul import Config, apply, default_config
from moss_jax.ops.norm import Norm, Residual, add_norm
from moss_jax.ops.qarray import QArray

KERNEL, FLOAT8 = "norm_matmul", "float8_e4m3fn"
REAL = {"K": 4096, "N": 6144}
PLAIN = {"stored": None, "norm": "layer", "bias": True, "gelu": True}


class TestNormLinear(Contract):
    op = NORM_LINEAR
    rows = ("residual",)
    keeps_float32 = (KERNEL,)
    cases = (
        Case("a token", KERNEL, rows=(1, 1), stored="int8"),
        Case("a pending branch", KERNEL, rows=(6,), branch=True),
        Case(
            "fewer slots than tiles", KERNEL, Config(1, 2, block_k=128, stages=3), stored="int8", K=2048, N=80
        ),
        Case("blocks that end early", KERNEL, Config(2, 2, block_k=256, stages=2), rows=(8,), K=1024, N=80),
        Case(
            "tiles in a loop",
            KERNEL,
            Config(1, 1, block_k=128, stages=9),
            rows=(2,),
            stored="int8",
            K=4096,
            N=80,
        ),
        Case("bfloat16", **PLAIN, rows=(2, 3)),
        Case("W8A8", **PLAIN | {"stored": FLOAT8}, rows=(2, 3), scheme="W8A8"),
        Case("float32", **PLAIN, rows=(5,), branch=True, K=48, N=24, dtype="float32"),
        Case("W8A16 in float32", rows=(5,), branch=True, K=48, N=24, dtype="float32"),
    )
    real = (
        Case("a token", KERNEL, **REAL, stored="int8"),
        Case("3 tokens", KERNEL, **REAL, rows=(3,), branch=True),
        Case("8 tokens", KERNEL, **REAL, rows=(8,)),
        Case("queries", KERNEL, rows=(2,), K=4096, N=4096, stored="int8"),
        Case("several units a block", KERNEL, rows=(8,), K=4096, N=16384, branch=True),
        Case("a prompt", **REAL, rows=(64,), branch=True),
        Case("a frame", **PLAIN, rows=(1608,), K=1280, N=5120, branch=True),
    )
    unsupported = (
        (KERNEL, {"rows": (9,)}, "it takes 1 to 8 rows, not 9"),
        (KERNEL, {"rows": (0,)}, "it takes 1 to 8 rows, not 0"),
        (KERNEL, {"K": 256}, "K = 256 is not a multiple of 512"),
        (KERNEL, {"N": 72}, "N = 72 is not a multiple of 16"),
        (KERNEL, {"dtype": "float32"}, "it takes and gives bfloat16, not float32 and float32"),
        (KERNEL, {"rows": (8,), "K": 16384}, "8 rows of 16384 don't fit in shared memory"),
        (KERNEL, {"stored": None}, "it takes weights in 8 bits for inputs in 16 (W8A16), not float"),
        (KERNEL, {"norm": "layer"}, "it takes RMS norms, and has no bias or GELU in its epilogue"),
    )

    def make(self, draw: Draw, *, rows=(1,), K=512, N=96, stored=FLOAT8, dtype="bfloat16", **options):
        kernel = draw(K, N, dtype=dtype, size=K**-0.5) if stored is None else None
        if stored is not None:
            # A normed row has no number beyond sqrt(K) |weight| + |bias|.
            scales = {"input_scale": 1 / 2} if options.get("scheme") == "W8A8" else {}
            kernel = draw.weights((N,), (K,), stored, **scales)
        x, branch = (draw.rows(*rows, K, dtype=dtype) for _ in range(2))
        return NormArguments(
            Residual(x, branch if options.get("branch") else None),
            Norm(
                draw(K, dtype=dtype, size=0.2, centre=1.0),
                draw(K, dtype=dtype) if options.get("norm") == "layer" else None,
                eps=1e-5,
            ),
            Weights(
                kernel,
                draw(N, dtype=dtype) if options.get("bias") else None,
                layout="inputs_first" if stored is None else "outputs_first",
            ),
            gelu=options.get("gelu", False),
            out_dtype=jnp.dtype(dtype),
        )

    def define(self, a: NormArguments, kept):
        x, branch, _ = a.residual
        y = Rounded(x)
        if branch is not None:
            y = (y + branch).rounded(x.dtype)
        normed, w = norm(y, a.norm), a.weights
        # Products are of bfloat16, or of 8 bits.
        dtype, scale = (FLOAT8, exact(w.kernel.input_scale)) if w.scheme == "W8A8" else (x.dtype, 1.0)
        call = a.linear(QArray(jnp.zeros(x.shape, FLOAT8), scale) if w.scheme == "W8A8" else x)
        return linear(call, normed.rounded(dtype, scale), kept), y


def call(**sizes) -> NormArguments:
    return TestNormLinear().make(Draw(), **sizes)


def test_plain_is_the_norm_and_the_map():
    """Bit for bit."""
    a = call(rows=(3, 3), branch=True)
    normed, y = add_norm(a.residual, a.norm)
    found = norm_linear(a.residual, a.norm, a.weights)
    for x, expected in zip(found, (linear_op(normed, a.weights), y), strict=True):
        np.testing.assert_array_equal(exact(x), exact(expected))


def test_what_does_not_fit():
    a, other = call(), call(K=256)
    with refuses("x (1, 512) must end with the inputs of the kernel, (256,) of (96, 256)"):
        norm_linear(a.residual, a.norm, other.weights)
    with refuses("weight is one number a column, [D] = (512,); got (256,)"):
        norm_linear(a.residual, other.norm, a.weights)


def test_configs():
    """The default fills shared memory; inputs that only small tiles divide have those."""
    for rows, each in (
        (1, (3, 256, 4)),
        (2, (3, 256, 3)),
        (4, (3, 256, 2)),
        (5, (2, 128, 8)),
        (8, (2, 128, 5)),
    ):
        assert default_config(rows, 4096) == Config(132, *each)
    default, a = default_config(1, 512), call(K=2048)
    assert default.block_k == 128
    with refuses("K = 2048 does not fall into quarters of tiles of 384"):
        apply(a, dataclasses.replace(default, block_k=384))
    with refuses("as one of 3 it has 76672"):
        apply(a, dataclasses.replace(default_config(1, 2048), stages=9))
