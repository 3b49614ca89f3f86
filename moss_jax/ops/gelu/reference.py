"""The definition of the op: plain float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.gelu.arguments import Arguments


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """The reference takes everything."""
    del arguments, platform
    return None


def apply(a: Arguments) -> Float[Array, "... N"]:
    """Computes the op in float32, by erfc."""
    return jax.nn.gelu(a.biased.astype(jnp.float32), approximate=False).astype(a.x.dtype)
