"""Times the rest of a decoder layer after attention (W8A16, few rows): one kernel against separate ops.

    python benchmarks/post_attention.py --out benchmarks/results/post_attention_h200.json
    python benchmarks/post_attention.py --tune --rows 1 --stored int8

Output projection, residual, RMSNorm, gated MLP, residual. A program has 16 calls, each with the result of the
previous one as x and as heads; calls rotate over weights that exceed any cache. Rates are shares of a large
copy timed first, and count only the bytes of the weights. Errors are ||y - exact|| / ||exact - x|| against
the reference in float32.
"""

import argparse
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from chained import Case, compare_chained, implementations, make_weights

from moss_jax.ops.norm import Norm, Residual
from moss_jax.ops.post_attention import POST_ATTENTION
from moss_jax.ops.post_attention.base import Arguments
from moss_jax.ops.post_attention.mosaic_gpu import default_config

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
        return dataclasses.replace(a, x=y, heads=y[..., : a.heads.shape[-1]])

    for stored in args.stored.split(","):
        copies = [make_inputs(jax.random.key(i), stored, max(all_rows), sizes) for i in range(COPIES)]
        for rows in all_rows:
            cut = [dataclasses.replace(a, x=a.x[:rows], heads=a.heads[:rows]) for a in copies]
            embed, heads, hidden = sizes
            default, configs = default_config(heads, embed, hidden), CONFIGS if args.tune else ()
            yield Case(
                f"{rows} x {' x '.join(map(str, sizes))} {stored}",
                cut,
                jax.jit(functools.partial(POST_ATTENTION, implementation="reference"))(cut[0]).sum(),
                cut[0].x,
                following,
                embed * (heads + 3 * hidden),
                list(implementations(POST_ATTENTION, "mosaic_gpu", cut[0], default, configs)),
                Residual.sum,
            )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def make_inputs(key, stored: str, rows: int, sizes) -> Arguments:
    """Draws inputs for which both branches are about as large as x, or a fraction of it."""
    D, K, F = sizes
    keys = jax.random.split(key, 6)
    return Arguments(
        jax.random.normal(keys[3], (rows, 1, D), jnp.bfloat16),
        jax.random.normal(keys[4], (rows, 1, K), jnp.bfloat16),
        out=make_weights(keys[0], stored, (D,), K),
        norm=Norm(jax.random.uniform(keys[5], (D,), jnp.bfloat16, 0.5, 1.5), eps=1e-5),
        up=make_weights(keys[1], stored, (2, F), D),
        down=make_weights(keys[2], stored, (D,), F),
    )


if __name__ == "__main__":
    main()
