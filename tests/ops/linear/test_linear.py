"""Linear maps with their epilogues."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.contract import PLAIN, Case, Contract, Draw, refuses
from ops.definitions import GELU_FIT_IN_8_BITS, Rounded, exact, half_step
from ops.definitions import linear as define_linear
from scipy.special import ndtr

from moss_jax.ops.linear import LINEAR, Weights, gelu, linear, residual_add
from moss_jax.ops.linear.base import Arguments, arguments
from moss_jax.ops.linear.mosaic_gpu import matmul_epilogue, weight_only, weight_only_gemm
from moss_jax.ops.qarray import QArray

FEW, GEMM, MANY, GEMV = "weight_only", "weight_only_gemm", "matmul_epilogue", "gemv"
FLOAT8 = "float8_e4m3fn"
W8A16, W8A8 = (functools.partial(Case, scheme=scheme) for scheme in ("W8A16", "W8A8"))
# The vision encoder's GEMMs.
ENCODER = {
    "queries and keys": functools.partial(W8A8, inputs=(1280,), outputs=(2560,), out_dtype=FLOAT8),
    "values": functools.partial(W8A8, inputs=(1280,), outputs=(1280,)),
    "out": functools.partial(W8A8, inputs=(1280,), outputs=(1280,), bias=True, residual=True, gate=True),
    "fc1": functools.partial(W8A8, inputs=(1280,), outputs=(5120,), bias=True, gelu=True, out_dtype=FLOAT8),
    "fc2": functools.partial(W8A8, inputs=(5120,), outputs=(1280,), bias=True, residual=True),
    "fc1 in bfloat16": functools.partial(Case, inputs=(1280,), outputs=(5120,), bias=True, gelu=True),
}
# The 11B's decoder: attention's projections, the MLP's, and the head.
DECODER = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256))
SQUARE = {"inputs": (4096,), "outputs": (4096,)}


def shapes(**sizes):
    """The outputs of each of the decoder's maps, and the sizes of a call of it."""
    return [(N, {"inputs": (K,), "outputs": (N,), **sizes}) for K, N in DECODER]


# Small cases of the kernels.
FEW_ROWS = functools.partial(W8A16, kernel=FEW)
CUT = functools.partial(FEW_ROWS, rows=(5,), inputs=(512,))
GEMM_ROWS = functools.partial(W8A16, kernel=GEMM)
ONE = functools.partial(weight_only_gemm.Config, rows=16, block_k=64, stages=2, cluster=1)
MANY_ROWS = functools.partial(W8A8, kernel=MANY, rows=(2, 68), inputs=(768,), bias=True)
TILED = functools.partial(W8A8, kernel=MANY, outputs=(256,))
GELU_8 = {"gelu": True, "out_dtype": FLOAT8}
TILE = functools.partial(matmul_epilogue.Config, columns=64, cluster=None, slots=1)
SHARED_WEIGHTS = TILE(blocks=2, cluster="rows", chunk=32, lag=3)
SHARED_INPUTS = TILE(blocks=4, cluster="columns", stages=2, lag=0)
FOUR_STEPS, TWO_STEPS = (
    {"rows": (264,), "inputs": (512,), "outputs": (128,)},
    {"rows": (136,), "inputs": (128,)},
)
ONE_BLOCK = functools.partial(TILE, blocks=1, columns=128, stages=3, chunk=32)
FEW_8, MANY_8 = {"scheme": "W8A16"}, {"scheme": "W8A8", "rows": (128,), "inputs": (768,)}
ROW = {"layout": "outputs_first"}
IN_FLOAT32 = {"rows": (5,), "inputs": (24,), "outputs": (12,), "dtype": "float32"}


class TestLinear(Contract):
    op = LINEAR
    plain = (None, *PLAIN, GEMV)
    rows = ("x", "residual")
    keeps_float32 = (FEW, GEMM, MANY, GEMV)
    supports_vjp = (MANY, GEMV)
    cases = (
        FEW_ROWS("int8", rows=(2, 4), stored="int8"),
        FEW_ROWS("a vector", rows=(), out_dtype="float32"),
        FEW_ROWS("fp8", rows=(2, 3)),
        CUT("2 splits, 2 blocks each", config=weight_only.Config(part=256, stages=3, blocks=4)),
        CUT("1 block", config=weight_only.Config(64, part=512, stages=2, blocks=1), stored="int8"),
        CUT("a tile a block", config=weight_only.Config(256, part=256, stages=1, blocks=100)),
        GEMM_ROWS("65 rows", rows=(5, 13), outputs=(320,)),
        GEMM_ROWS("rows of a tile", config=ONE(blocks=1), rows=(12,), stored="int8"),
        GEMM_ROWS("tiles moved back", config=ONE(blocks=3), rows=(41,), outputs=(192,)),
        GEMM_ROWS("an odd step", config=ONE(stages=3), rows=(40,), inputs=(192,), stored="int8"),
        GEMM_ROWS("splits", config=ONE(block_k=128, splits=2), rows=(40,), out_dtype="float32"),
        GEMM_ROWS("2 blocks of outputs", config=ONE(256, rows=24), rows=(24,), outputs=(256,)),
        GEMM_ROWS("tiles share x", config=ONE(cluster=2, blocks=4), rows=(40,), outputs=(576,)),
        GEMM_ROWS("more stages than steps", config=ONE(stages=8, cluster=2), rows=(16,), outputs=(320,)),
        MANY_ROWS("W8A8", gelu=True),
        MANY_ROWS("W8A8 with a residual", residual=True, gate=True),
        MANY_ROWS("bfloat16", kernel=None, scheme="float", gelu=True),
        MANY_ROWS("W8A8 to 8 bits", kernel=None, **GELU_8),
        TILED("4 slots", config=ONE_BLOCK(slots=4, lag=1), rows=(168,), inputs=(384,), **GELU_8),
        TILED("tiles share weights", config=SHARED_WEIGHTS, **FOUR_STEPS, bias=True, gelu=True),
        TILED("tiles share inputs", config=SHARED_INPUTS, **TWO_STEPS, scheme="float", gelu=True),
        TILED("a residual in 2 slots", config=ONE_BLOCK(), rows=(168,), inputs=(384,), residual=True),
        TILED("a residual in 1 slot", config=SHARED_WEIGHTS, **FOUR_STEPS, residual=True, gate=True),
        Case("one row", GEMV, rows=(1, 1), inputs=(4, 12), outputs=(24,), layout="outputs_first"),
        Case("axes", rows=(2, 5), inputs=(4, 6), outputs=(2, 12), bias=True, gelu=True, dtype="float32"),
        Case("outputs first", **IN_FLOAT32, layout="outputs_first"),
        W8A16("W8A16 in float32", **IN_FLOAT32, stored="int8", bias=True),
        W8A8("W8A8 in float32", **IN_FLOAT32, residual=True, gate=True),
    )
    real = (
        *(W8A16(f"{N} int8", FEW, rows=(1,), inputs=(K,), outputs=(N,), stored="int8") for K, N in DECODER),
        *(W8A16(f"{N} fp8", FEW, rows=(8,), inputs=(K,), outputs=(N,)) for K, N in DECODER),
        *(W8A16(f"{N} int8, 96 rows", GEMM, **of, stored="int8") for N, of in shapes(rows=(96,))),
        *(W8A16(f"{N} fp8, 2 x 128 rows", GEMM, **of) for N, of in shapes(rows=(2, 128))),
        *(W8A16(f"{M} rows", GEMM, rows=(M,), **SQUARE, stored="int8") for M in (9, 32, 65, 128, 200, 512)),
        W8A16("300 rows", GEMM, rows=(300,), inputs=(4096,), outputs=(6144,), out_dtype="float32"),
        W8A16("outputs for no whole tile", GEMM, rows=(70,), inputs=(1152,), outputs=(7, 64)),
        *(of(name, MANY, rows=(1608,)) for name, of in ENCODER.items()),
        *(of(f"{name}, 8 frames", MANY, rows=(8 * 1608,)) for name, of in ENCODER.items()),
        Case("a decoded token", GEMV, rows=(1, 1), inputs=(4096,), outputs=(6144,), layout="outputs_first"),
        Case("a prompt", None, rows=(2, 8), inputs=(4096,), outputs=(6144,), layout="outputs_first"),
        Case("the MLP's", None, rows=(64,), inputs=(4096,), outputs=(28672,)),
        W8A16("a long prompt", None, rows=(513,), inputs=(4096,), outputs=(4096,)),
    )
    unsupported = (
        (FEW, FEW_8 | {"rows": (9,)}, "it takes 1 to 8 rows, not 9"),
        (FEW, FEW_8 | {"rows": (0,)}, "it takes 1 to 8 rows, not 0"),
        (FEW, FEW_8 | {"inputs": (192,)}, "K = 192 is not a multiple of 128"),
        (FEW, FEW_8 | {"outputs": (96,)}, "N = 96 is not a multiple of 64"),
        (FEW, FEW_8 | {"dtype": "float16"}, "it takes x in bfloat16, not float16"),
        (FEW, FEW_8 | {"bias": True}, "it has no epilogue"),
        (FEW, {}, "it takes weights in 8 bits for inputs in 16 (W8A16), not float"),
        (GEMM, FEW_8 | {"rows": (513,)}, "it takes 1 to 512 rows, not 513"),
        (GEMM, FEW_8 | {"rows": (0,)}, "it takes 1 to 512 rows, not 0"),
        (GEMM, FEW_8 | {"rows": (65,), "inputs": (160,)}, "K = 160 is not a multiple of 64"),
        (GEMM, FEW_8 | {"rows": (65,), "outputs": (352,)}, "N = 352 is not a multiple of 64, 256 at least"),
        (GEMM, FEW_8 | {"rows": (65,), "outputs": (64,)}, "N = 64 is not a multiple of 64, 128 at least"),
        (GEMM, FEW_8 | {"dtype": "float16"}, "it takes x in bfloat16, not float16"),
        (GEMM, FEW_8 | {"gelu": True}, "it has no epilogue"),
        (GEMM, {}, "it takes weights in 8 bits for inputs in 16 (W8A16), not float"),
        (MANY, MANY_8 | {"rows": (120,)}, "it takes 128 rows or more, in multiples of 8, not 120"),
        (MANY, MANY_8 | {"rows": (3, 67)}, "it takes 128 rows or more, in multiples of 8, not 201"),
        (MANY, MANY_8 | {"outputs": (1344,)}, "N = 1344 is not a multiple of 128"),
        (MANY, MANY_8 | {"inputs": (640,)}, "K = 640 is not a multiple of 128, 768 at least"),
        (MANY, MANY_8 | {"out_dtype": "float32"}, "it gives bfloat16 or float8_e4m3fn, not float32"),
        (MANY, {"rows": (128,), "inputs": (320,), "gelu": True}, "K = 320 is not a multiple of 64, 384 at"),
        (MANY, {"dtype": "float32", "gelu": True}, "it takes bfloat16, or weights and inputs in float8_e4"),
        (MANY, {}, "in bfloat16 it takes calls with a GELU; without one XLA's matmul is as fast"),
        (MANY, {"residual": True}, "in bfloat16 it takes no residual; XLA's matmul is as fast, and adds it"),
        (MANY, ROW, "it takes weights with their inputs first"),
        (GEMV, ROW | {"rows": (2,)}, "it takes 1 row, not 2"),
        (GEMV, ROW | {"bias": True}, "it has no epilogue"),
        (GEMV, FEW_8 | {"rows": (1,)}, "it takes float weights with their outputs first"),
    )

    def rebuild(self, a: Arguments) -> Arguments:
        out_scale = None if a.out_factor is None else 1 / a.out_factor
        options = {"residual": a.residual, "gate": a.gate, "gelu": a.gelu, "out_dtype": a.out_dtype}
        return arguments(a.x, a.weights, out_scale, **options)

    def make(
        self,
        draw: Draw,
        *,
        rows=(1,),
        inputs=(256,),
        outputs=(128,),
        scheme="float",
        layout="inputs_first",
        dtype="bfloat16",
        **options,
    ):
        K, out_dtype = math.prod(inputs), jnp.dtype(options.get("out_dtype", dtype))
        x = draw.rows(*rows, K, dtype=dtype).reshape(*rows, *inputs)
        if scheme == "float":
            shape = (*outputs, *inputs) if layout == "outputs_first" else (*inputs, *outputs)
            kernel = draw(*shape, dtype=dtype, size=K**-0.5)
        else:
            layout, scales = "outputs_first", {"input_scale": 1 / 8} if scheme == "W8A8" else {}
            kernel = draw.weights(outputs, inputs, options.get("stored", FLOAT8), **scales)
        if scheme == "W8A8":
            x = QArray((8 * x).astype(FLOAT8), jnp.float32(1 / 8))
        return arguments(
            x,
            Weights(
                kernel,
                draw(*outputs, dtype=dtype) if options.get("bias") else None,
                num_inputs=len(inputs),
                layout=layout,
            ),
            jnp.float32(1 / 8) if out_dtype == FLOAT8 else None,
            residual=draw(*rows, *outputs, dtype=out_dtype) if options.get("residual") else None,
            gate=draw(1, dtype="float32") if options.get("gate") else None,
            gelu=options.get("gelu", False),
            out_dtype=out_dtype,
        )

    def define(self, a: Arguments, kept):
        return define_linear(a, Rounded(a.x), kept)

    def sample(self, a: Arguments, y):
        """Of weights in 8 bits some outputs too."""
        a, (y,) = super().sample(a, y)
        if a.weights.scheme != "W8A16":
            return a, [y]
        # Of the first axis of outputs, which comes after those of rows.
        some = slice((len(a.weights.kernel.scale) - 1) % 61, None, 61)
        weights = jax.tree.map(lambda x: x[some], a.weights)
        return dataclasses.replace(a, weights=weights), [y[(*[slice(None)] * (a.x.ndim - 1), some)]]


def call(**sizes) -> Arguments:
    return TestLinear().make(Draw(nan=False), **sizes)


def test_what_does_not_fit():
    a, few, many = call(inputs=(24,), outputs=(12,)), call(**FEW_8), call(**MANY_8)
    kernel, whole = a.weights.kernel, QArray(few.weights.kernel.values, jnp.float32(1))
    for x, weights, message in (
        (a.x[:, 1:], a.weights, "x (1, 23) must end with the inputs of the kernel, (24,) of (24, 12)"),
        (a.x, Weights(kernel, num_inputs=2), "must end with the inputs of the kernel"),
        (a.x, Weights(kernel, jnp.ones((1, 12))), "bias is one number an output, (12,); got (1, 12)"),
        (few.x[:, :128], Weights(few.weights.kernel), "a quantised kernel has its outputs first"),
        (few.x, Weights(whole, layout="outputs_first"), "has one scale an output, (128,); got ()"),
        (
            QArray(many.x.values[:1, :256], many.x.scale),
            few.weights,
            "inputs in 8 bits need a kernel for W8A8, not W8A16",
        ),
    ):
        with refuses(message):
            linear(x, weights, out_dtype="bfloat16")
    with refuses("out_dtype must be named for inputs in 8 bits"):
        linear(many.x, many.weights)
    with refuses("the residual is like the results, float32 (128, 128); got float32 (128,)"):
        residual_add(jnp.zeros(128), many.x, many.weights)


def test_weights_say_what_is_rounded():
    """W8A8 rounds inputs, and outputs that have a scale, and adds to the stream; others leave it pending."""
    a = call(**MANY_8, **GELU_8)
    kernel = dataclasses.replace(a.weights.kernel, output_scale=1 / a.out_factor)
    y = linear(jnp.float32(exact(a.x)), dataclasses.replace(a.weights, kernel=kernel), gelu=True)
    assert (y.dtype, y.scale) == (FLOAT8, 1 / a.out_factor)
    np.testing.assert_array_equal(exact(y.values), exact(LINEAR(a)))

    few, stream = call(**FEW_8), jnp.ones((128, 128), "bfloat16")
    added, pending = residual_add(stream, a.x, a.weights), residual_add(stream[:1], few.x, few.weights)
    assert (added.branch, added.x.dtype, pending.branch.dtype) == (None, "bfloat16", "bfloat16")
    assert linear(few.x, few.weights, out_dtype="float32").dtype == jnp.float32
    np.testing.assert_array_equal(pending.x, stream[:1])


def test_gradients_pass_through_8_bits():
    """A cotangent is rounded like the inputs, to 4 bits."""
    a = call(**MANY_8)
    x = exact(a.x).astype(np.float32)

    def gradient(name):
        return jax.grad(lambda x: linear(x, a.weights, implementation=name).sum())(x)

    expected = exact(gradient("reference"))
    np.testing.assert_allclose(gradient("xla"), expected, rtol=0, atol=0.07 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xla_is_one_op_after_the_other(dtype):
    """Bit for bit; and rows stay on the axes by which a mesh may split them."""
    a = call(rows=(2, 5), inputs=(24,), outputs=(12,), bias=True, gelu=True, dtype=dtype)
    product = jax.lax.dot_general(
        a.x, a.weights.kernel, (((2,), (0,)), ((), ())), preferred_element_type=dtype
    )
    np.testing.assert_array_equal(LINEAR(a, implementation="xla"), gelu(product, a.weights.bias))
    assert "reshape" not in jax.jit(lambda a: LINEAR(a)).lower(a).as_text()


def test_the_gelu_for_8_bits():
    """Off by less than a seventh of a half step, in float32, wherever they have numbers; and it vanishes."""
    x = np.unique(np.r_[np.linspace(-20, 20, 200_001), np.geomspace(1e-6, 1e6, 1000)])
    y, expected = (
        exact(matmul_epilogue._gelu(np.float32(x), matmul_epilogue.LOG2_TAIL_IN_8_BITS)),
        x * ndtr(x),
    )
    for scale in (1 / 64, 1, 16, 448):
        assert (
            scale * np.abs(y - expected) <= GELU_FIT_IN_8_BITS * half_step(scale * expected, FLOAT8)
        ).all()
    ends = np.float32([-np.inf, -1e30, -14, 0, np.inf, np.nan])
    y = matmul_epilogue._gelu(ends, matmul_epilogue.LOG2_TAIL_IN_8_BITS)
    np.testing.assert_allclose(y, [0, 0, 0, 0, np.inf, np.nan], rtol=0, atol=1e-37)


def test_default_configs():
    """For one frame 130 tiles for 132 multiprocessors, small or large; splits of K, and tiles of a block."""
    wide = matmul_epilogue.Config(cluster=None)
    narrow = dataclasses.replace(wide, columns=128, stages=6)
    many = {"fc1": matmul_epilogue.Config(cluster="columns"), "fc1 in bfloat16": matmul_epilogue.Config()}
    for name, of in ENCODER.items():
        frame, frames = (TestLinear().abstract(**of(name, rows=(n * 1608,)).sizes) for n in (1, 8))
        one = wide if name in ("queries and keys", "fc1", "fc1 in bfloat16") else narrow
        assert matmul_epilogue.default_config(frame) == one
        assert matmul_epilogue.default_config(frames) == many.get(name, matmul_epilogue.Config(lag=1))
    # Lines of 128 bytes while reading the weights takes longest, larger tiles afterwards.
    for rows, tile in ((16, (128, 16, 128)), (128, (128, 128, 128)), (256, (128, 256, 64))):
        gate_up = weight_only_gemm.default_config(rows, 4096, 28672)
        assert (gate_up.outputs, gate_up.rows, gate_up.block_k) == tile
    few = weight_only.Config(block_k=128, part=1024, blocks=264)
    assert [few.splits(K) for K in (128, 1024, 4096, 14336, 128 * 37)] == [1, 1, 4, 14, 37]
    assert [few.tiles_a_block(*shape) for shape in DECODER] == [2, 1, 7, 4, 31]


def test_configs_that_do_not_fit():
    for make, changes, message in (
        (matmul_epilogue.Config, {"columns": 320}, "columns is a multiple of 64 up to 256, not 320"),
        (matmul_epilogue.Config, {"lag": 4}, "lag is less than stages, 4, not 4"),
        (matmul_epilogue.Config, {"columns": 128, "slots": 4}, "128 columns are not made of 4 chunks of 64"),
        (matmul_epilogue.Config, {"stages": 5}, "278528 bytes of shared memory are more than 231424"),
        (weight_only.Config, {"block_k": 96}, "block_k is a multiple of 64, not 96"),
        (weight_only.Config, {"part": 64}, "part is at least block_k, 128, not 64"),
        (weight_only_gemm.Config, {"outputs": 192}, "outputs is 128 or 256, not 192"),
        (weight_only_gemm.Config, {"rows": 72}, "rows is a multiple of 16 up to 256, not 72"),
        (weight_only_gemm.Config, {"block_k": 96}, "block_k is 64, or 128 with 128 outputs, not 96"),
        (weight_only_gemm.Config, {"outputs": 256}, "block_k is 64, or 128 with 128 outputs, not 128"),
        (weight_only_gemm.Config, {"cluster": 4}, "cluster is 1 or 2, not 4"),
        (weight_only_gemm.Config, {"splits": 0}, "stages is at least 2, splits 1 and blocks 2, not 4, 0 and"),
        (weight_only_gemm.Config, {"outputs": 256, "rows": 144, "block_k": 64}, "144 sums a thread are more"),
        (weight_only_gemm.Config, {"stages": 5}, "262144 bytes of shared memory are more than 231424"),
        (weight_only.Config, {"stages": 0}, "stages and blocks are at least 1, not 0 and 264"),
    ):
        with refuses(message):
            make(**changes)
    with refuses("N = 128 is not a multiple of 256"):
        matmul_epilogue.apply(call(**MANY_8 | {"rows": (256,)}), matmul_epilogue.Config())
    with refuses("K = 256 is not a multiple of 384"):
        weight_only_gemm.apply(call(**FEW_8), ONE(splits=6))
    with refuses("K = 384 is not a multiple of block_k, 256"):
        weight_only.apply(call(**FEW_8, inputs=(384,)), weight_only.Config(256))


def test_gradients_of_wide_results_are_products_in_the_dtype_of_the_operands():
    x, kernel = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)

    def loss(x, kernel):
        return linear(x, Weights(kernel), out_dtype=jnp.float32, implementation="xla").sum()

    products = [
        {v.aval.dtype.name for v in equation.invars}
        for equation in jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, kernel).eqns
        if equation.primitive.name == "dot_general"
    ]
    assert len(products) >= 2
    assert all(dtypes == {"bfloat16"} for dtypes in products)
