"""Public API of the merging of rows: its contract and implementations.

B slots, K kv heads, S rows of a buffer, M rows that become one, D head
"""

from jaxtyping import Array, DTypeLike, Float, Int, Num

from moss_jax.ops.dispatch import Implementation, Op
from moss_jax.ops.merge_rows import base, mosaic_gpu
from moss_jax.ops.merge_rows.base import Arguments

MERGE_ROWS = Op(
    "merge_rows",
    {
        "mosaic_gpu": Implementation(mosaic_gpu.apply, mosaic_gpu.unsupported),
        "xla": Implementation(base.define),
    },
    {"gpu": ("mosaic_gpu", "xla")},
)


def merge_rows(
    x: Num[Array, "B K S D"],
    weights: Float[Array, "M B #K S"],
    source: Int[Array, "M B S"],
    count: Int[Array, "B S"],
    *,
    out_dtype: DTypeLike,
    implementation: str | None = None,
) -> Num[Array, "B K S D"]:
    """Weighted sums of rows, in float32.

    Row `i` becomes the sum over `m < count[b, i]` of `weights[m, b, k, i] * x[b, k, source[m, b, i]]`. Rows
    that are in no sum may contain anything, even NaN.

    Args:
      x: in 8 bits or 16, or in float32.
      weights: for each head, or one for all.
      source: `0 <= source < S`, for all m.
      count: number of sources, up to M; a row with none becomes zeros.
      out_dtype: of the result; integers are rounded to the nearest, halves to the even one.
      implementation: a name in `MERGE_ROWS`; None takes the first in the platform's order that can.

    Raises:
      ValueError: shapes that don't fit together.
      Unsupported: the named implementation cannot take these arguments.
    """
    return MERGE_ROWS(Arguments(x, weights, source, count, out_dtype), implementation=implementation)
