"""Times W8A16 GEMMs of many rows: our kernel in several tilings, XLA, and XLA in bfloat16.

    python benchmarks/weight_only.py --budget 100 --out benchmarks/results/weight_only_h200.json
    python benchmarks/weight_only.py --quick
    python benchmarks/weight_only.py --shapes down --others 9 --budget 100

A program has several calls, each with its own weights, together larger than any cache. All programs for one
matrix are compiled in parallel before the first is timed. Before it is timed, each is checked for errors and
for repeating bit for bit. The floor is the larger of two times: reading the weights at the rate of a large
copy, and the FLOPs at the rate of a large bfloat16 GEMM; shares are floor over time. Errors are
||y - exact|| / ||exact|| against float32, over some of the outputs.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from chained import make_weights
from report import first_line, make_parser, publish, say
from timing import Watch, begin, checked, line, side_by_side, timed

from moss_jax.ops.linear import Weights, linear
from moss_jax.ops.linear.base import Layout
from moss_jax.ops.linear.mosaic_gpu import weight_only
from moss_jax.ops.linear.mosaic_gpu.weight_only_gemm import Config, default_config, fill, misfit
from moss_jax.ops.qarray import QArray, dequantize

# The 11B's decoder: K, N, and the layout that weights in bfloat16 have there.
SHAPES: dict[str, tuple[int, int, Layout]] = {
    "gate_up": (4096, 28672, "inputs_first"),
    "down": (14336, 4096, "inputs_first"),
    "qkv": (4096, 6144, "outputs_first"),
    "out": (4096, 4096, "outputs_first"),
    "head": (4096, 128256, "inputs_first"),
}
TINY: dict[str, tuple[int, int, Layout]] = {"tiny": (256, 512, "inputs_first")}
HEAD_ROWS = 128  # Logits are computed only for the last token of a slot.
BYTES = 3e8  # Weights of a program in 8 bits, so that launching it is negligible.
MAX_CALLS = 16
WRONG = 1e-2  # A relative error that rounding to bfloat16 does not explain.
AGAIN = 5  # Runs that must agree bit for bit.


def main() -> None:
    parser = make_parser(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--rows", default="64,80,96,128,192,256,384,512", help="comma-separated row counts")
    parser.add_argument("--stored", default="int8", help="comma-separated dtypes of the weights")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma-separated names of matrices")
    parser.add_argument("--others", type=int, default=2, help="tilings to try beside the default, at most")
    parser.add_argument("--quick", action="store_true", help="80, 128 and 256 rows, default tilings")
    args, ceilings, deadline, watch = begin(parser)
    rows = [int(M) for M in args.rows.split(",")]
    if args.quick:
        rows, args.others = [80, 128, 256], 0
    shapes = TINY if args.tiny else {name: SHAPES[name] for name in args.shapes.split(",")}
    results = []
    for name, shape in shapes.items():
        for stored in args.stored.split(","):
            if time.monotonic() > deadline:
                break
            counts = [M for M in rows if name != "head" or M <= HEAD_ROWS]
            for row in compare(name, *shape, stored, counts, args, ceilings, deadline, watch):
                results.append(row)
                say(line(row))
    if time.monotonic() > deadline:
        say("out of time: the remaining cases were left out")
    best = table(results)
    say("\n".join(["", *best]))
    publish("weight_only.py", args, {"ceilings": ceilings, "best": best, "rows": results})


def compare(name, K, N, layout, stored, counts, args, ceilings, deadline, watch: Watch) -> Iterator[dict]:
    """Yields a row for each implementation and number of rows, for one matrix."""
    calls = min(max(math.ceil(BYTES / (K * N)), 1), MAX_CALLS)
    cases = [(M, *case) for M in counts for case in contenders(M, K, N, layout, args.others)]
    both = (False, True)
    abstract = {wide: jax.eval_shape(lambda wide=wide: make(K, N, stored, layout, wide)) for wide in both}

    def compile_chain(M, wide, apply):
        x = jax.ShapeDtypeStruct((M, K), jnp.bfloat16)
        step = jax.jit(apply)
        program = jax.jit(lambda x, weights: [step(x, w) for w in weights])
        return program.lower(x, [abstract[wide]] * calls).compile()

    compiled = side_by_side((functools.partial(compile_chain, M, wide, f) for M, _, wide, f in cases), watch)
    x = jax.random.normal(jax.random.key(1), (max(counts), K), jnp.bfloat16)
    held = {wide: [make(K, N, stored, layout, wide, i) for i in range(calls)] for wide in both}
    some = checked(N)
    kernel = held[False][0].kernel
    exact = reference(x, QArray(kernel.values[some], kernel.scale[some]))
    for (M, label, wide, _), program in zip(cases, compiled, strict=True):
        watch.alive()
        if time.monotonic() > deadline:
            return
        floor = max(K * N / ceilings["copy_tb_s"], 2 * M * K * N / ceilings["matmul_tflop_s"]) / 1e6
        row = {"case": f"{name} {M} x {K} x {N} {stored}", "implementation": label, "floor_us": floor}
        try:
            run, inputs = program.result(), (x[:M], held[wide])
            y = run(*inputs)[0]
            error = float(jnp.linalg.norm(y[:, some] - exact[:M]) / jnp.linalg.norm(exact[:M]))
            if not error < WRONG:
                raise ValueError(f"wrong: off by {error:.1e}")
            if not all(bool((run(*inputs)[0] == y).all()) for _ in range(AGAIN)):
                raise ValueError("repeats differ")
            row |= {"error": [error]} | timed(run, inputs, calls, args.repeats)
            row["tflop_s"] = 2e-6 * M * K * N / row["us"]
            row["share"] = floor / row["us"]
        except Exception as error:
            row["failed"] = first_line(error)
        yield row


Contender = tuple[str, bool, Callable[[jax.Array, Weights], Any]]


def contenders(M: int, K: int, N: int, layout: Layout, others: int) -> Iterator[Contender]:
    """Yields (name, whether weights are in bfloat16, function of x and weights) of each implementation."""
    kernel = "weight_only_gemm"
    for c in tilings(M, K, N)[: 1 + others]:
        label = f"{c.outputs}x{c.rows}x{c.block_k} s{c.stages} /{c.splits} c{c.cluster}"
        yield label, False, functools.partial(linear, implementation=kernel, config=c)
    if M <= weight_only.ROWS:
        yield "weight_only", False, functools.partial(linear, implementation="weight_only")
    yield "xla", False, functools.partial(linear, implementation="xla")
    yield f"bfloat16 xla, {layout}", True, functools.partial(linear, implementation="xla")


def tilings(M: int, K: int, N: int) -> list[Config]:
    """The default tiling, and those that differ from it in one way."""
    default = default_config(M, K, N)
    c = {name: getattr(default, name) for name in ("outputs", "rows", "splits", "cluster")}
    rows = c["rows"]
    found = [default]
    for changes in (
        {"outputs": 384 - c["outputs"]},
        {"rows": 2 * rows},
        {"splits": max(1, c["splits"] // 2)},
        {"splits": 2 * c["splits"]},
        {"cluster": 3 - c["cluster"]},
        {"block_k": 192 - default.block_k},
        {"rows": math.ceil(rows / 32) * 16},
        {"outputs": 256, "rows": math.ceil(rows / 32) * 16},
        {"outputs": 128, "rows": 2 * rows},
    ):
        try:
            config = fill(K, **c | changes)
        except ValueError:  # Too many sums, or too little shared memory.
            continue
        if config not in found and misfit(K, N, config) is None and config.rows < 2 * M:
            found.append(config)
    return found


@functools.partial(jax.jit, static_argnums=range(5))
def make(K: int, N: int, stored: str, layout: Layout, wide: bool, seed=0) -> Weights:
    """Random weights in 8 bits, or the same in bfloat16."""
    weights = make_weights(jax.random.key(seed), stored, (N,), K)
    if not wide:
        return weights
    kernel = dequantize(weights.kernel, jnp.bfloat16)
    return Weights(kernel if layout == "outputs_first" else kernel.T, layout=layout)


@jax.jit
def reference(x, kernel: QArray):
    """The product in float32."""
    return jnp.dot(x.astype(jnp.float32), dequantize(kernel).T, precision="highest")


def table(results: list[dict]) -> list[str]:
    """Formats a line for each case: the fastest tiling beside the default, XLA, and bfloat16."""
    lines = [f"{'case':<32} {'floor':>7} {'best':>7} {'default':>7} {'xla':>7} {'bf16':>7} us  best tiling"]
    for case in dict.fromkeys(row["case"] for row in results):
        rows = {row["implementation"]: row for row in results if row["case"] == case and "us" in row}
        ours = {name: row["us"] for name, row in rows.items() if name[0].isdigit()}
        first = next((row["implementation"] for row in results if row["case"] == case), "")
        best = min(ours, key=ours.__getitem__, default="none")
        bf16 = min((row["us"] for name, row in rows.items() if name.startswith("bf")), default=math.nan)
        floor = next(row["floor_us"] for row in results if row["case"] == case)
        xla = rows["xla"]["us"] if "xla" in rows else math.nan
        times = floor, ours.get(best, math.nan), ours.get(first, math.nan), xla, bf16
        lines.append(f"{case:<32} {' '.join(f'{t:>7.1f}' for t in times)}     {best}")
    return lines


if __name__ == "__main__":
    main()
