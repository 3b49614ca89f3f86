"""Shared by the benchmarks of kernels: flags, compilation, timing, ceilings, and rows as text."""

import argparse
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from report import add_out, device, say

ENOUGH_SECONDS = 0.02  # Length of a sample, so that launching and awaiting it is negligible.
SILENCE = 60  # Seconds without progress after which a kernel is assumed to hang.
CHECKED = 256  # Maximum number of rows or outputs that are compared.
SHARED_BYTES = 227 * 1024  # Shared memory of a thread block on Hopper.


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of scripts with a budget."""
    parser.add_argument("--repeats", type=int, default=9, help="samples of each time")
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds after which nothing new starts"
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes, to test this script on a CPU")
    add_out(parser)


def begin(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, dict[str, float], float, "Watch"]:
    """Starts a script whose kernels may hang; returns arguments, ceilings, deadline, and a watchdog."""
    add_flags(parser)
    args = parser.parse_args()
    deadline, watch = time.monotonic() + args.budget, Watch()
    ceilings = measure_ceilings(args.tiny)
    copy, matmul = ceilings.values()
    say(f"copy {copy:.3g} TB/s, bf16 matmul {matmul:.3g} TFLOP/s; {device()}")
    return args, ceilings, deadline, watch


def timed(program, inputs, calls: int, repeats: int) -> dict[str, float]:
    """Times a call of a program in microseconds: median, minimum and maximum of the samples."""
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
    """Rates of a large copy (bytes read and written) and a large bf16 GEMM, the best of several."""
    numbers, side = (2**18, 256) if tiny else (2**29, 8192)
    x = jax.random.bits(jax.random.key(0), (numbers,), jnp.uint32)
    copy = timed(jax.jit(lambda x: x + 1), (x,), 1, 10)["us_min"]
    a, b = jax.random.normal(jax.random.key(0), (2, side, side), jnp.bfloat16)
    matmul = timed(jax.jit(jnp.matmul), (a, b), 1, 10)["us_min"]
    return {"copy_tb_s": 2 * x.nbytes / copy / 1e6, "matmul_tflop_s": 2 * side**3 / matmul / 1e6}


class Watch:
    """Watchdog that ends the process if `alive` is not called in time: a hung kernel blocks its caller."""

    def __init__(self):
        self.alive()
        threading.Thread(target=self._look, daemon=True).start()

    def alive(self):
        self.seen = time.monotonic()

    def _look(self):
        while time.monotonic() < self.seen + SILENCE:
            time.sleep(1)
        say(f"no progress for {SILENCE} seconds: a kernel hangs")
        os._exit(3)


def side_by_side(compilations: Iterable[Callable[[], Any]], watch: Watch | None = None) -> list[Future]:
    """Compiles programs in parallel; returns when all are done, so that no timing overlaps with it."""
    with ThreadPoolExecutor() as pool:
        compiled = [pool.submit(compilation) for compilation in compilations]
        while wait(compiled, timeout=5).not_done:
            if watch:
                watch.alive()
    return compiled


def checked(count: int) -> np.ndarray:
    """Indices of the rows or outputs that are compared, including the first and the last."""
    return np.linspace(0, count - 1, min(count, CHECKED)).astype(int)


def named(changes: dict) -> str:
    """Formats changes of a configuration as text; empty for none."""
    return ", ".join(f"{name} {value}" for name, value in changes.items())


def line(row: dict) -> str:
    """Formats a row: microseconds (median, min, max), rate, share of the ceiling, errors, extra memory."""
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
