"""Quantised 8-bit arrays with scales: one type for weights, keys and values, and activations."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

# Storage dtypes by their names in settings.
DTYPES = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}
QUANTIZED = tuple(dtype.name for dtype in DTYPES.values())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
    """An array in int8 or float8_e4m3fn that stands for `values * scale`.

    Attributes:
      values: the stored numbers. Weights are `[outputs..., inputs...]`, so that the weights of one output are
        contiguous.
      scale: float32, with the leading axes of `values`: one number for each vector along the others.
        [outputs...] for weights, [B, K, S] for keys and values [B, K, S, D], [] for activations.
      input_scale: for weights of an 8-bit GEMM (W8A8): float32 [], by which inputs are divided before they
        are rounded. None leaves the inputs in 16 bits or more (W8A16).
      output_scale: for weights whose outputs are rounded to 8 bits as well: float32 [], by which outputs are
        divided first. None leaves them in 16 bits or more.
    """

    values: Array
    scale: Float[Array, "..."]
    input_scale: Float[Array, ""] | None = None
    output_scale: Float[Array, ""] | None = None

    def __post_init__(self):
        if not hasattr(self.values, "ndim") or not hasattr(self.scale, "ndim"):
            return  # JAX rebuilds pytrees around placeholders.
        if self.values.dtype.name not in QUANTIZED:
            raise ValueError(f"a QArray is in {' or '.join(QUANTIZED)}, not {self.values.dtype}")
        if self.scale.shape != self.values.shape[: self.scale.ndim]:
            raise ValueError(
                f"scale has the leading axes of values {self.values.shape}; got {self.scale.shape}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """The storage dtype."""
        return self.values.dtype


def quantize(x: Float[Array, "..."], dtype: DTypeLike, *, axes: int) -> QArray:
    """Quantises an array to 8 bits, scaled by the absolute maximum of each vector.

    Args:
      dtype: int8 or float8_e4m3fn.
      axes: number of leading axes that have separate scales.
    """
    dtype = jnp.dtype(dtype)
    floating = jnp.issubdtype(dtype, jnp.floating)
    limit = float(jnp.finfo(dtype).max if floating else jnp.iinfo(dtype).max)
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis=range(axes, x.ndim))
    # Never 0, to avoid division by zero: zeros stay zeros under any scale.
    scale = jnp.maximum(largest / limit, jnp.finfo(jnp.float32).tiny)
    x /= scale.reshape(*scale.shape, *(1,) * (x.ndim - axes))
    return QArray((x if floating else jnp.round(x)).astype(dtype), scale)


def dequantize(x: Array | QArray, dtype: DTypeLike = jnp.float32) -> Array:
    """Dequantises a QArray to `dtype`; other arrays are only cast."""
    if not isinstance(x, QArray):
        return x.astype(dtype)
    scale = x.scale.reshape(*x.scale.shape, *(1,) * (x.ndim - x.scale.ndim))
    return (x.values.astype(jnp.float32) * scale).astype(dtype)
