"""The linear map and what follows it: its contract, and the choice among its implementations.

K inputs, N outputs
"""

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Float32

from moss_jax.ops import dispatch
from moss_jax.ops.fused_linear import mosaic_gpu, reference, xla
from moss_jax.ops.fused_linear.arguments import Arguments

# Each is a module with `unsupported(arguments, platform) -> reason or None` and `apply(arguments)`.
IMPLEMENTATIONS = {"mosaic_gpu": mosaic_gpu, "xla": xla, "reference": reference}

# The first that supports the arguments is taken.
ORDER = {"gpu": ("mosaic_gpu", "xla")}


def fused_linear(
    x: Float[Array, "... K"],
    kernel: Float[Array, "K N"] | Float[Array, "N K"],
    scale: Float32[Array, " N"] | None = None,
    bias: Float[Array, " N"] | None = None,
    *,
    gelu: bool = False,
    out_scale: Float32[Array, " 1"] | None = None,
    residual: Float[Array, "... N"] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "... N"]:
    """`residual + out_scale * act(x @ kernel * scale + bias)`, with the exact gelu as `act`, or nothing.

    It has gradients, and where they are taken `mosaic_gpu` computes as `xla` does.

    Args:
      x: the inputs, in the dtype of the kernel.
      kernel: the weights: [K, N], or in float8_e4m3fn [N, K].
      scale: what each output is multiplied with; there exactly if the kernel is in float8_e4m3fn.
      bias: is added then; None for none.
      gelu: whether the gelu is taken of that.
      out_scale: what the results are multiplied with before they are rounded, so that they make use of 8
        bits, or before the residual is added, as the gate of a branch; 1 if None.
      residual: is added at last; in the dtype of the results, of 16 bits or more. None for none.
      out_dtype: of the results; that of x if None, but to be named for inputs in 8 bits. In float8_e4m3fn
        results must stay within 448: beyond, `mosaic_gpu` gives 448, and the others NaN.
      implementation: a name in `IMPLEMENTATIONS`; None takes the first of the platform's order that can.

    Returns:
      [..., N], in `out_dtype`.

    Raises:
      ValueError: shapes or dtypes that don't fit together.
      Unsupported: the named implementation cannot take these arguments.
    """
    if out_dtype is None:
        if x.dtype.itemsize == 1:
            raise ValueError(f"out_dtype must be named for inputs in {x.dtype}")
        out_dtype = x.dtype
    a = Arguments(x, kernel, scale, bias, out_scale, residual, gelu=gelu, out_dtype=jnp.dtype(out_dtype))
    return IMPLEMENTATIONS[choose(a, implementation)].apply(a)


def choose(arguments: Arguments, implementation: str | None = None, platform: str | None = None) -> str:
    """Name of the implementation that takes a call; the choice and its reasons are logged once each.

    Raises:
      Unsupported: the named implementation does not exist or cannot take the arguments.
    """
    return dispatch.choose("fused_linear", IMPLEMENTATIONS, ORDER, arguments, implementation, platform)
