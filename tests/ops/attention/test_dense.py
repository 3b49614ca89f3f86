"""The vision encoder's kernel for Hopper, against float64 NumPy, and the op that picks it.

B batch, P positions, H heads, D head
"""

import contextlib
import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.ops import dispatch, tiles
from moss_jax.ops.attention import Unsupported, api, attention, mosaic_gpu, self_attention
from moss_jax.ops.attention.mosaic_gpu.dense import DenseConfig

# The package has a function of the same name.
dense = importlib.import_module("moss_jax.ops.attention.mosaic_gpu.dense")

TOLERANCE = {"float32": 1e-5, "bfloat16": 1.5e-2, "float16": 2e-3}  # As a share of the largest number.


def draw(B, P, H, D, dtype="bfloat16", seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((B, P, 3, H, D), np.float32), dtype)


def exact(qkv):
    """In float64."""
    q, k, v = np.moveaxis(np.asarray(qkv, np.float64), 2, 0)
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, v)


def close(actual, expected, tolerance):
    actual = np.asarray(actual, np.float64)
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@contextlib.contextmanager
def interpreting():
    """The kernel on the CPU; what the interpreter doesn't know is replaced by what it means."""

    def dot(a, b):
        return jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32), precision="highest")

    def product(a, b, meanwhile):
        meanwhile()
        return sum(map(dot, a, b))

    def add_products(totals, a, b):
        return tuple(total + dot(a, x) for total, x in zip(totals, b, strict=True))

    def products(first, second, between, meanwhile, take, overlap):
        between()
        return add_products(*second), take(product(*first, meanwhile))

    def room(shape, part, head_dim, dtype):
        return tiles.tile((*shape, part[1]), dtype)

    replaced = {"product": product, "products": products, "add_products": add_products, "_room": room}
    with mock.patch.multiple(dense, **replaced), interpreted.on_gpu():
        yield


@pytest.mark.parametrize(
    ("D", "P", "config"),
    [
        (80, 200, DenseConfig(block_kv=64, blocks=3)),
        (80, 264, DenseConfig(warpgroups=3, block_kv=80, wide_values=False, stages=3)),
        (80, 200, DenseConfig(block_kv=48, wide_keys=False, wide_values=False, overlap=False, turns=False)),
        (64, 192, DenseConfig(warpgroups=3, block_kv=64)),
        (128, 136, DenseConfig()),
    ],
    ids=lambda x: None if isinstance(x, int) else f"{x.warpgroups}x64-{x.block_kv}",
)
def test_is_attention(D, P, config):
    """The last tile and the last block overlap with others; thread blocks take several blocks of queries."""
    qkv = draw(1, P, 2, D)
    with interpreting():
        close(dense.dense(qkv, config), exact(qkv), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize("changes", [{}, {"warpgroups": 3, "block_kv": 96, "wide_values": False}])
def test_lowers_for_a_gpu_without_one(B, changes):
    """As far as that goes: to the kernel's module, not to machine code."""
    qkv = jax.ShapeDtypeStruct((B, 1608, 3, 16, 80), "bfloat16")
    lowered = dense.dense.trace(qkv, DenseConfig(**changes)).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_configurations_are_checked():
    with pytest.raises(ValueError, match="warpgroups is 2 or 3, not 1"):
        DenseConfig(warpgroups=1)
    with pytest.raises(ValueError, match="block_kv is a multiple of 64 up to 256, not 96"):
        DenseConfig(block_kv=96)
    with pytest.raises(ValueError, match="2 stages and 1 block at least, not 1 and 132"):
        DenseConfig(stages=1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "bfloat16 and float16, not float32"),
        ({"D": 72}, "head_dim 64, 80 and 128, not 72"),
        ({"P": 1601}, "128 positions or more, in multiples of 8, not 1601"),
        ({"P": 120}, "not 120"),
        ({}, None),
    ],
)
def test_says_why_it_cannot(changes, reason):
    sizes = {"P": 1608, "D": 80, "dtype": "bfloat16"} | changes
    qkv = jax.ShapeDtypeStruct((1, sizes["P"], 3, 16, sizes["D"]), sizes["dtype"])
    assert "NVIDIA" in mosaic_gpu.unsupported_projection(qkv, "tpu")
    found = mosaic_gpu.unsupported_projection(qkv, "gpu")
    assert found is None if reason is None else reason in found


def sliced(qkv, **options):
    q, k, v = (qkv[:, :, i] for i in range(3))
    return attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), **options)


def test_elsewhere_it_is_attention_on_the_slices():
    qkv = draw(2, 24, 3, 16, "float32")
    for options in ({}, {"implementation": "reference"}):
        np.testing.assert_array_equal(self_attention(qkv, **options), sliced(qkv, **options))
    close(self_attention(qkv), exact(qkv), TOLERANCE["float32"])


def test_refuses_as_attention_does():
    with pytest.raises(ValueError, match=r"\[B, P, 3, H, D\], not \(1, 8, 2, 4, 16\)"):
        self_attention(jnp.ones((1, 8, 2, 4, 16)))
    with pytest.raises(Unsupported, match="'mosaic_gpu' cannot be used: it needs an NVIDIA GPU"):
        self_attention(draw(1, 128, 2, 64), implementation="mosaic_gpu")
    with pytest.raises(Unsupported, match="no attention implementation 'flash'"):
        self_attention(draw(1, 128, 2, 64), implementation="flash")


@pytest.fixture
def as_on_hopper():
    """The op picks the kernel, whose place is taken by the definition."""
    dispatch.log_once.cache_clear()
    with (
        mock.patch.dict(api.ORDER, cpu=("mosaic_gpu", "xla")),
        mock.patch.object(mosaic_gpu, "unsupported_projection", return_value=None),
        mock.patch.object(mosaic_gpu, "attend_projection") as kernel,
    ):
        kernel.side_effect = lambda qkv: sliced(qkv, implementation="reference") + 1
        yield kernel


@pytest.mark.parametrize("implementation", [None, "mosaic_gpu"])
def test_the_kernel_is_picked(as_on_hopper, implementation, caplog):
    qkv = draw(1, 24, 2, 16, "float32")
    with caplog.at_level(logging.INFO, logger="moss_jax"):
        out = self_attention(qkv, implementation=implementation)
    close(out - 1, exact(qkv), TOLERANCE["float32"])
    assert caplog.messages == ["attention from a fused projection on cpu: using mosaic_gpu"]


def test_gradients_are_those_of_the_slices(as_on_hopper):
    """And so is the output of a call that is differentiated."""
    qkv, d_out = draw(1, 24, 2, 16, "float32"), draw(1, 8, 2, 16, "float32").reshape(1, 24, 2, 16)
    out, pull = jax.vjp(self_attention, qkv)
    expected, expected_pull = jax.vjp(sliced, qkv)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(pull(d_out)[0], expected_pull(d_out)[0])
    as_on_hopper.assert_not_called()


ON_A_MESH = """
from unittest import mock
import jax, numpy as np
from moss_jax.ops.attention import api, mosaic_gpu, self_attention
from moss_jax.sharding import make_mesh

qkv = np.random.default_rng(0).standard_normal((4, 24, 3, 4, 16)).astype(np.float32)
expected = self_attention(qkv)
with (
    jax.set_mesh(make_mesh(1, 2, 4)),
    mock.patch.dict(api.ORDER, cpu=("mosaic_gpu", "xla")),
    mock.patch.object(mosaic_gpu, "unsupported_projection", return_value=None),
    mock.patch.object(mosaic_gpu, "attend_projection", lambda x: api._from_slices("reference", x)),
):
    out = jax.jit(self_attention)(qkv)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert len({s.index for s in out.addressable_shards}) == 8, out.sharding
print("held")
"""


def test_each_device_of_a_mesh_computes_its_part():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", ON_A_MESH],
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.strip() == "held", found.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("B", "P", "H", "D"), [(1, 1608, 16, 80), (8, 1608, 16, 80), (3, 200, 5, 64), (2, 1000, 4, 128)]
)
def test_on_a_gpu(B, P, H, D, dtype):
    qkv = draw(B, P, H, D, dtype)
    with jax.default_matmul_precision("highest"):
        expected = sliced(qkv.astype(jnp.float32), implementation="xla")
    out = jax.jit(lambda qkv: self_attention(qkv, implementation="mosaic_gpu"))(qkv)
    close(out, np.float64(expected), TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"turns": False},
        {"overlap": False},
        {"wide_values": False},
        {"wide_keys": False, "wide_values": False},
        {"warpgroups": 3, "block_kv": 96, "wide_values": False},
        {"stages": 4, "blocks": 5},
    ],
    ids=str,
)
def test_every_way_to_cut_it(changes):
    qkv = draw(2, 328, 4, 80)
    close(dense.dense(qkv, DenseConfig(**changes)), exact(qkv), TOLERANCE["bfloat16"])
