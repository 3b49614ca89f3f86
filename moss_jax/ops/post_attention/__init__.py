"""Everything of a decoder layer after attention, with weights in 8 bits."""

from moss_jax.ops.post_attention.api import IMPLEMENTATIONS, choose, post_attention
from moss_jax.ops.post_attention.arguments import Arguments

__all__ = ["IMPLEMENTATIONS", "Arguments", "choose", "post_attention"]
