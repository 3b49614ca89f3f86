"""Normalisation over the last axis, and the residual sum that comes before it."""

from moss_jax.ops.norm.api import IMPLEMENTATIONS, choose, layer_norm, rms_norm
from moss_jax.ops.norm.arguments import Arguments

__all__ = ["IMPLEMENTATIONS", "Arguments", "choose", "layer_norm", "rms_norm"]
