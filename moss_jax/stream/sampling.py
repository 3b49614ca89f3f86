"""Sampling of the next token: temperature, top-k, top-p and repetition penalty.

B slots, V vocabulary
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moss_jax.config import TokenSampling


def sample(
    logits: Float[Array, "B V"],
    config: TokenSampling,
    *,
    keys: Key[Array, " B"] | None,
    allowed: Bool[Array, " V"],
    said: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """Samples one token for each slot, independently.

    Args:
      keys: random key of each slot; not used at temperature 0.
      allowed: tokens that may be sampled.
      said: tokens that the repetition penalty applies to; None for none.
    """
    logits = jnp.where(allowed, logits, -jnp.inf)
    if said is not None and config.repetition_penalty != 1:
        # A positive score is divided and a negative one multiplied, so both fall (CTRL, arXiv 1909.05858).
        penalty = config.repetition_penalty
        logits = jnp.where(said, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    assert keys is not None
    logits = logits / config.temperature
    if config.top_k and config.top_k < logits.shape[-1]:
        values, tokens = jax.lax.top_k(logits, config.top_k)
    elif config.top_p < 1:
        values, tokens = jax.lax.top_k(logits, logits.shape[-1])
    else:
        return _categorical(keys, logits).astype(jnp.int32)
    if config.top_p < 1:
        p = jax.nn.softmax(values, axis=-1)
        # A token stays if those before it do not yet add up to top_p; so the first always does.
        values = jnp.where(jnp.cumsum(p, axis=-1) - p < config.top_p, values, -jnp.inf)
    return jnp.take_along_axis(tokens, _categorical(keys, values)[:, None], axis=-1)[:, 0].astype(jnp.int32)


_categorical = jax.vmap(jax.random.categorical)
