"""Arguments and definition of the exact GELU after a bias.

N columns
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops import dispatch

# Coefficients, highest power first, of log Phi(-a) for a >= 0: a weighted minimax fit of degree 7, within
# 2.2e-4 for a <= 5 and 2.2e-3 for a <= 13, and low enough beyond for exp to vanish.
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
    """Validated arguments of one call, built by `gelu` and read by implementations."""

    x: Float[Array, "..."]
    bias: Float[Array, "..."] | None = None

    @property
    def biased(self) -> Float[Array, "..."]:
        """The GELU's argument."""
        return self.x if self.bias is None else (self.x + self.bias).astype(self.x.dtype)


def define(a: Arguments) -> Float[Array, "..."]:
    """x Phi(x); differentiable."""
    # On a GPU, JAX's erfc takes three times as long as reading and writing bfloat16.
    return _gelu(a.biased) if a.x.dtype == jnp.bfloat16 else jax.nn.gelu(a.biased, approximate=False)


reference = dispatch.in_float32(define, lambda a: a.x.dtype)


@jax.custom_jvp
def _gelu(x: Array) -> Array:
    wide = x.astype(jnp.float32)
    return (wide * _phi(wide)).astype(x.dtype)


@_gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    return _gelu(x), slope(x) * tangent


def slope(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The GELU's derivative, Phi(x) + x phi(x), in the dtype of x, since it is kept for the backward pass."""
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return (_phi(wide) + wide * density).astype(x.dtype)


def _phi(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Phi(x) with a small *relative* error where it vanishes, unlike (1 + erf) / 2."""
    tail = jnp.exp(polynomial(LOG_TAIL, jnp.abs(x)))
    return jnp.where(x < 0, tail, 1 - tail)


def polynomial(coefficients: Sequence[float], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Evaluates a polynomial by Horner's rule; coefficients in the order of `LOG_TAIL`."""
    total: Array | float
    total, *others = coefficients  # Starting from 0 would turn infinity into NaN.
    for coefficient in others:
        total = total * x + coefficient
    assert isinstance(total, Array)
    return total
