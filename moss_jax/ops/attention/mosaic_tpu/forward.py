"""FlashAttention's forward kernel for TPUs: a tile of rows over its tiles of keys, with an online softmax.

B batch, K kv heads, N rows (a query of one head each), S keys, R rows of a tile, X keys of a tile, D head
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moss_jax.ops.attention.mosaic_tpu import tiles
from moss_jax.ops.attention.mosaic_tpu.tiles import Keys, Rows, TileRanges


def forward(config, scale, rows: Rows, keys: Keys, save: bool):
    """Returns the output [B, K, N, D] and, if `save`, the log-sum-exp [B, K, 1, N] padded to whole tiles."""
    B, K, N, D = rows.q.shape
    R, X = config.sizes(rows, keys)
    q = tiles.pad(rows.q, R, 2)
    start, end = (tiles.pad(bound, R, 1, mode="edge") for bound in (rows.start, rows.end))
    tile_ranges = TileRanges.of(start, end, R, X, rows.slots)
    start, end = (bound[:, None, :, None] for bound in (start, end))
    log_sum = jax.ShapeDtypeStruct((B, K, 1, q.shape[2]), jnp.float32) if save else None
    row, key = tiles.specs_by_row(R, X)
    out, log_sum = pl.pallas_call(
        functools.partial(_kernel, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, q.shape[2] // R, tiles.max_steps(tile_ranges.first, tile_ranges.last)),
            in_specs=[row(q, 2), row(start, 2), row(end, 2), keys.specs(key)],
            out_specs=[row(q, 2), row(log_sum, 3)],
            scratch_shapes=[pltpu.VMEM((R, width), jnp.float32) for width in (1, 1, D)],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), log_sum],
        compiler_params=tiles.PARAMS,
        name="attention_forward",
    )(tile_ranges, q, start, end, keys)
    return out[:, :, :N], log_sum


def _kernel(tile_ranges, q, start, end, keys, out, log_sum, row_max, row_sum, acc, *, scale):
    # Scores are [R, X]: in decode the long axis is along the lanes, as are the vectors of the keys.
    b, i, step = (pl.program_id(axis) for axis in (0, 2, 3))
    tile = tile_ranges.first[b, i] + step

    @pl.when(step == 0)
    def _():
        row_max[...] = jnp.full_like(row_max, -jnp.inf)
        row_sum[...] = jnp.zeros_like(row_sum)
        acc[...] = jnp.zeros_like(acc)

    def attend_tile(masked):
        k, v = (x[...].astype(q.dtype) for x in (keys.k, keys.v))
        scores = scale * tiles.matmul(q[...], k, (1, 1))
        if keys.k_scale is not None:
            scores *= keys.k_scale[...]
        if keys.bias is not None:
            scores += keys.bias[...]
        v_scale = None if keys.v_scale is None else keys.v_scale[...]
        if masked:
            at = tile * k.shape[0] + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            visible = (start[...] <= at) & (at < end[...])
            scores = jnp.where(visible, scores, -jnp.inf)
            used = jnp.max(jnp.where(visible, 1.0, 0.0), axis=0, keepdims=True)  # [1, X]
            v = tiles.only(tiles.column(used), v)
            v_scale = None if v_scale is None else jnp.where(used > 0, v_scale, 0)
        new_max = jnp.maximum(row_max[...], scores.max(axis=1, keepdims=True))
        # A row that has seen no key yet has maximum -inf, and -inf - -inf would be NaN.
        shift = jnp.where(new_max == -jnp.inf, 0, new_max)
        weights = jnp.exp(scores - shift)
        rescale = jnp.exp(row_max[...] - shift)
        row_max[...] = new_max
        row_sum[...] = row_sum[...] * rescale + weights.sum(axis=1, keepdims=True)
        if v_scale is not None:
            weights *= v_scale
        acc[...] = acc[...] * rescale + tiles.matmul(weights.astype(v.dtype), v, (1, 0))

    tile_ranges.when_in_range((b, i), tile, keys.k.shape[0], attend_tile)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        sees_any = row_sum[...] > 0
        sums = jnp.where(sees_any, row_sum[...], 1)
        out[...] = (acc[...] / sums).astype(out.dtype)
        if log_sum is not None:
            log_sum[...] = tiles.row(jnp.where(sees_any, row_max[...] + jnp.log(sums), jnp.inf))
