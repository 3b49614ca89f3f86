"""A linear map of many rows with inputs and weights in float8, and the bias and gelu behind it."""

from moss_jax.ops.fp8_linear.api import IMPLEMENTATIONS, choose, fp8_linear
from moss_jax.ops.fp8_linear.arguments import Arguments

__all__ = ["IMPLEMENTATIONS", "Arguments", "choose", "fp8_linear"]
