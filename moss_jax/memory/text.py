"""The KV cache of the text: keys and values of every self-attention layer.

B slots, K kv heads, R rows of a buffer, C capacity in tokens, D head
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Kernels read a text cache in place if its number of rows is a multiple of this.
ROWS_MULTIPLE = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextCache:
    """Keys and values of the tokens so far, for every self-attention layer.

    Attributes:
      keys, values: one [B, K, R, D] array per layer, in layer order; keys are rotated. R is at least C + 1: a
        slot that is idle or full writes to row C, which is never read.
      length: number of tokens in the cache.
      position: of the next token; at least `length`, and greater once tokens have been evicted, since the
        others keep their positions.
      capacity: C, the maximum number of tokens.
    """

    keys: tuple[Float[Array, "B K R D"], ...]
    values: tuple[Float[Array, "B K R D"], ...]
    length: Int[Array, " B"]
    position: Int[Array, " B"]
    capacity: int = dataclasses.field(metadata={"static": True})


def keep_tokens(text: TextCache, kept: Int[Array, "B C"], length: Int[Array, " B"]) -> TextCache:
    """Evicts tokens from the cache; those that stay keep their order and their positions.

    Args:
      kept: indices of the tokens that stay, ascending; only the first `length[b]` of slot `b` count.
      length: number of tokens of each slot that stay.
    """
    capacity = kept.shape[1]

    def gather(x):
        rows = jnp.take_along_axis(x, kept[:, None, :, None], axis=2, mode="clip")
        return jax.lax.dynamic_update_slice(x, rows, (0, 0, 0, 0)) if capacity < x.shape[2] else rows

    return dataclasses.replace(
        text,
        keys=tuple(map(gather, text.keys)),
        values=tuple(map(gather, text.values)),
        length=length,
    )
