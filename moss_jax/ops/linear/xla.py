"""The linear map in plain JAX, for any platform.

M rows, K inputs, N outputs
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moss_jax.ops.linear.arguments import Arguments


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """XLA takes everything."""
    del arguments, platform
    return None


def apply(a: Arguments) -> Float[Array, "M N"]:
    """Computes the op; differentiable in x, and in a kernel that is not in 8 bits."""
    # 8 bits meet 8 bits as they are; other inputs hold 8 bits exactly.
    kernel = a.kernel if a.x_scale is not None else a.kernel.astype(a.x.dtype)
    contracted = 1 if a.quantized else 0
    products = lax.dot_general(
        a.x, kernel, (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32
    )
    return a.scaled(products)
