"""The KV cache of the text: keys and values of every self-attention layer.

B slots, N of them compacted, K kv heads, R rows of a buffer, C capacity in tokens, D head
"""

import dataclasses

import jax
from jaxtyping import Array, Float, Int

from moss_jax.ops.keep_rows import keep_rows
from moss_jax.ops.qarray import QArray

# Kernels read a text cache in place if its number of rows is a multiple of this.
ROWS_MULTIPLE = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextCache:
    """Keys and values of the tokens so far, for every self-attention layer.

    Attributes:
      keys, values: one [B, K, R, D] array per layer, in layer order, QArrays if the cache is stored in 8
        bits; keys are rotated. R is at least C + 1: a slot that is idle or full writes to row C, which is
        never read.
      length: number of tokens in the cache.
      position: of the next token; at least `length`, and greater once tokens have been evicted, since the
        others keep their positions.
      capacity: C, the maximum number of tokens.
    """

    keys: tuple[Float[Array, "B K R D"] | QArray, ...]
    values: tuple[Float[Array, "B K R D"] | QArray, ...]
    length: Int[Array, " B"]
    position: Int[Array, " B"]
    capacity: int = dataclasses.field(metadata={"static": True})


def keep_tokens(
    text: TextCache,
    kept: Int[Array, "N C"],
    length: Int[Array, " N"],
    *,
    slots: Int[Array, " N"] | None = None,
) -> TextCache:
    """Evicts tokens from the cache; those that stay keep their order and their positions.

    Args:
      kept: indices of the tokens that stay, ascending; only the first `length[n]` count.
      length: number of tokens that stay.
      slots: entry `n` is about slot `slots[n]`, each a different one; other slots stay as they are. None if
        entry `n` is about slot `n` (N == B).
    """
    buffers, structure = jax.tree.flatten((text.keys, text.values))
    # A scale per row is a row of one number.
    rows = [x if x.ndim == 4 else x[..., None] for x in buffers]
    rows = keep_rows(rows, kept, length, slots=slots)
    keys, values = structure.unflatten([new.reshape(x.shape) for new, x in zip(rows, buffers, strict=True)])
    if slots is not None:
        length = text.length.at[slots].set(length)
    return dataclasses.replace(text, keys=keys, values=values, length=length)
