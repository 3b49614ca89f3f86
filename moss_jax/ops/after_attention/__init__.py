"""Everything of a decoder layer after attention, with weights in 8 bits."""

from moss_jax.ops.after_attention.api import IMPLEMENTATIONS, after_attention, choose
from moss_jax.ops.after_attention.arguments import Arguments

__all__ = ["IMPLEMENTATIONS", "Arguments", "after_attention", "choose"]
