"""The norm and the linear map one after the other, which have kernels of their own; for any platform.

M rows, N outputs
"""

from jaxtyping import Array, Float

from moss_jax.ops.linear import linear
from moss_jax.ops.norm import rms_norm
from moss_jax.ops.norm_linear.arguments import Arguments


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """It takes everything."""
    del arguments, platform
    return None


def apply(a: Arguments) -> Float[Array, "M N"]:
    """Computes the op, with what is normed in the dtype of x; differentiable where `linear` is."""
    normed, _ = rms_norm(a.x, a.norm, eps=a.eps)
    return linear(normed, a.weights, a.scale)
