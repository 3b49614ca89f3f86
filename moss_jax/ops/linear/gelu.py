"""Public API of the exact GELU after a bias: its contract and implementations."""

from jaxtyping import Array, Float

from moss_jax.ops.dispatch import Implementation, Op
from moss_jax.ops.linear import gelu_base
from moss_jax.ops.linear.gelu_base import Arguments
from moss_jax.ops.linear.mosaic_gpu import bias_gelu

GELU = Op(
    "gelu",
    {
        "bias_gelu": Implementation(bias_gelu.apply, bias_gelu.unsupported),
        "xla": Implementation(gelu_base.define),
        "reference": Implementation(gelu_base.reference),
    },
    {"gpu": ("bias_gelu", "xla")},
)


def gelu(
    x: Float[Array, "..."],
    bias: Float[Array, "..."] | None = None,
    *,
    implementation: str | None = None,
    config: bias_gelu.Config | None = None,
) -> Float[Array, "..."]:
    """y Phi(y) for y = x + bias, with the normal distribution's Phi: exact to the accuracy of `x.dtype`.

    Source: arXiv 1606.08415, section 2. It has gradients in x and bias.

    Args:
      x: the inputs.
      bias: has the trailing axes of x; the sum is rounded to the dtype of x. None for none.
      implementation: a name in `GELU`; None takes the first in the platform's order that can.
      config: tiling of the named implementation.

    Raises:
      ValueError: the bias doesn't fit.
      Unsupported: the named implementation cannot take these arguments.
    """
    if bias is not None and bias.shape != x.shape[x.ndim - bias.ndim :]:
        raise ValueError(f"bias has the trailing axes of x, {x.shape}; got {bias.shape}")
    return GELU(Arguments(x, bias), implementation=implementation, config=config)
