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

import jax
import jax.numpy as jnp
from attention import first_line, line, measure_ceilings, say, timed
from report import add_out, device, publish

from moss_jax.ops.after_attention import IMPLEMENTATIONS, Arguments, mosaic_gpu
from moss_jax.ops.after_attention.mosaic_gpu import Config, default_config, few_rows

D, K, F = 4096, 4096, 14336  # Of the 11B's decoder.
CALLS, COPIES = 16, 2
REPEATS = 30  # That must be equal bit for bit.
SILENCE = 60  # Seconds, after which a kernel is taken to hang.

# What is changed in the default configuration.
CONFIGS = (
    {"prefetch": False},
    {"block_k": 128, "stages": 10},
    {"part_down": 256},
    {"part_down": 1024, "stages": 4},
    {"part_down": 1792, "stages": 4},
    {"part": 512, "part_down": 256, "stages": 6},
    {"stages": 4},
    {"blocks": 132, "stages": 11},
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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

    sizes = (256, 256, 384) if args.tiny else (D, K, F)
    ceilings = measure_ceilings(args.tiny)
    say(f"copy {ceilings['copy_tb_s']:.3g} TB/s; {device()}")
    results = []
    for stored in args.stored.split(","):
        copies = [
            make_inputs(jax.random.key(i), stored, max(map(int, args.rows.split(","))), sizes)
            for i in range(COPIES)
        ]
        for rows in map(int, args.rows.split(",")):
            cut = [dataclasses.replace(a, x=a.x[:rows], heads=a.heads[:rows]) for a in copies]
            exact = jax.jit(IMPLEMENTATIONS["reference"].apply)(cut[0])
            for name, apply in contenders(cut[0], CONFIGS if args.tune else ()):
                watch.alive()
                if time.monotonic() < deadline:
                    row = {"case": f"{rows} x {' x '.join(map(str, sizes))} {stored}", "implementation": name}
                    results.append(row | measure(apply, cut, exact, args.repeats, ceilings["copy_tb_s"]))
                    say(line(results[-1]))
    if time.monotonic() > deadline:
        say("time is up: the rest was left out")
    flags = {name: "" if value is True else value for name, value in vars(args).items()}
    given = {name: x for name, x in flags.items() if name == "out" or x not in (None, False, math.inf)}
    publish("after_attention.py", argparse.Namespace(**given), {"ceilings": ceilings, "rows": results})


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


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def make_inputs(key, stored: str, rows: int, sizes) -> Arguments:
    """Both branches are about as large as x, or a fraction of it."""
    D, K, F = sizes
    keys = iter(jax.random.split(key, 10))

    def weights(outputs, inputs):
        codes = jax.random.bits(next(keys), (outputs, inputs), jnp.uint8)
        if stored != "int8":
            codes = jnp.where(codes & 127 == 127, 0, codes)  # No NaN.
        size = 74 if stored == "int8" else 120  # About the standard deviation of all codes.
        scale = jax.random.uniform(next(keys), (outputs,), minval=0.5, maxval=1.5)
        return jax.lax.bitcast_convert_type(codes, jnp.dtype(stored)), scale / (size * math.sqrt(inputs))

    out, out_scale = weights(D, K)
    gate_up, gate_up_scale = weights(2 * F, D)
    down, down_scale = weights(D, F)
    return Arguments(
        jax.random.normal(next(keys), (rows, D), jnp.bfloat16),
        jax.random.normal(next(keys), (rows, K), jnp.bfloat16),
        out=out,
        out_scale=out_scale,
        norm=jax.random.uniform(next(keys), (D,), jnp.bfloat16, 0.5, 1.5),
        gate_up=gate_up,
        gate_up_scale=gate_up_scale,
        down=down,
        down_scale=down_scale,
        eps=1e-5,
    )


def contenders(a: Arguments, configs):
    """(name, function of the arguments) of each way to compute; the kernel's default first."""
    if mosaic_gpu.unsupported(a, jax.default_backend()) is None:
        for changes in ({}, *configs):
            named = ", ".join(f"{name} {value}" for name, value in changes.items())
            config = Config(**vars(default_config(a)) | changes)
            yield named or "mosaic_gpu", functools.partial(few_rows, config=config)
    yield "xla", IMPLEMENTATIONS["xla"].apply


def measure(apply, copies: list[Arguments], exact, repeats: int, copy: float) -> dict:
    """Error, whether repeats agree, and the time of a call."""
    one = jax.jit(apply)
    try:
        y = one(copies[0])
        off = y.astype(jnp.float32) - exact.astype(jnp.float32)
        added = exact.astype(jnp.float32) - copies[0].x.astype(jnp.float32)
        row = {"error": [float(jnp.linalg.norm(off) / jnp.linalg.norm(added))]}
        if not all(bool((one(copies[0]) == y).all()) for _ in range(REPEATS)):
            return {"failed": "repeats differ"}
        row |= timed(jax.jit(functools.partial(chain, apply)), (copies,), CALLS, repeats)
    except Exception as error:
        return {"failed": first_line(error)}
    row["tb_s"] = sum(x.nbytes for x in (copies[0].out, copies[0].gate_up, copies[0].down)) / row["us"] / 1e6
    return row | {"share": row["tb_s"] / copy}


def chain(apply, copies: list[Arguments]):
    """One call after the other."""
    step, x = jax.jit(apply), copies[0].x
    for i in range(CALLS):
        x = step(dataclasses.replace(copies[i % COPIES], x=x, heads=x[:, : copies[0].heads.shape[1]]))
    return x


if __name__ == "__main__":
    main()
