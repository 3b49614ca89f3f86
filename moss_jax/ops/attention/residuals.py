"""Residuals of attention, its output and log-sum-exp, tagged so that a remat policy can save them."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jaxtyping import Array, Float

NAME = "attention"
# Prefix of the names of the primitives that JAX has for cuDNN.
CUDNN_FORWARD = "dot_product_attention_fwd"

_is_named = jax.checkpoint_policies.save_only_these_names(NAME)


def tag(
    out: Float[Array, "..."], log_sum: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Tags the output and the log-sum-exp of a forward pass with `checkpoint_name`."""
    return checkpoint_name(out, NAME), checkpoint_name(log_sum, NAME)


def save_residuals(primitive: Primitive, *avals: Any, **params: Any) -> bool:
    """`jax.checkpoint` policy that saves the residuals of attention, whichever implementation computes it."""
    # cuDNN's are results of a primitive inside of JAX, where they cannot be tagged.
    return primitive.name.startswith(CUDNN_FORWARD) or bool(_is_named(primitive, *avals, **params))
