"""Public API of the eviction of rows: its contract and implementations.

B slots, N of them compacted, K kv heads, R rows of a buffer, C rows that may stay
"""

from collections.abc import Sequence

from jaxtyping import Array, Int, Num

from moss_jax.ops.dispatch import Implementation, Op
from moss_jax.ops.keep_rows import base, mosaic_gpu
from moss_jax.ops.keep_rows.base import Arguments

KEEP_ROWS = Op(
    "keep_rows",
    {
        "mosaic_gpu": Implementation(mosaic_gpu.apply, mosaic_gpu.unsupported),
        "xla": Implementation(base.define),
    },
    {"gpu": ("mosaic_gpu", "xla")},
)


def keep_rows(
    buffers: Sequence[Num[Array, "B K R _"]],
    kept: Int[Array, "N C"],
    length: Int[Array, " N"],
    *,
    slots: Int[Array, " N"] | None = None,
    implementation: str | None = None,
) -> tuple[Num[Array, "B K R _"], ...]:
    """Evicts all rows of a slot but some, which become its first, in all buffers alike.

    Row `kept[n, i]` becomes row `i`, for `i < length[n]`; later rows may contain anything. Other slots
    stay as they are.

    Args:
      buffers: such as keys and values of all layers, of any widths and dtypes. A program that donates them
        changes them in place.
      kept: indices of the rows that stay, strictly ascending; only the first `length[n]` count.
      length: number of rows that stay.
      slots: entry `n` is about slot `slots[n]`, each a different one; there are no gradients with slots. None
        if entry `n` is about slot `n` (N == B).
      implementation: a name in `KEEP_ROWS`; None takes the first in the platform's order that can.

    Raises:
      ValueError: shapes that don't fit together.
      Unsupported: the named implementation cannot take these arguments.
    """
    a = Arguments(tuple(buffers), kept, length, slots)
    return KEEP_ROWS(a, implementation=implementation)
