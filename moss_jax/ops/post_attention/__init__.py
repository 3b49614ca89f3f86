"""The part of a layer after attention: output projection, residual adds, norm and MLP."""

from moss_jax.ops.post_attention.api import POST_ATTENTION, post_attention

__all__ = ["POST_ATTENTION", "post_attention"]
