"""The linear map in float8 and what follows it one after the other, for any platform.

M rows, N outputs
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moss_jax.ops.fp8_linear.arguments import Arguments
from moss_jax.ops.gelu import gelu


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """XLA takes everything."""
    del arguments, platform
    return None


def apply(a: Arguments) -> Float[Array, "M N"]:
    """Computes the op, with what the bias is added to in `out_dtype`; differentiable in the rounded rows."""
    products = lax.dot_general(
        a.x.numbers, a.kernel, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    y = (products * a.scale * a.x.scale[:, None]).astype(a.out_dtype)
    if a.gelu:
        return gelu(y, a.bias)
    return y if a.bias is None else (y + a.bias).astype(a.out_dtype)
