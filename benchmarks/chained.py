"""Shared by the benchmarks of few-row W8A16 kernels: chains of dependent calls."""

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from report import first_line, make_parser, publish, say
from timing import begin, line, named, timed

from moss_jax.ops.dispatch import Op
from moss_jax.ops.linear import Weights
from moss_jax.ops.qarray import QArray

REPEATS = 30  # Runs of one call that must agree bit for bit.


@dataclasses.dataclass(frozen=True)
class Case:
    """One call and the implementations that compute it.

    Attributes:
      copies: arguments with different weights, which calls rotate over; the first are those of the call.
      exact: the exact result.
      added_to: part of the result that the op only adds to, left out of the relative error.
      following: makes the arguments of a call depend on the result of the previous one.
      weights: size of the weights, in bytes.
      contenders: name and function of each implementation; the kernel's default first.
      result: selects the array of a result that is compared.
    """

    name: str
    copies: Sequence[Any]
    exact: jax.Array
    added_to: jax.Array | float
    following: Callable[[Any, jax.Array], Any]
    weights: int
    contenders: Sequence[tuple[str, Callable[[Any], Any]]]
    result: Callable[[Any], jax.Array]


def compare_chained(
    script: str, doc: str, cases: Callable[[argparse.Namespace], Iterator[Case]], calls: int
) -> None:
    """Parses the command line, times all cases and publishes the result.

    Args:
      calls: number of calls in a program, each of which depends on the previous one.
    """
    parser = make_parser(doc)
    parser.add_argument("--rows", default="1,2", help="comma-separated numbers of rows")
    parser.add_argument(
        "--stored", default="int8,float8_e4m3fn", help="comma-separated dtypes of the weights"
    )
    parser.add_argument("--tune", action="store_true", help="time other configurations of the kernel too")
    args, ceilings, deadline, watch = begin(parser)
    results = []
    for case in cases(args):
        for name, apply in case.contenders:
            watch.alive()
            if time.monotonic() < deadline:
                row = {"case": case.name, "implementation": name}
                results.append(row | _measure(apply, case, calls, args.repeats, ceilings["copy_tb_s"]))
                say(line(results[-1]))
    if time.monotonic() > deadline:
        say("out of time: the remaining cases were left out")
    publish(script, args, {"ceilings": ceilings, "rows": results})


def implementations(
    op: Op, kernel: str, a, default: Any, configs: Iterable[dict]
) -> Iterator[tuple[str, Callable]]:
    """The kernel of an op, if it supports the call: its default, then changed configurations; and XLA."""
    if op.implementations[kernel].unsupported(a, jax.default_backend()) is None:
        for changes in ({}, *configs):
            config = dataclasses.replace(default, **changes)
            yield named(changes) or "mosaic_gpu", functools.partial(op, implementation=kernel, config=config)
    yield "xla", functools.partial(op, implementation="xla")


def make_weights(key, stored: str, outputs: tuple[int, ...], inputs: int) -> Weights:
    """Random weights in 8 bits, scaled so that outputs are about as large as inputs."""
    codes_key, scale_key = jax.random.split(key)
    codes = jax.random.bits(codes_key, (*outputs, inputs), jnp.uint8)
    if stored != "int8":
        codes = jnp.where(codes & 127 == 127, 0, codes)  # No NaN.
    size = 74 if stored == "int8" else 120  # Approximate standard deviation of uniformly drawn codes.
    scale = jax.random.uniform(scale_key, outputs, minval=0.5, maxval=1.5) / (size * math.sqrt(inputs))
    values = jax.lax.bitcast_convert_type(codes, jnp.dtype(stored))
    return Weights(QArray(values, scale), layout="outputs_first")


def _measure(apply, case: Case, calls: int, repeats: int, copy: float) -> dict:
    """Relative error and time of a call; fails if repeats differ."""

    def call(a):
        return case.result(apply(a))

    one = jax.jit(call)
    try:
        y = one(case.copies[0])
        exact = case.exact.astype(jnp.float32)
        off, size = (jnp.linalg.norm(exact - x) for x in (y, case.added_to))
        if not all(bool((one(case.copies[0]) == y).all()) for _ in range(REPEATS)):
            return {"failed": "repeats differ"}
        program = jax.jit(functools.partial(_chain, call, case.following, calls))
        row = {"error": [float(off / size)]} | timed(program, (case.copies,), calls, repeats)
    except Exception as error:
        return {"failed": first_line(error)}
    row["tb_s"] = case.weights / row["us"] / 1e6
    return row | {"share": row["tb_s"] / copy}


def _chain(apply, following, calls: int, copies):
    """Runs calls in sequence, each on the result of the previous one."""
    step, y = jax.jit(apply), None
    for i in range(calls):
        a = copies[i % len(copies)]
        y = step(a if y is None else following(a, y))
    return y
