"""Fused residual add and norm in Pallas for NVIDIA's Hopper GPUs (Mosaic GPU): one pass over memory.

A row stays in registers from its loads to its stores. Few rows are bound by memory latency: each is spread
over the four warps of a thread block, and all loads are issued before the first is awaited. Many rows are
bound by bandwidth: each has one warp, which waits for no other, so that enough bytes are in flight. Without a
branch to load, each row has fewer bytes in flight, so a warp takes many rows one after another and prefetches
the next while it computes one.

M rows, R rows of a thread block, D width
"""

# Pallas types layouts, inline instructions and the references of kernels too narrowly.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false
# pyright: reportPossiblyUnboundVariable=false, reportPrivateImportUsage=false

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moss_jax.ops.mosaic_gpu import hopper, tiles
from moss_jax.ops.norm import base
from moss_jax.ops.norm.base import Arguments

WARPS = 4  # Per thread block, which is one warpgroup.
LANES = 32
UNIT = 256  # Columns that a warp loads at once, 16 bytes per lane.
MAX_WIDTH = 8192  # Widest row for which a warpgroup has registers.
MAX_WIDTH_OF_WARP = 2048  # Widest row per warp if several thread blocks are to share a multiprocessor.
# For wider rows: 64 rows of 4,096 took this kernel and XLA about the same time, 8,192 rows took XLA 51 us and
# this kernel 70. Nothing in between was measured.
MAX_WIDE_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Config:
    """Distribution of rows over warps.

    Attributes:
      warps: warps that share a row, 1 or 4; 1 needs 4 rows or more.
      resident: maximum number of thread blocks whose warps take many rows each, limited by registers.
    """

    warps: int
    resident: int = 4 * 132

    def __post_init__(self):
        if self.warps not in (1, WARPS):
            raise ValueError(f"a row is shared by 1 or {WARPS} warps, not {self.warps}")


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """Why this kernel cannot take the arguments; None if it can."""
    if reason := hopper.unsupported(platform):
        return reason
    x = arguments.x
    if x.dtype != jnp.bfloat16:
        return f"it takes bfloat16, not {x.dtype}"
    if arguments.out_dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        return f"it gives bfloat16 and float8_e4m3fn, not {arguments.out_dtype}"
    width = x.shape[-1]
    if x.size == 0:
        return "there are no rows"
    if width % UNIT or not 0 < width <= MAX_WIDTH:
        return f"D = {width} is not a multiple of {UNIT} up to {MAX_WIDTH}"
    if width > MAX_WIDTH_OF_WARP and (rows := x.size // width) > MAX_WIDE_ROWS:
        return f"with D = {width} it takes up to {MAX_WIDE_ROWS} rows, not {rows}"
    return None


def apply(a: Arguments, config: Config | None = None) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
    """Computes the op; its gradients are those of the definition."""
    return _differentiable(config or default_config(a), a)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(config, a):
    normed, y = one_pass(a.flat(), config)
    return normed.reshape(a.x.shape), y.reshape(a.x.shape)


def _forward(config, a):
    return _differentiable(config, a), a


def _backward(config, a, cotangents):
    del config
    return jax.vjp(base.define, a)[1](cotangents)


_differentiable.defvjp(_forward, _backward)


def default_config(a: Arguments) -> Config:
    """One warp per row if there are rows for all warps and registers for a row; otherwise all four."""
    rows, width = a.x.size // a.x.shape[-1], a.x.shape[-1]
    return Config(1 if rows >= WARPS and width <= MAX_WIDTH_OF_WARP else WARPS)


@functools.partial(jax.jit, static_argnames="config")
def one_pass(a: Arguments, config: Config) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
    """Computes the op for a call whose rows are on one axis; forward only.

    Jitted, so that a model's layers, which call it with the same shapes, trace and lower it once.
    """
    warps = config.warps
    if len(a.x) < WARPS // warps:
        raise ValueError(f"with 1 warp a row there must be {WARPS} rows, not {len(a.x)}")
    blocks = pl.cdiv(len(a.x), WARPS // warps)
    if warps == 1 and a.add is None:
        blocks = min(blocks, config.resident)
    arrays, structure = jax.tree.flatten(a)
    out_type = [jax.ShapeDtypeStruct(a.x.shape, a.out_dtype)]
    if a.add is not None:
        out_type.append(jax.ShapeDtypeStruct(a.x.shape, a.x.dtype))

    def kernel(*refs):
        _kernel(structure.unflatten(refs[: len(arrays)]), *refs[len(arrays) :], warps=warps, blocks=blocks)

    normed, *y = plgpu.kernel(
        kernel,
        kernel_name="add_norm",
        out_type=out_type,
        grid=(blocks,),
        grid_names=("block",),
        # Nothing reads what is written, and sums across warps have their own barriers.
        compiler_params=dataclasses.replace(tiles.COMPILER_PARAMS, unsafe_no_auto_barriers=True),
    )(*arrays)
    return normed, y[0] if y else a.x


def _kernel(a, normed_gmem, y_gmem=None, *, warps, blocks):
    """Computes R rows, once or many times; the last R end with the last row, so some are computed twice."""
    (rows, width), R = a.x.shape, WARPS // warps
    layout = _layout(width, warps)
    parts, block = pl.cdiv(rows, R), lax.axis_index("block")

    def load(ref, layout):
        return plgpu.load(ref, layout=layout, optimized=False)

    def load_vectors():
        return [load(ref, layout.reduce(0)) for ref in (a.weight, a.bias) if ref is not None]

    def place(part):
        return pl.ds(jnp.minimum(part * R, rows - R), R)

    def spread(vector, axis):
        """Broadcasts one number per row (axis 0) or per column (axis 1), in float32."""
        vector = lax.broadcast_in_dim(vector.astype(jnp.float32), (R, width), [axis])
        return plgpu.layout_cast(vector, layout)

    def mean(x):
        return x.sum(axis=1) * (1 / width)

    def store_norm(x, vectors, at):
        wide = x.astype(jnp.float32)
        if a.centred:
            wide -= spread(mean(wide), 0)
        wide *= spread(lax.rsqrt(mean(wide * wide) + a.eps), 0)
        wide *= spread(vectors[0], 1)
        if a.centred:
            wide += spread(vectors[1], 1)
        normed_gmem[at] = wide.astype(normed_gmem.dtype)

    x = load(a.x.at[place(block)], layout)
    if warps == 1 and a.add is None:

        def step(i, x):
            part = block + i * blocks
            after = load(a.x.at[place(part + blocks)], layout)
            # Reloaded every time: keeping them would take the registers of other thread blocks.
            store_norm(x, load_vectors(), place(part))
            return after

        lax.fori_loop(0, pl.cdiv(parts - block, blocks), step, x)
        return

    at = place(block)
    branch = None if a.add is None else load(a.add.at[at], layout)
    if a.scale is not None:
        scale = a.scale[0] if a.scale.shape == (1,) else load(a.scale.at[at], layout.reduce(1))
    if warps > 1:
        vectors = load_vectors()

    if branch is not None:
        branch = branch.astype(jnp.float32)
        if a.scale is not None:
            branch *= spread(scale, 0) if scale.ndim else scale.astype(jnp.float32)
        # The rounded sum is what is normalised, since the next layer sees it too.
        x = (x.astype(jnp.float32) + branch).astype(x.dtype)
        y_gmem[at] = x
    if warps == 1:
        # Loaded only now that the branch's registers are free; after the first rows they are cached.
        vectors = load_vectors()
    store_norm(x, vectors, at)


def _layout(width: int, warps: int):
    """Register layout of [R, D] over a block's threads, in vectors of up to 8 numbers, 16 bytes."""
    vector = next(n for n in (8, 4, 2) if width % (warps * LANES * n) == 0)
    run = LANES * vector  # Per warp.
    tile = ((WARPS, run),) if warps == 1 else ((1, WARPS * run), (run,))
    return plgpu.Layout.TILED(
        plgpu.Tiling((*tile, (vector,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
    )
