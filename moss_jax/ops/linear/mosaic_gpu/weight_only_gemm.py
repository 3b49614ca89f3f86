"""Weight-only (W8A16) GEMM of many rows: a warp-specialised persistent kernel for Hopper GPUs (Mosaic GPU).

Up to some 77 rows on an H200, by count, it is bound by reading the weights, beyond by arithmetic. The
operands are swapped, as in `weight_only`: weights are the rows that the tensor core takes, from registers,
where they are upcast, and x the columns, up to 256 of them. Here x passes through shared memory along with
the weights, so that a thread block keeps all sums of its tile of the result, whatever K.

There is one thread block per multiprocessor, which takes tiles one after another. One warpgroup issues TMA
copies and runs ahead into the next tiles; two compute, each its own outputs of a tile. While the tensor core
multiplies one block of 64 outputs x 64 inputs, a warpgroup upcasts the next one into other registers. If the
compiler cannot tell the two sets apart, it serialises all products and warns (C7513); hence the form of the
loop.

Two thread blocks can form a cluster of neighbouring outputs: each fetches half of their x for both (TMA
multicast), which reduces L2 traffic. If there are fewer tiles than multiprocessors, K is split and XLA adds
up the splits.

The last tiles of outputs and of rows are moved back to end with them; what two tiles share is written twice,
with the same values.

M rows, K inputs, N outputs, R x C tile of a thread block (outputs x rows), X inputs of a step
"""

# Pallas types layouts, inline instructions and the references of kernels too narrowly.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false
# pyright: reportPrivateImportUsage=false

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Shaped

from moss_jax.ops.linear.base import Arguments
from moss_jax.ops.linear.mosaic_gpu import weight_only
from moss_jax.ops.mosaic_gpu import hopper, tiles, upcast
from moss_jax.ops.mosaic_gpu.tiles import PER_ROW

ROWS = 512  # Maximum rows of x: more have not been tuned.
UNIT = 64  # Outputs and inputs of a block of weights that is upcast at once.
COLUMNS = 256  # Maximum columns of the tensor core.
WARPGROUPS = 2  # Number of consumer warpgroups.
CHUNK = 32  # Rows of the result, of 64 outputs each, that a warpgroup writes out at once.
SLOTS = 2  # Chunks per warpgroup in flight to memory.
REGISTERS = 232, 40  # Per consumer and per producer thread: 2 * 232 + 40 of 512 for a warp of each.
SHARED_BYTES = 226 * 1024  # Per thread block, without its barriers.
STAGED_BYTES = 2 * WARPGROUPS * SLOTS * CHUNK * UNIT  # The part of it for 16-bit results.


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiling of a call.

    Attributes:
      outputs: per tile, 128 or 256: 64 or 128 per warpgroup.
      rows: rows of x per tile, a multiple of 8 up to 256; of 16 in a cluster.
      block_k: inputs per step, 64 or, with 128 outputs, 128.
      stages: steps in flight.
      splits: number of equal splits of K.
      cluster: thread blocks that share x, 1 or 2.
      blocks: maximum number of thread blocks.
    """

    outputs: int = 128
    rows: int = 128
    block_k: int = 128
    stages: int = 4
    splits: int = 1
    cluster: int = 2
    blocks: int = 132

    def __post_init__(self):
        if self.outputs not in (128, 256):
            raise ValueError(f"outputs is 128 or 256, not {self.outputs}")
        if self.cluster not in (1, 2):
            raise ValueError(f"cluster is 1 or 2, not {self.cluster}")
        if self.rows % (8 * self.cluster) or not 0 < self.rows <= COLUMNS:
            raise ValueError(f"rows is a multiple of {8 * self.cluster} up to {COLUMNS}, not {self.rows}")
        if self.block_k not in ((64, 128) if self.outputs == 128 else (64,)):
            raise ValueError(f"block_k is 64, or 128 with 128 outputs, not {self.block_k}")
        if self.stages < 2 or self.splits < 1 or self.blocks < self.cluster:
            raise ValueError(
                f"stages is at least 2, splits 1 and blocks {self.cluster}, "
                f"not {self.stages}, {self.splits} and {self.blocks}"
            )
        if self.sums > 128:
            raise ValueError(f"{self.sums} sums a thread are more than 128")
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(f"{self.shared_bytes} bytes of shared memory are more than {SHARED_BYTES}")

    @property
    def blocks_of_outputs(self) -> int:
        """Number of blocks of 64 outputs per warpgroup."""
        return self.outputs // (UNIT * WARPGROUPS)

    @property
    def sums(self) -> int:
        """Number of sums that a thread keeps in registers.

        It also has two blocks of weights in bfloat16, of 16 registers each, and up to `block_k / 4` for the
        next upcast: 128 + 32 + 32 of 232.
        """
        return self.outputs * self.rows // (128 * WARPGROUPS)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a thread block in bytes, without its barriers."""
        ring = self.stages * self.block_k * (self.outputs + 2 * self.rows)
        return ring + STAGED_BYTES

    def cuts(self, M: int, N: int) -> tuple[int, int, int]:
        """Number of cluster tiles along the outputs, of splits, and of tiles along the rows."""
        return pl.cdiv(N, self.outputs * self.cluster), self.splits, pl.cdiv(M, self.rows)


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """Why this kernel cannot take the arguments; None if it can."""
    if reason := hopper.unsupported(platform) or weight_only.unsupported_scheme(arguments):
        return reason
    M, K, N = arguments.shape
    if not 0 < M <= ROWS:
        return f"it takes 1 to {ROWS} rows, not {M}"
    return misfit(K, N, default_config(M, K, N))


def misfit(K: int, N: int, config: Config) -> str | None:
    """Why the tiling doesn't fit a matrix of weights; None if it does."""
    if K % (each := config.block_k * config.splits) or K == 0:
        return f"K = {K} is not a multiple of {each}"
    outputs = config.outputs * config.cluster
    if N % UNIT or outputs > N:
        return f"N = {N} is not a multiple of {UNIT}, {outputs} at least"
    return None


def apply(a: Arguments, config: Config | None = None) -> Float[Array, "..."]:
    """Computes the op; forward only."""
    M, K, N = a.shape
    config = config or default_config(M, K, N)
    assert isinstance(a.x, Array)
    return a.unflatten(many_rows(a.x.reshape(M, K), a.matrix, a.scale, config, a.out_dtype))


def default_config(M: int, K: int, N: int) -> Config:
    """The tiling with the least time by `estimate`."""
    count, cluster = pl.cdiv(M, COLUMNS), 2 if N >= 256 else 1
    unit = 8 * cluster
    candidates = [
        fill(K, outputs, rows, splits, cluster)
        for rows in {pl.cdiv(M, cut * unit) * unit for cut in (count, 2 * count)}
        for outputs in (128, 256)
        for splits in (1, 2, 4, 7, 8)
        if outputs * rows <= 128 * 128 * WARPGROUPS and outputs * cluster <= max(N, 128)
    ]
    fitting = [config for config in candidates if misfit(K, N, config) is None]
    return min(fitting or candidates, key=lambda config: estimate(M, K, N, config))


def fill(K: int, outputs: int, rows: int, splits: int, cluster: int, block_k: int | None = None) -> Config:
    """The tiling of these sizes whose ring buffer fills shared memory; 128 inputs per step if 4 steps fit."""
    line, room = outputs + 2 * rows, SHARED_BYTES - STAGED_BYTES
    if block_k is None:
        wide = outputs == 128 and K % (128 * splits) == 0 and 4 * 128 * line <= room
        block_k = 128 if wide else 64
    return Config(outputs, rows, block_k, min(8, room // (block_k * line)), splits, cluster)


def estimate(M: int, K: int, N: int, config: Config) -> float:
    """Approximate time of a call in cycles of a multiprocessor.

    A tile takes as long as its slowest resource: the tensor core multiplies 2,048 numbers per cycle, of which
    3/4 are reached; shared memory moves 128 bytes per cycle, of which 85 % are reached (x is read for every
    64 outputs, weights at half the width); L2 delivers some 28 and memory 17, but 11 in lines of 64 inputs,
    half of what memory fetches at once. Writing the results comes on top, and with splits they are read and
    written once more.
    """
    stripes, splits, tiles_of_rows = config.cuts(M, N)
    each = K // splits
    waves = pl.cdiv(stripes * splits * tiles_of_rows * config.cluster, config.blocks)
    multiplied = each * config.outputs * config.rows / (2048 * 0.75)
    shared = each * (config.outputs * (config.rows / 32 + 3) + 2 * config.rows) / (128 * 0.85)
    delivered = each * (config.outputs + 2 * config.rows / config.cluster) / 28
    read = each * config.outputs / tiles_of_rows / (17 if config.block_k == 128 else 11)
    written = config.outputs * config.rows / 16 + 1500
    summed = 0 if splits == 1 else 3000 + M * N * 4 * (splits + 1) / (28 * config.blocks)
    return waves * (max(multiplied, shared, delivered, read) + written) + summed


@functools.partial(jax.jit, static_argnames=("config", "out_dtype"))
def many_rows(
    x: Float[Array, "M K"],
    weights: Shaped[Array, "N K"],
    scale: Float[Array, " N"],
    config: Config,
    out_dtype: DTypeLike,
) -> Float[Array, "M N"]:
    """Computes `x @ weights.T * scale`; forward only.

    Jitted, so that a model's layers, which call it with the same shapes, trace and lower it once.
    """
    (M, K), N = x.shape, len(weights)
    if reason := misfit(K, N, config):
        raise ValueError(reason)
    R, C, X, stages = config.outputs, config.rows, config.block_k, config.stages
    # The TMA moves pieces of 8 rows.
    x = jnp.pad(x, ((0, max(C, pl.cdiv(M, 8) * 8) - M), (0, 0)))
    rows, splits = len(x), config.splits
    cuts = config.cuts(rows, N)
    clusters = min(math.prod(cuts), config.blocks // config.cluster)
    cluster, x_free = {}, plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
    if config.cluster > 1:
        # A slot of x is refilled once the warpgroups of both blocks are done with it.
        cluster = {"cluster": (config.cluster,), "cluster_names": ("cluster",)}
        x_free = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=WARPGROUPS, num_barriers=stages
        )
    shape, dtype = ((rows, N), out_dtype) if splits == 1 else ((splits, rows, N), jnp.float32)
    # 32-bit results fill memory sectors without staging.
    staged = jnp.dtype(dtype).itemsize == 2
    y_smem = {"y_smem": tiles.tile((WARPGROUPS, SLOTS, CHUNK, UNIT), dtype)} if staged else {}
    y = plgpu.kernel(
        functools.partial(_kernel, config=config, cuts=cuts, stride=clusters),
        kernel_name="weight_only_gemm",
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        scratch_types=y_smem
        | {
            "x_smem": tiles.tile((stages, C, X), x.dtype),
            "weights_smem": tiles.tile((stages, R, X), weights.dtype),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),  # One arrival per copy.
            "x_free": x_free,
            "weights_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        },
        grid=(clusters,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        # `_kernel` documents why its own barriers suffice.
        compiler_params=dataclasses.replace(tiles.COMPILER_PARAMS, unsafe_no_auto_barriers=True),
        **cluster,
    )(x, weights, scale)
    if splits > 1:
        y = (y.sum(axis=0) * scale).astype(out_dtype)
    return y[:M]


def _kernel(
    x_gmem,
    weights_gmem,
    scale_gmem,
    y_gmem,
    *,
    x_smem,
    weights_smem,
    y_smem=None,
    full,
    x_free,
    weights_free,
    config,
    cuts,
    stride,
):
    """Computes the tiles `block`, `block + stride`, and so on, of this cluster.

    No automatic barriers: only copies write to the ring. All threads arrive at `weights_free` after they have
    read a slot into registers. A slot of x is read by products alone, and `x_free` is arrived at when they
    are done. A slot of `y_smem` is filled after a wait for the copy out of it, which is a barrier of the
    warpgroup; `commit_smem`, another one, stands between that and the next copy.
    """
    warpgroup = lax.axis_index("warpgroup")
    stages, C, X = x_smem.shape
    R, (M, K), N = config.outputs, x_gmem.shape, weights_gmem.shape[0]
    steps = K // (X * config.splits)
    first = lax.axis_index("block")
    rounds = pl.cdiv(math.prod(cuts) - first, stride)
    mine = R // WARPGROUPS

    def place(number):
        """First output and row of a tile, and its split; neighbouring tiles share weights."""
        rest, row = _divmod(first + number * stride, cuts[2])
        stripe, split = _divmod(rest, cuts[1])
        output = jnp.minimum(stripe * (R * config.cluster), N - R * config.cluster)
        if config.cluster > 1:
            output += lax.axis_index("cluster") * R
        return pl.multiple_of(output, UNIT), pl.multiple_of(jnp.minimum(row * C, M - C), 8), split

    def fetch(number, _):
        output, row, split = place(number)

        def step(i, _):
            every = number * steps + i
            slot = lax.rem(every, stages)

            @pl.when(every >= stages)
            def _():
                plgpu.barrier_wait(x_free.at[slot])
                plgpu.barrier_wait(weights_free.at[slot])

            inputs = pl.ds(pl.multiple_of((split * steps + i) * X, X), X)
            axes = "cluster" if config.cluster > 1 else None
            x, weights = x_gmem.at[pl.ds(row, C), inputs], weights_gmem.at[pl.ds(output, R), inputs]
            plgpu.copy_gmem_to_smem(weights, weights_smem.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(x, x_smem.at[slot], full.at[slot], collective_axes=axes)

        lax.fori_loop(0, steps, step, None)

    def compute(number, _):
        output, row, split = place(number)
        output = pl.multiple_of(output + warpgroup * mine, UNIT)
        begin = number * steps

        def multiply(*sums):
            def use(i):
                """Issues the products of a step; frees the slot of x of the previous step."""
                every = begin + i
                slot = lax.rem(every, stages)
                plgpu.barrier_wait(full.at[slot])

                def free_x():
                    pl.when(i > 0)(lambda: plgpu.barrier_arrive(x_free.at[lax.rem(every - 1, stages)]))

                def free_weights():
                    plgpu.barrier_arrive(weights_free.at[slot])

                for block, acc in enumerate(sums):
                    outputs = pl.ds(pl.multiple_of(warpgroup * mine + block * UNIT, UNIT), UNIT)
                    first, last = block == 0, block == len(sums) - 1
                    add_products(
                        acc,
                        weights_smem.at[slot, outputs],
                        x_smem.at[slot],
                        free_x if first else lambda: None,
                        free_weights if last else lambda: None,
                    )

            # With a single block per step, two steps alternate between the registers of two blocks.
            unrolled = 2 if len(sums) * X == UNIT else 1

            def some(i, _):
                for j in range(unrolled):
                    use(i * unrolled + j)

            lax.fori_loop(0, steps // unrolled, some, None)
            if steps % unrolled:
                # Otherwise the compiler would wait for every single product above.
                plgpu.wgmma_wait(0)
                use(steps - 1)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(x_free.at[lax.rem(begin + steps - 1, stages)])
            return tuple(acc[...] for acc in sums)

        accumulators = [plgpu.ACC((UNIT, C), jnp.float32)] * config.blocks_of_outputs
        for block, sums in enumerate(pl.run_scoped(multiply, *accumulators)):
            outputs = pl.ds(pl.multiple_of(output + block * UNIT, UNIT), UNIT)
            if config.splits == 1:
                scale = plgpu.load(scale_gmem.at[outputs], layout=PER_ROW, optimized=False)
                sums = sums * tiles.along_rows(scale, sums.shape)
            if y_smem is None:
                y = y_gmem if config.splits == 1 else y_gmem.at[split]
                # A thread then holds neighbours along N.
                sums = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)
                y.at[pl.ds(row, C), outputs].transpose((1, 0))[...] = sums
                continue
            for chunk, start in enumerate(range(0, C, CHUNK)):
                rows = pl.ds(0, min(CHUNK, C - start))
                slot = y_smem.at[warpgroup, (block * pl.cdiv(C, CHUNK) + chunk) % SLOTS, rows]
                plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
                slot.transpose((1, 0))[...] = sums[:, start : start + rows.size].astype(y_gmem.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(slot, y_gmem.at[pl.ds(row + start, rows.size), outputs])

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        lax.fori_loop(0, rounds, fetch, None)
        # The other block of a cluster still arrives at this block's barriers, so it must not exit yet.
        for i in range(stages if config.cluster > 1 else 0):
            every = rounds * steps - 1 - i

            @pl.when(every >= 0)
            def _(every=every):
                plgpu.barrier_wait(x_free.at[lax.rem(every, stages)])

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        lax.fori_loop(0, rounds, compute, None)
        plgpu.wait_smem_to_gmem(0)


def add_products(acc, weights_smem, x_smem, previous_done, weights_read):
    """Issues acc += weights @ x.T and leaves the last product in flight.

    Args:
      weights_smem: [64, X] in 8 bits.
      previous_done: called as soon as all earlier products are done.
      weights_read: called as soon as the weights are in registers.
    """
    weights = upcast.load_in_order(weights_smem)
    weights_read()
    for start in range(0, weights.shape[1], UNIT):
        inputs = slice(start, start + UNIT)
        wide = upcast.as_bfloat16(weights[:, inputs])
        plgpu.wgmma(acc, wide, x_smem.at[:, inputs].transpose((1, 0)))
        # Earlier products are done, so their registers can take the next weights.
        plgpu.wgmma_wait(1)
        if start == 0:
            previous_done()


def _divmod(x, y):
    return lax.div(x, y), lax.rem(x, y)
