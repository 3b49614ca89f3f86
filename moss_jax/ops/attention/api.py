"""The attention op: its contract, and the choice among its implementations.

B batch/slot, T query tokens, S keys, K kv heads, G query heads per kv head, H = K * G, D head
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from moss_jax.ops.attention import cudnn, mosaic_gpu, mosaic_tpu, reference, xla
from moss_jax.ops.attention.arguments import Arguments, KeyRange, Unsupported
from moss_jax.sharding import partition_spec

logger = logging.getLogger(__name__)

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


def choose(arguments: Arguments, implementation: str | None = None, platform: str | None = None) -> str:
    """Name of the implementation that takes a call; the choice and its reasons are logged once each.

    Raises:
      Unsupported: the named implementation does not exist or cannot take the arguments.
    """
    platform = platform or jax.default_backend()
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise Unsupported(
                f"no attention implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}"
            )
        if reason := IMPLEMENTATIONS[implementation].unsupported(arguments, platform):
            raise Unsupported(f"attention implementation {implementation!r} cannot be used: {reason}")
        return implementation
    passed_over = []
    for name in ORDER.get(platform, ("xla",)):
        reason = IMPLEMENTATIONS[name].unsupported(arguments, platform)
        if reason is None:
            _log_once(f"attention on {platform}: using {name}", *passed_over)
            return name
        passed_over.append(f"not using {name}: {reason}")
    raise Unsupported(f"no attention implementation for {platform}: {'; '.join(passed_over)}")


def _spread(attend: Callable[[Arguments], Array]) -> Callable[[Arguments], Array]:
    """Over the mesh that is in use: every device computes its rows of the batch and its kv heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
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


@functools.cache
def _log_once(*lines: str) -> None:
    logger.info("%s", "; ".join(lines))
