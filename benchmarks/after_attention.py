"""Times what follows attention in a decoder layer, of few rows, with weights in 8 bits: as one kernel, and as
plain JAX around the kernel of `linear`.

    python benchmarks/after_attention.py --out benchmarks/results/after_attention_h200.json
    python benchmarks/after_attention.py --tune --rows 1 --stored int8

A program makes 16 calls, each of which has the result of the one before as x and as heads; weights take
turns, so that no cache holds them. Rates are shares of a copy measured first, and count the bytes of the
weights alone. Errors are ||y - exact|| / ||exact - x|| against the reference in float32.
"""

import argparse
import dataclasses
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from attention import first_line, line, measure_ceilings, say, timed
from report import add_out, device, publish

from moss_jax.ops.after_attention import IMPLEMENTATIONS, Arguments, mosaic_gpu
from moss_jax.ops.after_attention.mosaic_gpu import default_config, few_rows

D, K, F = 4096, 4096, 14336  # Of the 11B's decoder.
COPIES = 2  # Of the weights.
REPEATS = 30  # That must be equal bit for bit.
SILENCE = 60  # Seconds, after which a kernel is taken to hang.

# What is changed in the default configuration.
CONFIGS = (
    {"prefetch": False},
    {"block_k": 128, "stages": 8},
    {"stages": 5},
    {"part_down": 512},
    {"part_down": 512, "stages": 6},
    {"part_down": 1024},
    {"part": 512},
    {"blocks": 132, "stages": 11},
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, computed in several ways.

    Attributes:
      copies: of the arguments, with weights of their own; the first are those of the call.
      exact: its result.
      added_to: what of the result was there before.
      following: the arguments of a call that depends on the result of the one before.
      weights: bytes.
      contenders: name and function of the arguments of each way; the kernel's default first.
    """

    name: str
    copies: Sequence[Any]
    exact: jax.Array
    added_to: jax.Array | float
    following: Callable[[Any, jax.Array], Any]
    weights: int
    contenders: Sequence[tuple[str, Callable[[Any], jax.Array]]]


def main() -> None:
    compare("after_attention.py", __doc__, cases, calls=16)


def compare(script: str, doc: str, cases: Callable[[argparse.Namespace], Iterator[Case]], calls: int) -> None:
    """Parses the command line, times all cases, publishes the result.

    Args:
      calls: of a program.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2", help="numbers of rows, comma-separated")
    parser.add_argument("--stored", default="int8,float8_e4m3fn", help="dtypes, comma-separated")
    parser.add_argument("--repeats", type=int, default=9, help="samples of each time")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which nothing is begun")
    parser.add_argument("--tune", action="store_true", help="other configurations of the kernel too")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try this script out on a CPU")
    add_out(parser)
    args = parser.parse_args()
    deadline = time.monotonic() + args.budget
    watch = Watch()

    ceilings = measure_ceilings(args.tiny)
    say(f"copy {ceilings['copy_tb_s']:.3g} TB/s; {device()}")
    results = []
    for case in cases(args):
        for name, apply in case.contenders:
            watch.alive()
            if time.monotonic() < deadline:
                row = {"case": case.name, "implementation": name}
                results.append(row | measure(apply, case, calls, args.repeats, ceilings["copy_tb_s"]))
                say(line(results[-1]))
    if time.monotonic() > deadline:
        say("time is up: the rest was left out")
    flags = {name: "" if value is True else value for name, value in vars(args).items()}
    given = {name: x for name, x in flags.items() if name == "out" or x not in (None, False, math.inf)}
    publish(script, argparse.Namespace(**given), {"ceilings": ceilings, "rows": results})


class Watch:
    """Ends the process if nobody says for long that it is alive: a kernel that hangs hangs the caller too."""

    def __init__(self):
        self.alive()
        threading.Thread(target=self._look, daemon=True).start()

    def alive(self):
        self.seen = time.monotonic()

    def _look(self):
        while time.monotonic() < self.seen + SILENCE:
            time.sleep(1)
        say(f"nothing happened for {SILENCE} seconds: a kernel hangs")
        os._exit(3)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    sizes, all_rows = (256, 256, 384) if args.tiny else (D, K, F), [int(x) for x in args.rows.split(",")]

    def following(a, y):
        return dataclasses.replace(a, x=y, heads=y[:, : a.heads.shape[1]])

    for stored in args.stored.split(","):
        copies = [make_inputs(jax.random.key(i), stored, max(all_rows), sizes) for i in range(COPIES)]
        for rows in all_rows:
            cut = [dataclasses.replace(a, x=a.x[:rows], heads=a.heads[:rows]) for a in copies]
            yield Case(
                f"{rows} x {' x '.join(map(str, sizes))} {stored}",
                cut,
                jax.jit(IMPLEMENTATIONS["reference"].apply)(cut[0]),
                cut[0].x,
                following,
                sum(x.nbytes for x in (cut[0].out, cut[0].gate_up, cut[0].down)),
                [
                    *kernels(mosaic_gpu, few_rows, default_config, cut[0], CONFIGS if args.tune else ()),
                    ("xla", IMPLEMENTATIONS["xla"].apply),
                ],
            )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def make_inputs(key, stored: str, rows: int, sizes) -> Arguments:
    """Both branches are about as large as x, or a fraction of it."""
    D, K, F = sizes
    keys = jax.random.split(key, 6)
    out, out_scale = make_weights(keys[0], stored, D, K)
    gate_up, gate_up_scale = make_weights(keys[1], stored, 2 * F, D)
    down, down_scale = make_weights(keys[2], stored, D, F)
    return Arguments(
        jax.random.normal(keys[3], (rows, D), jnp.bfloat16),
        jax.random.normal(keys[4], (rows, K), jnp.bfloat16),
        out=out,
        out_scale=out_scale,
        norm=jax.random.uniform(keys[5], (D,), jnp.bfloat16, 0.5, 1.5),
        gate_up=gate_up,
        gate_up_scale=gate_up_scale,
        down=down,
        down_scale=down_scale,
        eps=1e-5,
    )


def make_weights(key, stored: str, outputs: int, inputs: int) -> tuple[jax.Array, jax.Array]:
    """[N, K] in 8 bits, and scales by which they keep the size of what they map."""
    codes_key, scale_key = jax.random.split(key)
    codes = jax.random.bits(codes_key, (outputs, inputs), jnp.uint8)
    if stored != "int8":
        codes = jnp.where(codes & 127 == 127, 0, codes)  # No NaN.
    size = 74 if stored == "int8" else 120  # About the standard deviation of all codes.
    scale = jax.random.uniform(scale_key, (outputs,), minval=0.5, maxval=1.5)
    return jax.lax.bitcast_convert_type(codes, jnp.dtype(stored)), scale / (size * math.sqrt(inputs))


def kernels(module, few_rows, default_config, a, configs) -> Iterator[tuple[str, Callable]]:
    """The kernel of an op's module, if it takes the call: by default, and with configurations changed."""
    if module.unsupported(a, jax.default_backend()) is None:
        for changes in ({}, *configs):
            named = ", ".join(f"{name} {value}" for name, value in changes.items())
            config = dataclasses.replace(default_config(a), **changes)
            yield named or "mosaic_gpu", functools.partial(few_rows, config=config)


def measure(apply, case: Case, calls: int, repeats: int, copy: float) -> dict:
    """Error, whether repeats agree, and the time of a call."""
    one = jax.jit(apply)
    try:
        y = one(case.copies[0])
        exact = case.exact.astype(jnp.float32)
        off, size = (jnp.linalg.norm(exact - x) for x in (y, case.added_to))
        if not all(bool((one(case.copies[0]) == y).all()) for _ in range(REPEATS)):
            return {"failed": "repeats differ"}
        program = jax.jit(functools.partial(chain, apply, case.following, calls))
        row = {"error": [float(off / size)]} | timed(program, (case.copies,), calls, repeats)
    except Exception as error:
        return {"failed": first_line(error)}
    row["tb_s"] = case.weights / row["us"] / 1e6
    return row | {"share": row["tb_s"] / copy}


def chain(apply, following, calls: int, copies):
    """One call after the other."""
    step, y = jax.jit(apply), None
    for i in range(calls):
        a = copies[i % len(copies)]
        y = step(a if y is None else following(a, y))
    return y


if __name__ == "__main__":
    main()
