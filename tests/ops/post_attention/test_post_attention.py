"""The rest of a layer after attention."""

import collections
import dataclasses

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.contract import Case, Contract, Draw, refuses
from ops.definitions import Rounded, exact, linear, norm

from moss_jax.ops.linear import Weights
from moss_jax.ops.linear.base import Arguments as LinearArguments
from moss_jax.ops.norm import Norm, Residual
from moss_jax.ops.post_attention import POST_ATTENTION, post_attention
from moss_jax.ops.post_attention.base import Arguments
from moss_jax.ops.post_attention.mosaic_gpu import Config, Plan, apply, default_config
from moss_jax.ops.qarray import QArray

KERNEL, FLOAT8 = "mosaic_gpu", "float8_e4m3fn"
REAL = {"D": 4096, "heads": (32, 128), "F": 14336}
PLAN = (4096, 4096, 14336)
# Three blocks of several units each, of `down` at most 8; fewer stages than tiles.
SMALL = Config(blocks=3, block_k=128, stages=2, part=128, part_down=128, passes=3)
ONE_BLOCK = Config(blocks=1, block_k=128, stages=3, part=256, part_down=128)
PARTS = Config(blocks=4, block_k=128, stages=3, part=256, part_down=128, passes=3)
IN_FLOAT32 = {"rows": (2, 5), "D": 48, "heads": (4, 6), "F": 40, "dtype": "float32", "gates": True}


class TestPostAttention(Contract):
    op = POST_ATTENTION
    rows = ("x", "heads", "mlp_gate")
    keeps_float32 = (KERNEL,)
    cases = (
        Case("int8", KERNEL, SMALL, rows=(1, 1), stored="int8"),
        Case("gates", KERNEL, SMALL, rows=(5, 1), gates=True),
        Case("1 block, whose ring runs through all phases", KERNEL, ONE_BLOCK, rows=(1, 1)),
        Case("parts that begin within a block", KERNEL, PARTS, rows=(1, 2), F=384),
        Case("W8A16", rows=(2, 3), gates=True),
        Case("bfloat16", rows=(2, 3), stored=None),
        Case("a GELU", rows=(2, 3), stored=None, gelu=True, gates=True),
        Case("W8A8", rows=(2, 3), gelu=True, scheme="W8A8"),
        Case("a GELU in float32", **IN_FLOAT32, stored=None, gelu=True),
        Case("W8A16 in float32", **IN_FLOAT32),
    )
    real = (
        Case("a token", KERNEL, **REAL, rows=(1, 1), stored="int8"),
        Case("7 tokens", KERNEL, **REAL, rows=(7, 1), gates=True),
        Case("8 tokens", KERNEL, **REAL, rows=(8, 1), gates=True, stored="int8"),
        Case("a prompt", None, **REAL, rows=(64, 1), gates=True),
    )
    unsupported = (
        (KERNEL, {"rows": (9, 1)}, "it takes 1 to 8 rows, not 9"),
        (KERNEL, {"rows": (0, 1)}, "it takes 1 to 8 rows, not 0"),
        (KERNEL, {"heads": (3, 64)}, "K = 192 is not a multiple of 128"),
        (KERNEL, {"D": 192}, "D = 192 is not a multiple of 128"),
        (KERNEL, {"F": 320}, "F = 320 is not a multiple of 128"),
        (KERNEL, {"dtype": "float32"}, "it takes x and heads in bfloat16, not float32 and float32"),
        (
            KERNEL,
            {"out_stored": "int8"},
            "it takes weights of one 8-bit dtype for 16-bit inputs (W8A16), not ",
        ),
        (KERNEL, {"stored": None, "gelu": True}, "it takes gated MLPs behind RMS norms, without biases"),
        (
            KERNEL,
            {"rows": (8, 1), "D": 128, "heads": (1, 128), "F": 128 * 20001},
            "a block takes 226368 bytes of shared memory",
        ),
    )

    def make(
        self,
        draw: Draw,
        *,
        rows=(1, 1),
        D=256,
        heads=(4, 64),
        F=256,
        stored=FLOAT8,
        dtype="bfloat16",
        **options,
    ):
        gelu, in_8_bits = options.get("gelu", False), options.get("scheme") == "W8A8"

        def weights(outputs, inputs, stored=stored, size=1.0, **scales):
            bias = draw(*outputs, dtype=dtype) if gelu else None
            if stored is None:
                kernel = draw(*inputs, *outputs, dtype=dtype, size=size * np.prod(inputs) ** -0.5)
                return Weights(kernel, bias, num_inputs=len(inputs))
            kernel = draw.weights(outputs, inputs, stored, size=size, **scales if in_8_bits else {})
            return Weights(kernel, bias, num_inputs=len(inputs), layout="outputs_first")

        x = draw.rows(*rows, np.prod(heads), dtype=dtype).reshape(*rows, *heads)
        return Arguments(
            draw.rows(*rows, D, dtype=dtype),
            QArray((8 * x).astype(FLOAT8), jnp.float32(1 / 8)) if in_8_bits else x,
            weights((D,), heads, options.get("out_stored", stored), input_scale=1 / 8),
            Norm(
                draw(D, dtype=dtype, size=0.2, centre=1.0), draw(D, dtype=dtype) if gelu else None, eps=1e-5
            ),
            weights((F,) if gelu else (2, F), (D,), input_scale=1 / 8, output_scale=1 / 8),
            weights((D,), (F,), size=4.0, input_scale=1 / 8),
            draw(1, dtype=dtype) if options.get("gates") else None,
            draw.rows(*rows, 1, dtype=dtype) if options.get("gates") else None,
        )

    def arrays(self, y: Residual):
        return [y.sum()]

    def define(self, a: Arguments, kept):
        def run(w: Weights, x: Rounded, gelu=False):
            call = LinearArguments(x.value.reshape(-1, *w.inputs), w, gelu=gelu, out_dtype=a.x.dtype)
            return linear(call, x, kept)

        def inputs(w: Weights, x: Rounded):
            """As the GEMM multiplies them."""
            return (
                x.rounded(FLOAT8, exact(w.kernel.input_scale)) if w.scheme == "W8A8" else x.rounded(a.x.dtype)
            )

        def add(x: Rounded, gate, branch: Rounded):
            branch = branch.reshape(*a.x.shape)
            return x + (branch if gate is None else (branch * gate).rounded(kept))

        x = add(Rounded(a.x), a.attention_gate, run(a.out, Rounded(a.heads))).rounded(a.x.dtype)
        hidden = run(a.up, inputs(a.up, norm(x, a.norm)), gelu=not a.gated)
        if a.gated:
            F = a.up.outputs[-1]
            gate, up = (
                Rounded(hidden.value[:, part], hidden.deviation[:, part])
                for part in (slice(F), slice(F, None))
            )
            hidden = gate.map(lambda x: x / (1 + np.exp(-x)), 1.1).rounded(kept) * up
        return add(x, a.mlp_gate, run(a.down, inputs(a.down, hidden)))


def call(**sizes) -> Arguments:
    return TestPostAttention().make(Draw(), **sizes)


def test_what_does_not_fit():
    a, wide = call(), call(D=512, heads=(8, 64))
    for changes, message in (
        ({"heads": wide.heads}, "heads (1, 1, 8, 64) must end with the inputs of `out`, (4, 64)"),
        ({"up": a.out}, "the inputs of `up` must be (256,); got (4, 64)"),
        ({"up": wide.up}, "the inputs of `up` must be (256,); got (512,)"),
        ({"down": wide.down}, "the outputs of `down` must be (256,); got (512,)"),
        ({"up": call(F=384).up}, "the inputs of `down` must be (384,); got (256,)"),
        ({"norm": wide.norm}, "weight is one number a column, [D] = (256,); got (512,)"),
        (
            {"down": dataclasses.replace(a.down, bias=a.norm.weight[:1])},
            "one number an output, (256,); got (1,)",
        ),
    ):
        given = {field.name: getattr(a, field.name) for field in dataclasses.fields(a)} | changes
        with refuses(message):
            post_attention(given.pop("x"), given.pop("heads"), **given)


@pytest.mark.parametrize("changes", [{}, {"blocks": 132}, {"blocks": 228}, {"part_down": 512}], ids=str)
def test_every_unit_is_dealt_once_and_evenly(changes):
    for phase in Plan(1, *PLAN, dataclasses.replace(default_config(*PLAN), **changes), 132).phases:
        first, count = (np.asarray(x) for x in phase.units(jnp.arange(phase.blocks)))
        dealt = collections.Counter(
            unit for x, n in zip(first, count, strict=True) for unit in range(x, x + n)
        )
        assert dealt == dict.fromkeys(range(phase.stripes * phase.parts), 1)
        assert count.max() - count.min() <= 1
        assert ((first + count - 1) // phase.stripes - first // phase.stripes).max() < phase.spans


def test_the_default_fits_for_all_rows():
    for sizes, part_down in (
        (PLAN, 1792),  # Of 8 parts, as 3 blocks a part divide 264.
        ((8192, 8192, 28672), 512),  # 14 parts and more would lie across blocks.
        ((256, 256, 768), 256),  # There are fewer units than blocks in any case.
        ((4096, 4096, 12288), 2048),
    ):
        config = default_config(*sizes)
        assert (config.part_down, config.blocks, config.block_k * config.stages) == (part_down, 264, 1024)
        for rows in range(1, 9):
            Plan(rows, *sizes, config, 132)
    for changes, message in (
        ({"part": 1536}, "K = 4096 does not fall into parts of 1536 and tiles of 256"),
        ({"part_down": 128}, "F = 14336 does not fall into parts of 128 and tiles of 256"),
        ({"stages": 7}, "with 264 of them on 132 multiprocessors each has"),
        ({"blocks": 396}, "registers for 2 blocks, not for 3"),
        ({"blocks": 8, "part_down": 512, "stages": 1}, "a block has 224 units of `down`"),
    ):
        with refuses(message):
            Plan(1, *PLAN, dataclasses.replace(default_config(*PLAN), **changes), 132)


def test_many_rows_reach_the_kernels_of_single_ops():
    """Output projection, norm, up and down: no GEMM of 8-bit weights is left to XLA."""
    a = TestPostAttention().abstract(**REAL, rows=(100, 1), stored="int8")
    with interpreted.lowering_for("gpu"):
        program = jax.jit(lambda a: POST_ATTENTION(a).sum()).trace(a).lower(lowering_platforms=("cuda",))
    text = program.as_text()
    assert text.count("custom_call @mosaic_gpu") == 4
    assert "dot_general" not in text


@pytest.mark.gpu
def test_layer_after_layer():
    """One program, in a loop too. Weights are arguments: as constants they would lie beside JAX's memory."""
    a = call(**REAL, stored="int8")

    def layer(x, a):
        return apply(dataclasses.replace(a, x=x)).sum()

    def loop(x, a):
        return jax.lax.scan(lambda x, _: (layer(x, a), None), x, length=2)[0]

    one = jax.jit(layer)
    two = one(one(a.x, a), a)
    np.testing.assert_array_equal(jax.jit(lambda x, a: layer(layer(x, a), a))(a.x, a), two)
    np.testing.assert_array_equal(jax.jit(loop)(a.x, a), two)
