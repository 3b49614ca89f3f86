"""Sampling of the next token: temperature, top-k, top-p and repetition penalty, set per slot.

B slots, V vocabulary
"""

import dataclasses
import enum
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, UInt32

from moss_jax.config import TokenSampling


class SamplingKind(enum.IntEnum):
    """Sampling variants in order of cost: argmax, a draw from all tokens, a draw under top-k or top-p."""

    GREEDY = 0
    DRAWN = 1
    FILTERED = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotSampling:
    """Sampling parameters of all slots: one `TokenSampling` per slot, as arrays.

    Attributes:
      temperature: 0 for greedy decoding.
      top_k: 0 for all tokens.
      top_p: 1 for all tokens.
      repetition_penalty: 1 for none.
      key: random key from the slot's seed.
    """

    temperature: Float32[Array, " B"]
    top_k: Int32[Array, " B"]
    top_p: Float32[Array, " B"]
    repetition_penalty: Float32[Array, " B"]
    key: Key[Array, " B"]

    @classmethod
    def of(cls, sampling: TokenSampling | Sequence[TokenSampling], slots: int) -> "SlotSampling":
        """Builds the parameters of all slots.

        Args:
          sampling: one for all slots, or one for each.

        Raises:
          ValueError: the number of settings is not that of the slots.
        """
        each = [sampling] * slots if isinstance(sampling, TokenSampling) else list(sampling)
        if len(each) != slots:
            raise ValueError(f"there are {len(each)} samplings for {slots} slots; give one for each slot")
        return cls(
            temperature=jnp.asarray(np.array([x.temperature for x in each], np.float32)),
            # A number beyond int32 exceeds any vocabulary.
            top_k=jnp.asarray(np.array([min(x.top_k, 2**31 - 1) for x in each], np.int32)),
            top_p=jnp.asarray(np.array([x.top_p for x in each], np.float32)),
            repetition_penalty=jnp.asarray(np.array([x.repetition_penalty for x in each], np.float32)),
            key=_keys(np.array([x.seed for x in each], np.int64)),
        )


# Jitted, since outside of a program it takes the host 2 ms, for each stream that is opened.
_keys = jax.jit(jax.vmap(jax.random.key))


def kind_of(sampling: TokenSampling) -> SamplingKind:
    """The cheapest variant that implements these settings."""
    if not sampling.temperature:
        return SamplingKind.GREEDY
    has_filter = sampling.top_k > 0 or sampling.top_p < 1
    return SamplingKind.FILTERED if has_filter else SamplingKind.DRAWN


def sample(
    logits: Float[Array, "B V"],
    sampling: SlotSampling,
    kind: SamplingKind,
    *,
    positions: Int[Array, " B"],
    allowed: Bool[Array, " V"],
    said: Bool[Array, "B V"],
) -> Int[Array, " B"]:
    """Samples one token for each slot, independently.

    A token depends only on its slot's logits, settings and position; a slot whose own kind is cheaper than
    `kind` gets the same token either way. Ties with the last token that top-k or top-p keeps are kept too.

    Args:
      kind: static, at least that of every slot. A branch on the device would make the host wait for it.
      positions: stream positions of the tokens to sample; with the slot's key, they determine the draws.
      allowed: tokens that may be sampled.
      said: tokens that the repetition penalty applies to.
    """
    scores = jnp.where(allowed, logits, -jnp.inf)
    # A positive score is divided and a negative one multiplied, so both decrease (CTRL, arXiv 1909.05858).
    penalty = sampling.repetition_penalty[:, None]
    scores = jnp.where(said, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)
    greedy = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    if kind == SamplingKind.GREEDY:
        return greedy
    draws = sampling.temperature > 0
    # With the maximum subtracted, no temperature can make them overflow.
    temperature = jnp.where(draws, sampling.temperature, 1)[:, None]
    scaled = (scores - scores.max(axis=-1, keepdims=True)) / temperature
    if kind == SamplingKind.FILTERED:
        scaled = jnp.where(_kept(scores, scaled, sampling), scaled, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in)(sampling.key, positions)
    drawn = jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
    return jnp.where(draws, drawn, greedy)


def _kept(
    scores: Float[Array, "B V"], scaled: Float[Array, "B V"], sampling: SlotSampling
) -> Bool[Array, "B V"]:
    """Mask of the tokens left by top-k and then top-p; all tokens without either."""
    ordered = _ordered(scores)
    count = jnp.minimum(sampling.top_k, scores.shape[-1]).astype(jnp.float32)
    least = jnp.where(sampling.top_k > 0, _threshold(ordered, jnp.ones_like(scaled), count), 0)
    mass = jnp.where(ordered >= least[:, None], jnp.exp(scaled), 0)
    # A token stays if the likelier ones add up to less than top_p, so the likeliest always stays.
    share = jnp.maximum(sampling.top_p * mass.sum(axis=-1), jnp.finfo(jnp.float32).tiny)
    least = jnp.where(sampling.top_p < 1, _threshold(ordered, mass, share), least)
    return ordered >= least[:, None]


def _ordered(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Maps floats to integers that sort in the same order."""
    # Both signed zeros map to the same integer.
    x = jnp.where(x == 0, 0, x.astype(jnp.float32))
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign != 0, ~bits, bits | sign)


def _threshold(
    ordered: UInt32[Array, "B V"], weights: Float[Array, "B V"], least: Float[Array, " B"]
) -> UInt32[Array, " B"]:
    """The largest threshold for which the weights of all entries at or above it add up to at least `least`.

    A binary search bit by bit, from the highest down, with one pass over the vocabulary per bit; no sort.
    """

    def set_bit(i: Int[Array, ""], threshold: UInt32[Array, " B"]) -> UInt32[Array, " B"]:
        higher = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        total = jnp.where(ordered >= higher[:, None], weights, 0).sum(axis=-1)
        return jnp.where(total >= least, higher, threshold)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(len(ordered), jnp.uint32))
