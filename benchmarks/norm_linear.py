"""Times the RMSNorm-prologue GEMM (W8A16, few rows) against norm and GEMM as separate ops.

    python benchmarks/norm_linear.py --out benchmarks/results/norm_linear_h200.json
    python benchmarks/norm_linear.py --tune --rows 1 --stored int8

A program has 48 calls, each on the first outputs of the previous one; if there are more outputs than inputs,
they are copied first, which costs all contenders the same. Calls rotate over weights that exceed any cache.
Rates are shares of a large copy timed first, and count only the bytes of the weights. Errors are
||y - exact|| / ||exact|| against the reference in float32.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from chained import Case, compare_chained, implementations, make_weights

from moss_jax.ops.linear import NORM_LINEAR
from moss_jax.ops.linear.base import NormArguments
from moss_jax.ops.linear.mosaic_gpu.norm_matmul import default_config
from moss_jax.ops.norm import Norm, Residual

K = 4096  # Of the 11B's decoder.
OUTPUTS = (6144, 4096)  # QKV of self-attention; Q of cross-attention.
BYTES = 3e8  # Size of all copies of the weights, more than L2 holds.

# Changes of the default configuration.
CONFIGS = (
    {"block_k": 128, "stages": 8},
    {"each": 2, "stages": 6},
    {"each": 1, "stages": 9},
)


def main() -> None:
    compare_chained("norm_linear.py", __doc__, cases, calls=48)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    all_rows = [int(x) for x in args.rows.split(",")]

    def following(a, y):
        return dataclasses.replace(a, residual=Residual(y[:, : a.weights.inputs[0]]))

    inputs, all_outputs = (512, (1024,)) if args.tiny else (K, OUTPUTS)
    for stored in args.stored.split(","):
        for outputs in all_outputs:
            count = 2 if args.tiny else math.ceil(BYTES / (inputs * outputs))
            keys = jax.random.split(jax.random.key(0), count)
            copies = [make_inputs(key, stored, max(all_rows), inputs, outputs) for key in keys]
            for rows in all_rows:
                cut = [dataclasses.replace(a, residual=Residual(a.residual.x[:rows])) for a in copies]
                configs = CONFIGS if args.tune else ()
                yield Case(
                    f"{rows} x {inputs} x {outputs} {stored}",
                    cut,
                    jax.jit(functools.partial(NORM_LINEAR, implementation="reference"))(cut[0])[0],
                    0.0,
                    following,
                    inputs * outputs,
                    list(
                        implementations(
                            NORM_LINEAR, "norm_matmul", cut[0], default_config(rows, inputs), configs
                        )
                    ),
                    lambda result: result[0],
                )


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def make_inputs(key, stored: str, rows: int, inputs: int, outputs: int) -> NormArguments:
    """Draws arguments whose outputs are about as large as x."""
    keys = jax.random.split(key, 3)
    return NormArguments(
        Residual(jax.random.normal(keys[0], (rows, inputs), jnp.bfloat16)),
        Norm(jax.random.uniform(keys[1], (inputs,), jnp.bfloat16, 0.5, 1.5), eps=1e-5),
        make_weights(keys[2], stored, (outputs,), inputs),
        out_dtype=jnp.dtype(jnp.bfloat16),
    )


if __name__ == "__main__":
    main()
