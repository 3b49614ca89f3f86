"""The kernel for Hopper beyond the contract: how the weights are dealt, what a GPU is given, real shapes."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moss_jax.ops.linear.arguments import QUANTIZED
from ops.post_attention.test_post_attention import abstract, close, make_arguments, on_gpu

from moss_jax.ops.post_attention import mosaic_gpu
from moss_jax.ops.post_attention.mosaic_gpu import Config, default_config, plan

REAL = {"D": 4096, "K": 4096, "F": 14336}


@pytest.mark.parametrize(
    ("rows", "sizes", "config"),
    [
        (1, {}, Config(blocks=1, block_k=128, stages=3, part=256, part_down=128)),
        (2, {"F": 384}, Config(blocks=4, block_k=128, stages=3, part=256, part_down=128)),
    ],
    ids=["1 block, whose ring runs through all phases", "parts that begin within a block"],
)
def test_dealt_in_many_ways(rows, sizes, config):
    a = make_arguments(rows, "float8_e4m3fn", **sizes)
    with on_gpu(config):
        close(mosaic_gpu.apply(a), a)


@pytest.mark.parametrize("changes", [{}, {"blocks": 132}, {"blocks": 228}, {"part_down": 512}], ids=str)
def test_every_unit_is_dealt_once_and_evenly(changes):
    a = abstract(**REAL)
    p = plan(a, dataclasses.replace(default_config(a), **changes))
    for phase in p.phases:
        first, count = (np.asarray(x) for x in phase.units(jnp.arange(phase.blocks)))
        dealt = collections.Counter(
            unit for x, n in zip(first, count, strict=True) for unit in range(x, x + n)
        )
        assert dealt == dict.fromkeys(range(phase.stripes * phase.parts), 1)
        assert count.max() - count.min() <= 1
        assert ((first + count - 1) // phase.stripes - first // phase.stripes).max() < phase.spans


@pytest.mark.parametrize(
    ("sizes", "part_down"),
    [
        (REAL, 1792),  # Of 8 parts, as 3 blocks a part divide 264.
        ({"D": 8192, "K": 8192, "F": 28672}, 512),  # 14 parts and more would lie across blocks.
        ({"D": 256, "K": 256, "F": 768}, 256),  # There are fewer units than blocks in any case.
        ({"D": 4096, "K": 4096, "F": 12288}, 2048),
    ],
    ids=str,
)
def test_the_default(sizes, part_down):
    """It fits for all rows."""
    for rows in range(1, 9):
        a = abstract(rows=rows, **sizes)
        config = default_config(a)
        assert (config.part_down, config.blocks, config.block_k * config.stages) == (part_down, 264, 1024)
        assert mosaic_gpu.unsupported(a, "gpu") is None


def test_configurations_are_checked():
    a = abstract(**REAL)

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            plan(a, dataclasses.replace(default_config(a), **changes))

    refused("K = 4096 does not fall into parts of 1536 and tiles of 256", part=1536)
    refused("F = 14336 does not fall into parts of 128 and tiles of 256", part_down=128)
    refused("with 264 of them on 132 multiprocessors each has", stages=7)
    refused("registers for 2 blocks, not for 3", blocks=396)
    refused("a block has 224 units of `down`", blocks=8, part_down=512, stages=1)


@pytest.mark.parametrize(("rows", "stored"), [(1, "float8_e4m3fn"), (8, "int8")])
def test_lowers_for_a_gpu_without_one(rows, stored):
    """As far as that goes: to the kernel's module, not to machine code."""
    a = abstract(rows=rows, stored=stored, **REAL)
    assert mosaic_gpu.unsupported(a, "gpu") is None
    text = jax.jit(mosaic_gpu.apply).trace(a).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
    # What the kernel counts in is a constant of the program.
    assert f"dense<[{'0, ' * 33}1936945005]> : tensor<34xi32>" in text


@pytest.mark.gpu
@pytest.mark.parametrize("stored", QUANTIZED)
def test_real_shapes(stored):
    """And always the same, bit for bit."""
    most = make_arguments(8, stored, **REAL, gates=(jnp.linspace(1, 0.5, 8), jnp.linspace(0.5, 0, 8)))
    by_row = ("x", "heads", "attention_gate", "mlp_gate")
    run = jax.jit(mosaic_gpu.apply)
    for rows in (1, 2, 7, 8):
        a = dataclasses.replace(most, **{name: getattr(most, name)[-rows:] for name in by_row})
        out = run(a)
        close(out, a)
        for _ in range(50):
            np.testing.assert_array_equal(run(a), out)


@pytest.mark.gpu
def test_layer_after_layer():
    """One program, in a loop too. Weights are arguments: as constants they would lie beside JAX's memory."""
    a = make_arguments(1, "int8", **REAL)

    def layer(x, a):
        return mosaic_gpu.apply(dataclasses.replace(a, x=x))

    def loop(x, a):
        return jax.lax.scan(lambda x, _: (layer(x, a), None), x, length=2)[0]

    one = jax.jit(layer)
    two = one(one(a.x, a), a)
    np.testing.assert_array_equal(jax.jit(lambda x, a: layer(layer(x, a), a))(a.x, a), two)
    np.testing.assert_array_equal(jax.jit(loop)(a.x, a), two)
