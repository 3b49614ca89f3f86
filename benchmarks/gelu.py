"""Times what stands between the matmuls of the vision encoder's MLP: bias and gelu, and rows in 8 bits.

    python benchmarks/gelu.py --out benchmarks/results/gelu_h200.json

A program makes several calls on inputs of their own, so that starting it doesn't tell and no cache holds
them; in the model, one frame's are still in L2. Rates are shares of a copy measured first. Errors are
||out - exact|| / ||exact|| over the last rows; those of rows in 8 bits are what such rows cannot hold.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
from attention import first_line, line, measure_ceilings, say, timed
from report import add_out, device, publish

from moss_jax.ops import gelu as gelus
from moss_jax.ops import rounding
from moss_jax.ops.gelu import gelu
from moss_jax.ops.gelu.mosaic_gpu import GeluConfig, biased_gelu
from moss_jax.ops.rounding import round_rows

FRAMES, POSITIONS = (1, 8, 16), 1608
WIDTH, HIDDEN = 1280, 5120
NUMBERS = 2.6e8  # That a program takes, about.
MAX_CALLS = 32
CHECKED = 64  # Rows.
CONFIGS = ({"rows": 16}, {"rows": 8}, {"rows": 32})


@dataclasses.dataclass(frozen=True)
class Case:
    """Something to time.

    Attributes:
      bytes: read and written a number.
      error: of the outputs for some rows, given with the bias.
    """

    name: str
    implementation: str
    shape: tuple[int, int]
    bytes: int
    call: Callable
    error: Callable

    def program(self, xs, bias):
        return [self.call(x, bias) for x in xs]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="samples of each time")
    parser.add_argument("--tiny", action="store_true", help="few rows, to try this script out on a CPU")
    add_out(parser)
    args = parser.parse_args()

    ceilings = measure_ceilings(args.tiny)
    say(f"copy {ceilings['copy_tb_s']:.3g} TB/s; {device()}")
    rows = [frames * (16 if args.tiny else POSITIONS) for frames in FRAMES]
    bias = jnp.linspace(-1, 1, HIDDEN, dtype=jnp.bfloat16)
    inputs = {(M, N): (make_inputs(M, N), bias[:N]) for M in rows for N in (WIDTH, HIDDEN)}
    chosen = [case for M in rows for case in cases(M)]
    with futures.ThreadPoolExecutor() as threads:
        compiled = [threads.submit(build, case, inputs[case.shape]) for case in chosen]
    results = []
    for case, program in zip(chosen, compiled, strict=True):
        row = {
            "case": f"{case.name}, {case.shape[0]} x {case.shape[1]}",
            "implementation": case.implementation,
        }
        try:
            row |= measure(case, program.result(), inputs[case.shape], args.repeats, ceilings["copy_tb_s"])
        except Exception as error:
            row["failed"] = first_line(error)
        results.append(row)
        say(line(row))
    flags = {"repeats": args.repeats, "out": args.out} | ({"tiny": ""} if args.tiny else {})
    publish("gelu.py", argparse.Namespace(**flags), {"ceilings": ceilings, "rows": results})


def make_inputs(M: int, N: int) -> list[jax.Array]:
    """One for each call of a program."""
    calls = min(max(round(NUMBERS / (M * N)), 1), MAX_CALLS)
    draw = jax.jit(lambda key: 2 * jax.random.normal(key, (M, N), jnp.bfloat16))
    return [draw(key) for key in jax.random.split(jax.random.key(0), calls)]


def cases(M: int) -> list[Case]:
    """Ours, where they can be used, and XLA's, for M rows."""
    platform, found = jax.default_backend(), []

    def add(name, N, bytes_, error, **calls):
        found.extend(Case(name, key, (M, N), bytes_, call, error) for key, call in calls.items())

    x, bias = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((M, HIDDEN), (HIDDEN,)))
    if gelus.IMPLEMENTATIONS["mosaic_gpu"].unsupported(gelus.Arguments(x, bias), platform) is None:
        for changes in CONFIGS:
            call = functools.partial(ours, config=GeluConfig(**changes))
            name = ", ".join(f"{key} {value}" for key, value in changes.items())
            add("bias and gelu", HIDDEN, 4, gelu_error, **{f"mosaic_gpu, {name}": call})
    add("bias and gelu", HIDDEN, 4, gelu_error, xla=functools.partial(gelu, implementation="xla"))
    for N in (WIDTH, HIDDEN):
        x = jax.ShapeDtypeStruct((M, N), jnp.bfloat16)
        for name, implementation in rounding.IMPLEMENTATIONS.items():
            if implementation.unsupported(x, platform) is None:
                call = functools.partial(rounded, implementation=name)
                add("rows in 8 bits", N, 3, rounding_error, **{name: call})
    return found


def ours(x, bias, *, config):
    return biased_gelu(gelus.Arguments(x, bias), config)


def rounded(x, bias, *, implementation):
    del bias
    return round_rows(x, implementation=implementation)


def build(case: Case, inputs):
    return jax.jit(case.program).lower(*inputs).compile()


def measure(case: Case, program, inputs, repeats: int, copy: float) -> dict:
    """Error, time and rate."""
    xs, bias = inputs
    out = jax.tree.map(lambda y: y[-CHECKED:], program(xs, bias)[0])
    row = {"error": [case.error(xs[0][-CHECKED:], bias, out)]}
    row |= timed(program, inputs, len(xs), repeats)
    row["tb_s"] = case.bytes * xs[0].size / row["us"] / 1e6
    row["share"] = row["tb_s"] / copy
    return row


def gelu_error(x, bias, out) -> float:
    return distance(out, gelu(np.float32(x + bias), implementation="reference"))


def rounding_error(x, bias, out) -> float:
    del bias
    numbers, scale = out
    return distance(np.float32(numbers) * np.float32(scale)[:, None], x)


def distance(x, exact) -> float:
    x, exact = np.asarray(x, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


if __name__ == "__main__":
    main()
