"""Public API of the fused residual add and norm: its contract and implementations.

D width
"""

from typing import overload

import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.dispatch import Implementation, Op
from moss_jax.ops.norm import base, mosaic_gpu
from moss_jax.ops.norm.base import Arguments, Norm, Residual, check
from moss_jax.ops.qarray import QArray

ADD_NORM = Op(
    "add_norm",
    {
        "mosaic_gpu": Implementation(mosaic_gpu.apply, mosaic_gpu.unsupported),
        "xla": Implementation(base.define),
        "reference": Implementation(base.reference),
    },
    {"gpu": ("mosaic_gpu", "xla")},
)


@overload
def add_norm(
    residual: Residual,
    norm: Norm,
    *,
    out_scale: None = None,
    implementation: str | None = None,
    config: mosaic_gpu.Config | None = None,
) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]: ...


@overload
def add_norm(
    residual: Residual,
    norm: Norm,
    *,
    out_scale: Float[Array, ""] | None,
    implementation: str | None = None,
    config: mosaic_gpu.Config | None = None,
) -> tuple[Float[Array, "... D"] | QArray, Float[Array, "... D"]]: ...


def add_norm(
    residual: Residual,
    norm: Norm,
    *,
    out_scale: Float[Array, ""] | None = None,
    implementation: str | None = None,
    config: mosaic_gpu.Config | None = None,
) -> tuple[Float[Array, "... D"] | QArray, Float[Array, "... D"]]:
    """Adds the pending branch to a residual stream and normalises the sum `y` over its last axis.

    An RMS norm is `y / sqrt(mean(y²) + eps) * weight`, a layer norm
    `(y - mean(y)) / sqrt(var(y) + eps) * weight + bias`. Statistics are in float32. It has gradients in all
    arrays.

    Args:
      residual: the stream; the results have its dtype.
      norm: the parameters.
      out_scale: a power of two by which the normalised rows are divided before they are rounded to
        float8_e4m3fn. They must fit: a norm of D columns is bounded by sqrt(D) |weight| + |bias|. None leaves
        them in the dtype of the stream.
      implementation: a name in `ADD_NORM`; None takes the first in the platform's order that can.
      config: tiling of the named implementation.

    Returns:
      The normalised rows, and y.

    Raises:
      ValueError: shapes or dtypes that don't fit together.
      Unsupported: the named implementation cannot take these arguments.
    """
    check(residual, norm)
    x, branch, scale = residual
    weight, bias, dtype = norm.weight, norm.bias, x.dtype
    if out_scale is not None:
        dtype = jnp.dtype(jnp.float8_e4m3fn)
        weight = weight / out_scale.astype(weight.dtype)
        bias = None if bias is None else bias / out_scale.astype(bias.dtype)
    scale = None if scale is None else jnp.asarray(scale, x.dtype)
    a = Arguments(x, branch, scale, weight, bias, eps=norm.eps, out_dtype=dtype)
    normed, y = ADD_NORM(a, implementation=implementation, config=config)
    return (normed if out_scale is None else QArray(normed, out_scale)), y
