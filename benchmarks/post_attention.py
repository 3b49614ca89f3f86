"""Times the rest of a decoder layer after attention (W8A16, few rows): one kernel against separate ops.

    python benchmarks/post_attention.py --out benchmarks/results/post_attention_h200.json
    python benchmarks/post_attention.py --tune --rows 1 --stored int8

Output projection, residual, RMSNorm, gated MLP, residual. A program has 16 calls, each with the result of the
one before as x and as heads; calls rotate over weights, so that no cache holds them. Rates are shares of a
large copy timed first, and count the bytes of the weights alone. Errors are ||y - exact|| / ||exact - x||
against the reference in float32.
"""

import argparse
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from chained import Case, compare_chained, kernels, make_weights

from moss_jax.ops.post_attention import IMPLEMENTATIONS, Arguments, mosaic_gpu

D, K, F = 4096, 4096, 14336  # Of the 11B's decoder.
COPIES = 2  # Of the weights.

# Changes of the default configuration.
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


def main() -> None:
    compare_chained("post_attention.py", __doc__, cases, calls=16)


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
                    *kernels(mosaic_gpu, cut[0], CONFIGS if args.tune else ()),
                    ("xla", IMPLEMENTATIONS["xla"].apply),
                ],
            )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def make_inputs(key, stored: str, rows: int, sizes) -> Arguments:
    """Draws inputs for which both branches are about as large as x, or a fraction of it."""
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


if __name__ == "__main__":
    main()
