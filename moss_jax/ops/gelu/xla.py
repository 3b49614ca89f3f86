"""The gelu in plain JAX, for any platform."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.gelu.arguments import Arguments

# log Phi(-a), for a >= 0, is the polynomial with these coefficients, highest power first, to within 2.2e-4
# for a <= 5, 2.2e-3 for a <= 13, and low enough beyond for exp to vanish: a weighted minimax fit of degree 7.
LOG_TAIL = (
    -3.310256e-07,
    1.707342e-05,
    -0.0003685876,
    0.00441336,
    -0.03330725,
    -0.3231688,
    -0.7953252,
    -0.6933609,
)


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """XLA takes everything."""
    del arguments, platform
    return None


def apply(a: Arguments) -> Float[Array, "... N"]:
    """Computes the op; differentiable."""
    # On a GPU the erfc in JAX's costs three times what it takes to read and write bfloat16.
    return _gelu(a.biased) if a.x.dtype == jnp.bfloat16 else jax.nn.gelu(a.biased, approximate=False)


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
    tail = jnp.exp(polynomial(LOG_TAIL, jnp.abs(x)))
    return jnp.where(x < 0, tail, 1 - tail)


def polynomial(coefficients: Sequence[float], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The coefficients are in the order of `LOG_TAIL`."""
    total, *others = coefficients  # A polynomial that begins with 0 would make NaN of infinity.
    for coefficient in others:
        total = total * x + coefficient
    return total
