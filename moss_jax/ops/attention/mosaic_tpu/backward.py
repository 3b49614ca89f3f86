"""FlashAttention's backward kernels for TPUs: one by row for q, one by key for k, v and the bias.

Both recompute the scores of a tile, transposed: [X, R]. Rows are along the lanes, because here the vectors
(range, log-sum-exp, mean) are per row, and by key they change with every step.

B batch, K kv heads, N rows (a query of one head each), S keys, R rows of a tile, X keys of a tile, D head
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from moss_jax.ops.attention.mosaic_tpu import tiles
from moss_jax.ops.attention.mosaic_tpu.tiles import Keys, Rows, StaircaseConfig, TileRanges


class Saved(NamedTuple):
    """Inputs of the kernels by row; `mean` is the mean gradient of a row's weights, d_out · out."""

    q: Float[Array, "B K N D"]
    d_out: Float[Array, "B K N D"]
    start: Int[Array, "B 1 1 N"]
    end: Int[Array, "B 1 1 N"]
    log_sum: Float[Array, "B K 1 N"]
    mean: Float[Array, "B K 1 N"]

    def specs(self, spec) -> "Saved":
        """`spec(array, tiled axis)` of each."""
        return Saved(*(spec(x, axis) for x, axis in zip(self, (2, 2, 3, 3, 3, 3), strict=True)))


def backward(config: StaircaseConfig, scale, rows: Rows, keys: Keys, out, log_sum, d_out):
    """Gradients of q [B, K, N, D], of k and v [B, K, S, D], and of the bias [B, 1, 1, S] or None."""
    R, X = config.sizes(rows, keys)
    start, end = (tiles.pad(bound, R, 1, mode="edge") for bound in (rows.start, rows.end))
    tile_ranges = TileRanges.of(start, end, R, X)
    mean = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)
    saved = Saved(
        q=tiles.pad(rows.q, R, 2),
        d_out=tiles.pad(d_out, R, 2),
        start=start[:, None, None, :],
        end=end[:, None, None, :],
        log_sum=log_sum,
        mean=tiles.pad(mean, R, 2)[:, :, None, :],
    )
    d_q = _by_row(scale, R, X, tile_ranges, saved, keys)[:, :, : rows.q.shape[2]]
    return d_q, *_by_key(scale, R, X, tile_ranges, saved, keys)


def _by_row(scale, R, X, tile_ranges: TileRanges, saved: Saved, keys: Keys):
    """Gradient of q, over the same tiles as the forward pass."""
    B, K, N, D = saved.q.shape
    row, key = tiles.specs_by_row(R, X)
    return pl.pallas_call(
        functools.partial(_d_q_kernel, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, N // R, tiles.max_steps(tile_ranges.first, tile_ranges.last)),
            in_specs=[saved.specs(row), keys.specs(key)],
            out_specs=row(saved.q, 2),
            scratch_shapes=[pltpu.VMEM((R, D), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(saved.q.shape, saved.q.dtype),
        compiler_params=tiles.PARAMS,
        name="attention_d_q",
    )(tile_ranges, saved, keys)


def _by_key(scale, R, X, tile_ranges: TileRanges, saved: Saved, keys: Keys):
    """Gradients of k, v and bias: over the same pairs of tiles, by key."""
    B, K, S, D = keys.k.shape
    key_tiles = pl.cdiv(S, X)
    first, last = tile_ranges.row_tiles_by_key(key_tiles)

    def row_tile(b, j, step, tile_ranges, first, last):
        return tiles.tile_of_step(first[b, j], last[b, j], step)

    row = functools.partial(tiles.spec, R, row_tile)
    key = functools.partial(tiles.spec, X, lambda b, j, step, tile_ranges, first, last: j)
    with_bias = keys.bias is not None
    d_bias = jax.ShapeDtypeStruct((B, K, 1, S), jnp.float32) if with_bias else None
    d_k, d_v, d_bias = pl.pallas_call(
        functools.partial(_d_kv_kernel, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, K, key_tiles, tiles.max_steps(first, last)),
            in_specs=[saved.specs(row), keys.specs(key)],
            out_specs=[key(keys.k, 2), key(keys.v, 2), key(d_bias, 3)],
            scratch_shapes=[pltpu.VMEM((X, width), jnp.float32) for width in (D, D, 1)],
        ),
        out_shape=[*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys.k, keys.v)), d_bias],
        compiler_params=tiles.PARAMS,
        name="attention_d_kv",
    )(tile_ranges, first, last, saved, keys)
    return d_k, d_v, d_bias.sum(axis=1, keepdims=True) if with_bias else None


def _d_q_kernel(tile_ranges, saved, keys, d_q, acc, *, scale):
    b, i, step = (pl.program_id(axis) for axis in (0, 2, 3))
    tile = tile_ranges.first[b, i] + step

    @pl.when(step == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    def add_tile(masked):
        _, d_scores, used = _tile_gradients(saved, keys, tile, scale, masked)
        k = keys.k[...] if used is None else tiles.only(used, keys.k[...])
        acc[...] += scale * tiles.matmul(d_scores.astype(k.dtype), k, (0, 0))

    tile_ranges.when_in_range((b, i), tile, keys.k.shape[0], add_tile)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        d_q[...] = acc[...].astype(d_q.dtype)


def _d_kv_kernel(tile_ranges, first, last, saved, keys, d_k, d_v, d_bias, k_acc, v_acc, bias_acc, *, scale):
    b, tile, step = (pl.program_id(axis) for axis in (0, 2, 3))
    i = first[b, tile] + step

    @pl.when(step == 0)
    def _():
        for acc in (k_acc, v_acc, bias_acc):
            acc[...] = jnp.zeros_like(acc)

    def add_tile(masked):
        q, d_out = saved.q[...], saved.d_out[...]
        weights, d_scores, _ = _tile_gradients(saved, keys, tile, scale, masked)
        # A tile contains the rows of all G heads, so these sums are over the heads too.
        k_acc[...] += scale * tiles.matmul(d_scores.astype(q.dtype), q, (1, 0))
        v_acc[...] += tiles.matmul(weights.astype(d_out.dtype), d_out, (1, 0))
        if d_bias is not None:
            bias_acc[...] += d_scores.sum(axis=1, keepdims=True)

    # With gaps between the ranges, some tiles of rows between the first and the last are skipped.
    in_range = i < last[b, tile]
    tile_ranges.when_in_range((b, jnp.where(in_range, i, 0)), tile, keys.k.shape[0], add_tile, also=in_range)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        d_k[...] = k_acc[...].astype(d_k.dtype)
        d_v[...] = v_acc[...].astype(d_v.dtype)
        if d_bias is not None:
            d_bias[...] = tiles.row(bias_acc[...])


def _tile_gradients(saved: Saved, keys: Keys, tile, scale, masked):
    """Weights and gradients of the scores [X, R], and which keys any row sees [X, 1], None for all."""
    scores = scale * tiles.matmul(keys.k[...], saved.q[...], (1, 1))
    if keys.bias is not None:
        scores += tiles.column(keys.bias[...])
    if masked:
        at = tile * scores.shape[0] + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        visible = (saved.start[...] <= at) & (at < saved.end[...])
        scores = jnp.where(visible, scores, -jnp.inf)
    weights = jnp.exp(scores - saved.log_sum[...])
    d_scores = weights * (tiles.matmul(keys.v[...], saved.d_out[...], (1, 1)) - saved.mean[...])
    if not masked:
        return weights, d_scores, None
    used = jnp.max(jnp.where(visible, 1.0, 0.0), axis=1, keepdims=True)
    return weights, jnp.where(visible, d_scores, 0), used
