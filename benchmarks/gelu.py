"""Times bias + GELU as a separate pass, our kernel and XLA, on activations of the vision encoder.

    python benchmarks/gelu.py --out benchmarks/results/gelu_h200.json

A program has several calls, each on its own inputs, so that the launch is negligible and the inputs exceed
any cache; in the model, those of one frame are still in L2. Rates are shares of a large copy timed first.
Errors are ||out - exact|| / ||exact|| over the last rows.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from report import add_out, device, first_line, make_parser, publish, say
from timing import line, measure_ceilings, side_by_side, timed

from moss_jax.ops.linear import GELU, gelu
from moss_jax.ops.linear.gelu_base import Arguments
from moss_jax.ops.linear.mosaic_gpu.bias_gelu import Config

FRAMES, POSITIONS = (1, 8, 16), 1608
HIDDEN = 5120
NUMBERS = 2.6e8  # Approximate number of inputs of a program.
MAX_CALLS = 32
CHECKED = 64  # Rows.
ROWS_OF_A_BLOCK = (16, 8, 32)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="samples of each time")
    parser.add_argument("--tiny", action="store_true", help="few rows, to test this script on a CPU")
    add_out(parser)
    args = parser.parse_args()

    ceilings = measure_ceilings(args.tiny)
    say(f"copy {ceilings['copy_tb_s']:.3g} TB/s; {device()}")
    rows = [frames * (16 if args.tiny else POSITIONS) for frames in FRAMES]
    bias = jnp.linspace(-1, 1, HIDDEN, dtype=jnp.bfloat16)
    inputs = {M: (make_inputs(M), bias) for M in rows}
    chosen = [(M, name, call) for M in rows for name, call in contenders(M)]
    compiled = side_by_side(functools.partial(build, call, inputs[M]) for M, _, call in chosen)
    results = []
    for (M, name, _), program in zip(chosen, compiled, strict=True):
        row = {"case": f"bias and gelu, {M} x {HIDDEN}", "implementation": name}
        try:
            row |= measure(program.result(), inputs[M], args.repeats, ceilings["copy_tb_s"])
        except Exception as error:
            row["failed"] = first_line(error)
        results.append(row)
        say(line(row))
    publish("gelu.py", args, {"ceilings": ceilings, "rows": results})


def make_inputs(M: int) -> list[jax.Array]:
    """Draws an input for each call of a program."""
    calls = min(max(round(NUMBERS / (M * HIDDEN)), 1), MAX_CALLS)
    draw = jax.jit(lambda key: 2 * jax.random.normal(key, (M, HIDDEN), jnp.bfloat16))
    return [draw(key) for key in jax.random.split(jax.random.key(0), calls)]


def contenders(M: int) -> Iterator[tuple[str, Callable]]:
    """Yields (name, function of x and bias) for M rows: ours, if supported, and XLA's."""
    x, bias = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((M, HIDDEN), (HIDDEN,)))
    if GELU.implementations["bias_gelu"].unsupported(Arguments(x, bias), jax.default_backend()) is None:
        for rows in ROWS_OF_A_BLOCK:
            ours = functools.partial(gelu, implementation="bias_gelu", config=Config(rows))
            yield f"mosaic_gpu, rows {rows}", ours
    yield "xla", functools.partial(gelu, implementation="xla")


def build(call: Callable, inputs):
    return jax.jit(lambda xs, bias: [call(x, bias) for x in xs]).lower(*inputs).compile()


def measure(program, inputs, repeats: int, copy: float) -> dict:
    """Measures error, time and rate."""
    xs, bias = inputs
    out = np.asarray(program(xs, bias)[0][-CHECKED:], np.float64)
    exact = gelu(np.float32(xs[0][-CHECKED:] + bias), implementation="reference")
    exact = np.asarray(exact, np.float64)
    row = {"error": [float(np.linalg.norm(out - exact) / np.linalg.norm(exact))]}
    row |= timed(program, inputs, len(xs), repeats)
    row["tb_s"] = 2 * xs[0].nbytes / row["us"] / 1e6  # Read and written.
    row["share"] = row["tb_s"] / copy
    return row


if __name__ == "__main__":
    main()
