"""Times a residual add followed by RMSNorm or LayerNorm: our kernel, and XLA.

    python benchmarks/norm.py --out benchmarks/results/norm_h200.json

A program has several calls, each with its own weights, and with the results of the previous call as residual
stream and branch. Rates count branch and stream, read and written, as shares of a large copy timed first.
Errors are ||out - exact|| / ||exact|| against float64, of some normed rows and of their sums. All programs
are compiled in parallel before the first is timed.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from report import add_out, device, first_line, make_parser, publish, say
from timing import checked, measure_ceilings, side_by_side, timed

from moss_jax.ops.norm import ADD_NORM
from moss_jax.ops.norm.base import Arguments
from moss_jax.ops.norm.mosaic_gpu import Config, default_config

# Rows and width, and whether it is a layer norm: a decoded token of one and of eight streams, a prompt, a
# long sequence; the vision encoder's positions of one frame and of sixteen.
SHAPES = (
    (1, 4096, False),
    (8, 4096, False),
    (64, 4096, False),
    (8192, 4096, False),
    (1608, 1280, True),
    (16 * 1608, 1280, True),
)
TINY = ((4, 256, False), (9, 256, True))
BYTES = 5e8  # Memory traffic of a program.
MAX_CALLS = 16
EPS = 1e-5


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="samples of each time")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try this script out on a CPU")
    add_out(parser)
    args = parser.parse_args()

    ceilings = measure_ceilings(args.tiny)
    say(f"copy {ceilings['copy_tb_s']:.3g} TB/s; {device()}")
    cases = [case for shape in (TINY if args.tiny else SHAPES) for case in contenders(*shape)]
    compiled = side_by_side(functools.partial(compile_both, a, apply) for a, _, apply in cases)
    rows = []
    for (a, name, _), programs in zip(cases, compiled, strict=True):
        row = {"case": " x ".join(map(str, a.x.shape)), "implementation": name}
        if failure := programs.exception():
            row["failed"] = first_line(failure)
        else:
            row |= measure(a, *programs.result(), args.repeats, ceilings["copy_tb_s"])
        rows.append(row)
        say(line(row))
    publish("norm.py", args, {"ceilings": ceilings, "rows": rows})


def contenders(rows: int, width: int, layer: bool):
    """Yields (abstract call, name, function) of each implementation; ours first, by default configuration."""

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    x, vector = array(rows, width), array(width)
    a = Arguments(x, x, None, vector, vector if layer else None, eps=EPS, out_dtype=x.dtype)
    if ADD_NORM.implementations["mosaic_gpu"].unsupported(a, jax.default_backend()) is None:
        first = default_config(a).warps
        for warps in (first, 5 - first):  # 1 and 4.
            if rows >= 4 or warps == 4:
                ours = functools.partial(ADD_NORM, implementation="mosaic_gpu", config=Config(warps))
                yield a, f"mosaic_gpu, warps a row: {warps}", ours
    yield a, "xla", functools.partial(ADD_NORM, implementation="xla")


def compile_both(a: Arguments, apply):
    """Compiles the chain of calls, and a program of one call."""
    calls = [a] * count(a)
    return jax.jit(functools.partial(chain, apply)).lower(calls).compile(), jax.jit(apply).lower(a).compile()


def count(a: Arguments) -> int:
    """Number of calls in a program."""
    return min(math.ceil(BYTES / traffic(a)), MAX_CALLS)


def traffic(a: Arguments) -> int:
    """Minimum memory traffic of a call, in bytes."""
    return 4 * a.x.size * a.x.dtype.itemsize


def chain(apply, calls: list[Arguments]):
    """Runs all calls in sequence; only the first one's residual and branch are used."""
    step, normed, y = jax.jit(apply), calls[0].add, calls[0].x
    for a in calls:
        normed, y = step(dataclasses.replace(a, x=y, add=normed))
    return normed, y


def measure(a: Arguments, many, single, repeats: int, copy: float) -> dict:
    """Measures errors, time and rate."""
    calls, expected = make_inputs(a)
    found = (np.float64(out[checked(len(out))]) for out in single(calls[0]))
    row = {"error": [off(*pair) for pair in zip(found, expected, strict=True)]}
    row |= timed(many, (calls,), len(calls), repeats)
    row["tb_s"] = traffic(a) / row["us"] / 1e6
    return row | {"share": row["tb_s"] / copy}


@functools.cache
def make_inputs(a: Arguments):
    """Draws the calls of a program, and computes some exact rows of the first: normed, and their sums."""
    leaves, structure = jax.tree.flatten(a)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    first = jax.tree.unflatten(structure, drawn)
    others = [dataclasses.replace(first, weight=first.weight.copy()) for _ in range(count(a) - 1)]

    some = checked(len(first.x))
    y = np.float64(first.x[some]) + np.float64(first.add[some])
    centred = y - y.mean(axis=-1, keepdims=True) if a.centred else y
    normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPS) * np.float64(first.weight)
    return [first, *others], (normed + (np.float64(first.bias) if a.centred else 0), y)


def off(out, expected) -> float:
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))


def line(row: dict) -> str:
    """Formats a row as text."""
    name = f"{row['case']:>12}  {row['implementation']:<26}"
    if "failed" in row:
        return f"{name}failed: {row['failed']}"
    errors = ", ".join(f"{error:.1e}" for error in row["error"])
    return (
        f"{name}{row['us']:>8.2f} us ({row['us_min']:.2f} to {row['us_max']:.2f})"
        f"{row['tb_s']:>7.2f} TB/s, {row['share']:.0%} of a copy; off by {errors}"
    )


if __name__ == "__main__":
    main()
