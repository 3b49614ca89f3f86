"""The training loss.

B batch, S tokens, V vocabulary
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IGNORED = -100


class Loss(NamedTuple):
    """The sum of the weighted losses over the number of targets."""

    loss: Float[Array, ""]
    targets: Int[Array, ""]


def next_token_loss(
    logits: Float[Array, "B S V"],
    labels: Int[Array, "B S"],
    *,
    silence_id: int | None = None,
    silence_weight: float = 1.0,
) -> Loss:
    """Cross-entropy of each token given those before it, in float32.

    Args:
      labels: the tokens themselves; IGNORED where none is to be learnt.
      silence_id, silence_weight: targets of this id weigh so much. The sum is divided by the number of
        targets, not by their weight: so the original trains (arXiv 2606.07639).
    """
    logits, targets = logits[:, :-1].astype(jnp.float32), labels[:, 1:]
    counted = targets != IGNORED
    safe = jnp.where(counted, targets, 0)
    picked = jnp.take_along_axis(logits, safe[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    weights = counted.astype(jnp.float32)
    if silence_id is not None:
        weights = jnp.where(targets == silence_id, weights * silence_weight, weights)
    count = counted.sum()
    return Loss((losses * weights).sum() / jnp.maximum(count, 1), count)
