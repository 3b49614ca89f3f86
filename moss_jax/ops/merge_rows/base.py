"""Arguments and definition of the merging of rows.

B slots, K kv heads, S rows of a buffer, M rows that become one, D head
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Num


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
    """Validated arguments of one call, built by `merge_rows`, which documents the fields."""

    x: Num[Array, "B K S D"]
    weights: Float[Array, "M B #K S"]
    source: Int[Array, "M B S"]
    count: Int[Array, "B S"]
    out_dtype: DTypeLike = dataclasses.field(metadata={"static": True})

    def __post_init__(self):
        if not hasattr(self.source, "ndim"):  # JAX rebuilds pytrees around placeholders.
            return
        (B, K, S, _), (M, *_) = self.x.shape, self.source.shape
        if self.source.shape != (M, B, S):
            raise ValueError(f"source has M indices of each of {B} x {S} rows; got {self.source.shape}")
        if self.weights.shape not in ((M, B, 1, S), (M, B, K, S)):
            raise ValueError(
                f"weights are one for each source, of shape {(M, B, 1, S)} or {(M, B, K, S)}; "
                f"got {self.weights.shape}"
            )
        if self.count.shape != (B, S):
            raise ValueError(f"count has one entry for each of {B} x {S} rows; got {self.count.shape}")


def define(a: Arguments) -> Num[Array, "B K S D"]:
    """The definition, a gather for each of the M sources."""

    def part(m, weight, source):
        x = jnp.take_along_axis(a.x, source[:, None, :, None], axis=2, mode="clip")
        # Not by a weight of 0: the row could be NaN.
        return jnp.where((m < a.count)[:, None, :, None], weight[..., None] * x.astype(jnp.float32), 0)

    merged = functools.reduce(jnp.add, map(part, range(len(a.source)), a.weights, a.source))
    if jnp.issubdtype(a.out_dtype, jnp.integer):
        merged = jnp.round(merged)
    return merged.astype(a.out_dtype)
