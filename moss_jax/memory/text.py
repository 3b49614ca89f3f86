"""The KV cache of the text: keys and values of every self-attention layer.

B slots, K kv heads, R rows of a buffer, C capacity in tokens, D head
"""

import dataclasses

import jax
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
      length: tokens held; also the position of the next one.
      capacity: C, tokens that there is room for.
    """

    keys: tuple[Float[Array, "B K R D"], ...]
    values: tuple[Float[Array, "B K R D"], ...]
    length: Int[Array, " B"]
    capacity: int = dataclasses.field(metadata={"static": True})
