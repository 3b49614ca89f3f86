"""The linear map and what follows it one after the other, for any platform.

K inputs, N outputs
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moss_jax.ops.fused_linear.arguments import Arguments
from moss_jax.ops.gelu import gelu


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """XLA takes everything."""
    del arguments, platform
    return None


def apply(a: Arguments) -> Float[Array, "... N"]:
    """Computes the op, the product rounded before the bias is added; differentiable.

    Rows stay on the axes that they come on, by which a mesh may split them.
    """
    y = _scaled_product(a)
    if a.gelu:
        y = gelu(y, a.bias)
    elif a.bias is not None:
        y = y + a.bias
    if a.out_scale is not None:
        y = y * a.out_scale
    return (y if a.residual is None else a.residual + y).astype(a.out_dtype)


def _scaled_product(a: Arguments) -> Float[Array, "... N"]:
    """In the dtype of the kernel; if that is in 8 bits in that of the results, or bfloat16 for 8 bits."""
    over = ((a.x.ndim - 1,), (1 if a.in_8_bits else 0,))
    dtype = jnp.float32 if a.in_8_bits else a.kernel.dtype
    y = lax.dot_general(a.x, a.kernel, (over, ((), ())), preferred_element_type=dtype)
    if not a.in_8_bits:
        return y
    return (y * a.scale).astype(jnp.bfloat16 if a.out_dtype.itemsize == 1 else a.out_dtype)
