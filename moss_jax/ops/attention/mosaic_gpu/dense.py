"""Every position to every position, straight from the fused projection: the vision encoder's attention.

The shape of FlashAttention 3 (Shah et al., arXiv 2407.08608). A thread block takes blocks of queries of one
head one after another. One warpgroup fetches, and runs ahead into the next block; the others compute, each on
64 queries. While a tile's scores go through the softmax, the tensor core multiplies the weights of the tile
before with its values, and the other warpgroups' tiles. The warpgroups take turns in giving it work.

Whole tiles leave a rest of the keys, which comes first: a tile as small as the tensor core allows, moved back
to end with the positions. The keys that it shares with its neighbour are masked, so that only the start of
the walk has a mask. The last block of queries is moved back too: queries that two blocks share are written
twice, alike.

A weight is the power of 2 by which its score exceeds the maximum of its row in the first tile, and nobody
looks for another maximum: float32 and bfloat16 have room for weights far above 1, so nothing has to be scaled
again, and the softmax of a tile is short. Where the weights of a row become too large for that after all, its
block is walked once more, with the maximum of all that has been seen, when the thread block has done all
others. (If that is one of two blocks that share queries, either result of these may stay; they are rounded
differently.)

Lines of 80 numbers don't fill the 128 bytes that copies and tensor core like best. A head of 80 columns can
lie in shared memory as 64 columns in lines of 128 bytes beside 16 in lines of 32, instead of 80 in lines of
32: the copy engine then moves 2 pieces a vector, not 5.

Queries and keys may come in float8_e4m3fn, of which the tensor core takes twice as many columns at once: 32.
Heads of 80 then have 16 columns of zeros in shared memory, which the copy engine puts there: for it, they lie
beyond the head.

B batch, P positions, H heads, D head, W warpgroups that compute, X keys of a tile, F keys of the first
"""

import dataclasses
import functools

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, DTypeLike, Float

from moss_jax.ops.attention.arguments import Projection, RoundedProjection, projection_sizes, values_dtype
from moss_jax.ops.mosaic_gpu import tiles
from moss_jax.ops.mosaic_gpu.tiles import LOG2E, MATRIX, NEVER, PER_ROW

ROWS = 64  # Queries of a warpgroup: the rows of the tensor core's tiles.
SHARED_BYTES = 226 * 1024  # Of a thread block, but for its barriers.
UNIT = 8  # Positions come in multiples of this, the rows of a piece that the copy engine moves.
# Sums of weights are below this, or a row needs its own maximum: then they and their products with values are
# far from the largest numbers of their dtypes.
MOST = {"bfloat16": 2.0**96, "float16": 2.0**15}
DEPTH = 16  # Keys that a product with values takes at once from lines of 32 bytes, but 64 from lines of 128.

# Any thread's $1, for all of a warpgroup, by its own barrier.
VOTE = (
    "{ .reg .pred mine, any; setp.ne.b32 mine, $1, 0; barrier.cta.red.or.pred.aligned any, $2, 128, mine; "
    "selp.b32 $0, 1, 0, any; }"
)

# Registers of a thread that computes, and of one that fetches, by the number of warpgroups that compute. All
# together they are those that the thread block is started with; with more, it would wait for them for ever.
REGISTERS = {2: (232, 40), 3: (160, 32)}


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """How a call is cut.

    Attributes:
      warpgroups: that compute in a thread block, 2 or 3.
      block_kv: keys of a tile; a multiple of 64, or of 16 if values of 80 columns are not wide.
      stages: tiles of K and of V that are on their way at once, as far as shared memory has room: of 128
        keys, for 4 with heads of up to 80 columns, for 2 with 128.
      wide_values: their columns lie in lines of 128 bytes as far as they fill them, as those of keys do.
      blocks: thread blocks at most; each takes several blocks of queries one after another.
    """

    warpgroups: int = 2
    block_kv: int = 128
    stages: int = 4
    wide_values: bool = True
    blocks: int = 132

    def __post_init__(self):
        if self.warpgroups not in REGISTERS:
            raise ValueError(f"warpgroups is {' or '.join(map(str, REGISTERS))}, not {self.warpgroups}")
        unit = 64 if self.wide_values else 16
        if self.block_kv % unit or not unit <= self.block_kv <= 256:
            raise ValueError(f"block_kv is a multiple of {unit} up to 256, not {self.block_kv}")
        if self.stages < 2 or self.blocks < 1:
            raise ValueError(f"there are 2 stages and 1 block at least, not {self.stages} and {self.blocks}")

    def fitted(self, positions: int, head_dim: int) -> "DenseConfig":
        """No more queries and keys at once than there are, and no more stages than there is room for."""
        unit = 64 if self.wide_values else 16
        warpgroups = min(self.warpgroups, positions // ROWS)
        block_kv = min(self.block_kv, positions // unit * unit)
        vector = 2 * head_dim  # Bytes in 16 bits; queries and keys in 8 take less.
        stages = (SHARED_BYTES - 2 * warpgroups * ROWS * vector) // (2 * block_kv * vector)
        return dataclasses.replace(
            self, warpgroups=warpgroups, block_kv=block_kv, stages=min(self.stages, max(2, stages))
        )


# Heads of 80 columns take a tenth less time a query so, where there is work for all to the end.
TALL = DenseConfig(warpgroups=3, block_kv=96, wide_values=False)


def default_config(projection: Projection) -> DenseConfig:
    """The one that is done first."""
    batch, positions, heads, head_dim = projection_sizes(projection)

    def time(config: DenseConfig) -> int:
        blocks = batch * heads * pl.cdiv(positions, config.warpgroups * ROWS)
        return pl.cdiv(blocks, config.blocks) * config.warpgroups

    wide = DenseConfig()
    return TALL if head_dim == 80 and 0.9 * time(TALL) < time(wide) else wide


def unsupported(projection: Projection, out_dtype: jnp.dtype) -> str | None:
    """Why this kernel cannot take the projection, on a GPU that has what it needs; None if it can."""
    (_, positions, _, head_dim), dtype = projection_sizes(projection), values_dtype(projection)
    least = min(REGISTERS) * ROWS
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {dtype}"
    if isinstance(projection, RoundedProjection) and projection.qk.dtype != jnp.float8_e4m3fn:
        return f"it takes queries and keys apart in float8_e4m3fn, not {projection.qk.dtype}"
    if out_dtype not in (dtype, jnp.float8_e4m3fn):
        return f"from {dtype} it makes {dtype} and float8_e4m3fn, not {out_dtype}"
    if head_dim not in (64, 80, 128):
        return f"it takes head_dim 64, 80 and 128, not {head_dim}"
    if positions < least or positions % UNIT:
        return f"it takes {least} positions or more, in multiples of {UNIT}, not {positions}"
    return None


@functools.partial(jax.jit, static_argnames=("config", "out_dtype"))
def dense(
    projection: Projection, config: DenseConfig, out_dtype: DTypeLike | None = None
) -> Float[Array, "B P H D"]:
    """Computes the op, in the values' dtype if `out_dtype` is None; forward only."""
    (B, P, H, D), dtype = projection_sizes(projection), values_dtype(projection)
    out_dtype = jnp.dtype(dtype if out_dtype is None else out_dtype)
    arrays, structure = jax.tree.flatten(projection)
    qk_dtype = arrays[0].dtype
    config = config.fitted(P, D)
    W, X, stages = config.warpgroups, config.block_kv, config.stages
    blocks = min(B * H * pl.cdiv(P, W * ROWS), config.blocks)
    k_parts, v_parts = _parts(D, qk_dtype), _parts(D, dtype, config.wide_values)
    first_room = _room if _first(P, X) % 64 == 0 else _narrow_room

    # Lines of 80 bytes cannot be swizzled, but neither do stores to them meet in the same banks.
    out_room = tiles.tile if D * out_dtype.itemsize % 32 == 0 else plgpu.SMEM

    def barrier(arrivals, count):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    def kernel(*refs, **scratch):
        *refs, out_gmem = refs
        _kernel(structure.unflatten(refs), out_gmem, config=config, stride=blocks, **scratch)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((B, P, H, D), out_dtype),
        scratch_types={
            "q_smem": [_room((W, ROWS), part, D, qk_dtype) for part in k_parts],
            "k_smem": [_room((stages, X), part, D, qk_dtype) for part in k_parts],
            # The same memory as most tiles lie in it, and as the first one does.
            "v_smem": plgpu.RefUnion(
                *([room((stages, X), part, D, dtype) for part in v_parts] for room in (_room, first_room))
            ),
            "out_smem": out_room((W, ROWS, D), out_dtype),
            # One arrival a copy, or a warpgroup.
            "q_ready": barrier(len(k_parts), W),
            "k_ready": barrier(len(k_parts), stages),
            "v_ready": barrier(len(v_parts), stages),
            "q_free": barrier(1, W),
            "k_free": barrier(W, stages),
            "v_free": barrier(W, stages),
            "turn": barrier(1, W),
            # Of each block and warpgroup, whether it must be walked again, and that all of that is known.
            "again": plgpu.SMEM((pl.cdiv(B * H * pl.cdiv(P, W * ROWS), blocks), W), jnp.int32),
            "walked": barrier(W, 1),
        },
        grid=(blocks,),
        grid_names=("block",),
        num_threads=W + 1,
        thread_name="warpgroup",
        # `_kernel` says why its own barriers are enough.
        compiler_params=dataclasses.replace(tiles.COMPILER_PARAMS, unsafe_no_auto_barriers=True),
    )(*arrays)


def _parts(head_dim: int, dtype: jnp.dtype, wide: bool = True) -> list[tuple[int, int]]:
    """(first column, columns) of the pieces in which vectors lie in shared memory."""
    narrow = head_dim % 64
    if not (wide and narrow):
        return [(0, head_dim)]
    # In 8 bits the tensor core takes 32 columns at once: those behind the head are zeros.
    return [(0, head_dim - narrow), (head_dim - narrow, 32 if dtype.itemsize == 1 else narrow)]


def _first(positions: int, block_kv: int) -> int:
    """Keys of the first tile: what whole tiles leave, rounded up to a multiple of `DEPTH`; not 0."""
    missing = -positions % block_kv
    return block_kv - missing // DEPTH * DEPTH


def _room(shape, part, head_dim, dtype):
    """Shared memory for `shape` = (slots, vectors) of a part's columns.

    A part of a vector must be one line, and lies there by rows: the copy engine cannot cut a head into lines
    of 64 that has 80 columns. `_lines` is how it sees that memory, `_tile` how the tensor core does.
    """
    slots, vectors = shape
    width = part[1]
    if width == head_dim:
        return tiles.tile((slots, vectors, width), dtype)
    swizzle = plgpu.SwizzleTransform(width * jnp.dtype(dtype).itemsize)
    return plgpu.SMEM((slots, vectors // 8, 1, 8, width), dtype, transforms=(swizzle,))


def _narrow_room(shape, part, head_dim, dtype):
    """As much memory as `_room`, in lines of 32 bytes: there, tiles may have any multiple of `DEPTH` keys."""
    columns = 32 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(32))
    return plgpu.SMEM((*shape, part[1]), dtype, transforms=transforms)


def _slot(room, slot, vectors):
    """The first `vectors` of a slot."""
    return room.at[slot, : vectors // 8 if len(room.shape) == 5 else vectors]


def _lines(room):
    """A slot of `_room` as [vectors, columns] for the copy engine."""
    return room.reshape(room.shape[0] * 8, room.shape[-1]) if len(room.shape) == 4 else room


def _tile(room):
    """A slot of `_room` as [vectors, columns] for the tensor core."""
    if len(room.shape) == 2:
        return room
    tiling = plgpu.TilingTransform((8, room.shape[-1]))
    return dataclasses.replace(room, transforms=(*room.transforms, tiling.undo(None)))


def _kernel(
    projection,
    out_gmem,
    *,
    q_smem,
    k_smem,
    v_smem,
    out_smem,
    q_ready,
    k_ready,
    v_ready,
    q_free,
    k_free,
    v_free,
    turn,
    again,
    walked,
    config,
    stride,
):
    """Blocks of queries `block`, `block + stride`, and so on.

    No automatic barriers: tiles of Q, K and V are written by copies alone, after every thread that computes
    has arrived at the barrier that says they are free, and read by products alone. Only `out_smem` is written
    by threads: after the wait for the last copy out of it, which is a barrier of the warpgroup, and before
    `commit_smem`, which is another, and the next copy.

    A turn goes round: to be passed on to a warpgroup a second time, it must have been awaited by all of its
    threads the first time. Its holder waits for a tile of V at most, and that tile's room was freed before
    anybody had the turn before: with 2 stages or more, nobody waits for one who waits for his turn.
    """
    warpgroup = lax.axis_index("warpgroup")
    (B, P, H, D), dtype = projection_sizes(projection), values_dtype(projection)
    rounded = isinstance(projection, RoundedProjection)
    W, X, stages = config.warpgroups, config.block_kv, config.stages
    F = _first(P, X)
    v_smem, v_first = v_smem
    # Blocks of queries lie next to one another, so that those of a head find its keys in L2.
    blocks, steps = pl.cdiv(P, W * ROWS), pl.cdiv(P, X)
    first = lax.axis_index("block")
    rounds = pl.cdiv(B * H * blocks - first, stride)

    def place(number):
        """Batch row, head, and the first query of a block."""
        number = first + number * stride
        pair, block = lax.div(number, blocks), lax.rem(number, blocks)
        at = pl.multiple_of(jnp.minimum(block * (W * ROWS), P - W * ROWS), UNIT)
        return lax.div(pair, H), lax.rem(pair, H), at

    def source(which, batch, positions, head, columns):
        """Vectors of q (0), k (1) or v (2)."""
        if not rounded:
            return projection.at[batch, positions, which, head, columns]
        if which < 2:
            return projection.qk.at[batch, positions, which, head, columns]
        return projection.v.at[batch, positions, head, columns]

    def fetch(which, batch, head, at, rooms, barrier):
        """Copies the vectors from `at` on of q (0), k (1) or v (2)."""
        column = 0
        for room in map(_lines, rooms):
            vectors, width = room.shape
            # Beyond the head the copy engine finds zeros. Pallas refuses a slice that it knows to go there.
            first = column if column + width <= D else lax.optimization_barrier(jnp.int32(column))
            columns = pl.ds(first, width)
            plgpu.copy_gmem_to_smem(source(which, batch, pl.ds(at, vectors), head, columns), room, barrier)
            column += width

    def repeat(walk):
        """Walks once more through the blocks of which a warpgroup says so."""
        plgpu.barrier_wait(walked)

        def look(number, before):
            needed = sum(again[number, i] for i in range(W)) > 0
            pl.when(needed)(lambda: walk(number, before))
            return before + needed.astype(jnp.int32)

        lax.fori_loop(0, rounds, look, rounds)

    @pl.when(warpgroup == W)
    def _():
        plgpu.set_max_registers(REGISTERS[W][1], action="decrease")

        def walk(number, before):
            """Fetches a block, after so many others."""
            batch, head, at = place(number)

            def queries(i):
                pl.when(before > 0)(lambda: plgpu.barrier_wait(q_free.at[i]))
                fetch(0, batch, head, at + i * ROWS, [room.at[i] for room in q_smem], q_ready.at[i])

            def tile(step, at, vectors, v_smem):
                every = before * steps + step
                slot = lax.rem(every, stages)
                for which, rooms, ready, free in ((1, k_smem, k_ready, k_free), (2, v_smem, v_ready, v_free)):
                    pl.when(every >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                    rooms = [_slot(room, slot, vectors) for room in rooms]
                    fetch(which, batch, head, at, rooms, ready.at[slot])

            for i in range(W):
                queries(i)
            tile(0, P - F, F, v_first)
            lax.fori_loop(1, steps, lambda i, _: tile(i, pl.multiple_of((i - 1) * X, UNIT), X, v_smem), None)

        lax.fori_loop(0, rounds, lambda number, _: walk(number, number), None)
        repeat(walk)

    @pl.when(warpgroup < W)
    def _():
        plgpu.set_max_registers(REGISTERS[W][0], action="increase")
        pl.when(warpgroup == W - 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
        q = [_tile(room.at[warpgroup]) for room in q_smem]
        scale = D**-0.5 * LOG2E
        if rounded:
            scale *= projection.scale[0]

        def keys(slot, vectors=X):
            return [_tile(_slot(room, slot, vectors)).transpose((1, 0)) for room in k_smem]

        def values(slot):
            return [_tile(_slot(room, slot, X)) for room in v_smem]

        def first_values(slot):
            return [_tile(_slot(room, slot, F)) for room in v_first]

        def begin_turn():
            plgpu.barrier_wait(turn.at[warpgroup])

        def end_turn():
            plgpu.barrier_arrive(turn.at[lax.rem(warpgroup + 1, W)])

        def weigh(scores, top):
            """The weights and their sum."""
            weights = jnp.exp2(scores * scale - tiles.along_rows(top, scores.shape))
            return weights, weights.sum(axis=1)

        def softmax(scores, top):
            """The weights, their sum, the new maximum, and how much less the old weights count."""
            new_top = jnp.maximum(top, scores.max(axis=1) * scale)
            return *weigh(scores, new_top), new_top, jnp.exp2(top - new_top)

        def block(number, before, running=False):
            """Computes a block, after so many others, with a running maximum or that of the first tile."""
            batch, head, at = place(number)
            start = before * steps

            # The moved tile: keys of the whole tiles are not its own.
            slot = lax.rem(start, stages)
            plgpu.barrier_wait(q_ready.at[warpgroup])
            plgpu.barrier_wait(k_ready.at[slot])
            begin_turn()
            scores = product(q, keys(slot, F), end_turn)
            plgpu.barrier_arrive(k_free.at[slot])
            if others := F + (steps - 1) * X - P:
                # One number a key: to find the column of every score would take divisions by F.
                column = plgpu.broadcasted_iota(jnp.int32, (F,), 0, layout=tiles.PER_COLUMN)
                scores = jnp.where(tiles.along_columns(column, scores.shape) >= others, scores, NEVER)
            weights, total, top, _ = softmax(scores, tiles.full((ROWS,), NEVER, PER_ROW))
            out = tuple(tiles.full((ROWS, tile.shape[1]), 0, MATRIX) for tile in values(slot))

            def await_keys(step):
                slot = lax.rem(start + step, stages)
                pl.when(step < steps)(lambda: plgpu.barrier_wait(k_ready.at[slot]))

            def visit(step, carry, values=values):
                """Scores of a tile, and the products with the values of the one before."""
                out, narrow, top, total = carry
                slot, before = lax.rem(start + step, stages), lax.rem(start + step - 1, stages)
                begin_turn()

                def between():
                    plgpu.barrier_wait(v_ready.at[before])

                def taken(scores):
                    plgpu.barrier_arrive(k_free.at[slot])
                    found = softmax(scores, top) if running else weigh(scores, top)
                    found = lax.optimization_barrier(found)
                    # A branch, or the compiler would put the wait for the second product before the softmax.
                    await_keys(step + 1)
                    return found

                out, (weights, summed, *moved) = products(
                    (q, keys(slot)),
                    (out, narrow, values(before)),
                    between,
                    end_turn,
                    taken,
                    3 if running else 1,
                )
                plgpu.barrier_arrive(v_free.at[before])
                if moved:
                    top, decay = moved
                    out = tuple(x * tiles.along_rows(decay, x.shape) for x in out)
                    total *= decay
                return out, weights.astype(dtype), top, total + summed

            await_keys(1)
            carry = out, weights.astype(dtype), top, total
            if steps > 1:
                carry = visit(1, carry, first_values)
            out, narrow, _, total = lax.fori_loop(2, steps, visit, carry)
            plgpu.barrier_arrive(q_free.at[warpgroup])

            slot = lax.rem(start + steps - 1, stages)
            plgpu.barrier_wait(v_ready.at[slot])
            last_values = values if steps > 1 else first_values
            out = add_products(out, narrow, last_values(slot))
            plgpu.barrier_arrive(v_free.at[slot])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            share = 1 / total
            column = 0
            for x in out:
                mine = out_smem.at[warpgroup, :, pl.ds(column, x.shape[1])]
                mine[...] = (x * tiles.along_rows(share, x.shape)).astype(out_smem.dtype)
                column += x.shape[1]
            plgpu.commit_smem()
            rows = pl.ds(pl.multiple_of(at + warpgroup * ROWS, UNIT), ROWS)
            plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], out_gmem.at[batch, rows, head])
            if not running:
                again[number, warpgroup] = anywhere(jnp.where(total < MOST[str(dtype)], 0, 1))

        lax.fori_loop(0, rounds, lambda number, _: block(number, number), None)
        # What is computed again is written behind what it replaces.
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(walked)
        repeat(functools.partial(block, running=True))
        plgpu.wait_smem_to_gmem(0)


def product(a, b, meanwhile):
    """The sum of the parts' products a @ b; `meanwhile` is done when the tensor core has them."""

    def multiply(acc):
        for x, y in zip(a, b, strict=True):
            plgpu.wgmma(acc, x, y)
        meanwhile()
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((a[0].shape[0], b[0].shape[1]), jnp.float32))


def add_products(totals, a, b):
    """total + a @ b for each total and b."""

    def multiply(accs):
        for acc, y in zip(accs, b, strict=True):
            plgpu.wgmma(acc, a, y)

    return pl.run_state(multiply)(tuple(map(plgpu.ACC.init, totals)))


def products(first, second, between, meanwhile, take, vectors):
    """`product(*first)` through `take`, beside `add_products(*second)`.

    `take` gives a matrix and so many numbers a row. `between` is done after the first has been given to the
    tensor core, `meanwhile` after both have; `take` doesn't wait for the second.
    """
    (a, b), (totals, c, d) = first, second
    shape = a[0].shape[0], b[0].shape[1]

    def multiply(refs):
        acc, accs, taken = refs
        for x, y in zip(a, b, strict=True):
            plgpu.wgmma(acc, x, y)
        between()
        for total, y in zip(accs, d, strict=True):
            plgpu.wgmma(total, c, y)
        meanwhile()
        scores = plgpu.wgmma_accumulator_load(acc, wait_n=len(d))
        for ref, x in zip(taken, take(scores), strict=True):
            ref[...] = x

    nothing = tiles.full(shape, 0, MATRIX)
    rows = (tiles.full(shape[:1], 0, PER_ROW),) * vectors
    initial = plgpu.ACC.init(nothing), tuple(map(plgpu.ACC.init, totals)), (nothing, *rows)
    _, totals, taken = pl.run_state(multiply)(initial)
    return totals, taken


def anywhere(flags):
    """1 if any of the numbers that a warpgroup has one a row is 1, else 0."""

    @plgpu.inline_mgpu(
        arg_types=(PER_ROW,),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())),
    )
    def vote(_, flags):
        i32 = ir.IntegerType.get_signless(32)
        mine = functools.reduce(arith.ori, (mgpu.utils.bitcast(x, i32) for x in flags.registers.flat))
        found = llvm.inline_asm(
            i32,
            [mine, mgpu.utils.warpgroup_barrier_idx(sync=False)],
            VOTE,
            "=r,r,r,~{memory}",
            has_side_effects=True,
        )
        return mgpu.FragmentedArray.splat(found, shape=(), is_signed=True)

    return vote(flags)
