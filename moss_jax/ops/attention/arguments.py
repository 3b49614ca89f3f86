"""What every attention implementation is called with.

B batch/slot, T query tokens, S keys, K kv heads, G query heads per kv head, H = K * G, D head, P positions
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, Int

from moss_jax.ops.dispatch import Unsupported

# K and V of these dtypes come with a scale per vector.
QUANTIZED = ("int8", "float8_e4m3fn")


class KeyRange(NamedTuple):
    """Query `t` of row `b` sees the keys `start[b, t] <= s < end[b, t]`; an empty range sees none."""

    start: Int[Array, "B T"]
    end: Int[Array, "B T"]


def no_gradients(stored: jnp.dtype) -> Unsupported:
    """What a backward pass over K and V in 8 bits raises."""
    return Unsupported(f"attention over K and V in {stored} has no gradients; give them in q's dtype")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
    """One checked call of the op; `attention` builds it, implementations read it.

    Attributes:
      kv_range: None lets every query see every key.
      bias: added to the scores of a key for all heads and queries, before the softmax.
      causal: query `t` sees the keys `s <= t` (T == S); static, so that kernels for it can be chosen.
      k_scale, v_scale: the keys are `k * k_scale[..., None]`, the values likewise; there exactly if K and V
        are quantised.
    """

    q: Float[Array, "B T H D"]
    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S D"]
    kv_range: KeyRange | None
    bias: Float[Array, "B S"] | None
    scale: float = dataclasses.field(metadata={"static": True})
    causal: bool = dataclasses.field(metadata={"static": True})
    k_scale: Float[Array, "B K S"] | None = None
    v_scale: Float[Array, "B K S"] | None = None

    def __post_init__(self):
        if not hasattr(self.q, "ndim"):  # JAX rebuilds pytrees around placeholders.
            return
        if self.q.ndim != 4 or self.k.ndim != 4 or self.v.shape != self.k.shape:
            raise ValueError(
                f"attention takes q [B, T, H, D] and k, v [B, K, S, D]; "
                f"got q {self.q.shape}, k {self.k.shape}, v {self.v.shape}"
            )
        (b, t, h, d), (kb, kv_heads, s, kd) = self.q.shape, self.k.shape
        if (b, d) != (kb, kd) or h % kv_heads:
            raise ValueError(
                f"q {self.q.shape} and k {self.k.shape} must share B and D, and H must be a multiple of K"
            )
        if self.causal and (self.kv_range is not None or t != s):
            raise ValueError(f"causal attention needs T == S and no kv_range; got T={t}, S={s}")
        for bound in self.kv_range or ():
            if bound.shape != (b, t):
                raise ValueError(f"kv_range holds int32 [B, T] = {(b, t)} bounds; got {bound.shape}")
        if self.bias is not None and self.bias.shape != (b, s):
            raise ValueError(f"bias is one number a key, [B, S] = {(b, s)}; got {self.bias.shape}")
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if (scale is not None) != self.quantized:
                raise ValueError(
                    f"K and V in {' and '.join(QUANTIZED)} come with k_scale and v_scale, others without; "
                    f"got {name} {'None' if scale is None else scale.shape} with {self.k.dtype}"
                )
            if scale is not None and scale.shape != (b, kv_heads, s):
                raise ValueError(f"{name} is one number a vector, {(b, kv_heads, s)}; got {scale.shape}")

    @property
    def quantized(self) -> bool:
        """Whether K and V are stored in 8 bits."""
        return self.k.dtype.name in QUANTIZED

    @property
    def bounds(self) -> KeyRange:
        """The range of every query, spelt out."""
        if self.kv_range is not None:
            return self.kv_range
        b, t = self.q.shape[:2]
        end = jnp.arange(1, t + 1) if self.causal else jnp.full(t, self.k.shape[2])
        return KeyRange(jnp.zeros((b, t), jnp.int32), jnp.broadcast_to(end.astype(jnp.int32), (b, t)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundedProjection:
    """What was projected to queries, keys and values, the first two in 8 bits.

    Attributes:
      qk: queries and keys.
      scale: what the queries are multiplied with; a power of two.
    """

    qk: Float8e4m3fn[Array, "B P 2 H D"]
    v: Float[Array, "B P H D"]
    scale: Float[Array, " 1"]

    def __post_init__(self):
        if not hasattr(self.qk, "ndim"):  # JAX rebuilds pytrees around placeholders.
            return
        B, P, *heads = self.v.shape
        if self.qk.shape != (B, P, 2, *heads) or self.v.ndim != 4 or self.scale.shape != (1,):
            raise ValueError(
                f"a projection in 8 bits is qk [B, P, 2, H, D], v [B, P, H, D] and scale [1]; "
                f"got {self.qk.shape}, {self.v.shape} and {self.scale.shape}"
            )


Projection = Float[Array, "B P 3 H D"] | RoundedProjection


def projection_sizes(projection: Projection) -> tuple[int, int, int, int]:
    """B, P, H and D."""
    if isinstance(projection, RoundedProjection):
        return projection.v.shape
    B, P, _, H, D = projection.shape
    return B, P, H, D


def values_dtype(projection: Projection) -> jnp.dtype:
    """In which attention computes, and gives its results unless told otherwise."""
    return (projection.v if isinstance(projection, RoundedProjection) else projection).dtype


def slices(projection: Projection) -> tuple[Float[Array, "B P H D"], ...]:
    """Queries, keys and values."""
    if isinstance(projection, RoundedProjection):
        q, k = (projection.qk[:, :, i].astype(projection.v.dtype) for i in range(2))
        return q * projection.scale.astype(q.dtype), k, projection.v
    return tuple(projection[:, :, i] for i in range(3))
