"""An RMS norm with the linear map behind it: their contract, and the choice among their implementations.

M rows, K inputs, N outputs
"""

from jaxtyping import Array, Float, Float8e4m3fn, Float32, Int8

from moss_jax.ops import dispatch
from moss_jax.ops.norm_linear import mosaic_gpu, reference, xla
from moss_jax.ops.norm_linear.arguments import Arguments

# Each is a module with `unsupported(arguments, platform) -> reason or None` and `apply(arguments)`.
IMPLEMENTATIONS = {"mosaic_gpu": mosaic_gpu, "xla": xla, "reference": reference}

# The first that supports the arguments is taken.
ORDER = {"gpu": ("mosaic_gpu", "xla")}


def norm_linear(
    x: Float[Array, "... K"],
    norm: Float[Array, " K"],
    weights: Int8[Array, "N K"] | Float8e4m3fn[Array, "N K"],
    scale: Float32[Array, " N"],
    *,
    eps: float,
    implementation: str | None = None,
) -> Float[Array, "... N"]:
    """A linear map of what an RMS norm returns: `rmsnorm(x) * norm @ weights.T * scale`.

    It has gradients in x and norm where `linear` has them, but not with `mosaic_gpu`.

    Args:
      x: the residual stream; the result has its dtype.
      norm: the weight of the norm.
      weights: of the linear map, as `linear` takes them.
      scale: what each output is multiplied with.
      eps: added to the mean square before its root is taken.
      implementation: a name in `IMPLEMENTATIONS`; None takes the first of the platform's order that can.

    Raises:
      ValueError: shapes or dtypes that don't fit together.
      Unsupported: the named implementation cannot take these arguments.
    """
    a = Arguments(x.reshape(-1, x.shape[-1]), norm, weights, scale, eps=eps)
    y = IMPLEMENTATIONS[choose(a, implementation)].apply(a)
    return y.reshape(*x.shape[:-1], weights.shape[0])


def choose(arguments: Arguments, implementation: str | None = None, platform: str | None = None) -> str:
    """Name of the implementation that takes a call; the choice and its reasons are logged once each.

    Raises:
      Unsupported: the named implementation does not exist or cannot take the arguments.
    """
    return dispatch.choose("norm_linear", IMPLEMENTATIONS, ORDER, arguments, implementation, platform)
