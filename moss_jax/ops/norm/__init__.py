"""RMS norm and layer norm, fused with the residual add before them."""

from moss_jax.ops.norm.api import ADD_NORM, add_norm
from moss_jax.ops.norm.base import Norm, Residual

__all__ = ["ADD_NORM", "Norm", "Residual", "add_norm"]
