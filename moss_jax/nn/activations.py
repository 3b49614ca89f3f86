"""Activation functions that XLA computes slowly as they are written in `jax.nn`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# log Phi(-a), for a >= 0, is the polynomial with these coefficients, lowest power first, to within 2.2e-4 for
# a <= 5, 2.2e-3 for a <= 13, and low enough beyond for exp to vanish: a weighted minimax fit of degree 7.
_LOG_TAIL = (
    -0.6933609,
    -0.7953252,
    -0.3231688,
    -0.03330725,
    0.00441336,
    -0.0003685876,
    1.707342e-05,
    -3.310256e-07,
)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x Phi(x), with Phi the normal distribution's: exact to the accuracy of `x.dtype`.

    Source: arXiv 1606.08415, section 2.
    """
    # On a GPU the erfc in JAX's costs three times what it takes to read and write bfloat16.
    return _gelu(x) if x.dtype == jnp.bfloat16 else jax.nn.gelu(x, approximate=False)


@jax.custom_jvp
def _gelu(x: Array) -> Array:
    wide = x.astype(jnp.float32)
    return (wide * _phi(wide)).astype(x.dtype)


@_gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    wide = x.astype(jnp.float32)
    phi = _phi(wide)
    slope = phi + wide * jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    # The slope is all that the backward pass keeps, so it is kept narrow.
    return (wide * phi).astype(x.dtype), slope.astype(x.dtype) * tangent


def _phi(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Phi(x), whose *relative* error stays small where it vanishes, which that of (1 + erf) / 2 does not."""
    tail = jnp.exp(jnp.polyval(np.float32(_LOG_TAIL[::-1]), jnp.abs(x)))
    return jnp.where(x < 0, tail, 1 - tail)
