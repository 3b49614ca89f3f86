"""A linear map of many rows, and what follows it: a scale, a bias, a gelu, rounding to 8 bits, a residual."""

from moss_jax.ops.fused_linear.api import IMPLEMENTATIONS, choose, fused_linear
from moss_jax.ops.fused_linear.arguments import Arguments

__all__ = ["IMPLEMENTATIONS", "Arguments", "choose", "fused_linear"]
