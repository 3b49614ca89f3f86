"""The part of a decoder layer after attention, W8A16: one persistent cooperative kernel for Hopper GPUs.

It takes up to 8 rows, in Pallas (Mosaic GPU). It is bound by reading the weights, once; what can be saved are
the gaps between the reads of consecutive GEMMs. So as many thread blocks as the GPU holds at once stay
resident from the first weight to the last, each with TMA copies of the next tiles in flight, which continue
from one matrix into the next.

Three phases, `out`, `up` and `down`, are split-K GEMMs: each is divided into units of 64 outputs by a split
of the inputs, whose partial sums go to global memory. Phases are separated by a grid barrier, after which
each block computes its own part of the next GEMM's inputs from the sums. There is none at the end: the last
block to arrive at 128 numbers of the result adds up their splits.

Products are those of `skinny_matmul`, in bfloat16. Plain JAX also rounds the results of GEMMs and SiLU; here
they stay in float32. The norm's factor, one number per row, is applied after `up`, so that no block needs
more of x than its part.

Limits. Blocks that are not all resident at once would deadlock; after some seconds they trap, and the process
loses its GPU. The grid is as large as the GPU holds when nothing else runs there. Another stream's kernel
delays the blocks until its own have ended, but two of these kernels at once may each occupy the room that the
other waits for. XLA runs a device's programs one after the other, and likewise the kernels in a program that
depend on each other, as layers do. Not safe: programs of several processes under MPS, and independent calls
in one program, if XLA is configured to run them concurrently.

M rows, C = 8 columns of the tensor core, D width of the stream, K inputs of `out`, F hidden width, X inputs
of a tile
"""

# Pallas types layouts, inline instructions and the references of kernels too narrowly.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false
# pyright: reportPrivateImportUsage=false

import dataclasses
import functools
import math

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Float, Shaped

from moss_jax.ops.mosaic_gpu import hopper, skinny_matmul, tiles
from moss_jax.ops.mosaic_gpu.skinny_matmul import (
    BLOCKED,
    STRIDED,
    THREADS,
    TILE,
    C,
    multiprocessors,
    piece,
    strided,
)
from moss_jax.ops.mosaic_gpu.tiles import MATRIX
from moss_jax.ops.norm import Residual
from moss_jax.ops.post_attention.base import Arguments
from moss_jax.ops.qarray import QArray

CHUNK = 128  # Numbers of the result that one block adds up: one per thread.
LINE = 128  # Bytes per L2 cache line.
LOOKS = 1 << 23  # Polls of the barrier's counter, some seconds, before a block traps.


@dataclasses.dataclass(frozen=True)
class Config:
    """Distribution of the weights over thread blocks.

    Attributes:
      blocks: number of thread blocks, all of which must be resident at once.
      block_k: inputs per tile.
      stages: tiles in flight per block.
      part: inputs per unit of `out` and `up`.
      part_down: inputs per unit of `down`.
      prefetch: whether the inputs of a phase are prefetched to L2 before the barrier that precedes it.
      passes: 1. Pallas's interpreter runs blocks sequentially, so none can wait for another: with 3, each
        phase is a separate pass over all blocks.
    """

    blocks: int
    block_k: int = 256
    stages: int = 5
    part: int = 1024
    part_down: int = 512
    prefetch: bool = True
    passes: int = 1


@dataclasses.dataclass(frozen=True)
class Phase:
    """A split-K GEMM divided into units, ordered by split.

    Attributes:
      stripes: number of stripes of 64 outputs.
      parts: number of parts of the inputs.
      tiles: number of tiles per unit.
      blocks: number of blocks, which take consecutive units, distributed evenly.
    """

    stripes: int
    parts: int
    tiles: int
    blocks: int

    @property
    def spans(self) -> int:
        """Maximum number of parts that a block's units span."""
        if self.blocks % self.parts == 0:
            return 1
        most = pl.cdiv(self.stripes * self.parts, self.blocks)
        return min(self.parts, pl.cdiv(most - 1, self.stripes) + 1)

    def units(self, block):
        """Returns the first unit of a block and the number of its units."""
        units, place = self.stripes * self.parts, block
        if self.blocks % self.parts == 0:
            # Neighbouring blocks take parts of the same rows, so that together they read whole rows.
            place = lax.rem(block, self.parts) * (self.blocks // self.parts) + lax.div(block, self.parts)
        first = lax.div(place * units, self.blocks)
        return first, lax.div((place + 1) * units, self.blocks) - first


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes derived from the arguments' shapes and the configuration; raises if they do not fit."""

    rows: int
    K: int
    D: int
    F: int
    config: Config
    multiprocessors: int

    def __post_init__(self):
        c = self.config
        for name, size, part in (("K", self.K, c.part), ("D", self.D, c.part), ("F", self.F, c.part_down)):
            if part % c.block_k or part % CHUNK or size % part:
                raise ValueError(
                    f"{name} = {size} does not fall into parts of {part} and tiles of {c.block_k}"
                )
        each = pl.cdiv(c.blocks, self.multiprocessors)
        if each > 2:
            # A thread has up to 255 registers.
            raise ValueError(f"a multiprocessor has registers for 2 blocks, not for {each}")
        room = skinny_matmul.shared_room(each)
        if self.shared > room:
            raise ValueError(
                f"a block takes {self.shared} bytes of shared memory, and with {c.blocks} of them on "
                f"{self.multiprocessors} multiprocessors each has {room}"
            )
        if self.units_down > THREADS:
            raise ValueError(
                f"a block has {self.units_down} units of `down`, and {THREADS} threads count them"
            )

    @property
    def phases(self) -> tuple[Phase, Phase, Phase]:
        """The phases of `out`, `up` and `down`."""
        c = self.config
        shapes = ((self.D, self.K, c.part), (2 * self.F, self.D, c.part), (self.D, self.F, c.part_down))
        out, up, down = (Phase(N // TILE, K // part, part // c.block_k, c.blocks) for N, K, part in shapes)
        return out, up, down

    @property
    def units_down(self) -> int:
        """Maximum number of units of `down` per block."""
        return pl.cdiv(self.phases[2].stripes * self.phases[2].parts, self.config.blocks)

    @property
    def operand_tiles(self) -> int:
        return max(phase.spans * phase.tiles for phase in self.phases)

    @property
    def pitch(self) -> int:
        """Row stride in shared memory, in numbers."""
        return skinny_matmul.pitch(self.rows, self.operand_tiles * self.config.block_k)

    @property
    def stored(self) -> int:
        """Rows of the sums that are stored: all columns of the tensor core, unless there is a single row."""
        return 1 if self.rows == 1 else C

    @property
    def shared(self) -> int:
        """Shared memory of a block in bytes."""
        c = self.config
        arrays = (self.rows * self.pitch * 2, c.stages * TILE * c.block_k, THREADS * 4)
        return skinny_matmul.shared_bytes(*arrays, barriers=c.stages)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """Arguments of the kernel as matrices; `up` has F2 = 2 F outputs, the gate's first."""

    x: Float[Array, "M D"]
    heads: Float[Array, "M K"]
    norm: Float[Array, " D"]
    gates: Float[Array, "2 M"] | None
    out: Shaped[Array, "D K"]
    out_scale: Float[Array, " D"]
    up: Shaped[Array, "F2 D"]
    up_scale: Float[Array, " F2"]
    down: Shaped[Array, "D F"]
    down_scale: Float[Array, " D"]
    eps: float = dataclasses.field(kw_only=True, metadata={"static": True})

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """M, K, D, F."""
        (M, K), (D, F) = self.heads.shape, self.down.shape
        return M, K, D, F


def operands(a: Arguments) -> Operands:
    """Converts the arguments of a call to matrices."""
    *rows, D = a.x.shape
    weights = {}
    for name, w in (("out", a.out), ("up", a.up), ("down", a.down)):
        assert isinstance(w.kernel, QArray)
        weights[name] = w.kernel.values.reshape(math.prod(w.outputs), -1)
        weights[f"{name}_scale"] = w.kernel.scale.reshape(-1)
    gates = (a.attention_gate, a.mlp_gate)
    if all(gate is None for gate in gates):
        gates = None
    else:
        each = [jnp.ones(1) if gate is None else gate.astype(jnp.float32) for gate in gates]
        gates = jnp.stack([jnp.broadcast_to(gate, (*rows, 1)).reshape(-1) for gate in each])
    x = a.x.reshape(-1, D)
    assert isinstance(a.heads, Array)
    return Operands(x, a.heads.reshape(len(x), -1), a.norm.weight, gates, **weights, eps=a.norm.eps)


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """Why this kernel cannot take the arguments; None if it can."""
    if reason := hopper.unsupported(platform):
        return reason
    a, maps = arguments, (arguments.out, arguments.up, arguments.down)
    if not a.gated or a.norm.bias is not None or any(w.bias is not None for w in maps):
        return "it takes gated MLPs behind RMS norms, without biases"
    dtypes = {w.kernel.dtype.name for w in maps}
    if any(w.scheme != "W8A16" for w in maps) or len(dtypes) > 1:
        return f"it takes weights of one 8-bit dtype for 16-bit inputs (W8A16), not {', '.join(dtypes)}"
    if a.x.dtype != jnp.bfloat16 or a.heads.dtype != jnp.bfloat16:
        return f"it takes x and heads in bfloat16, not {a.x.dtype} and {a.heads.dtype}"
    rows, D = math.prod(a.x.shape[:-1]), a.x.shape[-1]
    K, F = math.prod(a.out.inputs), math.prod(a.down.inputs)
    if not 0 < rows <= C:
        return f"it takes 1 to {C} rows, not {rows}"
    for name, size in (("K", K), ("D", D), ("F", F)):
        if size % CHUNK or size == 0:
            return f"{name} = {size} is not a multiple of {CHUNK}"
    try:
        Plan(rows, K, D, F, default_config(K, D, F), multiprocessors())
    except ValueError as error:
        return str(error)
    return None


def apply(a: Arguments, config: Config | None = None) -> Residual:
    """Computes the op; forward only."""
    o = operands(a)
    return Residual(few_rows(o, config or default_config(*o.sizes[1:])).reshape(a.x.shape))


def default_config(K: int, D: int, F: int) -> Config:
    """Configuration with two thread blocks per multiprocessor."""
    blocks = 2 * multiprocessors()
    part, part_down = math.gcd(K, D, 1024), _part_down(D, F, blocks)
    block_k = math.gcd(part, part_down, 256)
    return Config(blocks, block_k, 4 * 256 // block_k, part, part_down)


def _part_down(D: int, F: int, blocks: int) -> int:
    """Inputs per unit of `down`, for the fewest parts, since each adds sums to write, add and wait for.

    Subject to: every block has a unit, none has units of two parts, and 8 rows of a part leave room for the
    weights.
    """
    for parts in range(pl.cdiv(F, 2048), F // CHUNK + 1):
        if blocks % parts == 0 and F % (parts * CHUNK) == 0 and D // TILE * parts >= blocks:
            return F // parts
    return math.gcd(F, 512)


@functools.partial(jax.jit, static_argnames="config")
def few_rows(o: Operands, config: Config) -> Float[Array, "M D"]:
    """Computes the op for M <= 8; forward only.

    Jitted, so that a model's layers, which call it with the same shapes, trace and lower it once.
    """
    p, passes = Plan(*o.sizes, config, multiprocessors()), config.passes
    # The barrier's counter, and one for each chunk of the result.
    counters = jax.new_ref(jnp.zeros(1 + p.D // CHUNK, jnp.int32))
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    row = jax.ShapeDtypeStruct(o.x.shape, o.x.dtype)
    out, up, down = p.phases
    *_, y = plgpu.kernel(
        functools.partial(_kernel, plan=p, eps=o.eps),
        kernel_name="post_attention",
        out_type=[
            f32((out.parts, p.stored, p.D)),
            f32((up.parts, p.rows)),
            row,
            f32((up.parts, p.stored, 2 * p.F)),
            f32((down.parts, p.stored, p.D)),
            row,
        ],
        scratch_types={
            "row_smem": plgpu.SMEM((p.rows, p.pitch), jnp.bfloat16),
            "ring_smem": tiles.tile((config.stages, TILE, config.block_k), o.out.dtype),
            "last_smem": plgpu.SMEM((THREADS,), jnp.int32),
            "barrier": plgpu.Barrier(num_barriers=config.stages),
        },
        grid=(config.blocks,) if passes == 1 else (passes, config.blocks),
        grid_names=("block",) if passes == 1 else ("pass", "block"),
        compiler_params=skinny_matmul.COMPILER_PARAMS,
    )(
        o.x,
        o.heads,
        o.norm,
        o.gates,
        o.out,
        o.out_scale,
        o.up,
        o.up_scale,
        o.down,
        o.down_scale,
        counters,
    )
    return y


def _kernel(
    x_gmem,
    heads_gmem,
    norm_gmem,
    gates_gmem,
    out_gmem,
    out_scale_gmem,
    up_gmem,
    up_scale_gmem,
    down_gmem,
    down_scale_gmem,
    counters_gmem,
    attended_gmem,
    squares_gmem,
    middle_gmem,
    hidden_gmem,
    sums_gmem,
    y_gmem,
    *,
    row_smem,
    ring_smem,
    last_smem,
    barrier,
    plan,
    eps,
):
    """Body of one thread block.

    `attended_gmem`, `hidden_gmem` and `sums_gmem` are the sums of the three phases, `middle_gmem` x after
    attention.

    No automatic barriers: `commit_smem` is a barrier of the warpgroup. A visit to a tile has one: before it,
    all threads have read the tile into registers; after it, the tile's slot is refilled. A phase has one,
    between the writes to `row_smem` and the products. The next phase writes to it after all threads have
    passed the grid barrier, before which they have read what they need.
    """
    config, rows, phases = plan.config, plan.rows, plan.phases
    X, stages = config.block_k, config.stages
    now = None if config.passes == 1 else lax.axis_index("pass")
    dealt = [phase.units(lax.axis_index("block")) for phase in phases]
    # Steps are tiles, counted through all phases.
    begins = [jnp.int32(0)]
    for phase, (_, count) in zip(phases, dealt, strict=True):
        begins.append(begins[-1] + count * phase.tiles)
    begin, end = begins[0], begins[-1]
    if now is not None:
        begin, end = (
            jnp.where(now == 0, x, jnp.where(now == 1, y, z)) for x, y, z in (begins[:3], begins[1:])
        )

    def fetch(step):
        ring = lax.rem(step, stages)
        for i, weights in enumerate((out_gmem, up_gmem, down_gmem)):

            @pl.when((begins[i] <= step) & (step < begins[i + 1]))
            def _(phase=phases[i], first=dealt[i][0], since=step - begins[i], weights=weights):
                part, stripe = _divmod(first + lax.div(since, phase.tiles), phase.stripes)
                tile = part * phase.tiles + lax.rem(since, phase.tiles)
                source = weights.at[piece(stripe, TILE), piece(tile, X)]
                plgpu.copy_gmem_to_smem(source, ring_smem.at[ring], barrier.at[ring])

    def visit(step, operand, sums):
        ring = lax.rem(step, stages)
        plgpu.barrier_wait(barrier.at[ring])
        weights = skinny_matmul.load(ring_smem.at[ring], BLOCKED)
        plgpu.commit_smem()
        pl.when(step + stages < end)(functools.partial(fetch, step + stages))
        return skinny_matmul.multiply(sums, weights, row_smem, operand * X, BLOCKED)

    def parts(number):
        """Parts of a phase that the block's units span, or more: all blocks process the same number."""
        phase, (first, _) = phases[number], dealt[number]
        first_part = lax.div(first, phase.stripes)
        return [jnp.minimum(first_part + span, phase.parts - 1) for span in range(phase.spans)]

    def run(number, inputs, sums_gmem):
        """Runs a phase; `inputs(m, part)` returns a part of row m of the product's inputs, in float32."""
        phase, (first, count), own = phases[number], dealt[number], parts(number)
        for m in range(rows):
            # All are loaded before any is stored.
            for span, values in enumerate([inputs(m, part) for part in own]):
                row_smem[m, pl.ds(span * phase.tiles * X, phase.tiles * X)] = values.astype(jnp.bfloat16)
        plgpu.commit_smem()

        def unit(i, _):
            part, stripe = _divmod(first + i, phase.stripes)
            step, operand = begins[number] + i * phase.tiles, (part - own[0]) * phase.tiles
            nothing = tiles.full((TILE, C), 0, MATRIX)
            sums = lax.fori_loop(
                0, phase.tiles, lambda tile, sums: visit(step + tile, operand + tile, sums), nothing
            )
            if plan.stored == 1:
                # The other columns are the same.
                sums = jnp.where(tiles.index((TILE, C), 1) == 0, sums, 0)
                sums_gmem[part, 0, piece(stripe, TILE)] = sums.sum(axis=1)
            else:
                # A thread then holds neighbouring outputs.
                sums = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)
                sums_gmem.at[part, :, piece(stripe, TILE)].transpose((1, 0))[...] = sums

        lax.fori_loop(0, count, unit, None)

    def needed(number, part):
        """Operands for the inputs of a part, except those that this phase has just written."""
        if number == 1:
            at = piece(part, config.part)
            return [ref.at[at] for ref in (out_scale_gmem, norm_gmem)]
        halves = [half(part, start) for start in (0, plan.F)]
        sums = [hidden_gmem.at[split, m] for split in range(phases[1].parts) for m in range(rows)]
        return [ref.at[at] for at in halves for ref in (up_scale_gmem, *sums)]

    def expect(number):
        """Prefetches these operands to L2 again, from which the streamed weights have evicted them."""
        for part in parts(number):
            for ref in needed(number, part):
                prefetch(ref)

    def half(part, start):
        """Slice of a part in the gate, which starts at 0, or in up, which starts at F."""
        return pl.ds(pl.multiple_of(start + part * config.part_down, CHUNK), config.part_down)

    def added(sums_gmem, m, at):
        """Adds up the sums of all parts."""
        parts = [strided(sums_gmem.at[part, m, at]) for part in range(sums_gmem.shape[0])]
        return sum(parts[1:], parts[0])

    def gated(branch, which, m):
        return branch if gates_gmem is None else gates_gmem[which, m] * branch

    def attended(m, part):
        return strided(heads_gmem.at[m, piece(part, config.part)])

    def normed(m, part):
        """Norm without its factor; the block with the first unit of the part stores what is needed later."""
        at = piece(part, config.part)
        branch = added(attended_gmem, m, at) * strided(out_scale_gmem.at[at])
        x = (strided(x_gmem.at[m, at]) + gated(branch, 0, m)).astype(x_gmem.dtype)
        wide = x.astype(jnp.float32)
        (first, count), start = dealt[1], part * phases[1].stripes

        @pl.when((first <= start) & (start < first + count))
        def _():
            middle_gmem[m, at] = x
            squares_gmem[part, m] = (wide * wide).sum()
            plgpu.commit_smem()  # Between the uses of the scratch memory of two sums.

        return wide * strided(norm_gmem.at[at])

    def hidden(m, part):
        halves = [half(part, start) for start in (0, plan.F)]
        gate, up = (added(hidden_gmem, m, at) * strided(up_scale_gmem.at[at]) for at in halves)
        squares = [squares_gmem[part, m] for part in range(phases[1].parts)]
        factor = lax.rsqrt(sum(squares[1:], squares[0]) / plan.D + eps)
        gate, up = gate * factor, up * factor
        return gate / (1 + jnp.exp(-gate)) * up

    def finish():
        """Computes the result wherever this block is the last to arrive."""
        phase, (first, count) = phases[2], dealt[2]

        def chunk(unit):
            return lax.div(lax.rem(unit, phase.stripes), CHUNK // TILE)

        # All of a block's units arrive at once, each through a thread of its own.
        thread = skinny_matmul.threads()
        counter = jnp.where(thread < count, 1 + chunk(first + thread), -1)
        last_smem[...] = arrive(counters_gmem, counter, phase.parts * (CHUNK // TILE))
        plgpu.commit_smem()

        def unit(i, _):
            @pl.when(last_smem[i] == 1)
            def _():
                at = piece(chunk(first + i), CHUNK)
                for m in range(rows):
                    branch = added(sums_gmem, m, at) * strided(down_scale_gmem.at[at])
                    total = strided(middle_gmem.at[m, at]) + gated(branch, 1, m)
                    y_gmem[m, at] = total.astype(y_gmem.dtype)

        lax.fori_loop(0, count, unit, None)

    for i in range(stages):
        pl.when(begin + i < end)(functools.partial(fetch, begin + i))
    work = ((attended, attended_gmem), (normed, hidden_gmem), (hidden, sums_gmem))
    for number, (inputs, sums) in enumerate(work):
        if number:
            if config.prefetch:
                expect(number)
            grid_barrier(counters_gmem, config.blocks)
        this = functools.partial(run, number, inputs, sums)
        this() if now is None else pl.when(now == number)(this)
    finish() if now is None else pl.when(now == 2)(finish)


def _divmod(x, y):
    return lax.div(x, y), lax.rem(x, y)


# As in CUDA's cooperative groups: the arrivals of all blocks add up to 2^31, so that the last one flips the
# top bit, for which all wait, and the counter needs no reset.
BARRIER = """{{
.reg .pred done, tired; .reg .b32 old, new, looks;
fence.acq_rel.gpu;
atom.add.relaxed.gpu.global.u32 old, [$0], $1;
mov.b32 looks, 0;
LOOK:
ld.relaxed.gpu.global.u32 new, [$0];
xor.b32 new, new, old;
setp.lt.s32 done, new, 0;
@done bra SEEN;
add.u32 looks, looks, 1;
setp.lt.u32 tired, looks, {looks};
@tired bra LOOK;
trap;
SEEN:
fence.acq_rel.gpu;
}}"""

PREFETCH = """{{
.reg .pred there; .reg .b64 at;
setp.lt.u32 there, $1, {lines};
mad.wide.u32 at, $1, {line}, $0;
@there prefetch.global.L2 [at];
}}"""

# The last arrival resets the counter.
ARRIVE = """{{
.reg .pred there, last; .reg .b32 old; .reg .b64 at;
fence.acq_rel.gpu;
setp.ge.s32 there, $2, 0;
mad.wide.s32 at, $2, 4, $1;
mov.b32 old, 0;
@there atom.inc.relaxed.gpu.global.u32 old, [at], {most};
fence.acq_rel.gpu;
setp.eq.u32 last, old, {most};
selp.b32 $0, 1, 0, last;
}}"""


def prefetch(ref):
    """Prefetches a vector in global memory, of up to 128 lines, to L2."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def fetch(_, ref):
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [mgpu.utils.memref_ptr(ref), mgpu.utils.thread_idx()],
            PREFETCH.format(line=LINE, lines=pl.cdiv(size, LINE)),
            "l,r,~{memory}",
            has_side_effects=True,
        )

    size = math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize
    fetch(ref)


def grid_barrier(counters, blocks):
    """Grid-wide barrier; earlier writes to global memory are visible to all blocks afterwards."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def synchronize(_, counters):
        i32 = ir.IntegerType.get_signless(32)

        def constant(value):
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        mgpu.utils.warpgroup_barrier()
        with mgpu.utils.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            first = arith.cmpi(arith.CmpIPredicate.eq, mgpu.utils.block_idx(), constant(0))
            arrivals = arith.select(first, constant(2**31 - (blocks - 1)), constant(1))
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [mgpu.utils.memref_ptr(counters), arrivals],
                BARRIER.format(looks=LOOKS),
                "l,r,~{memory}",
                has_side_effects=True,
            )
        mgpu.utils.warpgroup_barrier()

    synchronize(counters)


def arrive(counters, counter, expected):
    """Signals that the block is done; returns [128], 1 for each thread that arrived last of those expected.

    Each thread has its own counter, or none if negative. Writes to global memory before earlier arrivals are
    visible to the last one's block once its threads have the result.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), STRIDED),
        return_type=plgpu.ShapeDtypeStruct((THREADS,), jnp.int32, layout=STRIDED),
    )
    def count(_, counters, counter):
        i32 = ir.IntegerType.get_signless(32)
        mgpu.utils.warpgroup_barrier()
        (register,) = counter.registers.flat
        last = llvm.inline_asm(
            i32,
            [mgpu.utils.memref_ptr(counters), mgpu.utils.bitcast(register, i32)],
            ARRIVE.format(most=expected - 1),
            "=r,l,r,~{memory}",
            has_side_effects=True,
        )
        registers = np.array([mgpu.utils.bitcast(last, register.type)], dtype=object)
        return mgpu.FragmentedArray(_registers=registers, _layout=counter.layout, _is_signed=True)

    return count(counters, counter)
