"""The training loss.

B batch, S tokens, D width, V vocabulary
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moss_jax.text.labels import IGNORED


class Targets(NamedTuple):
    """What each token is to predict; the last one of a sequence has nothing after it.

    Attributes:
      ids: the next token; 0 where there is no target.
      weights: in the loss, which is the sum of the weighted losses of all tokens; 0 where there is no target.
      text: targets that are not silence.
      silence: targets that are.
      after_silence: text targets before which the stream was silent: where it begins to speak.
    """

    ids: Int[Array, "B S"]
    weights: Float[Array, "B S"]
    text: Bool[Array, "B S"]
    silence: Bool[Array, "B S"]
    after_silence: Bool[Array, "B S"]


def find_targets(
    tokens: Int[Array, "B S"],
    labels: Int[Array, "B S"],
    *,
    silence_id: int,
    image_id: int,
    silence_weight: float = 1.0,
) -> Targets:
    """The targets of a batch, and how much each counts.

    Args:
      labels: the tokens themselves; IGNORED where none is to be learnt.
      silence_weight: of targets that are silence. The sum of the losses is divided by the number of targets,
        not by their weight: so the original trains (arXiv 2606.07639).
    """
    following = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    counted = following != IGNORED
    silence = following == silence_id
    weights = jnp.where(silence, silence_weight, 1.0) * counted / jnp.maximum(counted.sum(), 1)
    # The last token up to here that is no frame's.
    said = jax.lax.cummax(jnp.where(tokens == image_id, -1, jnp.arange(tokens.shape[1])), axis=1)
    silent = (said >= 0) & (jnp.take_along_axis(tokens, jnp.maximum(said, 0), axis=1) == silence_id)
    text = counted & ~silence
    return Targets(jnp.where(counted, following, 0), weights, text, silence, text & silent)


def token_losses(
    hidden: Float[Array, "B S D"],
    ids: Int[Array, "B S"],
    logits_of: Callable[[Float[Array, "B T D"]], Float[Array, "B T V"]],
    *,
    chunks: int = 1,
) -> Float[Array, "B S"]:
    """Cross-entropy of each token in float32.

    Args:
      logits_of: hidden states to logits.
      chunks: parts of the sequence that are taken one after the other, so that the logits of only one are
        held at a time; the backward pass computes them again.
    """

    def losses(part):
        hidden, ids = part
        logits = logits_of(hidden).astype(jnp.float32)
        # Not a gather: a mesh that splits the vocabulary would collect the logits for it, and its gradient
        # is a scatter.
        target = jnp.arange(logits.shape[-1]) == ids[..., None]
        return jax.nn.logsumexp(logits, axis=-1) - jnp.where(target, logits, 0).sum(axis=-1)

    if chunks == 1:
        return losses((hidden, ids))
    B, S = ids.shape
    size = -(-S // chunks)

    def split(x):  # [B, S, ...] to [chunks, B, size, ...]
        x = jnp.pad(x, ((0, 0), (0, chunks * size - S), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(B, chunks, size, *x.shape[2:]).swapaxes(0, 1)

    parts = jax.lax.map(jax.checkpoint(losses), (split(hidden), split(ids)))
    return parts.swapaxes(0, 1).reshape(B, -1)[:, :S]


def mean_over(losses: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """Mean of the losses where the mask is set; 0 where it is nowhere."""
    return jnp.where(mask, losses, 0).sum() / jnp.maximum(mask.sum(), 1)
