"""Public API of linear maps with prologues and epilogues: contracts and implementations.

Weights are floats or QArrays, which decide the precision of the GEMM: both operands unchanged, 8-bit weights
with 16-bit inputs (W8A16), or 8-bit weights and inputs (W8A8).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from moss_jax.ops.dispatch import Implementation, Op, in_float32
from moss_jax.ops.linear import base, gemv
from moss_jax.ops.linear.base import Layout, NormArguments, Weights, arguments, check
from moss_jax.ops.linear.mosaic_gpu import matmul_epilogue, norm_matmul, weight_only, weight_only_gemm
from moss_jax.ops.norm import Norm, Residual, add_norm
from moss_jax.ops.norm.base import check as check_norm
from moss_jax.ops.qarray import QArray

LINEAR = Op(
    "linear",
    {
        "weight_only": Implementation(weight_only.apply, weight_only.unsupported),
        "weight_only_gemm": Implementation(weight_only_gemm.apply, weight_only_gemm.unsupported),
        "matmul_epilogue": Implementation(matmul_epilogue.apply, matmul_epilogue.unsupported),
        "gemv": Implementation(gemv.apply, gemv.unsupported),
        "xla": Implementation(base.define),
        "reference": Implementation(base.reference),
    },
    {"gpu": ("weight_only", "weight_only_gemm", "matmul_epilogue", "gemv", "xla")},
)


def linear(
    x: Float[Array, "..."] | QArray,
    weights: Weights,
    *,
    gelu: bool = False,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
    config: weight_only.Config | weight_only_gemm.Config | matmul_epilogue.Config | None = None,
) -> Float[Array, "..."] | QArray:
    """`x @ kernel + bias` over the trailing axes of x, or the exact GELU of it; accumulates in float32.

    It has gradients in all operands of 16 bits or more, but not with `weight_only` and `weight_only_gemm`.
    Under differentiation, `matmul_epilogue` computes as `xla` does.

    Args:
      x: [..., inputs...]; for W8A8 a QArray with the kernel's input scale, or an array, which is rounded.
      weights: the kernel and the bias.
      gelu: whether the GELU is applied after the bias.
      out_dtype: of the results; None for the dtype of a float kernel, otherwise that of x. Results in
        float8_e4m3fn must stay within 448: beyond, `matmul_epilogue` saturates at 448, the others give NaN.
      implementation: a name in `LINEAR`; None takes the first in the platform's order that can.
      config: tiling of the named implementation.

    Returns:
      [..., outputs...]; a QArray if the kernel has an output scale.

    Raises:
      ValueError: shapes or dtypes that don't fit together.
      Unsupported: the named implementation cannot take these arguments.
    """
    x, dtype, out_scale = _inputs(x, weights, out_dtype)
    a = arguments(x, weights, out_scale, gelu=gelu, out_dtype=dtype)
    check(a)
    y = LINEAR(a, implementation=implementation, config=config)
    return y if out_scale is None else QArray(y, out_scale)


def residual_add(
    stream: Float[Array, "..."],
    x: Float[Array, "..."] | QArray,
    weights: Weights,
    gate: Float[Array, "..."] | None = None,
    *,
    implementation: str | None = None,
    config: matmul_epilogue.Config | None = None,
) -> Residual:
    """Adds `gate * linear(x)` to a residual stream: in the GEMM's epilogue (W8A8), or as a pending branch.

    Args:
      stream: [..., outputs...]; the result has its dtype.
      x, weights, implementation, config: as in `linear`.
      gate: broadcasts to [..., 1]; in an epilogue it is a single number, [1]. 1 if None.
    """
    if weights.scheme != "W8A8":
        y = linear(x, weights, out_dtype=stream.dtype, implementation=implementation, config=config)
        assert not isinstance(y, QArray)
        return Residual(stream, y, gate)
    x, dtype, _ = _inputs(x, weights, stream.dtype)
    gate = None if gate is None else gate.astype(jnp.float32)
    a = arguments(x, weights, residual=stream, gate=gate, out_dtype=dtype)
    check(a)
    return Residual(LINEAR(a, implementation=implementation, config=config))


def _inputs(x, weights, out_dtype):
    """Returns the inputs as the GEMM takes them, the dtype of the results, and their divisor."""
    kernel = weights.kernel
    if not isinstance(kernel, QArray):
        return x, jnp.dtype(out_dtype or kernel.dtype), None
    if kernel.output_scale is not None:
        out_dtype = jnp.float8_e4m3fn
    elif out_dtype is None:
        if isinstance(x, QArray):
            raise ValueError("out_dtype must be named for inputs in 8 bits")
        out_dtype = x.dtype
    if kernel.input_scale is not None and not isinstance(x, QArray):
        x = QArray((x / kernel.input_scale).astype(kernel.dtype), kernel.input_scale)
    return x, jnp.dtype(out_dtype), kernel.output_scale


def _norm_then_linear(a: NormArguments) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The unfused definition of `norm_linear`."""
    kernel = a.weights.kernel
    normed, x = add_norm(
        a.residual, a.norm, out_scale=kernel.input_scale if isinstance(kernel, QArray) else None
    )
    return LINEAR(a.linear(normed)), x


NORM_LINEAR = Op(
    "norm_linear",
    {
        "norm_matmul": Implementation(norm_matmul.apply, norm_matmul.unsupported),
        "xla": Implementation(_norm_then_linear),
        "reference": Implementation(
            in_float32(_norm_then_linear, lambda a: (a.out_dtype, a.residual.x.dtype))
        ),
    },
    {"gpu": ("norm_matmul", "xla")},
)


def norm_linear(
    residual: Residual,
    norm: Norm,
    weights: Weights,
    *,
    gelu: bool = False,
    implementation: str | None = None,
    config: norm_matmul.Config | None = None,
) -> tuple[Float[Array, "..."] | QArray, Float[Array, "..."]]:
    """A linear map of the normalised residual sum, `linear(norm(y))`, and that sum.

    It has gradients where `add_norm` and `linear` have them, but not with `norm_matmul`.

    Args:
      residual: the stream; results have its dtype.
      norm: parameters of the norm over the last axis.
      weights: of a map from that one axis.
      gelu: as in `linear`.
      implementation: a name in `NORM_LINEAR`; None takes the first in the platform's order that can.
      config: tiling of the named implementation.

    Returns:
      [..., outputs...], a QArray if the kernel has an output scale; and the residual sum y.

    Raises:
      ValueError: shapes or dtypes that don't fit together.
      Unsupported: the named implementation cannot take these arguments.
    """
    check_norm(residual, norm)
    kernel = weights.kernel
    out_scale = kernel.output_scale if isinstance(kernel, QArray) else None
    dtype = residual.x.dtype if out_scale is None else jnp.dtype(jnp.float8_e4m3fn)
    a = NormArguments(residual, norm, weights, out_scale, gelu=gelu, out_dtype=dtype)
    check(a.linear(residual.x))
    y, x = NORM_LINEAR(a, implementation=implementation, config=config)
    return (y if out_scale is None else QArray(y, out_scale)), x


def decode_layout(platform: str | None = None) -> Layout:
    """The layout of attention projections that is fastest for a single row.

    Args:
      platform: None for the default backend.
    """
    return "outputs_first" if (platform or jax.default_backend()) == "gpu" else "inputs_first"
