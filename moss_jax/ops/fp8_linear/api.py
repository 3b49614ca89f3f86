"""The linear map in float8: its contract, and the choice among its implementations.

K inputs, N outputs
"""

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Float8e4m3fn, Float32

from moss_jax.ops import dispatch
from moss_jax.ops.fp8_linear import mosaic_gpu, reference, xla
from moss_jax.ops.fp8_linear.arguments import Arguments
from moss_jax.ops.rounding import Rounded

# Each is a module with `unsupported(arguments, platform) -> reason or None` and `apply(arguments)`.
IMPLEMENTATIONS = {"mosaic_gpu": mosaic_gpu, "xla": xla, "reference": reference}

# The first that supports the arguments is taken.
ORDER = {"gpu": ("mosaic_gpu", "xla")}


def fp8_linear(
    x: Rounded,
    kernel: Float8e4m3fn[Array, "N K"],
    scale: Float32[Array, " N"],
    bias: Float[Array, " N"] | None = None,
    *,
    gelu: bool = False,
    out_dtype: DTypeLike,
    implementation: str | None = None,
) -> Float[Array, "... N"]:
    """`x @ kernel.T * scale + bias` with both factors of the product in 8 bits, and the exact gelu of it.

    It has gradients in what x was rounded from, but not with `mosaic_gpu`.

    Args:
      x: the inputs [..., K].
      kernel: the weights.
      scale: what each output is multiplied with.
      bias: is added then; None for none.
      gelu: whether the gelu is taken of that.
      out_dtype: of the outputs.
      implementation: a name in `IMPLEMENTATIONS`; None takes the first of the platform's order that can.

    Returns:
      [..., N], in `out_dtype`.

    Raises:
      ValueError: shapes or dtypes that don't fit together.
      Unsupported: the named implementation cannot take these arguments.
    """
    *rows, K = x.numbers.shape
    flat = Rounded(x.numbers.reshape(-1, K), x.scale.reshape(-1))
    a = Arguments(flat, kernel, scale, bias, gelu=gelu, out_dtype=jnp.dtype(out_dtype))
    return IMPLEMENTATIONS[choose(a, implementation)].apply(a).reshape(*rows, a.outputs)


def choose(arguments: Arguments, implementation: str | None = None, platform: str | None = None) -> str:
    """Name of the implementation that takes a call; the choice and its reasons are logged once each.

    Raises:
      Unsupported: the named implementation does not exist or cannot take the arguments.
    """
    return dispatch.choose("fp8_linear", IMPLEMENTATIONS, ORDER, arguments, implementation, platform)
