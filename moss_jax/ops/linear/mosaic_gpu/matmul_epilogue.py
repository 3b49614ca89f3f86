"""GEMM of many rows with an epilogue: a warp-specialised persistent kernel for Hopper GPUs (Mosaic GPU).

FP8 (W8A8) or bfloat16; the epilogue covers scale, bias, GELU, rounding to FP8 and a residual. There is one
thread block per multiprocessor, which takes tiles of the result one after another. Two warpgroups compute,
each its own rows of a tile; a third issues TMA copies and runs ahead into the next tiles.

An epilogue occupies its warpgroup but not the tensor core, which the other warpgroup should use meanwhile. So
the second starts each tile some steps after the first (`lag`) and ends it as many later: in these steps it
has the tensor core for itself, while the first is in its epilogue; and while the second is in its own, the
first is in the next tile.

Two thread blocks can form a cluster of neighbouring tiles, whose common operand is read once by TMA
multicast: each fetches half of it for both.

The last rows of tiles are moved back to end with the rows; rows that two tiles share are written twice, with
the same values. So the residual must not alias the results.

M rows, K inputs, N outputs, R x C tile of a thread block, X inputs of a step
"""

# Pallas types layouts, inline instructions and the references of kernels too narrowly.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false
# pyright: reportPrivateImportUsage=false

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moss_jax.ops.linear import base, gelu_base
from moss_jax.ops.linear.base import Arguments
from moss_jax.ops.linear.mosaic_gpu.bias_gelu import LARGEST, LOG2_TAIL
from moss_jax.ops.mosaic_gpu import hopper, tiles
from moss_jax.ops.mosaic_gpu.tiles import PER_COLUMN
from moss_jax.ops.qarray import QArray

LINE = 128  # Bytes of input per step: the width at which TMA and tensor core are fastest.
WARPGROUPS = 2  # Number of consumer warpgroups.
REGISTERS = 232, 40  # Per consumer and per producer thread.
SHARED_BYTES = 226 * 1024  # Per thread block, without its barriers.
UNIT = 8  # Rows come in multiples of this, the rows of a piece that the TMA moves.
MANY_ROWS = 10_000  # Enough tiles for every tiling.

# Coefficients of log2 Phi(-a), good enough for a GELU in 8 bits: a minimax fit of degree 3 to a Phi(-a) for
# a <= 14, weighted by its half step in float8_e4m3fn after a multiplication with 448. It is wrong by 0.13 of
# these at most, whatever the factor up to 448. One power less saves little: a warp's exponential takes 8
# cycles, in which most of the rest fits.
LOG2_TAIL_IN_8_BITS = (-0.01552599, -0.53494296, -1.09678969, -1.00637158)


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiling of a call.

    Attributes:
      columns: per tile, up to 256; it has 64 rows per warpgroup.
      stages: steps in flight.
      lag: steps by which the second warpgroup is behind the first, less than `stages`; only the remaining
        stages hide memory latency.
      cluster: axis along which the two tiles of a cluster are adjacent, "rows" (they share the weights) or
        "columns" (they share the inputs); None for no clusters.
      chunk: columns of the result that the epilogue processes at once, 64 or 32.
      slots: chunks in flight to memory, or whose residual is in flight from memory.
      blocks: maximum number of thread blocks.
    """

    columns: int = 256
    stages: int = 4
    lag: int = 2
    cluster: Literal["rows", "columns"] | None = "rows"
    chunk: int = 64
    slots: int = 2
    blocks: int = 132

    def __post_init__(self):
        if self.columns % 64 or not 64 <= self.columns <= 256:
            raise ValueError(f"columns is a multiple of 64 up to 256, not {self.columns}")
        if not 0 <= self.lag < self.stages:
            raise ValueError(f"lag is less than stages, {self.stages}, not {self.lag}")
        if self.chunk not in (32, 64) or self.columns % (self.chunk * self.slots):
            raise ValueError(
                f"{self.columns} columns are not made of {self.slots} chunks of {self.chunk} each"
            )
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(f"{self.shared_bytes} bytes of shared memory are more than {SHARED_BYTES}")

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a thread block in bytes, with 16-bit results and without its barriers."""
        rows = 64 * WARPGROUPS
        return self.stages * (rows + self.columns) * LINE + self.slots * rows * self.chunk * 2

    @property
    def cluster_tile(self) -> tuple[int, int]:
        """Rows and columns of the result that a cluster computes."""
        above, beside = 1 + (self.cluster == "rows"), 1 + (self.cluster == "columns")
        return 64 * WARPGROUPS * above, self.columns * beside

    def cuts(self, M: int, N: int) -> tuple[int, int]:
        """Number of cluster tiles along the rows and along the columns."""
        rows, columns = self.cluster_tile
        return pl.cdiv(M, rows), N // columns


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """Arguments of the kernel as matrices.

    Attributes:
      kernel: [N, K] in float8_e4m3fn, otherwise [K, N].
      scale: of 8-bit products.
      factor: of the results before they are rounded, or before the residual is added.
    """

    x: Float[Array, "M K"]
    kernel: Float[Array, "..."]
    scale: Float[Array, " N"] | None = None
    bias: Float[Array, " N"] | None = None
    factor: Float[Array, " 1"] | None = None
    residual: Float[Array, "M N"] | None = None
    gelu: bool = dataclasses.field(default=False, kw_only=True, metadata={"static": True})
    out_dtype: jnp.dtype = dataclasses.field(kw_only=True, metadata={"static": True})

    @property
    def in_8_bits(self) -> bool:
        return self.kernel.dtype == jnp.float8_e4m3fn

    @property
    def shape(self) -> tuple[int, int, int]:
        """M, K, N."""
        M, K = self.x.shape
        return M, K, self.kernel.shape[0 if self.in_8_bits else 1]


def operands(a: Arguments) -> Operands:
    """Converts the arguments of a call to matrices."""
    (M, K, N), bias = a.shape, a.weights.bias
    x = a.x.values if isinstance(a.x, QArray) else a.x
    factor = a.gate
    if a.out_factor is not None:
        factor = a.out_factor.reshape(1)
    return Operands(
        x.reshape(M, K),
        a.matrix,
        a.scale,
        None if bias is None else bias.reshape(N),
        None if factor is None else factor.astype(jnp.float32),
        None if a.residual is None else a.residual.reshape(M, N),
        gelu=a.gelu,
        out_dtype=a.out_dtype,
    )


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """Why this kernel cannot take the arguments; None if it can."""
    if reason := hopper.unsupported(platform):
        return reason
    a, scheme = arguments, arguments.weights.scheme
    if scheme == "float" and a.weights.outputs_first:
        return "it takes weights with their inputs first"
    if scheme == "W8A16" or a.x.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        return f"it takes bfloat16, or weights and inputs in float8_e4m3fn, not {a.x.dtype} ({scheme})"
    if scheme == "float" and a.weights.kernel.dtype != a.x.dtype:
        return f"it takes weights in the dtype of x, {a.x.dtype}, not {a.weights.kernel.dtype}"
    if a.out_dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        return f"it gives bfloat16 or float8_e4m3fn, not {a.out_dtype}"
    if a.residual is not None and scheme == "float":
        return "in bfloat16 it takes no residual; XLA's matmul is as fast, and adds it too"
    if not (scheme == "W8A8" or a.gelu):
        return "in bfloat16 it takes calls with a GELU; without one XLA's matmul is as fast"
    return misfit(a, default_config(a))


def misfit(a: Arguments | Operands, config: Config) -> str | None:
    """Why the tiling doesn't fit a call; None if it does."""
    M, K, N = a.shape
    rows, columns = config.cluster_tile
    if M % UNIT or rows > M:
        return f"it takes {rows} rows or more, in multiples of {UNIT}, not {M}"
    if N % columns or N == 0:
        return f"N = {N} is not a multiple of {columns}"
    X = step_inputs(a)
    if K % X or config.stages * X > K:
        return f"K = {K} is not a multiple of {X}, {config.stages * X} at least"
    return None


def step_inputs(a: Arguments | Operands) -> int:
    """X: the number of inputs in a line of x."""
    return LINE // a.x.dtype.itemsize


def default_config(a: Arguments) -> Config:
    """Clusters for many rows; for fewer, the tile width that keeps the multiprocessors busy to the end."""
    M, _, N = a.shape
    if M >= MANY_ROWS and N % 256 == 0:
        if a.weights.scheme == "float":
            return Config()
        # Chosen by measured times of the encoder's maps, which differ by 1 to 8 %.
        return Config(cluster="columns") if a.gelu and N % 512 == 0 else Config(lag=1)

    def time(config: Config) -> int:
        return pl.cdiv(math.prod(config.cuts(M, N)), config.blocks) * config.columns

    wide, narrow = Config(cluster=None), Config(columns=128, stages=6, cluster=None)
    return wide if N % 256 == 0 and time(wide) <= time(narrow) else narrow


def apply(a: Arguments, config: Config | None = None) -> Float[Array, "..."]:
    """Computes the op; differentiable."""
    return _differentiable(config or default_config(a), a)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(config, a):
    return a.unflatten(many_rows(operands(a), config))


def _forward(config, a):
    """Forward pass by the definition, which has gradients."""
    del config
    return jax.vjp(base.define, a)


def _backward(config, pull, dy):
    del config
    return pull(dy)


_differentiable.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames="config")
def many_rows(a: Operands, config: Config) -> Float[Array, "M N"]:
    """Computes the op; forward only.

    Jitted, so that a model's layers, which call it with the same shapes, trace and lower it once.
    """
    if reason := misfit(a, config):
        raise ValueError(reason)
    M, _, N = a.shape
    R, C, X, stages = 64 * WARPGROUPS, config.columns, step_inputs(a), config.stages
    arrays, structure = jax.tree.flatten(a)
    cuts, size = config.cuts(M, N), 1 if config.cluster is None else 2
    clusters = min(math.prod(cuts), config.blocks // size)
    if config.cluster is None:
        cluster, free = {}, plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
    else:
        cluster = {"cluster": (size,), "cluster_names": ("cluster",)}
        # A slot is refilled once the warpgroups of both blocks are done with it.
        free = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=WARPGROUPS, num_barriers=stages
        )

    def kernel(*refs, **scratch):
        *refs, y_gmem = refs
        _kernel(structure.unflatten(refs), y_gmem, config=config, cuts=cuts, stride=clusters, **scratch)

    return plgpu.kernel(
        kernel,
        kernel_name="matmul_epilogue",
        out_type=jax.ShapeDtypeStruct((M, N), a.out_dtype),
        scratch_types={
            "x_smem": tiles.tile((stages, R, X), a.x.dtype),
            "kernel_smem": tiles.tile((stages, C, X) if a.in_8_bits else (stages, X, C), a.kernel.dtype),
            "y_smem": tiles.tile((WARPGROUPS, config.slots, 64, config.chunk), a.out_dtype),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),  # One arrival per copy.
            "free": free,
            "ahead": plgpu.Barrier(),
            "fetched": plgpu.Barrier(num_barriers=WARPGROUPS * config.slots),
        },
        grid=(clusters,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        # `_kernel` documents why its own barriers suffice.
        compiler_params=dataclasses.replace(tiles.COMPILER_PARAMS, unsafe_no_auto_barriers=True),
        **cluster,
    )(*arrays)


def _kernel(a, y_gmem, *, x_smem, kernel_smem, y_smem, full, free, ahead, fetched, config, cuts, stride):
    """Computes the tiles `block`, `block + stride`, and so on, of this cluster.

    No automatic barriers: the ring is written by copies alone, after the warpgroups have arrived at the
    barrier that says that a slot is free, and read by products alone. A slot of `y_smem` is filled, by
    threads or with a residual, after a wait for the copy out of it, which is a barrier of the warpgroup; a
    residual's 16 rows are written over by the warp that has read them. `commit_smem`, another barrier, stands
    between that and the next copy.

    `ahead` goes from the first warpgroup to the second once a tile. The first is less than `stages` steps
    ahead, and a tile has as many, so it cannot arrive a second time before the second has waited.
    """
    warpgroup = lax.axis_index("warpgroup")
    M, K, _ = a.shape
    (stages, R, X), C = x_smem.shape, config.columns
    steps = K // X
    first = lax.axis_index("block")
    rounds = pl.cdiv(math.prod(cuts) - first, stride)

    def place(number):
        """First row and column of a tile."""
        row, column = plgpu.planar_snake(first + number * stride, cuts, 1, cuts[1])
        high, wide = config.cluster_tile
        row, column = jnp.minimum(row * high, M - high), column * wide
        if config.cluster == "rows":
            row += lax.axis_index("cluster") * R
        if config.cluster == "columns":
            column += lax.axis_index("cluster") * C
        return pl.multiple_of(row, UNIT), pl.multiple_of(column, C)

    def fetch(number, _):
        row, column = place(number)

        def step(i, _):
            every = number * steps + i
            slot = lax.rem(every, stages)
            pl.when(every >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            inputs, outputs = pl.ds(pl.multiple_of(i * X, X), X), pl.ds(column, C)
            x = a.x.at[pl.ds(row, R), inputs]
            kernel = a.kernel.at[(outputs, inputs) if a.in_8_bits else (inputs, outputs)]
            for source, ring, shared in ((x, x_smem, "columns"), (kernel, kernel_smem, "rows")):
                axes = "cluster" if config.cluster == shared else None
                plgpu.copy_gmem_to_smem(source, ring.at[slot], full.at[slot], collective_axes=axes)

        lax.fori_loop(0, steps, step, None)

    def compute(number, _):
        row, column = place(number)
        row = pl.multiple_of(row + warpgroup * 64, UNIT)
        mine = [fetched.at[warpgroup * config.slots + slot] for slot in range(config.slots)]
        epilogue = _Epilogue(a, y_gmem, y_smem.at[warpgroup], mine, pl.ds(row, 64), column)
        begin = number * steps

        def multiply(acc):
            def use(every):
                slot = lax.rem(every, stages)
                plgpu.barrier_wait(full.at[slot])
                x = x_smem.at[slot, pl.ds(pl.multiple_of(warpgroup * 64, 64), 64)]
                kernel = kernel_smem.at[slot]
                plgpu.wgmma(acc, x, kernel.transpose((1, 0)) if a.in_8_bits else kernel)

            def done(every):
                plgpu.barrier_arrive(free.at[lax.rem(every, stages)])

            def step(i, _):
                use(begin + i)
                plgpu.wgmma_wait(1)
                done(begin + i - 1)

            lead = max(1, config.lag)
            use(begin)
            lax.fori_loop(1, lead, step, None)
            if config.lag:
                pl.when(warpgroup == 0)(lambda: plgpu.barrier_arrive(ahead))
            epilogue.fetch_first()
            lax.fori_loop(lead, steps, step, None)
            plgpu.wgmma_wait(0)
            done(begin + steps - 1)
            return acc[...]

        if config.lag:
            pl.when(warpgroup == 1)(lambda: plgpu.barrier_wait(ahead))
        epilogue(pl.run_scoped(multiply, plgpu.ACC((64, C), jnp.float32)))

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        lax.fori_loop(0, rounds, fetch, None)
        # In a cluster, the other block still arrives at this block's barriers, so it must not exit yet.
        for i in range(stages):
            plgpu.barrier_wait(free.at[lax.rem(rounds * steps + i, stages)])

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        lax.fori_loop(0, rounds, compute, None)
        plgpu.wait_smem_to_gmem(0)


class _Epilogue:
    """The epilogue of a warpgroup's tile, chunk by chunk; created before the product.

    That way, scales and bias of the first chunk are in flight during the product, and those of each later one
    during the previous chunk. A chunk's residual is loaded into the slot that its results leave from: for the
    first chunks during the product, for later ones when the slot is free.
    """

    def __init__(self, a, y_gmem, slots, fetched, rows, column):
        self.a, self.y_gmem, self.rows, self.column = a, y_gmem, rows, column
        self.slots, self.fetched = slots, fetched
        self.factor = None if a.factor is None else a.factor[0]
        self.vectors = self.load(0)

    def columns(self, chunk: int):
        size = self.slots.shape[-1]
        return pl.ds(pl.multiple_of(self.column + chunk * size, size), size)

    def load(self, chunk: int):
        """Loads the scale and bias of a chunk's columns."""
        vectors = (self.a.scale, self.a.bias)
        return [None if x is None else _load(x.at[self.columns(chunk)], PER_COLUMN) for x in vectors]

    def fetch_first(self):
        """Fetches the residual of the first chunks, one per slot, once the previous tile has left the slots.

        Called some steps into the product, by when that has happened.
        """
        if self.a.residual is not None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for chunk in range(len(self.fetched)):
                self.fetch(chunk)

    def fetch(self, chunk: int):
        """Fetches the residual of a chunk."""
        source, slot = self.a.residual.at[self.rows, self.columns(chunk)], chunk % len(self.fetched)
        plgpu.copy_gmem_to_smem(source, self.slots.at[slot], self.fetched[slot])

    def __call__(self, products):
        """Finishes the tile and writes it to memory."""
        slots, _, size = self.slots.shape
        chunks = products.shape[1] // size
        for chunk in range(chunks):
            scale, bias = self.vectors
            if chunk + 1 < chunks:
                self.vectors = self.load(chunk + 1)
            y = products[:, chunk * size : (chunk + 1) * size]
            if scale is not None:
                y *= tiles.along_columns(scale, y.shape)
            if bias is not None:
                y += tiles.along_columns(bias.astype(jnp.float32), y.shape)
            if self.a.gelu:
                y = _gelu(y, LOG2_TAIL_IN_8_BITS if self.a.out_dtype.itemsize == 1 else LOG2_TAIL)
            if self.factor is not None:
                y *= self.factor
            slot = self.slots.at[chunk % slots]
            if self.a.residual is None:
                plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
            else:
                plgpu.barrier_wait(self.fetched[chunk % slots])
                y += plgpu.load(slot, layout=tiles.MATRIX).astype(jnp.float32)
            slot[...] = y.astype(slot.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(slot, self.y_gmem.at[self.rows, self.columns(chunk)])
            # A slot is refilled a chunk later, so that nothing waits for the copy that has just started.
            left = chunk - min(1, slots - 1)
            if self.a.residual is not None and 0 <= left < chunks - slots:
                plgpu.wait_smem_to_gmem(chunk - left, wait_read_only=True)
                self.fetch(left + slots)


def _load(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False)


def _gelu(y, log2_tail: Sequence[float]):
    """y Phi(y), as `bias_gelu.py` computes it."""
    size = jnp.minimum(jnp.abs(y), LARGEST)
    return jnp.maximum(y, 0) - size * jnp.exp2(gelu_base.polynomial(log2_tail, size))
