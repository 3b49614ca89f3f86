"""The linear map: its contract, and the choice among its implementations.

M rows, K inputs, N outputs
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, Float32, Int8

from moss_jax.ops import dispatch
from moss_jax.ops.linear import mosaic_gpu, reference, xla
from moss_jax.ops.linear.arguments import Arguments

# Each is a module with `unsupported(arguments, platform) -> reason or None` and `apply(arguments)`.
IMPLEMENTATIONS = {"mosaic_gpu": mosaic_gpu, "xla": xla, "reference": reference}

# The first that supports the arguments is taken.
ORDER = {"gpu": ("mosaic_gpu", "xla")}


def linear(
    x: Float[Array, "... K"],
    kernel: Int8[Array, "N K"] | Float8e4m3fn[Array, "N K"],
    scale: Float32[Array, " N"],
    *,
    out_dtype=None,
    implementation: str | None = None,
) -> Float[Array, "... N"]:
    """A linear map with weights in 8 bits and a scale per output; accumulates in float32.

    It has gradients in x, but not with `mosaic_gpu`.

    Args:
      x: the inputs.
      kernel: the weights.
      scale: what each output is multiplied with.
      out_dtype: of the outputs; that of x if None.
      implementation: a name in `IMPLEMENTATIONS`; None takes the first of the platform's order that can.

    Returns:
      [..., N]: `scale[n] * sum_k x[..., k] * kernel[n, k]`.

    Raises:
      ValueError: shapes or dtypes that don't fit together.
      Unsupported: the named implementation cannot take these arguments.
    """
    a = Arguments(x.reshape(-1, x.shape[-1]), kernel, scale, out_dtype=jnp.dtype(out_dtype or x.dtype))
    out = IMPLEMENTATIONS[choose(a, implementation)].apply(a)
    return out.reshape(*x.shape[:-1], a.outputs)


def choose(arguments: Arguments, implementation: str | None = None, platform: str | None = None) -> str:
    """Name of the implementation that takes a call; the choice and its reasons are logged once each.

    Raises:
      Unsupported: the named implementation does not exist or cannot take the arguments.
    """
    return dispatch.choose("linear", IMPLEMENTATIONS, ORDER, arguments, implementation, platform)
