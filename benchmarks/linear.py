"""Times GEMMs of few rows: W8A16 by our kernel and by XLA, bfloat16 by XLA.

    python benchmarks/linear.py --out benchmarks/results/linear_h200.json
    python benchmarks/linear.py --quick --budget 80

A program has several calls, each with its own weights, together larger than any cache, and with inputs built
from the outputs of the previous call. Rates are shares of a large copy timed first, and count only the bytes
of the weights. Errors are ||out - exact|| / ||exact|| against float64, over some of the outputs.
"""

import dataclasses
import functools
import itertools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from report import device, first_line, make_parser, publish, say
from timing import SHARED_BYTES, add_flags, checked, line, measure_ceilings, named, timed

from moss_jax.ops.linear import LINEAR, Weights, linear
from moss_jax.ops.linear.base import Arguments
from moss_jax.ops.linear.mosaic_gpu.weight_only import Config
from moss_jax.ops.qarray import DTYPES, QArray

QUANTIZED = [dtype.name for dtype in DTYPES.values()]

# (K, N) of the 11B's decoder: MLP gate and up, MLP down, QKV, attention output, logits.
SHAPES = ((4096, 28672), (14336, 4096), (4096, 6144), (4096, 4096), (4096, 128256))
ROWS = (1, 8)
BYTES = 3e8  # Weights of a program, so that launching it is negligible.
MAX_CALLS = 16

# Changes of the default configuration.
CONFIGS = (
    {},
    {"part": 512, "blocks": 396},
    {"stages": 4, "blocks": 528},
    {"stages": 10},
    {"part": 512},
    {"part": 512, "stages": 4, "blocks": 528},
    {"part": 2048, "stages": 6},
    {"part": 4096, "stages": 4},
    {"block_k": 256, "stages": 4},
    {"block_k": 256, "stages": 2, "blocks": 528},
    {"stages": 16, "blocks": 132},
)
QUICK_SHAPES, QUICK_ROWS, QUICK_CONFIGS = 3, 1, 3


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--stored", default="int8,float8_e4m3fn,bfloat16", help="comma-separated dtypes of the weights"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one row, the first shapes and configurations only"
    )
    add_flags(parser)
    args = parser.parse_args()
    deadline = time.monotonic() + args.budget

    shapes, rows, configs = SHAPES, ROWS, CONFIGS
    if args.quick:
        shapes, rows, configs = shapes[:QUICK_SHAPES], rows[:QUICK_ROWS], configs[:QUICK_CONFIGS]
    if args.tiny:
        shapes = [(128, 192)]
    ceilings = measure_ceilings(args.tiny)
    say(f"copy {ceilings['copy_tb_s']:.3g} TB/s; {device()}")
    results = []
    for shape, stored in itertools.product(shapes, args.stored.split(",")):
        if time.monotonic() < deadline:
            results += compare(*shape, stored, rows, configs, args.repeats, ceilings["copy_tb_s"], deadline)
    if time.monotonic() > deadline:
        say("out of time: the remaining cases were left out")
    publish("linear.py", args, {"ceilings": ceilings, "rows": results})


def compare(K, N, stored, rows, configs, repeats, copy, deadline) -> list[dict]:
    """Measures each contender for each number of rows until the deadline; returns a row for each."""
    x, kernel, scale, exact = make_inputs(K, N, stored)
    calls = min(max(math.ceil(BYTES / kernel.nbytes), 1), MAX_CALLS)
    kernels = [jnp.array(kernel, copy=True) for _ in range(calls)]
    results = []
    for M in rows:
        for name, apply in contenders(M, K, N, stored, configs):
            if time.monotonic() > deadline:
                return results
            row = {"case": f"{M} x {K} x {N} {stored}", "implementation": name}
            try:
                program, inputs = jax.jit(functools.partial(chain, apply)), (x[:M], kernels, scale)
                out = np.asarray(program(*inputs)[0], np.float64)[:, checked(N)]
                row["error"] = [float(np.linalg.norm(out - exact[:M]) / np.linalg.norm(exact[:M]))]
                row |= timed(program, inputs, calls, repeats)
                row["tb_s"] = kernel.nbytes / row["us"] / 1e6
                row["share"] = row["tb_s"] / copy
            except Exception as error:
                row["failed"] = first_line(error)
            results.append(row)
            say(line(row))
    return results


def make_inputs(K: int, N: int, stored: str):
    """Returns the rows, the weights with their scales, and some exact outputs, about as large as x."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((max(ROWS), K), np.float32), jnp.bfloat16)
    integers = rng.integers(-127, 128, (N, K), np.int8)
    scale = np.full(N, 1 / (73 * math.sqrt(K)), np.float32)  # 73 is the integers' standard deviation.
    kernel = jnp.asarray(integers).astype(stored) if stored in QUANTIZED else None
    if kernel is None:
        kernel = (jnp.asarray(integers).T * scale).astype(stored)
    some = np.float64((kernel if stored in QUANTIZED else kernel.T)[checked(N)].astype(jnp.float32))
    exact = np.float64(x) @ some.T
    return x, kernel, jnp.asarray(scale), exact * scale[checked(N)] if stored in QUANTIZED else exact


def chain(apply, x, kernels, scale):
    """Runs a call for each kernel; returns all outputs, so that XLA computes each in full."""
    step, outputs = jax.jit(apply), []
    for kernel in kernels:
        outputs.append(step(x, kernel, scale))
        repeats = math.ceil(x.shape[1] / outputs[-1].shape[1])
        x = jnp.tile(outputs[-1], (1, repeats))[:, : x.shape[1]]
    return outputs


def contenders(M: int, K: int, N: int, stored: str, configs):
    """Yields (name, function of x, kernel and scale) of each implementation; ours first."""
    if stored not in QUANTIZED:
        # The model's own path for weights that are not in 8 bits.
        yield "xla", lambda x, kernel, _: x @ kernel
        return

    def run(x, kernel, scale, **options):
        return linear(x, Weights(QArray(kernel, scale), layout="outputs_first"), **options)

    def summed(x, kernel, scale):
        """Computes a sum over the inputs, for which XLA uses no tensor cores."""
        products = x.astype(jnp.float32) * kernel.astype(jnp.float32)
        return (products.sum(axis=1) * scale)[None].astype(x.dtype)

    abstract = [((M, K), jnp.bfloat16), ((N, K), stored), ((N,), jnp.float32)]
    x, kernel, scale = (jax.ShapeDtypeStruct(*x) for x in abstract)
    call = Arguments(x, Weights(QArray(kernel, scale), layout="outputs_first"), out_dtype=x.dtype)
    if LINEAR.implementations["weight_only"].unsupported(call, jax.default_backend()) is None:
        for changes in configs:
            config = dataclasses.replace(Config(), **changes)
            if shared_bytes(M, K, config) <= SHARED_BYTES:
                forced = functools.partial(run, implementation="weight_only", config=config)
                yield named(changes) or "mosaic_gpu", forced
    yield "xla", functools.partial(run, implementation="xla")
    if M == 1:
        yield "xla, summed", summed


def shared_bytes(rows: int, inputs: int, config: Config) -> int:
    """Shared memory of one thread block, without its barriers."""
    ring = config.stages * config.block_k * 64
    return ring + 2 * math.ceil(rows / 8) * 8 * inputs // config.splits(inputs) + 1024


if __name__ == "__main__":
    main()
