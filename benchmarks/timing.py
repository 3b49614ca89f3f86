"""What the benchmarks of kernels share: compiling, timing, the ceilings that times are held against, rows.

At the end stands a whole benchmark of chained calls, for kernels of few rows with weights in 8 bits.
"""

import argparse
import dataclasses
import functools
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from report import add_out, device, first_line, make_parser, publish, say

ENOUGH_SECONDS = 0.02  # Of one sample, so that starting and awaiting it doesn't tell.
SILENCE = 60  # Seconds, after which a kernel is taken to hang.
CHECKED = 256  # Rows or outputs, of as many as there are.
REPEATS = 30  # Of a chained kernel, that must be equal bit for bit.
SHARED_BYTES = 227 * 1024  # Of a Hopper multiprocessor.


def timed(program, inputs, calls: int, repeats: int) -> dict[str, float]:
    """Microseconds of one of the program's calls: median, least, most."""
    jax.block_until_ready(program(*inputs))
    started = time.perf_counter()
    jax.block_until_ready(program(*inputs))
    rounds = min(max(round(ENOUGH_SECONDS / (time.perf_counter() - started)), 1), 200)
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(rounds):
            result = program(*inputs)
        jax.block_until_ready(result)
        samples.append(1e6 * (time.perf_counter() - started) / (rounds * calls))
    return {"us": statistics.median(samples), "us_min": min(samples), "us_max": max(samples)}


def measure_ceilings(tiny: bool) -> dict[str, float]:
    """The best of several large copies, counting bytes read and written, and of several large matmuls."""
    numbers, side = (2**18, 256) if tiny else (2**29, 8192)
    x = jax.random.bits(jax.random.key(0), (numbers,), jnp.uint32)
    copy = timed(jax.jit(lambda x: x + 1), (x,), 1, 10)["us_min"]
    a, b = jax.random.normal(jax.random.key(0), (2, side, side), jnp.bfloat16)
    matmul = timed(jax.jit(jnp.matmul), (a, b), 1, 10)["us_min"]
    return {"copy_tb_s": 2 * x.nbytes / copy / 1e6, "matmul_tflop_s": 2 * side**3 / matmul / 1e6}


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


def side_by_side(compilations: Iterable[Callable[[], Any]], watch: Watch | None = None) -> list[Future]:
    """Compiles programs in threads. Returns when all are done: nothing is timed while others are compiled."""
    with ThreadPoolExecutor() as pool:
        compiled = [pool.submit(compilation) for compilation in compilations]
        while wait(compiled, timeout=5).not_done:
            if watch:
                watch.alive()
    return compiled


def checked(count: int) -> np.ndarray:
    """Which of so many rows or outputs are looked at, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, CHECKED)).astype(int)


def named(changes: dict) -> str:
    """What is changed in a configuration, as text; empty for nothing."""
    return ", ".join(f"{name} {value}" for name, value in changes.items())


def line(row: dict) -> str:
    """A row as text: microseconds (median, least, most), rate, share of the ceiling, errors, extra memory."""
    text = f"{row['case']:<30} {row['implementation']:<26}"
    if "failed" in row:
        return f"{text} failed: {row['failed']}"
    text += f" {row['us']:>9.1f} us ({row['us_min']:.1f} to {row['us_max']:.1f})"
    for unit, name in (("tb_s", "TB/s"), ("tflop_s", "TFLOP/s")):
        if unit in row:
            text += f"  {row[unit]:>5.3g} {name} {row['share']:>4.0%}"
    if "error" in row:
        text += f"  off by {', '.join(f'{error:.1e}' for error in row['error'])}"
    return text + (f"  +{row['extra_mb']:.1f} MB" if "extra_mb" in row else "")


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


def compare_chained(
    script: str, doc: str, cases: Callable[[argparse.Namespace], Iterator[Case]], calls: int
) -> None:
    """Parses the command line, times all cases, publishes the result.

    Args:
      calls: of a program, each of which depends on the one before.
    """
    parser = make_parser(doc)
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
                results.append(row | _measure(apply, case, calls, args.repeats, ceilings["copy_tb_s"]))
                say(line(results[-1]))
    if time.monotonic() > deadline:
        say("time is up: the rest was left out")
    publish(script, args, {"ceilings": ceilings, "rows": results})


def kernels(module, a, configs: Iterable[dict]) -> Iterator[tuple[str, Callable]]:
    """The kernel of an op's module, if it takes the call: by default, and with configurations changed."""
    if module.unsupported(a, jax.default_backend()) is None:
        for changes in ({}, *configs):
            config = dataclasses.replace(module.default_config(a), **changes)
            yield named(changes) or "mosaic_gpu", functools.partial(module.few_rows, config=config)


def make_weights(key, stored: str, outputs: int, inputs: int) -> tuple[jax.Array, jax.Array]:
    """[N, K] in 8 bits, and scales by which they keep the size of what they map."""
    codes_key, scale_key = jax.random.split(key)
    codes = jax.random.bits(codes_key, (outputs, inputs), jnp.uint8)
    if stored != "int8":
        codes = jnp.where(codes & 127 == 127, 0, codes)  # No NaN.
    size = 74 if stored == "int8" else 120  # About the standard deviation of all codes.
    scale = jax.random.uniform(scale_key, (outputs,), minval=0.5, maxval=1.5)
    return jax.lax.bitcast_convert_type(codes, jnp.dtype(stored)), scale / (size * math.sqrt(inputs))


def _measure(apply, case: Case, calls: int, repeats: int, copy: float) -> dict:
    """Error, whether repeats agree, and the time of a call."""
    one = jax.jit(apply)
    try:
        y = one(case.copies[0])
        exact = case.exact.astype(jnp.float32)
        off, size = (jnp.linalg.norm(exact - x) for x in (y, case.added_to))
        if not all(bool((one(case.copies[0]) == y).all()) for _ in range(REPEATS)):
            return {"failed": "repeats differ"}
        program = jax.jit(functools.partial(_chain, apply, case.following, calls))
        row = {"error": [float(off / size)]} | timed(program, (case.copies,), calls, repeats)
    except Exception as error:
        return {"failed": first_line(error)}
    row["tb_s"] = case.weights / row["us"] / 1e6
    return row | {"share": row["tb_s"] / copy}


def _chain(apply, following, calls: int, copies):
    """One call after the other."""
    step, y = jax.jit(apply), None
    for i in range(calls):
        a = copies[i % len(copies)]
        y = step(a if y is None else following(a, y))
    return y
