"""The vision encoder's kernel for Hopper, against float64 NumPy, and the op that picks it.

B batch, P positions, H heads, D head
"""

import contextlib
import dataclasses
import functools
import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import interpreted
import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from moss_jax.ops.attention.arguments import slices

from moss_jax.ops import dispatch
from moss_jax.ops.attention import RoundedProjection, Unsupported, api, attention, mosaic_gpu, self_attention
from moss_jax.ops.attention.mosaic_gpu.dense import DenseConfig
from moss_jax.ops.mosaic_gpu import tiles

# The package has a function of the same name.
dense = importlib.import_module("moss_jax.ops.attention.mosaic_gpu.dense")

TOLERANCE = {"float32": 1e-5, "bfloat16": 1.5e-2, "float16": 2e-3}  # As a share of the largest number.

FP8 = jnp.dtype(jnp.float8_e4m3fn)


def draw(B, P, H, D, dtype="bfloat16", seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((B, P, 3, H, D), np.float32), dtype)


def rounded(qkv, scale=2**-5):
    """The same with queries and keys in 8 bits, and queries that have to be multiplied with `scale`."""
    qk = qkv[:, :, :2] * jnp.array([1 / scale, 1], qkv.dtype)[:, None, None]
    largest = float(jnp.finfo(FP8).max)
    qk = qk.clip(-largest, largest).astype(FP8)
    return RoundedProjection(qk, qkv[:, :, 2], jnp.full(1, scale, jnp.float32))


def exact(projection):
    """In float64."""
    if isinstance(projection, RoundedProjection):
        q, k, v = (np.asarray(x, np.float64) for x in (*jnp.moveaxis(projection.qk, 2, 0), projection.v))
        q *= np.asarray(projection.scale)
    else:
        q, k, v = np.moveaxis(np.asarray(projection, np.float64), 2, 0)
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, v)


def close(actual, expected, tolerance):
    actual = np.asarray(actual, np.float64)
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def close_in_fp8(actual, expected, tolerance):
    """Half a step of float8 from what `close` takes."""
    assert actual.dtype == FP8
    allowed = tolerance * np.abs(expected).max()
    # 3 bits behind the first; below 2^-6 the steps are those of 2^-6.
    half_step = np.maximum(np.abs(expected) + allowed, 2**-6) / 16
    assert (np.abs(np.asarray(actual, np.float64) - expected) <= allowed + half_step).all()


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

    def products(first, second, between, meanwhile, take, vectors):
        between()
        return add_products(*second), take(product(*first, meanwhile))

    def room(shape, part, head_dim, dtype):
        return plgpu.SMEM((*shape, part[1]), dtype)

    def parts(head_dim, dtype, wide=True):
        """It copies no zeros from beyond an array."""
        return [(0, head_dim)] if dtype.itemsize == 1 else cut(head_dim, dtype, wide)

    cut = dense._parts
    replaced = {"product": product, "products": products, "add_products": add_products, "_room": room}
    replaced["_parts"] = parts
    replaced["anywhere"] = jnp.max
    with mock.patch.multiple(dense, **replaced), interpreted.on_gpu():
        yield


@pytest.mark.parametrize(
    ("D", "P", "config"),
    [
        (80, 200, DenseConfig(block_kv=64, blocks=3)),
        (80, 264, DenseConfig(warpgroups=3, block_kv=80, wide_values=False, stages=3)),
        (80, 200, DenseConfig(block_kv=48, wide_values=False)),
        (64, 192, DenseConfig(warpgroups=3, block_kv=64)),
        (128, 136, DenseConfig()),
    ],
    ids=lambda x: None if isinstance(x, int) else f"{x.warpgroups}x64-{x.block_kv}",
)
def test_is_attention(D, P, config):
    """The first tile and the last block overlap with others; thread blocks take several blocks of queries."""
    qkv = draw(1, P, 2, D)
    with interpreting():
        close(dense.dense(qkv, config), exact(qkv), TOLERANCE["bfloat16"])


@pytest.mark.parametrize(
    ("P", "block_kv", "first"),
    [
        (128, 128, 128),
        (136, 128, 16),
        (192, 128, 64),
        (200, 128, 80),
        (208, 64, 16),
        (248, 128, 128),
        (256, 64, 64),
    ],
)
def test_the_first_tile_takes_what_the_others_leave(P, block_kv, first):
    """With as many tiles as there are stages, fewer, and more."""
    assert dense._first(P, block_kv) == first
    qkv = draw(1, P, 1, 80)
    with interpreting():
        close(dense.dense(qkv, DenseConfig(block_kv=block_kv, stages=3)), exact(qkv), TOLERANCE["bfloat16"])


def test_no_more_of_the_first_tile_is_masked_than_must_be():
    for P in range(128, 512, 8):
        for block_kv in (16, 64, 96, 128):
            rest = P % block_kv or block_kv
            assert rest <= dense._first(P, block_kv) <= min(rest + 8, block_kv)


def with_peaks(qkv, heads, keys, exceed):
    """Such that scores of all queries with these keys exceed those with others by so much, in powers of 2."""
    qkv = np.asarray(qkv, np.float32) / 4
    D = qkv.shape[-1]
    qkv[:, :, :2, heads, 0] = 0
    qkv[:, :, 0, heads, 0] = 8
    qkv[:, np.array(keys)[:, None], 1, heads, 0] = exceed / tiles.LOG2E * D**0.5 / 8
    return jnp.asarray(qkv, "bfloat16")


@pytest.mark.parametrize(("W", "exceed"), [(2, 94), (2, 600), (3, 100)])
def test_scores_may_exceed_those_of_the_first_tile_by_any_number(W, exceed):
    """In some blocks they do, in others not; after a block that is walked again comes another."""
    config = DenseConfig(warpgroups=W, block_kv=64, stages=3, blocks=2)
    qkv = with_peaks(draw(1, 200, 5, 64), [0, 3], [70, 120], exceed)
    with interpreting():
        out = dense.dense(qkv, config)
    close(out, exact(qkv), TOLERANCE["bfloat16"])


@pytest.mark.parametrize(
    ("exceed", "vote", "right"), [(600, jnp.max, True), (600, jnp.min, False), (0, jnp.max, True)]
)
def test_blocks_are_walked_again_where_sums_exceed_the_most(exceed, vote, right):
    """None are if nobody hears that they should be; with a limit of 0, in the last case, all are."""
    qkv = with_peaks(draw(1, 200, 3, 64), [0, 2], [70], exceed)
    qkv = qkv.at[:, ::64, 0].set(0)  # A row of each block has nothing to exceed.
    most = 0 if exceed == 0 else dense.MOST["bfloat16"]
    with (
        interpreting(),
        mock.patch.object(dense, "anywhere", vote),
        mock.patch.dict(dense.MOST, bfloat16=most),
    ):
        out = dense.dense.__wrapped__(qkv, DenseConfig(block_kv=64, stages=3, blocks=2))
    assert np.isfinite(np.asarray(out, np.float32)).all() == right
    if right:
        close(out, exact(qkv), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("D", [64, 80])
def test_writes_float8(D):
    qkv = draw(1, 200, 2, D)
    with interpreting():
        out = dense.dense(qkv, DenseConfig(block_kv=64, blocks=3), "float8_e4m3fn")
    close_in_fp8(out, exact(qkv), TOLERANCE["bfloat16"])


@pytest.mark.parametrize(("D", "W"), [(64, 2), (80, 3), (128, 2)])
@pytest.mark.parametrize("out_dtype", [None, FP8])
def test_queries_and_keys_in_8_bits(D, W, out_dtype):
    projection = rounded(draw(1, 200, 2, D))
    config = DenseConfig(warpgroups=W, block_kv=64, blocks=3)
    with interpreting():
        out = dense.dense(projection, config, out_dtype)
    check = close if out_dtype is None else close_in_fp8
    check(out, exact(projection), TOLERANCE["bfloat16"])


def test_peaks_of_queries_and_keys_in_8_bits():
    projection = rounded(with_peaks(draw(1, 200, 3, 64), [0, 2], [70], 600))
    with interpreting():
        out = dense.dense(projection, DenseConfig(block_kv=64, stages=3, blocks=2))
    close(out, exact(projection), TOLERANCE["bfloat16"])


def test_heads_in_8_bits_are_cut_for_the_tensor_core():
    """In pieces of 32 columns, of which the copy engine moves lines of 32, 64 or 128 bytes."""
    parts = {D: dense._parts(D, FP8) for D in (64, 80, 128)}
    assert parts == {64: [(0, 64)], 80: [(0, 64), (64, 32)], 128: [(0, 128)]}


@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize("changes", [{}, {"warpgroups": 3, "block_kv": 96, "wide_values": False}])
@pytest.mark.parametrize("prepare", [lambda qkv: qkv, rounded], ids=["bfloat16", "float8"])
def test_lowers_for_a_gpu_without_one(B, changes, prepare):
    """As far as that goes: to the kernel's module, not to machine code."""
    qkv = jax.eval_shape(prepare, jax.ShapeDtypeStruct((B, 1608, 3, 16, 80), "bfloat16"))
    lowered = dense.dense.trace(qkv, DenseConfig(**changes)).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("B", "D", "warpgroups"), [(1, 80, 2), (2, 80, 2), (4, 80, 3), (8, 80, 3), (16, 80, 3), (16, 128, 2)]
)
def test_the_default_by_frames(B, D, warpgroups):
    """What a frame's few blocks of queries gain by being large, they lose by ending unevenly."""
    qkv = jax.ShapeDtypeStruct((B, 1608, 3, 16, D), "bfloat16")
    assert dense.default_config(qkv).warpgroups == warpgroups


@pytest.mark.parametrize("D", [64, 80, 128])
@pytest.mark.parametrize("P", [128, 136, 192, 200])
@pytest.mark.parametrize("prepare", [lambda qkv: qkv, rounded], ids=["bfloat16", "float8"])
def test_every_first_tile_lowers_for_a_gpu_without_one(P, D, prepare):
    qkv = jax.eval_shape(prepare, jax.ShapeDtypeStruct((1, P, 3, 2, D), "bfloat16"))
    lowered = dense.dense.trace(qkv, DenseConfig()).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("D", [64, 80, 128])
def test_float8_lowers_for_a_gpu_without_one(D):
    qkv = jax.ShapeDtypeStruct((16, 1608, 3, 16, D), "bfloat16")
    lowered = dense.dense.trace(qkv, DenseConfig(), FP8).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    assert lowered.out_info.dtype == FP8


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
        ({"out_dtype": "float32"}, "bfloat16 and float8_e4m3fn, not float32"),
        ({"out_dtype": "float16"}, "bfloat16 and float8_e4m3fn, not float16"),
        ({"out_dtype": "float8_e4m3fn"}, None),
        ({}, None),
        ({"qk": "float8_e4m3fn"}, None),
        ({"qk": "float8_e4m3fn", "dtype": "float32"}, "bfloat16 and float16, not float32"),
        ({"qk": "float8_e5m2"}, "queries and keys apart in float8_e4m3fn, not float8_e5m2"),
        ({"qk": "float8_e4m3fn", "P": 1601}, "in multiples of 8, not 1601"),
    ],
)
def test_says_why_it_cannot(changes, reason):
    sizes = {"P": 1608, "D": 80, "dtype": "bfloat16"} | changes
    qkv = jax.ShapeDtypeStruct((1, sizes["P"], 3, 16, sizes["D"]), sizes["dtype"])
    if "qk" in sizes:
        qkv = jax.eval_shape(rounded, qkv)
        qkv = dataclasses.replace(qkv, qk=jax.ShapeDtypeStruct(qkv.qk.shape, sizes["qk"]))
    out_dtype = jnp.dtype(sizes.get("out_dtype", sizes["dtype"]))
    assert "NVIDIA" in mosaic_gpu.unsupported_projection(qkv, out_dtype, "tpu")
    found = mosaic_gpu.unsupported_projection(qkv, out_dtype, "gpu")
    assert found is None if reason is None else reason in found


def sliced(projection, **options):
    q, k, v = slices(projection)
    return attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), **options)


def test_elsewhere_it_is_attention_on_the_slices():
    qkv = draw(2, 24, 3, 16, "float32")
    for options in ({}, {"implementation": "reference"}):
        np.testing.assert_array_equal(self_attention(qkv, **options), sliced(qkv, **options))
    close(self_attention(qkv), exact(qkv), TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_slices_are_what_was_rounded(dtype):
    projection = rounded(draw(2, 24, 3, 16, dtype))
    out = self_attention(projection)
    assert out.dtype == dtype
    close(out, exact(projection), TOLERANCE[dtype])
    full = exact(draw(2, 24, 3, 16, dtype))
    assert 0.005 < np.linalg.norm(exact(projection) - full) / np.linalg.norm(full) < 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_slices_give_float8_too(dtype):
    qkv = draw(2, 24, 3, 16, dtype)
    out = self_attention(qkv, out_dtype=jnp.float8_e4m3fn)
    np.testing.assert_array_equal(np.float32(out), np.float32(sliced(qkv).astype(FP8)))
    close_in_fp8(out, exact(qkv), TOLERANCE[dtype])


def test_refuses_as_attention_does():
    with pytest.raises(ValueError, match=r"\[B, P, 3, H, D\], not \(1, 8, 2, 4, 16\)"):
        self_attention(jnp.ones((1, 8, 2, 4, 16)))
    with pytest.raises(ValueError, match=r"qk \[B, P, 2, H, D\], .* got \(1, 8, 3, 4, 16\)"):
        RoundedProjection(jnp.ones((1, 8, 3, 4, 16), FP8), jnp.ones((1, 8, 4, 16)), jnp.ones(1))
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

        def attend(qkv, out_dtype):
            return (sliced(qkv, implementation="reference") + 1).astype(out_dtype)

        kernel.side_effect = attend
        yield kernel


@pytest.mark.parametrize("implementation", [None, "mosaic_gpu"])
def test_the_kernel_is_picked(as_on_hopper, implementation, caplog):
    qkv = draw(1, 24, 2, 16, "float32")
    with caplog.at_level(logging.INFO, logger="moss_jax"):
        out = self_attention(qkv, implementation=implementation)
    close(out - 1, exact(qkv), TOLERANCE["float32"])
    in_fp8 = self_attention(qkv, out_dtype=FP8, implementation=implementation)
    np.testing.assert_array_equal(np.float32(in_fp8), np.float32(out.astype(FP8)))
    assert caplog.messages == ["attention from a fused projection on cpu: using mosaic_gpu"]


def test_the_kernel_is_given_what_was_rounded(as_on_hopper):
    projection = rounded(draw(1, 24, 2, 16))
    close(self_attention(projection) - 1, exact(projection), 2 * TOLERANCE["bfloat16"])
    as_on_hopper.assert_called_once()


def test_gradients_are_those_of_the_slices(as_on_hopper):
    """And so is the output of a call that is differentiated."""
    qkv, d_out = draw(1, 24, 2, 16, "float32"), draw(1, 8, 2, 16, "float32").reshape(1, 24, 2, 16)
    out, pull = jax.vjp(self_attention, qkv)
    expected, expected_pull = jax.vjp(sliced, qkv)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(pull(d_out)[0], expected_pull(d_out)[0])
    as_on_hopper.assert_not_called()


def test_gradients_of_what_was_rounded_are_those_of_the_slices(as_on_hopper):
    projection = rounded(draw(1, 24, 2, 16, "float32"))
    d_out = draw(1, 8, 2, 16, "float32").reshape(1, 24, 2, 16)
    out, pull = jax.vjp(self_attention, projection)
    expected, expected_pull = jax.vjp(sliced, projection)
    np.testing.assert_array_equal(out, expected)
    for found, exactly in zip(*map(jax.tree.leaves, (pull(d_out), expected_pull(d_out))), strict=True):
        assert np.abs(np.float32(exactly)).max() > 0
        np.testing.assert_array_equal(np.float32(found), np.float32(exactly))
    as_on_hopper.assert_not_called()


def test_gradients_of_float8_go_through_the_cast(as_on_hopper):
    qkv, d_out = draw(1, 24, 2, 16, "float32"), draw(1, 8, 2, 16, FP8).reshape(1, 24, 2, 16)
    out, pull = jax.vjp(lambda qkv: self_attention(qkv, out_dtype=FP8), qkv)
    expected, expected_pull = jax.vjp(lambda qkv: sliced(qkv).astype(FP8), qkv)
    np.testing.assert_array_equal(np.float32(out), np.float32(expected))
    np.testing.assert_array_equal(pull(d_out)[0], expected_pull(d_out)[0])
    as_on_hopper.assert_not_called()


ON_A_MESH = """
from unittest import mock
import jax, numpy as np
from moss_jax.ops.attention import RoundedProjection, api, mosaic_gpu, self_attention
from moss_jax.sharding import make_mesh

qkv = np.random.default_rng(0).standard_normal((4, 24, 3, 4, 16)).astype(np.float32)
qk = qkv[:, :, :2].astype("float8_e4m3fn")
projections = qkv, RoundedProjection(qk, qkv[:, :, 2], np.full(1, 0.5, np.float32))
expected = [self_attention(x) for x in projections]
with (
    jax.set_mesh(make_mesh(1, 2, 4)),
    mock.patch.dict(api.ORDER, cpu=("mosaic_gpu", "xla")),
    mock.patch.object(mosaic_gpu, "unsupported_projection", return_value=None),
    mock.patch.object(
        mosaic_gpu, "attend_projection", lambda x, out_dtype: api._from_slices("reference", out_dtype, x)
    ),
):
    for projection, alone in zip(projections, expected, strict=True):
        out = jax.jit(self_attention)(projection)
        np.testing.assert_allclose(out, alone, atol=1e-5)
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
@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [("bfloat16", None), ("float16", None), ("bfloat16", FP8), ("float16", FP8)]
)
@pytest.mark.parametrize(
    ("B", "P", "H", "D"), [(1, 1608, 16, 80), (8, 1608, 16, 80), (3, 200, 5, 64), (2, 1000, 4, 128)]
)
def test_on_a_gpu(B, P, H, D, dtype, out_dtype):
    qkv = draw(B, P, H, D, dtype)
    with jax.default_matmul_precision("highest"):
        expected = sliced(qkv.astype(jnp.float32), implementation="xla")
    attend = functools.partial(self_attention, out_dtype=out_dtype, implementation="mosaic_gpu")
    check = close if out_dtype is None else close_in_fp8
    check(jax.jit(attend)(qkv), np.float64(expected), TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("out_dtype", [None, FP8])
@pytest.mark.parametrize(
    ("B", "P", "H", "D"), [(1, 1608, 16, 80), (8, 1608, 16, 80), (3, 200, 5, 64), (2, 1000, 4, 128)]
)
def test_queries_and_keys_in_8_bits_on_a_gpu(B, P, H, D, dtype, out_dtype):
    projection = rounded(draw(B, P, H, D, dtype))
    with jax.default_matmul_precision("highest"):
        expected = sliced(
            dataclasses.replace(projection, v=projection.v.astype(jnp.float32)), implementation="xla"
        )
    attend = functools.partial(self_attention, out_dtype=out_dtype, implementation="mosaic_gpu")
    check = close if out_dtype is None else close_in_fp8
    check(jax.jit(attend)(projection), np.float64(expected), TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"wide_values": False},
        {"warpgroups": 3, "block_kv": 96, "wide_values": False},
        {"stages": 4, "blocks": 5},
    ],
    ids=str,
)
def test_every_way_to_cut_it(changes):
    qkv = draw(2, 328, 4, 80)
    close(dense.dense(qkv, DenseConfig(**changes)), exact(qkv), TOLERANCE["bfloat16"])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes", [{}, {"warpgroups": 3, "block_kv": 96, "wide_values": False, "blocks": 7}]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("exceed", [12, 94, 98, 600])
def test_peaks_on_a_gpu(changes, dtype, exceed):
    qkv = with_peaks(draw(2, 1608, 6, 80), [0, 3], [70, 400, 1200], exceed).astype(dtype)
    # The tensor core adds 8 bits up with 14: the larger a peak, the less is left of the rest. With nothing
    # left of it these would be off by 0.2.
    for projection, tolerance in ((qkv, TOLERANCE[dtype]), (rounded(qkv), 0.1 if exceed < 100 else 0.2)):
        expected = exact(projection)
        for _ in range(3):
            close(dense.dense(projection, DenseConfig(**changes)), expected, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 80, 128])
@pytest.mark.parametrize("P", [128, 136, 192, 200, 248, 256, 1544])
def test_every_first_tile_on_a_gpu(P, D):
    qkv = draw(2, P, 3, D)
    close(dense.dense(qkv, DenseConfig()), exact(qkv), TOLERANCE["bfloat16"])
    projection = rounded(qkv)
    close(dense.dense(projection, DenseConfig()), exact(projection), TOLERANCE["bfloat16"])
