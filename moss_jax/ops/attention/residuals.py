"""What the backward pass of attention needs beside its inputs, by name, so that remat can keep it."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jaxtyping import Array, Float

NAME = "attention"

_is_named = jax.checkpoint_policies.save_only_these_names(NAME)


def named(
    out: Float[Array, "..."], log_sum: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Names the outputs of a forward pass and the logarithms of their softmax's sums."""
    return checkpoint_name(out, NAME), checkpoint_name(log_sum, NAME)


def is_residual(primitive: Primitive, *avals: Any, **params: Any) -> bool:
    """Policy of `jax.checkpoint` that saves the outputs and softmax statistics of attention."""
    # cuDNN's are the results of a primitive of JAX, out of reach of a name.
    return primitive.name.startswith("dot_product_attention_fwd") or bool(
        _is_named(primitive, *avals, **params)
    )
