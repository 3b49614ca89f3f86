"""Public API of the attention ops: their contracts and implementations.

R rows of queries, B batch/slot, T query tokens, S keys, K kv heads, G query heads per kv head, H = K * G,
D head, P positions
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from moss_jax.ops.attention import base, cudnn, mosaic_gpu, mosaic_tpu, xla
from moss_jax.ops.attention.base import (
    AppendArguments,
    Appended,
    Arguments,
    KeyRange,
    Projection,
    SelfAttentionArguments,
    projection_shape,
    slices,
    values_dtype,
)
from moss_jax.ops.attention.mosaic_gpu import DecodeConfig, DenseConfig, StaircaseConfig
from moss_jax.ops.attention.xla import XlaConfig
from moss_jax.ops.dispatch import Implementation, Op
from moss_jax.ops.qarray import QArray, quantize
from moss_jax.ops.rotary import Rotation, rotate
from moss_jax.ops.writes import write_row, write_rows
from moss_jax.sharding import partition_spec

# Prefixes of the partition specs of a call's arguments, by field, and of its result.
Specs = tuple[Mapping[str, Any], PartitionSpec]


def sharded[Arguments](
    apply: Callable[..., Array], specs: Callable[[Arguments, AbstractMesh], Specs]
) -> Callable[..., Array]:
    """Wraps an implementation that the compiler cannot partition in `shard_map` if a mesh is in use.

    Args:
      apply: computes the op on one device.
      specs: how a call's batch and heads are sharded on a mesh.
    """

    @functools.wraps(apply)
    def on_mesh(a, *config):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
            return apply(a, *config)
        in_specs, out_specs = specs(a, mesh)
        arrays = {f.name: getattr(a, f.name) for f in dataclasses.fields(a) if not f.metadata.get("static")}
        arrays = {name: x for name, x in arrays.items() if x is not None}
        return jax.shard_map(
            lambda arrays: apply(dataclasses.replace(a, **arrays), *config),
            mesh=mesh,
            in_specs=({name: in_specs[name] for name in arrays},),
            out_specs=out_specs,
            # The kernels don't declare over which mesh axes their outputs vary.
            check_vma=False,
        )(arrays)

    return on_mesh


def attention_specs(a: Arguments, mesh: AbstractMesh) -> Specs:
    """Each device computes its rows of the batch and its kv heads.

    With explicit slots, any row may read any slot, so every device has all slots and all rows.
    """
    batch, kv_heads = partition_spec(("batch", "kv_heads"), a.k.shape[:2], mesh)
    if a.slots is not None:
        batch = None
    rows, heads = PartitionSpec(batch), PartitionSpec(batch, kv_heads)
    queries = PartitionSpec(batch, None, kv_heads)
    specs = {"q": queries, "k": heads, "v": heads, "kv_range": rows, "bias": rows, "slots": rows}
    return specs, queries


def self_attention_specs(a: SelfAttentionArguments, mesh: AbstractMesh) -> Specs:
    """Each device computes its rows of the batch and its heads."""
    B, _, H, _ = projection_shape(a.projection)
    batch, heads = partition_spec(("batch", "heads"), (B, H), mesh)
    out = PartitionSpec(batch, None, heads)
    by_ndim = {5: PartitionSpec(batch, None, None, heads), 4: out, 0: PartitionSpec()}
    return {"projection": jax.tree.map(lambda x: by_ndim[x.ndim], a.projection)}, out


ATTENTION = Op(
    "attention",
    {
        "cudnn": Implementation(cudnn.apply, cudnn.unsupported),
        "mosaic_gpu": Implementation(sharded(mosaic_gpu.apply, attention_specs), mosaic_gpu.unsupported),
        "mosaic_tpu": Implementation(sharded(mosaic_tpu.apply, attention_specs), mosaic_tpu.unsupported),
        "xla": Implementation(xla.apply),
        "reference": Implementation(base.reference),
    },
    {"gpu": ("cudnn", "mosaic_gpu", "xla"), "tpu": ("mosaic_tpu", "xla")},
)


def attention(
    q: Float[Array, "R T H D"],
    k: Float[Array, "B K S D"] | QArray,
    v: Float[Array, "B K S D"] | QArray,
    kv_range: KeyRange | None = None,
    *,
    slots: Int[Array, " R"] | None = None,
    causal: bool = False,
    bias: Float[Array, "B S"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    config: XlaConfig
    | DecodeConfig
    | StaircaseConfig
    | mosaic_tpu.DecodeConfig
    | mosaic_tpu.StaircaseConfig
    | None = None,
) -> Float[Array, "R T H D"]:
    """Softmax attention in which each query sees one range of the keys.

    Head `h` of the queries reads kv head `h // G` (GQA). Row `r` reads keys, values and bias of slot `r`, or
    of `slots[r]`. Keys outside a query's range have no influence, and those that no query of a row sees may
    contain anything, even NaN. A query with an empty range gives exact zeros. Accumulates in float32.

    Args:
      q: queries.
      k, v: keys and values; if they are QArrays, [B, K, S, D] with scales [B, K, S], there are no gradients.
      kv_range: the keys that each query sees; None for all of them.
      slots: `0 <= slots[r] < B`, also for rows that see nothing; any number of rows may read one slot. The
        Pallas kernels have no gradients with slots. None if row `r` reads slot `r` (R == B).
      causal: instead of a range, and without slots: query `t` sees the keys up to `t`.
      bias: float32, added to the scores of each key.
      scale: of the scores before the bias; 1 / sqrt(D) if None.
      implementation: a name in `ATTENTION`; None takes the first in the platform's order that can.
      config: tiling of the named implementation; its class selects one of several kernels.

    Returns:
      [R, T, H, D] in q's dtype.

    Raises:
      ValueError: shapes that don't fit together.
      Unsupported: the named implementation cannot take these arguments.
    """
    arguments = Arguments(
        q=q,
        k=k,
        v=v,
        kv_range=None if kv_range is None else KeyRange(*kv_range),
        bias=bias,
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        causal=causal,
        slots=slots,
    )
    if k.shape[2] == 0:
        return jnp.zeros_like(q)
    return ATTENTION(arguments, implementation=implementation, config=config)


def _attend_to_slices(a: SelfAttentionArguments) -> Float[Array, "B P H D"]:
    """Self-attention as `attention` on slices of the projection."""
    q, k, v = slices(a.projection)
    out = attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), implementation=a.attention)
    return out.astype(a.out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(config, a: SelfAttentionArguments) -> Float[Array, "B P H D"]:
    """The dense kernel; under differentiation, output and gradients are those of `_attend_to_slices`."""
    return sharded(mosaic_gpu.self_attention, self_attention_specs)(a, config)


def _dense_forward(config, a):
    # The kernel saves no residuals, so the forward pass is that of the slices too.
    del config
    return jax.vjp(_attend_to_slices, a)


def _dense_backward(config, pull, d_out):
    del config
    return pull(d_out)


_dense.defvjp(_dense_forward, _dense_backward)

SELF_ATTENTION = Op(
    "self_attention",
    {
        "mosaic_gpu": Implementation(
            lambda a, config=None: _dense(config, a), mosaic_gpu.unsupported_self_attention
        ),
        "xla": Implementation(_attend_to_slices),
    },
    {"gpu": ("mosaic_gpu", "xla")},
)


def self_attention(
    projection: Projection,
    *,
    out_scale: Float[Array, ""] | None = None,
    implementation: str | None = None,
    config: DenseConfig | None = None,
) -> Float[Array, "B P H D"] | QArray:
    """Dense self-attention on a fused projection to q, k and v.

    Uses a kernel that takes the fused projection if one can; otherwise this is `attention` on slices of it.
    Gradients are always those of the latter.

    Args:
      projection: an array [B, P, 3, H, D], or one whose queries and keys are in 8 bits.
      out_scale: requests a result in float8_e4m3fn and becomes its scale: averages of values are rounded
        without scaling, so the caller divides the values by it beforehand and keeps them within 448. None
        leaves the result in the values' dtype.
      implementation: a name in `ATTENTION`; a kernel for fused projections is used only if it is "mosaic_gpu"
        or None.
      config: forces the kernel for fused projections, with this tiling.

    Raises:
      ValueError: the projection has another shape.
      Unsupported: the named implementation cannot take it.
    """
    dtype = values_dtype(projection) if out_scale is None else jnp.dtype(jnp.float8_e4m3fn)
    a = SelfAttentionArguments(projection, out_dtype=dtype, attention=implementation)
    out = SELF_ATTENTION(a, implementation=None if config is None else "mosaic_gpu", config=config)
    return out if out_scale is None else QArray(out, out_scale)


def _append(a: AppendArguments) -> Appended:
    """Unfused append: RoPE, the writes to the cache and `attention` as separate ops."""
    R, T, *_, D = a.qkv.shape
    q = rotate(a.qkv[..., :-2, :].reshape(R, T, -1, D), a.rotation)
    k = rotate(a.qkv[..., -2, :], a.rotation).swapaxes(1, 2)  # [R, K, T, D]
    v = a.qkv[..., -1, :].swapaxes(1, 2)

    def write(old: Array, new: Array) -> Array:
        # Rows of one slot that write nothing would all target the row past the capacity.
        if T > 1 or a.slots is not None:
            return write_rows(old, new, a.start, a.count, a.slots)
        at = jnp.where(a.count > 0, jnp.minimum(a.start, a.capacity), a.capacity)
        return write_row(old, new, at)

    keys, values = (
        jax.tree.map(write, old, quantize(x, old.dtype, axes=3) if isinstance(old, QArray) else x)
        for old, x in ((a.keys, k), (a.values, v))
    )

    def attend(keys, values):
        return attention(q, keys, values, a.key_range, slots=a.slots, implementation=a.attention)

    return Appended(keys, values, attend)


APPEND = Op(
    "append",
    {
        "mosaic_gpu": Implementation(mosaic_gpu.append, mosaic_gpu.unsupported_append),
        "xla": Implementation(_append),
    },
    {"gpu": ("mosaic_gpu", "xla")},
)


def append(
    qkv: Float[Array, "R T K group_and_kv D"],
    rotation: Rotation,
    keys: Float[Array, "B K S D"] | QArray,
    values: Float[Array, "B K S D"] | QArray,
    start: Int[Array, " R"],
    count: Int[Array, " R"],
    *,
    slots: Int[Array, " R"] | None = None,
    capacity: int,
    implementation: str | None = None,
    config: DecodeConfig | None = None,
) -> Appended:
    """Appends new tokens to a KV cache; each then attends to its slot of the cache up to itself.

    Token `t` of row `r` has the position `start[r] + t` in its slot. Tokens from `count[r]` on, and those
    beyond the capacity, are not appended; the former attend to nothing and give zeros. All rows are appended
    before any attends, so that several may be consecutive chunks of one slot. The fused kernel has no
    gradients.

    Args:
      qkv: projections of the new tokens: for each kv head its queries, key and value.
      rotation: RoPE of queries and keys.
      keys, values: the cache; its keys are rotated. If they are QArrays, each new vector is quantized by its
        own maximum.
      start: offset of each row's tokens in its slot.
      count: number of new tokens of each row to append.
      slots: `0 <= slots[r] < B`, also for rows without tokens. Rows of one slot must not overlap. None if row
        `r` belongs to slot `r` (R == B).
      capacity: maximum number of tokens in the cache; S is larger, and rows past the capacity may be written
        but are never read.
      implementation: a name in `ATTENTION`; a fused kernel is used only if it is "mosaic_gpu" or None.
      config: forces the fused kernel, with this tiling.

    Returns:
      The cache with the tokens appended, and a function for their attention to it. If several calls append
      to it, all must do so before any attends: between two writes, XLA may copy the cache for a read.

    Raises:
      ValueError: shapes that don't fit together, or a cache without a row beyond the capacity.
      Unsupported: the named implementation cannot take these arguments.
    """
    a = AppendArguments(
        qkv, rotation, keys, values, start, count, slots, capacity=capacity, attention=implementation
    )
    return APPEND(a, implementation=None if config is None else "mosaic_gpu", config=config)
