"""Self-attention from a fused projection: the dense kernel for Hopper against float64 NumPy, and the op.

B batch, P positions, H heads, D head
"""

import dataclasses

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.attention import exact
from ops.attention.exact import close

from moss_jax.ops.attention import QuantizedProjection, Unsupported, attention, mosaic_gpu, self_attention
from moss_jax.ops.attention.base import SelfAttentionArguments, slices, values_dtype
from moss_jax.ops.attention.mosaic_gpu import dense
from moss_jax.ops.attention.mosaic_gpu.dense import DenseConfig, dense_attention
from moss_jax.ops.mosaic_gpu import tiles
from moss_jax.ops.qarray import QArray

FP8 = jnp.dtype(jnp.float8_e4m3fn)


def draw(B, P, H, D, dtype="bfloat16", seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((B, P, 3, H, D), np.float32), dtype)


def quantized(qkv, scale=2**-5):
    """The same with queries and keys in 8 bits, and queries to be multiplied by `scale`."""
    qk = qkv[:, :, :2] * jnp.array([1 / scale, 1], qkv.dtype)[:, None, None]
    largest = float(jnp.finfo(FP8).max)
    return QuantizedProjection(
        QArray(qk.clip(-largest, largest).astype(FP8), jnp.float32(scale)), qkv[:, :, 2]
    )


def arrays(projection):
    """q [B, P, H, D], k and v [B, H, P, D] in float64."""
    if isinstance(projection, QuantizedProjection):
        q, k = np.moveaxis(np.float64(projection.qk.values), 2, 0)
        q, v = q * np.float64(projection.qk.scale), np.float64(projection.v)
    else:
        q, k, v = np.moveaxis(np.float64(projection), 2, 0)
    return q, k.swapaxes(1, 2), v.swapaxes(1, 2)


def hold(out, projection, what="", score_error=0.0):
    """Compares an output, rounded to 8 bits or not, with the exact one.

    Args:
      score_error: absolute error of scores beyond that of a sum in float32.
    """
    q, k, v = arrays(projection)
    end = np.full(q.shape[:2], k.shape[2])
    dtype = values_dtype(projection)
    scale = q.shape[-1] ** -0.5
    # An error of a score is a relative error of its weight, and of the sum.
    share = exact.tolerance(dtype, q, k, scale) + 2 * score_error
    assert out.dtype in (dtype, FP8)
    expected = exact.attend(q, k, v, None, 0 * end, end, scale)
    close(out, expected, share, what, dtype=FP8 if out.dtype == FP8 else None)


def compute(projection, config, out_dtype=None):
    with interpreted.on_gpu():
        return dense_attention(projection, config, out_dtype)


@pytest.mark.parametrize(
    ("D", "P", "config"),
    [
        (80, 200, DenseConfig(block_kv=64, blocks=3)),
        (80, 264, DenseConfig(warpgroups=3, block_kv=80, wide_values=False, stages=3)),
        (64, 192, DenseConfig(warpgroups=3, block_kv=64)),
        (128, 136, DenseConfig()),
    ],
    ids=lambda x: None if isinstance(x, int) else f"{x.warpgroups}x64-{x.block_kv}",
)
def test_is_attention(D, P, config):
    """The first tile and the last block overlap with others; thread blocks take several blocks of queries."""
    qkv = draw(1, P, 2, D)
    hold(compute(qkv, config), qkv)


# Positions, keys of a tile, keys of the first tile: with as many tiles as stages, fewer, and more.
FIRST_TILES = [(128, 128, 128), (136, 128, 16), (192, 128, 64), (208, 64, 16), (248, 128, 128)]


@pytest.mark.parametrize(("P", "block_kv", "first"), FIRST_TILES)
def test_the_first_tile_takes_the_remainder(P, block_kv, first):
    assert dense._first(P, block_kv) == first
    qkv = draw(1, P, 1, 80)
    hold(compute(qkv, DenseConfig(block_kv=block_kv, stages=3)), qkv)


def test_no_more_of_the_first_tile_is_masked_than_must_be():
    for P in range(128, 512, 8):
        for block_kv in (16, 64, 96, 128):
            rest = P % block_kv or block_kv
            assert rest <= dense._first(P, block_kv) <= min(rest + 8, block_kv)


def with_peaks(qkv, heads, keys, exceed):
    """Such that scores of all queries with some keys exceed the others by `exceed`, in powers of 2."""
    qkv = np.asarray(qkv, np.float32) / 4
    D = qkv.shape[-1]
    qkv[:, :, :2, heads, 0] = 0
    qkv[:, :, 0, heads, 0] = 8
    qkv[:, np.array(keys)[:, None], 1, heads, 0] = exceed / tiles.LOG2E * D**0.5 / 8
    return jnp.asarray(qkv, "bfloat16")


@pytest.mark.parametrize(("W", "exceed", "limit"), [(2, 94, None), (2, 600, None), (3, 100, None), (2, 0, 0)])
def test_blocks_are_computed_again_where_weights_are_too_large(W, exceed, limit):
    """In some blocks they are, in others not; with a limit of 0, in the last case, in all."""
    config = DenseConfig(warpgroups=W, block_kv=64, stages=3, blocks=2, largest_weight=limit)
    qkv = with_peaks(draw(1, 200, 5, 64), [0, 3], [70, 120], exceed)
    qkv = qkv.at[:, ::64, 0].set(0)  # A row of each block has no peak.
    hold(compute(qkv, config), qkv)


@pytest.mark.parametrize(("D", "W"), [(64, 2), (80, 3), (128, 2)])
def test_queries_keys_and_results_in_8_bits(D, W):
    qkv, config = draw(1, 200, 2, D), DenseConfig(warpgroups=W, block_kv=64, blocks=3)
    hold(compute(qkv, config, FP8), qkv, "results")
    projection = quantized(qkv)
    hold(compute(projection, config), projection, "queries and keys")
    hold(compute(projection, config, FP8), projection, "all")


def test_peaks_of_queries_and_keys_in_8_bits():
    projection = quantized(with_peaks(draw(1, 200, 3, 64), [0, 2], [70], 600))
    hold(compute(projection, DenseConfig(block_kv=64, stages=3, blocks=2)), projection)


def test_heads_in_8_bits_are_cut_for_the_tensor_core():
    """In pieces of 32 columns, of which the TMA moves lines of 32, 64 or 128 bytes."""
    parts = {D: dense._parts(D, FP8) for D in (64, 80, 128)}
    assert parts == {64: [(0, 64)], 80: [(0, 64), (64, 32)], 128: [(0, 128)]}


@pytest.mark.parametrize("prepare", [lambda qkv: qkv, quantized], ids=["bfloat16", "float8"])
@pytest.mark.parametrize(
    ("B", "P", "D", "config"),
    [
        (1, 1608, 80, DenseConfig()),
        (8, 1608, 80, dense.THREE_CONSUMERS),
        *((1, P, 80, DenseConfig()) for P in (128, 136, 192)),
        (1, 200, 64, DenseConfig()),
        (2, 1000, 128, DenseConfig()),
    ],
    ids=str,
)
def test_lowers_for_a_gpu_without_one(B, P, D, config, prepare):
    """To the kernel's module, not to machine code."""
    projection = jax.eval_shape(prepare, jax.ShapeDtypeStruct((B, P, 3, 16, D), "bfloat16"))
    for out_dtype in (None, FP8):
        lowered = dense_attention.trace(projection, config, out_dtype).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()
        assert lowered.out_info.dtype == (out_dtype or "bfloat16")


@pytest.mark.parametrize(
    ("B", "D", "warpgroups"), [(1, 80, 2), (2, 80, 2), (4, 80, 3), (16, 80, 3), (16, 128, 2)]
)
def test_the_default_by_frames(B, D, warpgroups):
    """A frame's few blocks of queries lose by ending unevenly what they gain by being large."""
    qkv = jax.ShapeDtypeStruct((B, 1608, 3, 16, D), "bfloat16")
    assert dense.default_config(qkv).warpgroups == warpgroups


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
        ({"out_dtype": "float16"}, "bfloat16 and float8_e4m3fn, not float16"),
        ({"out_dtype": "float8_e4m3fn"}, None),
        ({}, None),
        ({"qk": "float8_e4m3fn"}, None),
        ({"qk": "float8_e4m3fn", "dtype": "float32"}, "bfloat16 and float16, not float32"),
        ({"qk": "int8"}, "queries and keys in float8_e4m3fn, not int8"),
    ],
)
def test_says_why_it_cannot(changes, reason):
    sizes = {"P": 1608, "D": 80, "dtype": "bfloat16"} | changes
    projection = jax.ShapeDtypeStruct((1, sizes["P"], 3, 16, sizes["D"]), sizes["dtype"])
    if "qk" in sizes:
        projection = jax.eval_shape(quantized, projection)
        qk = QArray(jax.ShapeDtypeStruct(projection.qk.shape, sizes["qk"]), projection.qk.scale)
        projection = dataclasses.replace(projection, qk=qk)
    a = SelfAttentionArguments(projection, out_dtype=jnp.dtype(sizes.get("out_dtype", sizes["dtype"])))
    assert "NVIDIA" in mosaic_gpu.unsupported_self_attention(a, "tpu")
    found = mosaic_gpu.unsupported_self_attention(a, "gpu")
    assert found is None if reason is None else reason in found


def sliced(projection, **options):
    q, k, v = slices(projection)
    return attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_elsewhere_it_is_attention_on_the_slices(dtype):
    qkv = draw(2, 24, 3, 16, dtype)
    for projection in (qkv, quantized(qkv)):
        for options in ({}, {"implementation": "reference"}):
            out = self_attention(projection, **options)
            np.testing.assert_array_equal(np.float32(out), np.float32(sliced(projection, **options)))
        hold(out, projection)
        scale = jnp.float32(0.25)
        in_8_bits = self_attention(projection, out_scale=scale, **options)
        assert in_8_bits.scale is scale
        np.testing.assert_array_equal(np.float32(in_8_bits.values), np.float32(out.astype(FP8)))


def test_refuses_as_attention_does():
    with pytest.raises(ValueError, match=r"\[B, P, 3, H, D\], not \(1, 8, 2, 4, 16\)"):
        self_attention(jnp.ones((1, 8, 2, 4, 16)))
    with pytest.raises(ValueError, match=r"qk \[B, P, 2, H, D\] .* got \(1, 8, 3, 4, 16\)"):
        QuantizedProjection(QArray(jnp.ones((1, 8, 3, 4, 16), FP8), jnp.ones(())), jnp.ones((1, 8, 4, 16)))
    with pytest.raises(Unsupported, match="'mosaic_gpu' cannot be used: it needs an NVIDIA GPU"):
        self_attention(draw(1, 128, 2, 64), implementation="mosaic_gpu")
    with pytest.raises(Unsupported, match="'mosaic_gpu' cannot be used: it needs an NVIDIA GPU"):
        self_attention(draw(1, 128, 2, 64), config=DenseConfig())
    with pytest.raises(Unsupported, match="no attention implementation 'flash'"):
        self_attention(draw(1, 128, 2, 64), implementation="flash")


def test_a_config_forces_the_kernel():
    projection = quantized(draw(1, 136, 1, 64))
    scale = jnp.float32(2)
    with interpreted.on_gpu():
        out = self_attention(projection, out_scale=scale, config=DenseConfig(block_kv=64))
    assert out.scale is scale
    hold(out.values, projection)


@pytest.mark.parametrize("prepare", [lambda qkv: qkv, quantized], ids=["bfloat16", "float8"])
@pytest.mark.parametrize("scale", [None, 2.0])
def test_gradients_are_those_of_the_slices(prepare, scale):
    """And so is the output of a call that is differentiated; results in 8 bits are those of a cast."""
    projection, d_out = prepare(draw(1, 128, 1, 64)), draw(1, 128, 1, 64, seed=1)[:, :, 0]
    out_scale = None if scale is None else jnp.float32(scale)

    def by_kernel(projection):
        out = self_attention(projection, out_scale=out_scale, config=DenseConfig())
        return out if scale is None else out.values

    def by_slices(projection):
        out = sliced(projection)
        return out if scale is None else out.astype(FP8)

    with interpreted.on_gpu():
        out, pull = jax.vjp(by_kernel, projection)
        expected, expected_pull = jax.vjp(by_slices, projection)
        d_out = d_out.astype(out.dtype)
        np.testing.assert_array_equal(np.float32(out), np.float32(expected))
        for found, of in zip(*map(jax.tree.leaves, (pull(d_out), expected_pull(d_out))), strict=True):
            assert np.abs(np.float32(of)).max() > 0
            np.testing.assert_array_equal(np.float32(found), np.float32(of))


def fp8_sum_error(projection):
    """Error of scores of which Hopper's tensor core cuts each term to 14 bits, from the largest; else 0."""
    if not isinstance(projection, QuantizedProjection):
        return 0.0
    q, k, _ = arrays(projection)
    return exact.EPS_FP8_SUM * q.shape[-1] ** 0.5 * abs(q).max() * abs(k).max()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("B", "P", "H", "D", "dtype"),
    [
        (1, 1608, 16, 80, "bfloat16"),
        (8, 1608, 2, 80, "float16"),
        (3, 200, 5, 64, "float16"),
        (2, 1000, 4, 128, "bfloat16"),
    ],
)
def test_on_a_gpu(B, P, H, D, dtype):
    """With queries and keys, results, both or neither in 8 bits."""
    qkv = draw(B, P, H, D, dtype)
    for projection in (qkv, quantized(qkv)):
        for scale in (None, jnp.float32(1)):
            out = jax.jit(lambda x, scale=scale: self_attention(x, out_scale=scale, config=DenseConfig()))
            found = out(projection)
            found = found.values if isinstance(found, QArray) else found
            hold(found, projection, score_error=fp8_sum_error(projection))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [
        DenseConfig(wide_values=False),
        DenseConfig(stages=4, blocks=5),
        dense.THREE_CONSUMERS,
    ],
    ids=str,
)
def test_every_way_to_cut_it(config):
    qkv = draw(2, 328, 4, 80)
    hold(dense_attention(qkv, config), qkv)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "config"),
    [("bfloat16", DenseConfig()), ("float16", dataclasses.replace(dense.THREE_CONSUMERS, blocks=7))],
)
def test_peaks_on_a_gpu(dtype, config):
    for exceed in (12, 94, 98, 600):
        qkv = with_peaks(draw(2, 1608, 6, 80), [0, 3], [70, 400, 1200], exceed).astype(dtype)
        for projection in (qkv, quantized(qkv)):
            for _ in range(3):
                out = dense_attention(projection, config)
                hold(out, projection, f"{exceed}", rest_of_peaks(projection))


def rest_of_peaks(projection):
    """The largest score without the column of the peaks, beside which sums in 8 bits may lose the rest."""
    if not isinstance(projection, QuantizedProjection):
        return 0.0
    q, k, _ = arrays(projection)
    return abs(np.einsum("bqhd,bhkd->bhqk", q[:, :, :, 1:], k[:, :, :, 1:])).max() * q.shape[-1] ** -0.5


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("P", "D"),
    [(128, 80), (136, 64), (192, 80), (200, 128), (248, 64), (256, 128), (1544, 80)],
)
def test_every_first_tile_on_a_gpu(P, D):
    qkv = draw(2, P, 3, D)
    for projection in (qkv, quantized(qkv)):
        out = dense_attention(projection, DenseConfig())
        hold(out, projection, score_error=fp8_sum_error(projection))
