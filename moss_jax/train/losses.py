"""The training loss: cross-entropy and the terms that a config adds to it.

B batch, S tokens, T tokens of a chunk, D width, V vocabulary
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moss_jax.text.labels import IGNORED

# A loss term maps float32 logits and the target ids to a loss per token. Losses of tokens without a target
# (whose id is 0) are discarded.
type LossTerm = Callable[[Float[Array, "B T V"], Int[Array, "B T"]], Float[Array, "B T"]]


def cross_entropy(logits: Float[Array, "B T V"], ids: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Negative log-likelihood of the targets."""
    # Not a gather: with a sharded vocabulary it would all-gather the logits, and its gradient is a scatter.
    target = jnp.arange(logits.shape[-1]) == ids[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.where(target, logits, 0).sum(axis=-1)


def z_loss(logits: Float[Array, "B T V"], ids: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Squared log-partition function, which keeps logits from drifting (arXiv 2204.02311, section 5)."""
    return jax.nn.logsumexp(logits, axis=-1) ** 2


# Terms that `train.loss_terms` can add to the cross-entropy, by their names there and in the metrics.
LOSS_TERMS: dict[str, LossTerm] = {"z_loss": z_loss}

# The metric that counts the targets a loss is averaged over; for other losses it is `targets`.
_COUNTS = {f"loss_{kind}": f"targets_{kind}" for kind in ("text", "silence", "after_silence")}


def count_of(metric: str) -> str | None:
    """Returns the metric that counts the targets a metric is averaged over; None if it is not such a mean."""
    return _COUNTS.get(metric, "targets" if metric == "loss" or metric in LOSS_TERMS else None)


class Targets(NamedTuple):
    """The target of each token; the last token of a sequence has none.

    Attributes:
      ids: the next token; 0 where there is no target.
      weights: weights of the token losses, whose weighted sum is the loss; 0 where there is no target.
      text: mask of targets other than silence.
      silence: mask of silence targets.
      after_silence: mask of text targets that follow a silence: the onsets of speech.
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
    """Returns the targets of a batch and their weights in the loss.

    Args:
      tokens: the input.
      labels: the tokens where they are targets; IGNORED elsewhere.
      silence_id: id of `<|silence|>`.
      image_id: id of `<|image|>`.
      silence_weight: weight of silence targets. The sum of the weighted losses is divided by the number of
        targets, not by the sum of their weights, as in the original (arXiv 2606.07639).
    """
    following = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    counted = following != IGNORED
    silence = following == silence_id
    weights = jnp.where(silence, silence_weight, 1.0) * counted / jnp.maximum(counted.sum(), 1)
    # Index of the latest token that is neither a frame nor padding, at each token; 0 if there is none.
    passed = (tokens == image_id) | (tokens == 0)
    said = jax.lax.cummax(jnp.where(passed, 0, jnp.arange(tokens.shape[1])), axis=1)
    silent = jnp.take_along_axis(tokens, said, axis=1) == silence_id
    text = counted & ~silence
    return Targets(jnp.where(counted, following, 0), weights, text, silence, text & silent)


def token_losses(
    hidden: Float[Array, "B S D"],
    ids: Int[Array, "B S"],
    logits_of: Callable[[Float[Array, "B T D"]], Float[Array, "B T V"]],
    *,
    terms: Mapping[str, LossTerm],
    chunks: int = 1,
) -> dict[str, Float[Array, "B S"]]:
    """Evaluates loss terms at each token, in float32.

    Args:
      hidden: final hidden states.
      ids: targets.
      logits_of: the output projection.
      terms: loss terms by name.
      chunks: number of chunks that the sequence is processed in, so that the logits of only one are in memory
        at a time; the backward pass recomputes them.
    """

    def losses(part):
        hidden, ids = part
        logits = logits_of(hidden).astype(jnp.float32)
        return {name: term(logits, ids) for name, term in terms.items()}

    if chunks == 1:
        return losses((hidden, ids))
    B, S = ids.shape
    size = -(-S // chunks)

    def split(x):  # [B, S, ...] to [chunks, B, size, ...]
        x = jnp.pad(x, ((0, 0), (0, chunks * size - S), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(B, chunks, size, *x.shape[2:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(B, -1)[:, :S]

    return jax.tree.map(join, jax.lax.map(jax.checkpoint(losses), (split(hidden), split(ids))))


def mean_over(losses: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """Mean of the masked losses; 0 if the mask is empty."""
    return jnp.where(mask, losses, 0).sum() / jnp.maximum(mask.sum(), 1)
