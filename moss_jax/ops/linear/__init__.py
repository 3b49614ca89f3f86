"""Linear maps: GEMM of floats, W8A16 and W8A8, with norm prologue and bias, GELU and residual epilogues."""

from moss_jax.ops.linear.api import LINEAR, NORM_LINEAR, decode_layout, linear, norm_linear, residual_add
from moss_jax.ops.linear.base import Layout, Weights
from moss_jax.ops.linear.gelu import GELU, gelu

__all__ = [
    "GELU",
    "LINEAR",
    "NORM_LINEAR",
    "Layout",
    "Weights",
    "decode_layout",
    "gelu",
    "linear",
    "norm_linear",
    "residual_add",
]
