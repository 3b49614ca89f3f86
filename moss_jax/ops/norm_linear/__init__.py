"""An RMS norm and the linear map behind it, with weights in 8 bits."""

from moss_jax.ops.norm_linear.api import IMPLEMENTATIONS, choose, norm_linear
from moss_jax.ops.norm_linear.arguments import Arguments

__all__ = ["IMPLEMENTATIONS", "Arguments", "choose", "norm_linear"]
