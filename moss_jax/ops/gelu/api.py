"""The exact gelu behind a bias: its contract, and the choice among its implementations.

N columns
"""

from jaxtyping import Array, Float

from moss_jax.ops import dispatch
from moss_jax.ops.gelu import mosaic_gpu, reference, xla
from moss_jax.ops.gelu.arguments import Arguments

# Each is a module with `unsupported(arguments, platform) -> reason or None` and `apply(arguments)`.
IMPLEMENTATIONS = {"mosaic_gpu": mosaic_gpu, "xla": xla, "reference": reference}

# The first that supports the arguments is taken.
ORDER = {"gpu": ("mosaic_gpu", "xla")}


def gelu(
    x: Float[Array, "... N"], bias: Float[Array, " N"] | None = None, *, implementation: str | None = None
) -> Float[Array, "... N"]:
    """y Phi(y) for y = x + bias, with Phi the normal distribution's: exact to the accuracy of `x.dtype`.

    Source: arXiv 1606.08415, section 2. It has gradients in x and bias.

    Args:
      x: the inputs.
      bias: is added to them, and the sum rounded to their dtype; None for none.
      implementation: a name in `IMPLEMENTATIONS`; None takes the first of the platform's order that can.

    Returns:
      [..., N], in the dtype of x.

    Raises:
      ValueError: shapes that don't fit together.
      Unsupported: the named implementation cannot take these arguments.
    """
    a = Arguments(x, bias)
    return IMPLEMENTATIONS[choose(a, implementation)].apply(a)


def choose(arguments: Arguments, implementation: str | None = None, platform: str | None = None) -> str:
    """Name of the implementation that takes a call; the choice and its reasons are logged once each.

    Raises:
      Unsupported: the named implementation does not exist or cannot take the arguments.
    """
    return dispatch.choose("gelu", IMPLEMENTATIONS, ORDER, arguments, implementation, platform)
