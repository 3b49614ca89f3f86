"""The linear map by weights of which those of one output lie side by side.

A decoded token waits for its weights. On an NVIDIA GPU, XLA makes of "multiply and sum along the last axis"
a kernel that reads small matrices faster than its matmul of one row does; with many rows it is the other way
round.

K inputs, N outputs
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float


def pays(platform: str | None = None) -> bool:
    """Whether one row goes faster by weights that lie so than by `[K, N]`.

    Args:
      platform: the default backend's if None.
    """
    return (platform or jax.default_backend()) == "gpu"


def contiguous_linear(
    x: Float[Array, "... K"], kernel: Float[Array, "N K"], *, out_dtype: DTypeLike | None = None
) -> Float[Array, "... N"]:
    """x @ kernel.T, accumulated in float32.

    Args:
      out_dtype: of the outputs; the kernel's if None.

    Raises:
      ValueError: x and the kernel differ in K.
    """
    if kernel.ndim != 2 or x.shape[-1] != kernel.shape[1]:
        raise ValueError(f"x [..., K] and kernel [N, K] must share K; got {x.shape} and {kernel.shape}")
    out_dtype = out_dtype or kernel.dtype
    if x.size == x.shape[-1] and pays():
        products = x.reshape(1, -1).astype(jnp.float32) * kernel.astype(jnp.float32)
        return products.sum(axis=-1).astype(out_dtype).reshape(*x.shape[:-1], -1)
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, kernel, contract, preferred_element_type=out_dtype)
