"""The kernels for TPUs beyond the contract: several tiles, which of them are visited, and compilation.

B batch, T queries, S keys, K kv heads, G query heads per kv head, D head, R rows of a tile, X keys of a tile
"""

import dataclasses
import functools

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies
from ops.attention import exact
from ops.attention.exact import close
from ops.attention.test_contract import poisoned, poisoned_quantized

from moss_jax.config import moss_tiny, moss_video_11b
from moss_jax.ops.attention import Arguments, KeyRange, mosaic_tpu
from moss_jax.ops.attention.mosaic_tpu import DecodeConfig, StaircaseConfig
from moss_jax.ops.attention.mosaic_tpu.tiles import TileRanges, max_steps
from moss_jax.ops.qarray import QUANTIZED, QArray, quantize

B, G, S, D = 2, 3, 300, 64  # 300 keys are two tiles and a shorter one.
DECODE, STAIRCASE = DecodeConfig(block_kv=128), StaircaseConfig(block_q=128, block_kv=128)


def inputs(T, K, dtype="float32"):
    """q, k, v in `dtype`, a bias and the gradient of the output."""
    rng = np.random.default_rng(T)
    q, d_out = (np.array(jnp.asarray(x, dtype)) for x in rng.standard_normal((2, B, T, K * G, D)))
    k, v = (np.array(jnp.asarray(x, dtype)) for x in rng.standard_normal((2, B, K, S, D)))
    return q, k, v, rng.standard_normal((B, S)).astype(np.float32), d_out


def key_ranges(T):
    """Name -> (start, end), int32 [B, T]."""
    t = np.arange(T)
    frames = S * (t + 1) // T // 17 * 17
    ranges = {
        "staircase": (0 * t, frames),
        "moving windows": (np.maximum(frames - 60, 0), frames),
        "gaps": (np.where(t % 2, 20, 270), np.where(t % 2, 90, 290)),
        "every key, and beyond": (0 * t - 5, 0 * t + S + 5),
    }
    ranges = {name: np.stack([bounds, bounds], axis=1).astype(np.int32) for name, bounds in ranges.items()}
    ranges["staircase"][1, 1, T // 2 :] = 130  # The second row of the batch stops before the last tile.
    ranges["moving windows"][:, 1] = 0  # It sees nothing.
    return {name: (start, end) for name, (start, end) in ranges.items()}


@functools.partial(jax.jit, static_argnums=0)
def run(config, q, k, v, bias, start, end, d_out=None):
    """The output and, given its gradient, those of q, k, v and bias."""

    def call(q, k, v, bias):
        return mosaic_tpu.apply(Arguments(q, k, v, KeyRange(start, end), bias, D**-0.5), config)

    with interpreted.on_tpu():
        if d_out is None:
            return (call(q, k, v, bias),)
        out, vjp = jax.vjp(call, q, k, v, bias)
        return out, *vjp(d_out)


def hold(config, dtype, what, q, k, v, bias, d_out, start, end):
    """Compares output and gradients with exact ones; what no query sees is NaN."""
    bad_k, bad_v, bad_bias, unseen = poisoned(k, v, bias, start, end)
    found = run(config, q, bad_k, bad_v, bad_bias, start, end, d_out)
    start, end = start.clip(0, S), end.clip(0, S)
    expected = [exact.attend(q, k, v, bias, start, end, D**-0.5)]
    if d_out is not None:
        expected += exact.gradients(q, k, v, bias, start, end, D**-0.5, d_out)
    share = exact.tolerance(dtype, q, k, D**-0.5)
    for name, x, of in zip(("out", "d_q", "d_k", "d_v", "d_bias"), found, expected, strict=False):
        assert x.dtype == (np.float32 if name == "d_bias" else dtype)
        close(x, of, share, f"{what}: {name}")
    out, *gradients = (np.asarray(x) for x in found)
    assert not out[start >= end].any(), what
    if gradients:
        d_q, d_k, d_v, d_bias = gradients
        assert not d_q[start >= end].any(), what
        assert not d_k.swapaxes(1, 2)[unseen].any(), what
        assert not d_v.swapaxes(1, 2)[unseen].any(), what
        assert not d_bias[unseen].any(), what


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_staircase_over_several_tiles(dtype):
    T = 100  # 300 rows
    these = inputs(T, 1, dtype)
    for what, bounds in key_ranges(T).items():
        hold(STAIRCASE, dtype, what, *these, *bounds)


def test_decode_over_several_tiles():
    """With gradients, which take the kernels of the staircase, and without."""
    T = 4
    *these, d_out = inputs(T, 2)
    for what, bounds in key_ranges(T).items():
        hold(DECODE, "float32", what, *these, d_out if what == "staircase" else None, *bounds)


@pytest.mark.parametrize(
    ("config", "T", "stored"),
    [(DECODE, 2, "float8_e4m3fn"), (STAIRCASE, 60, "int8")],
    ids=["decode", "staircase"],
)
def test_quantized_over_several_tiles(config, T, stored):
    q, k, v, bias, _ = inputs(T, 1)
    k, v = (quantize(x, stored, axes=3) for x in (k, v))
    exact_k, exact_v = (np.float64(x.values) * np.float64(x.scale)[..., None] for x in (k, v))
    share = exact.tolerance("float32", q, exact_k, D**-0.5, score_eps=2.0**-23)
    for what in ("staircase", "gaps"):
        start, end = key_ranges(T)[what]
        expected = exact.attend(q, exact_k, exact_v, bias, start, end, D**-0.5)
        _, _, bad_bias, unseen = poisoned(exact_k, exact_v, bias, start, end)
        (out,) = run(config, q, *(poisoned_quantized(x, unseen) for x in (k, v)), bad_bias, start, end)
        close(out, expected, share, what)


def test_tile_ranges_against_their_definition():
    R, X, tiles = 128, 128, 3
    rng = np.random.default_rng(0)
    start, end = np.sort(rng.integers(0, S + 1, (2, 4, 2 * R)), axis=0)
    start[0, :R] = end[0, :R] = 0
    start[1, :R], end[1, :R] = 200, 210
    start[2, R:], end[2, R:] = 0, S
    start[3], end[3] = np.minimum(start[3], 60), np.maximum(end[3], 270)
    tile_ranges = TileRanges.of(jnp.asarray(start), jnp.asarray(end), R, X)
    visitors = np.stack(tile_ranges.row_tiles_by_key(tiles), axis=-1)
    for b in range(4):
        visits = np.zeros((2, tiles), bool)
        for i in range(2):
            keys = np.arange(tiles * X)
            rows = slice(i * R, (i + 1) * R)
            seen = (start[b, rows, None] <= keys) & (keys < end[b, rows, None])  # [R, S]
            used = np.flatnonzero(seen.any(axis=0)) // X
            first, last = (used[0], used[-1] + 1) if len(used) else (0, 0)
            assert (tile_ranges.first[b, i], tile_ranges.last[b, i]) == (first, last)
            visits[i, first:last] = True
            unmasked = (tile_ranges.every_start[b, i] <= keys) & (keys < tile_ranges.every_end[b, i])
            np.testing.assert_array_equal(unmasked, seen.all(axis=0))
        for j in range(tiles):
            used = np.flatnonzero(visits[:, j])
            assert tuple(visitors[b, j]) == ((used[0], used[-1] + 1) if len(used) else (0, 0))


def test_a_bank_with_few_keys_takes_few_steps():
    start, end = np.zeros((2, 3, 128), np.int32)
    assert max_steps(*TileRanges.of(start, end, 128, 128)[:2]) == 1, "one, that writes zeros"
    end[0], start[1], end[1] = 257, 1000, 1001
    assert max_steps(*TileRanges.of(start, end, 128, 128)[:2]) == 3


def test_tiles_out_of_range_are_not_fetched(monkeypatch):
    """A tile is fetched when a step names another one than the step before."""
    fetched = {}

    def pallas_call(kernel, *, grid_spec, out_shape, name, **_):
        def of(scalars, spec):
            """Tiles that the steps of each range name, without those that are there already."""
            ranges = {}
            for *outer, step in np.ndindex(*(int(size) for size in grid_spec.grid)):
                tile = int(spec.index_map(*outer, step, *scalars)[2])
                tiles = ranges.setdefault((outer[0], outer[2]), [])
                tiles.extend([] if tile in tiles[-1:] else [tile])
            return ranges

        def call(*args):
            rows, *_, keys = grid_spec.in_specs
            scalars = args[: grid_spec.num_scalar_prefetch]
            fetched[name] = of(scalars, rows.q if name == "attention_d_kv" else keys.k)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_shape)

        return call

    monkeypatch.setattr(pl, "pallas_call", pallas_call)
    T = 100
    q, k, v, bias, d_out = inputs(T, 1)
    start, end = key_ranges(T)["moving windows"]
    run.__wrapped__(STAIRCASE, q, k, v, bias, start, end, d_out)
    expected = {(0, 0): [0], (0, 1): [0, 1], (0, 2): [1, 2], (1, 0): [0], (1, 1): [0], (1, 2): [0]}
    assert fetched["attention_forward"] == fetched["attention_d_q"] == expected
    expected = {(0, 0): [0, 1], (0, 1): [1, 2], (0, 2): [2], (1, 0): [0], (1, 1): [0], (1, 2): [0]}
    assert fetched["attention_d_kv"] == expected


def abstract(dtype, T, *, heads=(32, 8), keys=25_856, head_dim=128, stored=None, bias=True, rows=None):
    """Arguments without numbers: one slot, and that many rows of it if any are named."""
    R = rows or 1
    bound = jax.ShapeDtypeStruct((R, T), jnp.int32)
    kv = jax.ShapeDtypeStruct((1, heads[1], keys, head_dim), stored or dtype)
    if stored in QUANTIZED:
        kv = QArray(kv, jax.ShapeDtypeStruct((1, heads[1], keys), jnp.float32))
    return Arguments(
        q=jax.ShapeDtypeStruct((R, T, heads[0], head_dim), dtype),
        k=kv,
        v=kv,
        kv_range=KeyRange(bound, bound),
        bias=jax.ShapeDtypeStruct((1, keys), jnp.float32) if bias else None,
        scale=1.0,
        slots=jax.ShapeDtypeStruct((R,), jnp.int32) if rows else None,
    )


@pytest.mark.parametrize(
    ("platform", "arguments", "reason"),
    [
        ("tpu", abstract("bfloat16", 4), None),
        ("tpu", abstract("float32", 4, stored="int8"), None),
        ("gpu", abstract("bfloat16", 4), "it needs a TPU, and this is gpu"),
        ("tpu", abstract("float16", 4), "float32 and bfloat16, not float16"),
        ("tpu", abstract("bfloat16", 4, stored="float32"), "not bfloat16 and float32"),
        ("tpu", abstract("bfloat16", 4, head_dim=320), "head_dim 320"),
    ],
)
def test_says_why_it_cannot(platform, arguments, reason):
    said = mosaic_tpu.unsupported(arguments, platform)
    assert said == reason if reason is None else reason in said


@pytest.mark.parametrize("size", [0, 64, -128])
def test_sizes_of_tiles_are_whole_registers(size):
    for config in (DecodeConfig, StaircaseConfig):
        with pytest.raises(ValueError, match=f"block_kv {size} must be a positive multiple of 128"):
            config(block_kv=size)
    with pytest.raises(ValueError, match="block_q"):
        StaircaseConfig(block_q=size)


def shapes():
    """Arguments, and whether with gradients."""
    sizes = {}
    for name, model, frames in (("11b", moss_video_11b(), 256), ("tiny", moss_tiny(), 256)):
        decoder = model.decoder
        sizes[name] = {
            "heads": (decoder.num_heads, decoder.num_kv_heads),
            "head_dim": decoder.head_dim,
            "keys": frames * model.vectors_per_frame,
        }
    for name, size in sizes.items():
        for T in (1, 4096):
            for dtype in ("bfloat16", "float32"):
                gradients = T > 1 or dtype == "float32"
                yield pytest.param(abstract(dtype, T, **size), gradients, id=f"{name}-{T}-{dtype}")
    for stored in ("int8", "float8_e4m3fn"):
        for T in (1, 4096):
            yield pytest.param(abstract("bfloat16", T, stored=stored), False, id=f"11b-{T}-{stored}")
    yield pytest.param(abstract("float32", 1, stored="int8"), False, id="11b-1-float32-int8")
    for T in (1, 256):
        yield pytest.param(abstract("bfloat16", T, rows=9), False, id=f"9 rows of a slot-{T}")
    for head_dim in (64, 80, 256):
        dtype = "float32" if head_dim == 64 else "bfloat16"
        arguments = abstract(dtype, 401, heads=(6, 2), keys=1000, head_dim=head_dim, bias=head_dim == 64)
        yield pytest.param(arguments, True, id=f"head_dim {head_dim}")


def program(arguments, gradients):
    """A function of the arguments, and the number of its kernels."""
    if not gradients:
        return mosaic_tpu.apply, 1

    def with_gradients(a):
        out, vjp = jax.vjp(
            lambda q, k, v, bias: mosaic_tpu.apply(dataclasses.replace(a, q=q, k=k, v=v, bias=bias)),
            *(a.q, a.k, a.v, a.bias),
        )
        return out, vjp(out)

    return with_gradients, 3


@pytest.mark.parametrize(("arguments", "gradients"), list(shapes()))
def test_lowers_for_a_tpu(arguments, gradients):
    """To Mosaic's MLIR, which is as far as JAX itself goes."""
    function, kernels = program(arguments, gradients)
    exported = jax.export.export(jax.jit(function), platforms=["tpu"])(arguments)
    assert exported.mlir_module().count("@tpu_custom_call") == kernels


@pytest.mark.parametrize(("arguments", "gradients"), list(shapes()))
def test_compiles_for_a_tpu(arguments, gradients, monkeypatch):
    """Layouts, registers and vector memory, by the TPU's compiler, which needs no TPU."""
    pytest.importorskip("libtpu", reason="the compiler for TPUs comes with jax[tpu]")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # Not asking the cloud which TPU this is.
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    function, _ = program(arguments, gradients)
    compiled = jax.jit(function, out_shardings=jax.sharding.SingleDeviceSharding(devices[0]))
    assert compiled.trace(arguments).lower(lowering_platforms=("tpu",)).compile().memory_analysis()
