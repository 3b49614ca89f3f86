"""Times the GEMMs of the vision encoder with their epilogues, in bfloat16 and FP8: our kernel, and XLA.

    python benchmarks/matmul.py --out benchmarks/results/matmul_h200.json
    python benchmarks/matmul.py --tune --rows 51456 --budget 80

A program has several calls, each on its own operands, so that the launch is negligible. All programs for one
number of rows are compiled in parallel before the first is timed. In FP8 the inputs are already rounded;
`qkv` is two GEMMs, of which `qk` outputs float8, as `fc1` does; `out` and `fc2` add the residual in their
epilogue. The norm is also timed: in FP8 it rounds the inputs of `qk`, `v` and `fc1`, in bfloat16 it adds the
results of `out` and `fc2`. Rates are shares of a large bfloat16 GEMM. Errors are ||y - exact|| / ||exact||
against float32: first for the operands as given, then for the operands before rounding.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from report import first_line, make_parser, publish, say
from timing import Watch, begin, line, named, side_by_side, timed

from moss_jax.ops.linear import LINEAR, Weights
from moss_jax.ops.linear.base import Arguments
from moss_jax.ops.linear.base import arguments as linear_arguments
from moss_jax.ops.linear.mosaic_gpu.matmul_epilogue import Config, default_config, misfit
from moss_jax.ops.norm import Norm, Residual, add_norm
from moss_jax.ops.qarray import QArray

WIDTH, HIDDEN = 1280, 5120
LAYERS = {
    "qkv": (WIDTH, 3 * WIDTH),
    "qk": (WIDTH, 2 * WIDTH),
    "v": (WIDTH, WIDTH),
    "out": (WIDTH, WIDTH),
    "fc1": (WIDTH, HIDDEN),
    "fc2": (HIDDEN, WIDTH),
}
TINY = {"qkv": (256, 768), "qk": (256, 512), "fc1": (256, 512), "fc2": (512, 256)}
IN_8_BITS = {"qkv": (False,), "qk": (True,), "v": (True,)}  # The others are timed in both.
ROUNDED = ("qk", "fc1")  # Results in float8, in FP8.
BIASED = ("fc1", "fc2")
ADDED = ("out", "fc2")  # Residual in the epilogue, in FP8.
SCALE = 32  # Inverse scale of float8 inputs and of the results of fc1.
KERNEL = "matmul_epilogue"
FLOPS = 1e12  # Approximate work of a program.
MAX_CALLS = 24
REPEATS = 10  # Runs of one call that must agree bit for bit.

SMALL = {"columns": 128, "stages": 6}
FINE = {"chunk": 32, "slots": 4}
# Configurations that --tune tries besides the default.
CONFIGS = (
    Config(),
    Config(cluster=None),
    Config(cluster="columns"),
    Config(lag=0),
    Config(lag=1),
    Config(lag=3),
    Config(**FINE),
    Config(**FINE, lag=0),
    Config(**FINE, cluster="columns"),
    Config(stages=3, lag=1, slots=4),
    Config(**SMALL, cluster=None),
    Config(**SMALL, cluster=None, lag=0),
    Config(**SMALL, cluster=None, lag=3),
    Config(**SMALL, cluster="columns", lag=3),
)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--rows",
        default="1608,12864,51456",
        help="comma-separated numbers of rows; by default those of 1, 8 and 32 frames",
    )
    parser.add_argument("--tune", action="store_true", help="time other configurations of the kernel too")
    args, ceilings, deadline, watch = begin(parser)
    layers, results = TINY if args.tiny else LAYERS, []
    for M in [136] if args.tiny else map(int, args.rows.split(",")):
        if time.monotonic() > deadline:
            break
        for row in compare(M, layers, args.tune, args.repeats, ceilings["matmul_tflop_s"], deadline, watch):
            results.append(row)
            say(line(row))
    if time.monotonic() > deadline:
        say("out of time: the remaining cases were left out")
    publish("matmul.py", args, {"ceilings": ceilings, "rows": results})


def compare(
    M: int, layers, tune: bool, repeats: int, ceiling: float, deadline: float, watch: Watch
) -> Iterator[dict]:
    """Yields a row for each implementation of each matmul, and of the norm before it."""
    cases = [(*case, name, call) for case in layers.items() for name, call in contenders(M, *case, tune)]
    compiled = side_by_side(
        (functools.partial(compile_chain, M, *shape, call) for _, shape, _, call in cases), watch
    )
    held = None, None  # Only the operands of one layer are in memory at a time.
    for (layer, (K, N), name, call), program in zip(cases, compiled, strict=True):
        watch.alive()
        if time.monotonic() > deadline:
            return
        row = {"case": f"{layer} {M} x {K} x {N}", "implementation": name}
        try:
            run = program.result()
            if held[0] != layer:
                held = None, None
                held = layer, [make_operands(i, M, K, N) for i in range(calls(M, K, N))]
            inputs = held[1]
            if name.startswith(("bfloat16", "fp8")):
                row["error"] = errors(layer, name.startswith("fp8"), call, inputs[0])
            row |= timed(run, (inputs,), len(inputs), repeats)
            if "error" in row:
                row["tflop_s"] = 2e-6 * M * K * N / row["us"]
                row["share"] = row["tflop_s"] / ceiling
        except Exception as error:
            row["failed"] = first_line(error)
        yield row


def contenders(M: int, layer: str, shape: tuple[int, int], tune: bool):
    """Yields (name, function of the operands) of each implementation."""
    for in_8_bits in IN_8_BITS.get(layer, (False, True)):
        dtype = "fp8" if in_8_bits else "bfloat16"
        operands = functools.partial(arguments, layer, in_8_bits)
        yield f"{dtype}, xla", functools.partial(run, operands, implementation="xla")
        a = jax.eval_shape(lambda operands=operands: operands(make_operands(0, M, *shape)))
        if LINEAR.implementations[KERNEL].unsupported(a, jax.default_backend()) is not None:
            continue
        default = default_config(a)
        others = [x for x in CONFIGS if x != default and misfit(a, x) is None] if tune else ()
        for config in (default, *others):
            changes = {k: v for k, v in vars(config).items() if v != getattr(Config(), k)}
            name = "mosaic_gpu" if config == default else named(changes) or "Config()"
            yield f"{dtype}, {name}", functools.partial(run, operands, implementation=KERNEL, config=config)
    if layer == "qkv":  # Before `fc1` it is the same.
        yield "norm", norm
        yield "norm, in 8 bits", norm_in_8_bits


def arguments(layer: str, in_8_bits: bool, o) -> Arguments:
    bias, gelu = o["bias"] if layer in BIASED else None, layer == "fc1"
    if not in_8_bits:
        return Arguments(o["x"], Weights(o["kernel"], bias), gelu=gelu, out_dtype=o["x"].dtype)
    x, kernel = o["rounded"]
    out_scale = jnp.float32(1 / SCALE) if gelu else None
    out_dtype = jnp.dtype("float8_e4m3fn" if layer in ROUNDED else "bfloat16")
    residual = o["residual"] if layer in ADDED else None
    weights = Weights(kernel, bias, layout="outputs_first")
    return linear_arguments(x, weights, out_scale, residual=residual, gelu=gelu, out_dtype=out_dtype)


def run(operands, o, **options):
    return LINEAR(operands(o), **options)


def norm(o):
    """Residual add and norm, as in the bfloat16 encoder."""
    return add_norm(Residual(o["x"], o["branch"]), Norm(o["weight"], o["weight"], eps=1e-5))


def norm_in_8_bits(o):
    """Norm with float8 output of the residual stream, to which the GEMMs have already added."""
    scale = jnp.float32(1)
    return add_norm(Residual(o["x"]), Norm(o["weight"], o["weight"], eps=1e-5), out_scale=scale)[0].values


def errors(layer: str, in_8_bits: bool, call, o) -> list[float]:
    """Errors against the exact result of the operands, rounded and not; fails if repeats differ."""
    run = jax.jit(call)
    y = run(o)
    if not all(bool((run(o) == y).all()) for _ in range(REPEATS)):
        raise ValueError("repeats differ")
    exact = in_float32(layer, o)
    if not in_8_bits:
        return [off(y, exact)]
    a = arguments(layer, in_8_bits, o)
    if a.residual is not None:
        a = dataclasses.replace(a, residual=a.residual.astype(jnp.float32))
        exact += a.residual
    a = dataclasses.replace(a, out_dtype=jnp.dtype("float32"))
    own = jax.jit(functools.partial(LINEAR, implementation="reference"))(a)
    return [off(y, own), off(y, exact if a.out_scale is None else exact / a.out_scale)]


@functools.partial(jax.jit, static_argnums=0)
def in_float32(layer: str, o):
    y = jnp.matmul(o["x"].astype(jnp.float32), o["kernel"].astype(jnp.float32), precision="highest")
    y = y + o["bias"].astype(jnp.float32) if layer in BIASED else y
    return jax.nn.gelu(y, approximate=False) if layer == "fc1" else y


def off(y, exact) -> float:
    return float(jnp.linalg.norm(y.astype(jnp.float32) - exact) / jnp.linalg.norm(exact))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def make_operands(seed: int, M: int, K: int, N: int):
    """Draws the operands of one call, in bfloat16 and rounded to 8 bits."""
    shapes = {
        "x": (M, K),
        "branch": (M, K),
        "residual": (M, N),
        "kernel": (K, N),
        "bias": (N,),
        "weight": (K,),
    }
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    drawn = {
        name: jax.random.normal(key, shape, jnp.bfloat16)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    drawn["kernel"] = (drawn["kernel"] / math.sqrt(K)).astype(jnp.bfloat16)
    scale = jnp.abs(drawn["kernel"]).max(axis=0).astype(jnp.float32) / 448
    x, kernel = drawn["x"] * SCALE, (drawn["kernel"] / scale).T
    x, kernel = (y.astype(jnp.float8_e4m3fn) for y in (x, kernel))
    input_scale = jnp.float32(1 / SCALE)
    return drawn | {"rounded": (QArray(x, input_scale), QArray(kernel, scale, input_scale))}


def calls(M: int, K: int, N: int) -> int:
    return min(max(round(FLOPS / (2 * M * K * N)), 1), MAX_CALLS)


def compile_chain(M: int, K: int, N: int, call):
    """Compiles a program of several calls; it returns all results, so that each is computed in full."""
    operands = [jax.eval_shape(lambda: make_operands(0, M, K, N))] * calls(M, K, N)
    step = jax.jit(call)
    return jax.jit(lambda operands: [step(o) for o in operands]).lower(operands).compile()


if __name__ == "__main__":
    main()
