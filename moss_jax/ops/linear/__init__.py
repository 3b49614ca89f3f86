"""A linear map of few or many rows, with weights in 8 bits."""

from moss_jax.ops.linear.api import IMPLEMENTATIONS, choose, linear
from moss_jax.ops.linear.arguments import Arguments

__all__ = ["IMPLEMENTATIONS", "Arguments", "choose", "linear"]
