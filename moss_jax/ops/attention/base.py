"""Arguments of the attention ops, and the definition of attention in plain JAX.

R rows of queries, B batch/slot, T query tokens, S keys, K kv heads, G query heads per kv head, H = K * G,
D head, P positions
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moss_jax.ops.dispatch import Unsupported, in_float32
from moss_jax.ops.qarray import QUANTIZED, QArray, dequantize
from moss_jax.ops.rotary import Rotation


class KeyRange(NamedTuple):
    """Query `t` of row `r` sees the keys `start[r, t] <= s < end[r, t]`; an empty range sees none."""

    start: Int[Array, "R T"]
    end: Int[Array, "R T"]


def no_gradients(stored: jnp.dtype) -> Unsupported:
    """Error raised by a backward pass over quantised K and V."""
    return Unsupported(f"attention over K and V in {stored} has no gradients; give them in q's dtype")


def no_gradients_by_slot() -> Unsupported:
    """Error raised by a kernel's backward pass over rows with explicit slots."""
    return Unsupported(
        "this kernel has no gradients of rows with slots; the implementations xla and reference have"
    )


def read_slots[X: Array | QArray](x: X, slots: Int[Array, " R"] | None) -> X:
    """Gathers each row's slot from an array [slots, ...]; no copy if row `r` reads slot `r`."""
    return x if slots is None else jax.tree.map(lambda x: jnp.take(x, slots, axis=0, mode="clip"), x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
    """Validated arguments of one call of `attention`, as implementations take them.

    Attributes:
      q: queries.
      k, v: keys and values; QArrays have one scale per vector, [B, K, S].
      kv_range: None lets every query see every key.
      bias: added to a key's scores for all heads and queries, before the softmax.
      scale: of the scores.
      causal: query `t` sees the keys `s <= t` (T == S).
      slots: row `r` reads k, v and bias of slot `slots[r]`; None if it is slot `r` (R == B).
    """

    q: Float[Array, "R T H D"]
    k: Float[Array, "B K S D"] | QArray
    v: Float[Array, "B K S D"] | QArray
    kv_range: KeyRange | None
    bias: Float[Array, "B S"] | None
    scale: float = dataclasses.field(metadata={"static": True})
    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    slots: Int[Array, " R"] | None = None

    def __post_init__(self):
        if not hasattr(self.q, "ndim"):  # JAX rebuilds pytrees around placeholders.
            return
        if self.q.ndim != 4 or self.k.ndim != 4 or self.v.shape != self.k.shape:
            raise ValueError(
                f"attention takes q [B, T, H, D] and k, v [B, K, S, D]; "
                f"got q {self.q.shape}, k {self.k.shape}, v {self.v.shape}"
            )
        (r, t, h, d), (b, kv_heads, s, kd) = self.q.shape, self.k.shape
        shared = "D" if self.slots is not None else "B and D"
        if d != kd or h % kv_heads or (self.slots is None and r != b):
            raise ValueError(
                f"q {self.q.shape} and k {self.k.shape} must share {shared}, and H must be a multiple of K"
            )
        check_slots(self.slots, r)
        if self.causal and self.slots is not None:
            raise ValueError("causal attention is for queries over their own keys, not over those of slots")
        if self.causal and (self.kv_range is not None or t != s):
            raise ValueError(f"causal attention needs T == S and no kv_range; got T={t}, S={s}")
        for bound in self.kv_range or ():
            if bound.shape != (r, t):
                raise ValueError(f"kv_range holds int32 [R, T] = {(r, t)} bounds; got {bound.shape}")
        if self.bias is not None and self.bias.shape != (b, s):
            raise ValueError(f"bias is one number a key, [B, S] = {(b, s)}; got {self.bias.shape}")
        for name, x in (("k", self.k), ("v", self.v)):
            if isinstance(x, QArray):
                if x.scale.shape != (b, kv_heads, s):
                    raise ValueError(
                        f"{name} has one scale per vector, {(b, kv_heads, s)}; got {x.scale.shape}"
                    )
            elif x.dtype.name in QUANTIZED:
                raise ValueError(f"{name} in {x.dtype} must be a QArray, with its scales")
        if isinstance(self.k, QArray) != isinstance(self.v, QArray):
            raise ValueError(f"both of k and v are QArrays or neither; got {self.k.dtype} and {self.v.dtype}")

    @property
    def quantized(self) -> bool:
        """Whether K and V are stored in 8 bits."""
        return isinstance(self.k, QArray)

    @property
    def group_rows(self) -> int:
        """Number of queries that share a kv head, T * G."""
        return self.q.shape[1] * self.q.shape[2] // self.k.shape[1]

    @property
    def bounds(self) -> KeyRange:
        """The explicit range of every query."""
        if self.kv_range is not None:
            return self.kv_range
        r, t = self.q.shape[:2]
        end = jnp.arange(1, t + 1) if self.causal else jnp.full(t, self.k.shape[2])
        return KeyRange(jnp.zeros((r, t), jnp.int32), jnp.broadcast_to(end.astype(jnp.int32), (r, t)))


def check_slots(slots: Int[Array, " R"] | None, rows: int) -> None:
    """Raises ValueError unless there is one slot per row, or None."""
    if slots is not None and (slots.shape != (rows,) or not jnp.issubdtype(slots.dtype, jnp.integer)):
        raise ValueError(
            f"slots holds an integer a row, [R] = {(rows,)}; got {slots.dtype} {tuple(slots.shape)}"
        )


def define(a: Arguments) -> Float[Array, "R T H D"]:
    """Softmax attention that materialises all scores, accumulated in float32."""
    R, T, H, D = a.q.shape
    K, S = a.k.shape[1:3]
    start, end = a.bounds
    keys = jnp.arange(S)
    visible = (start[..., None] <= keys) & (keys < end[..., None])  # [R, T, S]
    used = visible.any(axis=1)[:, None, :, None]  # [R, 1, S, 1]
    # Keys that no query sees may be NaN, and 0 * NaN would corrupt the sums.
    k, v = (jnp.where(used, dequantize(read_slots(x, a.slots), a.q.dtype), 0) for x in (a.k, a.v))
    q = a.q.reshape(R, T, K, H // K, D)
    scores = jnp.einsum("RTKGD,RKSD->RKGTS", q, k, preferred_element_type=jnp.float32) * a.scale
    if a.bias is not None:
        bias = jnp.where(used[:, 0, :, 0], read_slots(a.bias, a.slots), 0)
        scores += bias[:, None, None, None, :]
    # Not -inf, because a row without keys would then give -inf - -inf = NaN.
    scores = jnp.where(visible[:, None, None], scores, -1e30)
    weights = jnp.where(visible[:, None, None], jax.nn.softmax(scores, axis=-1), 0)
    out = jnp.einsum("RKGTS,RKSD->RTKGD", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(R, T, H, D).astype(a.q.dtype)


reference = in_float32(define, lambda a: a.q.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedProjection:
    """A fused QKV projection whose queries and keys are in float8_e4m3fn.

    Attributes:
      qk: queries and keys, values [B, P, 2, H, D]. The scale, [], is a power of two and that of the scores:
        the product of the scales of queries and keys. It is applied to the queries only.
      v: values.
    """

    qk: QArray
    v: Float[Array, "B P H D"]

    def __post_init__(self):
        if not hasattr(self.v, "ndim"):  # JAX rebuilds pytrees around placeholders.
            return
        B, P, *heads = self.v.shape
        if self.qk.shape != (B, P, 2, *heads) or self.v.ndim != 4 or self.qk.scale.ndim:
            raise ValueError(
                f"a quantised projection is qk [B, P, 2, H, D] with a scale [], and v [B, P, H, D]; "
                f"got {self.qk.shape}, {self.qk.scale.shape} and {self.v.shape}"
            )


Projection = Float[Array, "B P 3 H D"] | QuantizedProjection


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelfAttentionArguments:
    """Validated arguments of one call of `self_attention`.

    Attributes:
      projection: fused queries, keys and values.
      out_dtype: of the results: the values' dtype or float8_e4m3fn.
      attention: name of the implementation of `attention` to use; None for any.
    """

    projection: Projection
    out_dtype: jnp.dtype = dataclasses.field(kw_only=True, metadata={"static": True})
    attention: str | None = dataclasses.field(default=None, kw_only=True, metadata={"static": True})

    def __post_init__(self):
        if isinstance(self.projection, QuantizedProjection) or not hasattr(self.projection, "ndim"):
            return
        if self.projection.ndim != 5 or self.projection.shape[2] != 3:
            raise ValueError(
                f"self_attention takes a projection [B, P, 3, H, D], not {self.projection.shape}"
            )


def projection_shape(projection: Projection) -> tuple[int, int, int, int]:
    """(B, P, H, D)."""
    if isinstance(projection, QuantizedProjection):
        B, P, H, D = projection.v.shape
    else:
        B, P, _, H, D = projection.shape
    return B, P, H, D


def values_dtype(projection: Float[Array, "..."] | QuantizedProjection) -> jnp.dtype:
    """Dtype of the values, which is also that of the computation."""
    return (projection.v if isinstance(projection, QuantizedProjection) else projection).dtype


def slices(projection: Projection) -> tuple[Float[Array, "B P H D"], ...]:
    """Queries, keys and values, in the dtype of the values."""
    if isinstance(projection, QuantizedProjection):
        q, k = (projection.qk.values[:, :, i].astype(projection.v.dtype) for i in range(2))
        return q * projection.qk.scale.astype(q.dtype), k, projection.v
    # Not by indices: the gradient of each would be padded to the whole, and the three added up.
    return tuple(x[:, :, 0] for x in jax.lax.split(projection, (1, 1, 1), axis=2))


class Appended(NamedTuple):
    """A KV cache with new tokens appended, and a function for their attention.

    Attributes:
      attend: computes the attention outputs of the new tokens, [R, T, H, D], from keys and values to which
        all calls have appended.
    """

    keys: Float[Array, "B K S D"]
    values: Float[Array, "B K S D"]
    attend: Callable[[Float[Array, "B K S D"], Float[Array, "B K S D"]], Float[Array, "R T H D"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AppendArguments:
    """Validated arguments of one call of `append`.

    Attributes:
      qkv: projections of the new tokens: for each kv head its queries, key and value.
      rotation: RoPE of the new tokens' positions.
      keys, values: the KV cache; its keys are rotated.
      start: offset of each row's tokens in its slot.
      count: number of new tokens of each row to append.
      slots: slot of each row; None if row `r` belongs to slot `r` (R == B).
      capacity: maximum number of tokens in the cache.
      attention: name of the implementation of `attention` to use; None for any.
    """

    qkv: Float[Array, "R T K group_and_kv D"]
    rotation: Rotation
    keys: Float[Array, "B K S D"] | QArray
    values: Float[Array, "B K S D"] | QArray
    start: Int[Array, " R"]
    count: Int[Array, " R"]
    slots: Int[Array, " R"] | None = None
    capacity: int = dataclasses.field(kw_only=True, metadata={"static": True})
    attention: str | None = dataclasses.field(default=None, kw_only=True, metadata={"static": True})

    def __post_init__(self):
        if not hasattr(self.qkv, "ndim"):  # JAX rebuilds pytrees around placeholders.
            return
        if self.keys.shape[2] <= self.capacity:
            raise ValueError(
                f"a cache for {self.capacity} tokens has at least {self.capacity + 1} rows, "
                f"not {self.keys.shape[2]}"
            )
        rows = len(self.qkv) if self.slots is not None else self.keys.shape[0]
        check_slots(self.slots, rows)
        leading = {len(x) for x in (self.qkv, *self.rotation)}
        if leading != {rows} or self.start.shape != (rows,) or self.count.shape != (rows,):
            raise ValueError(
                f"qkv, rotation, start and count have one entry for each of {rows} rows; got "
                f"{self.qkv.shape}, {self.rotation.cos.shape}, {self.start.shape} and {self.count.shape}"
            )

    @property
    def following(self) -> Arguments:
        """Arguments of the attention after the append; queries and ranges are given only as shapes."""
        R, T, kv_heads, group_and_kv, D = self.qkv.shape
        q: Any = jax.ShapeDtypeStruct((R, T, kv_heads * (group_and_kv - 2), D), self.qkv.dtype)
        bound: Any = jax.ShapeDtypeStruct((R, T), jnp.int32)
        ranges, scale = KeyRange(bound, bound), 1 / math.sqrt(D)
        return Arguments(q, self.keys, self.values, ranges, None, scale, slots=self.slots)

    @property
    def key_range(self) -> KeyRange:
        """Key range of each new token: its slot up to itself; empty for tokens that are not appended."""
        token = jnp.arange(self.qkv.shape[1], dtype=jnp.int32)
        position = self.start[:, None] + token
        end = jnp.where(token < self.count[:, None], jnp.minimum(position + 1, self.capacity), 0)
        return KeyRange(jnp.zeros_like(end), end)
