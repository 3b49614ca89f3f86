"""Residuals of attention, tagged so that remat policies can save them.

They are its output and log-sum-exp, and the projection that its queries, keys and values are slices of.
"""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jaxtyping import Array, Float

NAME = "attention"
PROJECTION = "attention projection"
# Prefix of the names of the primitives that JAX has for cuDNN.
CUDNN_FORWARD = "dot_product_attention_fwd"

_is_named = jax.checkpoint_policies.save_only_these_names(NAME)
_is_projection = jax.checkpoint_policies.save_only_these_names(PROJECTION)


def tag(
    out: Float[Array, "..."], log_sum: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Tags the output and the log-sum-exp of a forward pass with `checkpoint_name`."""
    return checkpoint_name(out, NAME), checkpoint_name(log_sum, NAME)


def tag_projection(qkv: Float[Array, "..."]) -> Float[Array, "..."]:
    """Tags a fused projection to queries, keys and values with `checkpoint_name`."""
    return checkpoint_name(qkv, PROJECTION)


def save_residuals(primitive: Primitive, *avals: Any, **params: Any) -> bool:
    """`jax.checkpoint` policy that saves the residuals of attention, whichever implementation computes it."""
    # cuDNN's are results of a primitive inside of JAX, where they cannot be tagged.
    return primitive.name.startswith(CUDNN_FORWARD) or bool(_is_named(primitive, *avals, **params))


def save_projections(primitive: Primitive, *avals: Any, **params: Any) -> bool:
    """`jax.checkpoint` policy that saves the projections of self-attention, too."""
    return save_residuals(primitive, *avals, **params) or bool(_is_projection(primitive, *avals, **params))
