"""The attention op: its contract, and the choice among its implementations.

B batch/slot, T query tokens, S keys, K kv heads, G query heads per kv head, H = K * G, D head
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, DTypeLike, Float, Int

from moss_jax.memory import write_row, write_rows
from moss_jax.ops import dispatch
from moss_jax.ops.attention import cudnn, mosaic_gpu, mosaic_tpu, reference, xla
from moss_jax.ops.attention.arguments import (
    Arguments,
    KeyRange,
    Projection,
    RoundedProjection,
    projection_sizes,
    slices,
    values_dtype,
)
from moss_jax.ops.rotary import Rotation, rotate
from moss_jax.sharding import partition_spec

# Each is a module with `unsupported(arguments, platform) -> reason or None` and `attend(arguments)`.
IMPLEMENTATIONS = {
    "cudnn": cudnn,
    "mosaic_gpu": mosaic_gpu,
    "mosaic_tpu": mosaic_tpu,
    "xla": xla,
    "reference": reference,
}

# The compiler cannot spread these over a mesh: each device is given its part of the batch and of the heads.
SPREAD_BY_HAND = ("mosaic_gpu", "mosaic_tpu")

# The first that supports the arguments is taken.
ORDER = {"gpu": ("cudnn", "mosaic_gpu", "xla"), "cpu": ("xla",), "tpu": ("mosaic_tpu", "xla")}


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    kv_range: KeyRange | None = None,
    *,
    causal: bool = False,
    bias: Float[Array, "B S"] | None = None,
    k_scale: Float[Array, "B K S"] | None = None,
    v_scale: Float[Array, "B K S"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H D"]:
    """Softmax attention in which each query sees one range of the keys.

    Head `h` of the queries reads kv head `h // G`. Keys outside a query's range have no influence, and
    those that no query of a row sees may hold anything, NaN too. A query whose range is empty gives exact
    zeros. Accumulates in float32.

    Args:
      q, k, v: queries, keys and values.
      kv_range: the keys that each query sees; None for all of them.
      causal: instead of a range: query `t` sees the keys up to `t`.
      bias: float32, added to the scores of each key.
      k_scale, v_scale: float32, for K and V in int8 or float8_e4m3fn: what each vector is multiplied with.
        Such a call has no gradients.
      scale: of the scores before the bias; 1 / sqrt(D) if None.
      implementation: a name in `IMPLEMENTATIONS`; None takes the first of the platform's order that can.

    Returns:
      [B, T, H, D] in q's dtype.

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
        k_scale=k_scale,
        v_scale=v_scale,
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        causal=causal,
    )
    if k.shape[2] == 0:
        return jnp.zeros_like(q)
    name = choose(arguments, implementation)
    attend = IMPLEMENTATIONS[name].attend
    return (_spread(attend) if name in SPREAD_BY_HAND else attend)(arguments)


def self_attention(
    projection: Projection,
    *,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "B P H D"]:
    """Attention of every position to every position, straight from a fused projection to q, k and v.

    A kernel that reads the projection as it lies takes the calls that it can; others are `attention` on its
    slices. Gradients are always those of `attention`.

    Args:
      projection: an array [B, P, 3, H, D], or one whose queries and keys are in 8 bits.
      out_dtype: of the results; that of the values if None. float8_e4m3fn is for what comes next to take
        8 bits; the caller keeps the values within 448, of which the results are averages.
      implementation: as in `attention`.

    Raises:
      ValueError: the projection has another shape.
      Unsupported: the named implementation cannot take it.
    """
    rounded = isinstance(projection, RoundedProjection)
    if not rounded and (projection.ndim != 5 or projection.shape[2] != 3):
        raise ValueError(f"self_attention takes a projection [B, P, 3, H, D], not {projection.shape}")
    out_dtype = jnp.dtype(values_dtype(projection) if out_dtype is None else out_dtype)
    unsupported = functools.partial(mosaic_gpu.unsupported_projection, projection, out_dtype)
    if _takes_whole("attention from a fused projection", unsupported, implementation):
        return _from_projection(implementation, out_dtype, projection)
    return _from_slices(implementation, out_dtype, projection)


def _takes_whole(what: str, unsupported: Callable[[str], str | None], implementation: str | None) -> bool:
    """Whether mosaic_gpu takes a call as it is, before it is made into one of `attention`."""
    platform = jax.default_backend()
    wanted = ORDER.get(platform, ()) if implementation is None else (implementation,)
    if "mosaic_gpu" not in wanted:
        return False
    reason = unsupported(platform)
    dispatch.log_once(
        f"{what} on {platform}: using mosaic_gpu"
        if reason is None
        else f"{what} on {platform}: in steps, since mosaic_gpu cannot do it at once: {reason}"
    )
    return reason is None


def _from_slices(implementation, out_dtype, projection):
    q, k, v = slices(projection)
    out = attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), implementation=implementation)
    return out.astype(out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _from_projection(implementation, out_dtype, projection):
    del implementation
    attend = functools.partial(mosaic_gpu.attend_projection, out_dtype=out_dtype)
    if (mesh := _mesh()) is None:
        return attend(projection)
    B, _, H, _ = projection_sizes(projection)
    batch, heads = partition_spec(("batch", "heads"), (B, H), mesh)
    spec, v_spec = PartitionSpec(batch, None, None, heads), PartitionSpec(batch, None, heads)
    if isinstance(projection, RoundedProjection):
        spec = RoundedProjection(spec, v_spec, PartitionSpec())
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(spec,),
        out_specs=v_spec,
        check_vma=False,
    )(projection)


def _from_projection_forward(implementation, out_dtype, projection):
    """That of the slices: the kernel saves nothing that a backward pass could start from."""
    return jax.vjp(functools.partial(_from_slices, implementation, out_dtype), projection)


def _from_projection_backward(implementation, out_dtype, pull, d_out):
    del implementation, out_dtype
    return pull(d_out)


_from_projection.defvjp(_from_projection_forward, _from_projection_backward)


def append_and_attend(
    qkv: Float[Array, "B T K G+2 D"],
    by: Rotation,
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S D"],
    start: Int[Array, " B"],
    count: Int[Array, " B"],
    *,
    capacity: int,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B K S D"], Float[Array, "B K S D"]]:
    """Appends new tokens to a cache and attends from them to all that it then holds up to themselves.

    Token `t` of slot `b` has the place `start[b] + t`. Tokens from `count[b]` on, and those that have no
    place below the capacity, are not appended; the former attend to nothing and give zeros. With `mosaic_gpu`
    it has no gradients.

    Args:
      qkv: what was projected of each token: for each kv head its queries, key and value.
      by: rotates queries and keys.
      keys, values: the cache; keys are rotated.
      start: tokens that it holds.
      capacity: that there is room for; S is larger, and what lies beyond may be written to but is never read.
      implementation: as in `attention`.

    Returns:
      What the tokens found, and the cache with them in it.

    Raises:
      ValueError: shapes that don't fit together, or a cache without a row beyond the capacity.
      Unsupported: the named implementation cannot take these arguments.
    """
    B, T, kv_heads, group_and_kv, D = qkv.shape
    if keys.shape[2] <= capacity:
        raise ValueError(
            f"a cache for {capacity} tokens has at least {capacity + 1} rows, not {keys.shape[2]}"
        )
    place = start[:, None] + jnp.arange(T, dtype=jnp.int32)
    end = jnp.where(jnp.arange(T) < count[:, None], jnp.minimum(place + 1, capacity), 0)
    kv_range = KeyRange(jnp.zeros_like(end), end)
    q = jax.ShapeDtypeStruct((B, T, kv_heads * (group_and_kv - 2), D), qkv.dtype)
    a = Arguments(q, keys, values, kv_range, None, 1 / math.sqrt(D), causal=False)
    unsupported = functools.partial(mosaic_gpu.unsupported_append, a)
    if _mesh() is None and _takes_whole("appending tokens", unsupported, implementation):
        return mosaic_gpu.append_and_attend(qkv, by, a, start, count, capacity)
    q = rotate(qkv[..., :-2, :].reshape(B, T, -1, D), by)
    k = rotate(qkv[..., -2, :], by).swapaxes(1, 2)  # [B, K, T, D]
    v = qkv[..., -1, :].swapaxes(1, 2)
    if T > 1:
        keys, values = (write_rows(old, new, start, count) for old, new in ((keys, k), (values, v)))
    else:
        at = jnp.where(count > 0, jnp.minimum(start, capacity), capacity)
        keys, values = (write_row(old, new, at) for old, new in ((keys, k), (values, v)))
    return attention(q, keys, values, kv_range, implementation=implementation), keys, values


def choose(arguments: Arguments, implementation: str | None = None, platform: str | None = None) -> str:
    """Name of the implementation that takes a call; the choice and its reasons are logged once each.

    Raises:
      Unsupported: the named implementation does not exist or cannot take the arguments.
    """
    return dispatch.choose("attention", IMPLEMENTATIONS, ORDER, arguments, implementation, platform)


def _spread(attend: Callable[[Arguments], Array]) -> Callable[[Arguments], Array]:
    """Over the mesh that is in use: every device computes its rows of the batch and its kv heads."""
    if (mesh := _mesh()) is None:
        return attend

    def on_mesh(a: Arguments) -> Array:
        batch, kv_heads = partition_spec(("batch", "kv_heads"), a.k.shape[:2], mesh)
        rows, heads = PartitionSpec(batch), PartitionSpec(batch, kv_heads)
        queries = PartitionSpec(batch, None, kv_heads)
        specs = {"q": queries, "k": heads, "v": heads, "k_scale": heads, "v_scale": heads}
        arrays = {f.name: getattr(a, f.name) for f in dataclasses.fields(a) if not f.metadata.get("static")}
        arrays = {name: x for name, x in arrays.items() if x is not None}
        return jax.shard_map(
            lambda arrays: attend(dataclasses.replace(a, **arrays)),
            mesh=mesh,
            in_specs=({name: specs.get(name, rows) for name in arrays},),
            out_specs=queries,
            # The kernels don't say over which axes their outputs vary.
            check_vma=False,
        )(arrays)

    return on_mesh


def _mesh() -> AbstractMesh | None:
    """The mesh that is in use, if there is one over which a kernel has to be spread."""
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types
    return None if alone else mesh
