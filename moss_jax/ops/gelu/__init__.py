"""A bias and the exact gelu."""

from moss_jax.ops.gelu.api import IMPLEMENTATIONS, choose, gelu
from moss_jax.ops.gelu.arguments import Arguments

__all__ = ["IMPLEMENTATIONS", "Arguments", "choose", "gelu"]
