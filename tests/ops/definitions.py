"""Definitions of the ops in float64, with a bound of the rounding errors of an implementation."""

import math

import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr

from moss_jax.ops.linear.base import Arguments
from moss_jax.ops.norm import Norm
from moss_jax.ops.qarray import QArray

DEVIATIONS = 6  # A normal variable is farther from its mean once in 5e8.
UNIT, SMALLEST = 2.0**-24, 2.0**-126  # Largest relative error of rounding to float32, least normal number.
# Hopper's tensor core adds 32 products of 8-bit numbers at once, and keeps 13 bits behind the largest one's.
PRODUCTS_AT_ONCE, UNIT_AT_ONCE = 32, 2.0**-11
# Relative error of the polynomial fits of Phi's tail, and in half steps of a result in 8 bits.
GELU_FIT, GELU_FIT_IN_8_BITS = 2.3e-3, 0.14


def exact(x) -> np.ndarray:
    """The numbers of an array or a QArray in float64."""
    if isinstance(x, QArray):
        return exact(x.values) * exact(x.scale).reshape(*x.scale.shape, *(1,) * (x.ndim - x.scale.ndim))
    with np.errstate(invalid="ignore"):  # Of signalling NaNs.
        return np.asarray(x).astype(np.float64)


def half_step(x: np.ndarray, dtype) -> np.ndarray:
    """Largest error of rounding to a dtype; in more than 8 bits, XLA may flush subnormals to zero."""
    info = jnp.finfo(dtype)
    tiny = float(info.tiny)
    return np.maximum(np.abs(x), tiny) * float(info.eps) / 2 + (tiny if info.bits > 8 else 0)


class Rounded:
    """Numbers in float64, and the standard deviation of the rounding errors that a computation may make.

    Rounding errors are taken as independent of each other and with mean zero.
    Source: Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019.
    """

    def __init__(self, value, deviation=0.0):
        self.value = exact(value)
        self.deviation = np.broadcast_to(deviation, self.value.shape)

    def __add__(self, other):
        other = as_rounded(other)
        deviations = np.broadcast_arrays(self.deviation, other.deviation)
        return Rounded(self.value + other.value, np.hypot(*deviations))

    def __mul__(self, other):
        other = as_rounded(other)
        deviation = np.hypot(self.value * other.deviation, other.value * self.deviation)
        return Rounded(self.value * other.value, deviation)

    def __matmul__(self, matrix: np.ndarray):
        return self.product(matrix, len(matrix) * UNIT)

    def product(self, matrix: np.ndarray, unit: float):
        """The matrix product, whose sums are off by up to `unit` times the length of the vector added up.

        K * UNIT for K products in float32: each partial sum is rounded, and up to sqrt(K) lengths large
        (Cauchy-Schwarz); K such errors add up to sqrt(K).
        """
        spread = self.deviation**2 + (unit * self.value) ** 2
        return Rounded(self.value @ matrix, np.sqrt(spread @ matrix**2))

    def map(self, function, slope):
        """A function of each number, given its derivative or an upper bound of that."""
        value, slope = function(self.value), slope(self.value) if callable(slope) else slope
        return Rounded(value, np.abs(slope) * self.deviation).off(4 * UNIT * np.abs(value))

    def off(self, error: np.ndarray):
        """The numbers, wrong by up to this error more."""
        return Rounded(self.value, np.hypot(self.deviation, error / DEVIATIONS))

    def rounded(self, dtype, scale=1.0):
        """The numbers, divided by a scale and rounded; that error is uniform."""
        error = half_step(self.value / scale, dtype) * scale / math.sqrt(3)
        return Rounded(self.value, np.hypot(self.deviation, error))

    def reshape(self, *shape):
        return Rounded(self.value.reshape(shape), self.deviation.reshape(shape))

    def check(self, found) -> None:
        """Raises AssertionError unless an array is this, rounded to its dtype, and NaN where this is."""
        value, numbers = self.value.reshape(found.shape), exact(found)
        bound = half_step(value, found.dtype) + DEVIATIONS * self.deviation.reshape(found.shape)
        np.testing.assert_array_equal(np.isnan(numbers), np.isnan(value))
        share = np.nan_to_num(np.abs(numbers - value) / bound).reshape(-1)
        worst = share.argmax()
        assert share[worst] <= 1, (
            f"{numbers.flat[worst]:.6g} instead of {value.flat[worst]:.6g} at {worst} of {found.shape}: "
            f"{share[worst]:.2f} times the bound, and {(share > 1).mean():.1%} are beyond it"
        )


def as_rounded(x) -> Rounded:
    return x if isinstance(x, Rounded) else Rounded(x)


def norm(y: Rounded, params: Norm) -> Rounded:
    """RMS norm, or layer norm if there is a bias."""
    mean = np.full((y.value.shape[-1], 1), 1 / y.value.shape[-1])
    if params.bias is not None:
        y = y + (y @ mean) * -1
    squares = y.map(np.square, lambda x: 2 * x) @ mean + params.eps
    normed = y * squares.map(lambda x: x**-0.5, lambda x: x**-1.5 / 2) * params.weight
    return normed if params.bias is None else normed + params.bias


def gelu(y: Rounded, out_dtype) -> Rounded:
    """The exact GELU, which bfloat16 and 8 bits have by a polynomial fit of log Phi."""
    size, result = np.abs(y.value), y.map(lambda x: x * ndtr(x), 1.13)
    fit = 0 if out_dtype == jnp.float32 else GELU_FIT * ndtr(-size)
    return result.off(size * (fit + SMALLEST))


def linear(a: Arguments, x: Rounded, kept) -> Rounded:
    """The linear map and its epilogue, with results rounded to `kept` after each step; [M, N]."""
    (M, K, N), w = a.shape, a.weights
    kernel, unit = exact(w.kernel), K * UNIT
    if w.scheme == "W8A8":
        unit = max(unit, UNIT_AT_ONCE * math.sqrt(K / PRODUCTS_AT_ONCE))
    matrix = kernel.reshape(N, K).T if w.outputs_first else kernel.reshape(K, N)
    y = x.reshape(M, K).product(matrix, unit).rounded(kept)
    if w.bias is not None:
        y = (y + exact(w.bias).reshape(N)).rounded(kept)
    if a.gelu:
        y = gelu(y, a.out_dtype).rounded(kept)
    if a.out_factor is not None:
        y = y * exact(a.out_factor)
        y = y.off(GELU_FIT_IN_8_BITS * half_step(y.value, a.out_dtype))
    if a.gate is not None:
        y = (y * a.gate).rounded(kept)
    return y if a.residual is None else y + exact(a.residual).reshape(M, N)
