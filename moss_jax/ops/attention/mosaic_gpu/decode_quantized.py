"""Few queries over a long bank of keys in 8 bits: as `decode`, with the operands of the products swapped.

Keys are the rows of the scores and the queries their columns, because the tensor core takes 64 rows but as
few as 8 columns. K goes from shared memory through registers straight into the tensor core; only V comes
back to shared memory as 16 bits, because its product reads it transposed.

B slot, T query tokens, R = T * G rows of queries, N = R rounded up to a multiple of 8, S keys, X keys of a
tile, P splits, K kv heads, G query heads per kv head, D head
"""

import dataclasses
import functools

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from moss_jax.ops.attention.arguments import Arguments
from moss_jax.ops.attention.mosaic_gpu import tiles
from moss_jax.ops.attention.mosaic_gpu.decode import LANES, TINY, _join, _pad
from moss_jax.ops.attention.mosaic_gpu.tiles import LOG2E, MATRIX, NEVER, PER_COLUMN, PER_ROW

# Pallas would put two barriers around every store and one before every copy; the kernel's own are enough:
# `_kernel` says where each hazard ends.
AUTO_BARRIERS = False

NARROW = plgpu.Layout.WGMMA_UPCAST_2X  # As MATRIX, but a thread has 4 neighbouring columns, 32 bits in all.


@dataclasses.dataclass(frozen=True)
class QuantizedDecodeConfig:
    """How the keys are cut.

    Attributes:
      block_kv: keys of a tile.
      stages: tiles of K and of V that are on their way at once.
      blocks: splits that are running at once on the whole card, over all slots and heads.
    """

    block_kv: int = 64
    stages: int = 2
    blocks: int = 528

    def __post_init__(self):
        if self.block_kv % 64 or self.block_kv < 64:
            raise ValueError(f"block_kv is a multiple of 64, not {self.block_kv}")
        if self.stages < 1 or self.blocks < 1:
            raise ValueError(f"stages and blocks are at least 1, not {self.stages} and {self.blocks}")

    def splits(self, pairs: int, keys: int) -> int:
        """Into how many pieces the keys of each (slot, kv head) pair are cut."""
        return max(1, min(self.blocks // pairs, pl.cdiv(keys, self.block_kv)))


@functools.partial(jax.jit, static_argnames="config")
def decode_quantized(a: Arguments, config: QuantizedDecodeConfig) -> Float[Array, "B T H D"]:
    """Computes the op for T * G <= 64, K and V in 8 bits and D a multiple of 64; forward only."""
    B, T, H, D = a.q.shape
    K, S = a.k.shape[1:3]
    rows = T * H // K
    if not a.quantized or rows > 64 or D % 64 or D > 256:
        raise ValueError(
            f"decode_quantized takes 8-bit K and V, T * G up to 64 and D of 64, 128, 192 or 256; "
            f"got {a.k.dtype}, T * G = {rows}, D = {D}"
        )
    N, X = pl.cdiv(rows, 8) * 8, config.block_kv
    splits = config.splits(B * K, S)
    # Both hold every number that the 8 bits do.
    inner = jnp.float16 if a.k.dtype == jnp.float8_e4m3fn else jnp.bfloat16
    q = a.q.reshape(B, T, K, H // K, D).swapaxes(1, 2).reshape(B, K, rows, D)
    if inner != q.dtype:
        # The scale goes in here, so that float16 holds queries of any size that matters.
        q = (q.astype(jnp.float32) * a.scale).astype(inner)
    q = _shuffle(jnp.pad(q, ((0, 0), (0, 0), (0, N - rows), (0, 0))))
    # The vectors of all slots and heads in one row: tiles may start at any multiple of 8 of them.
    bias = None if a.bias is None else jnp.broadcast_to(a.bias[:, None], (B, K, S))
    k, v = (_pad(x.reshape(-1, D), X) for x in (a.k, a.v))
    vectors = [_pad(x.astype(jnp.float32).reshape(-1), X) for x in (a.k_scale, a.v_scale)]
    bias = None if bias is None else _pad(bias.astype(jnp.float32).reshape(-1), X)
    start, end = (x.astype(jnp.int32) for x in a.bounds)
    part = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    out, top, total = plgpu.kernel(
        functools.partial(
            _kernel,
            scale=LOG2E * (a.scale if inner == a.q.dtype else 1),
            group=H // K,
            keys=S,
            heads=K,
            splits=splits,
            stages=config.stages,
        ),
        out_type=[part((B, K, splits, D, N)), part((B, K, splits, N)), part((B, K, splits, N))],
        scratch_types={
            "q_smem": tiles.tile((N, D), inner),
            "k_smem": tiles.tile((config.stages, X, D), a.k.dtype),
            "v_smem": tiles.tile((config.stages, X, D), a.v.dtype),
            "wide_smem": tiles.tile((X, D), inner),
            "weights_smem": tiles.tile((N, X), inner),
            # Of k_scale, v_scale and the bias.
            "vectors_smem": plgpu.SMEM((2 + (bias is not None), config.stages, X), jnp.float32),
            "barriers": (
                plgpu.Barrier(),
                # One arrival a copy.
                plgpu.Barrier(num_arrivals=2 + (bias is not None), num_barriers=config.stages),
                plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            ),
        },
        grid=(splits, K, B),
        grid_names=("split", "head", "slot"),
        compiler_params=dataclasses.replace(
            tiles.COMPILER_PARAMS,
            unsafe_no_auto_barriers=not AUTO_BARRIERS,
            # Of 8 columns, for the largest score of each; with more columns there are more rounds.
            reduction_scratch_bytes=1024 if N == 8 else 2048,
        ),
    )(q, k, v, start, end, *vectors, bias)
    # Of the heads, `_join` reads whole lines of a warpgroup.
    out = jnp.pad(out.swapaxes(-1, -2), (*[(0, 0)] * 4, (0, -D % LANES)))
    out = _shuffle(_join(out, top, total, rows)[..., :D])
    return out.reshape(B, K, T, H // K, D).swapaxes(1, 2).reshape(B, T, H, D).astype(a.q.dtype)


def _kernel(
    q_gmem,
    k_gmem,
    v_gmem,
    start_gmem,
    end_gmem,
    k_scale_gmem,
    v_scale_gmem,
    bias_gmem,
    out_gmem,
    top_gmem,
    total_gmem,
    *,
    q_smem,
    k_smem,
    v_smem,
    wide_smem,
    weights_smem,
    vectors_smem,
    barriers,
    scale,
    group,
    keys,
    heads,
    splits,
    stages,
):
    """One split of the keys of one slot and kv head.

    No automatic barriers: `commit_smem` is a barrier of the warpgroup, and a visit to a tile has two.
    Before the first, everyone has read the tile of K and has awaited the last visit's product. After it, K's
    slot is filled again, and `wide_smem` and `weights_smem`, which that product read, are written. Before
    the second, everyone has read the tile of V and written those two. After it, V's slot is filled again, and
    the product reads them. No thread reads either of them but through the tensor core.
    """
    split, head, slot = (lax.axis_index(name) for name in ("split", "head", "slot"))
    q_barrier, k_barrier, v_barrier = barriers
    _, X, D = k_smem.shape
    N = q_smem.shape[0]
    T = start_gmem.shape[1]

    plgpu.copy_gmem_to_smem(q_gmem.at[slot, head], q_smem, q_barrier)

    starts = [jnp.maximum(start_gmem[slot, t], 0) for t in range(T)]
    ends = [jnp.minimum(end_gmem[slot, t], keys) for t in range(T)]
    low, high = keys, 0
    for first, last in zip(starts, ends, strict=True):
        low = jnp.where(first < last, jnp.minimum(low, first), low)
        high = jnp.where(first < last, jnp.maximum(high, last), high)
    base = (slot * heads + head) * keys  # of this slot and head among all vectors
    low = lax.div(base + low, 8) * 8 - base
    count = pl.cdiv(jnp.maximum(high - low, 0), X)
    first_tile, last_tile = lax.div(split * count, splits), lax.div((split + 1) * count, splits)
    steps = last_tile - first_tile

    def place(step):
        """Where the tile lies among all vectors, and the first key that is its own.

        The last tile of all is moved back to end with the range, so that no more is read; the keys that it
        then shares with its neighbour are not its own.
        """
        own = low + (first_tile + step) * X
        end = pl.cdiv(base + high, 8) * 8
        return pl.multiple_of(jnp.maximum(jnp.minimum(base + own, end - X), 0), 8), own

    def fetch(copies, barrier, step):
        ring = lax.rem(step, stages)
        at, _ = place(step)
        for gmem, smem in copies:
            if gmem is not None:
                plgpu.copy_gmem_to_smem(gmem.at[pl.ds(at, X)], smem.at[ring], barrier.at[ring])

    bias_smem = None if bias_gmem is None else vectors_smem.at[2]
    k_copies = ((k_gmem, k_smem), (k_scale_gmem, vectors_smem.at[0]), (bias_gmem, bias_smem))
    v_copies = ((v_gmem, v_smem), (v_scale_gmem, vectors_smem.at[1]))
    fetch_k = functools.partial(fetch, k_copies, k_barrier)
    fetch_v = functools.partial(fetch, v_copies, v_barrier)

    for step in range(stages):
        pl.when(step < steps)(functools.partial(fetch_k, step))
        pl.when(step < steps)(functools.partial(fetch_v, step))
    plgpu.barrier_wait(q_barrier)

    column = plgpu.broadcasted_iota(jnp.int32, (N,), 0, layout=PER_COLUMN)
    firsts, lasts = jnp.zeros_like(column), jnp.zeros_like(column)
    for t, (first, last) in enumerate(zip(starts, ends, strict=True)):
        mine = (column >= t * group) & (column < (t + 1) * group)
        firsts, lasts = jnp.where(mine, first, firsts), jnp.where(mine, last, lasts)

    def visit(step, carry):
        out, top, total = carry
        ring = lax.rem(step, stages)
        at, own = place(step)
        at -= base

        plgpu.barrier_wait(k_barrier.at[ring])
        k = widen(k_smem.at[ring], q_smem.dtype)
        factor = plgpu.load(vectors_smem.at[0, ring], layout=PER_ROW) * scale
        bias = None if bias_smem is None else plgpu.load(bias_smem.at[ring], layout=PER_ROW)
        plgpu.commit_smem()
        pl.when(step + stages < steps)(functools.partial(fetch_k, step + stages))

        scores = tiles.product(k, q_smem.transpose((1, 0)), functools.partial(widen_v, ring, at))

        # The weights carry the scale of V; dividing by it again gives what the total is made of.
        v_scale = plgpu.load(vectors_smem.at[1, ring], layout=PER_ROW)
        v_scale = jnp.where(v_scale > TINY, v_scale, TINY)
        summand = jnp.log2(v_scale) if bias is None else jnp.log2(v_scale) + bias * LOG2E
        scores = scores * tiles.along_rows(factor, scores.shape) + tiles.along_rows(summand, scores.shape)
        scores = jnp.where(seen(at, own), scores, NEVER)

        new_top = jnp.maximum(top, scores.max(axis=0))
        # A column that has seen no key yet has top -inf, and -inf - -inf would be NaN.
        shift = jnp.where(new_top == NEVER, 0.0, new_top)
        weights = jnp.exp2(scores - tiles.along_columns(shift, scores.shape))
        decay = jnp.exp2(top - shift)
        total *= tiles.along_columns(decay, total.shape)
        total += weights * tiles.along_rows(1 / v_scale, total.shape)

        weights_smem.transpose((1, 0))[...] = weights.astype(weights_smem.dtype)
        plgpu.commit_smem()
        pl.when(step + stages < steps)(functools.partial(fetch_v, step + stages))

        out *= tiles.along_columns(decay, out.shape)
        out += tiles.product(wide_smem.transpose((1, 0)), weights_smem.transpose((1, 0)))
        return out, new_top, total

    def widen_v(ring, at):
        """V to 16 bits, while K is being multiplied; the values that no query sees are zeroed.

        They could be NaN, and 0 * NaN would spoil the sums.
        """
        plgpu.barrier_wait(v_barrier.at[ring])
        v = widen(v_smem.at[ring], wide_smem.dtype)
        whole = jnp.bool_(False)
        for first, last in zip(starts, ends, strict=True):
            whole = whole | ((first <= at) & (at + X <= last))

        @pl.when(whole)
        def _():
            wide_smem[...] = v

        @pl.when(jnp.logical_not(whole))
        def _():
            key = at + tiles.index((X, D), 0)
            used = functools.reduce(
                jnp.logical_or,
                [(first <= key) & (key < last) for first, last in zip(starts, ends, strict=True)],
            )
            wide_smem[...] = jnp.where(used, v, jnp.zeros_like(v))

    def seen(at, own):
        """Which (key, query) pairs count."""
        key = at + tiles.index((X, N), 0)
        # The larger of two numbers is a scalar's business: vectors of integers compare as unsigned.
        if T == 1:
            return (key >= jnp.maximum(starts[0], own)) & (key < ends[0])
        first, last = (tiles.along_columns(x, (X, N)) for x in (firsts, lasts))
        return (key >= jnp.maximum(own, 0)) & (key >= first) & (key < last)

    start = (
        tiles.full((D, N), 0, MATRIX),
        tiles.full((N,), NEVER, PER_COLUMN),
        tiles.full((X, N), 0, MATRIX),
    )
    out, top, total = lax.fori_loop(0, steps, visit, start)
    out_gmem[slot, head, split] = out
    # Nobody reads this memory any more: the last visit's second barrier has been passed.
    stats = ((top, top_gmem), (total.sum(axis=0), total_gmem))
    for i, (x, _) in enumerate(stats):
        vectors_smem[i, 0, pl.ds(0, N)] = x
    plgpu.commit_smem()
    for i, (_, gmem) in enumerate(stats):
        plgpu.copy_smem_to_gmem(vectors_smem.at[i, 0, pl.ds(0, N)], gmem.at[slot, head, split])
    plgpu.wait_smem_to_gmem(0)


def widen(narrow, dtype):
    """8 bits to 16, through registers, with the columns shuffled; scales come in with scores and weights."""
    return relabel(plgpu.load(narrow, layout=NARROW, optimized=False).astype(dtype))


def relabel(x):
    """`_shuffle` at no cost: the threads that have x as NARROW take what they have as MATRIX."""

    @plgpu.inline_mgpu(
        arg_types=(NARROW,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=MATRIX)
    )
    def take(_, x):
        layout = MATRIX.to_mgpu()
        registers = np.empty(layout.registers_shape(x.shape), dtype=object)
        for at, register in np.ndenumerate(x.registers):
            # 4 columns of a block of 16; as a MATRIX, 2 in its left half and 2 in its right.
            left, right = (mgpu.utils.vector_slice(register, slice(i, i + 2)) for i in (0, 2))
            registers[at[0], at[1] * 2, *at[2:-1]] = left
            registers[at[0], at[1] * 2 + 1, *at[2:-1]] = right
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=x.is_signed)

    return take(x)


def _shuffle(x):
    """The columns in the order of `relabel`: in each block of 16, bits 1 and 3 of the index change places."""
    return x.reshape(*x.shape[:-1], -1, 2, 2, 2, 2).swapaxes(-4, -2).reshape(x.shape)
