"""The KV cache of the text: keys and values of every self-attention layer.

B slots, K kv heads, R rows of a buffer, C capacity in tokens, D head
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Kernels read a text cache in place if its rows are a multiple of this.
ROWS_MULTIPLE = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextCache:
    """Keys and values of the tokens so far, for every self-attention layer.

    Attributes:
      keys, values: one [B, K, R, D] array a layer, in layer order; keys are rotated. R is at least C + 1: a
        slot that stands still or is full writes to row C, which is never read.
      length: tokens held.
      position: of the next token; not less than `length`, and more once tokens have been dropped, since the
        others keep theirs.
      capacity: C, tokens that there is room for.
    """

    keys: tuple[Float[Array, "B K R D"], ...]
    values: tuple[Float[Array, "B K R D"], ...]
    length: Int[Array, " B"]
    position: Int[Array, " B"]
    capacity: int = dataclasses.field(metadata={"static": True})


def keep_tokens(text: TextCache, kept: Int[Array, "B C"], length: Int[Array, " B"]) -> TextCache:
    """Drops tokens from the cache; those that stay keep their order and their positions.

    Args:
      kept: indices of the tokens that stay, ascending; only the first `length[b]` of slot `b` count.
      length: tokens of each slot that stay.
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
