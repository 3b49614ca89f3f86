"""The whole state of a batch of streams: the text cache and the memory bank of every slot."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from moss_jax.config import ModelConfig
from moss_jax.memory.bank import NO_POSITION, MemoryBank
from moss_jax.memory.text import ROWS_MULTIPLE, TextCache
from moss_jax.memory.writes import CapacityError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamState:
    """Text cache and memory bank of all slots."""

    text: TextCache
    bank: MemoryBank

    @property
    def slots(self) -> int:
        return self.text.length.shape[0]


def init_state(
    config: ModelConfig, slots: int, *, text_capacity: int, bank_capacity: int, dtype: DTypeLike
) -> StreamState:
    """An empty state.

    Args:
      slots: streams side by side.
      text_capacity: tokens that a slot can hold.
      bank_capacity: frames that a slot can hold.

    Raises:
      CapacityError: a size below 1, or more tokens than the model has positions for.
    """
    for name, size in (("slots", slots), ("text_capacity", text_capacity), ("bank_capacity", bank_capacity)):
        if size < 1:
            raise CapacityError(f"{name} must be at least 1, not {size}")
    decoder = config.decoder
    if text_capacity > decoder.max_positions:
        raise CapacityError(
            f"text_capacity {text_capacity} exceeds the {decoder.max_positions} positions of the model"
        )

    def buffers(layers: int, capacity: int) -> tuple[jax.Array, ...]:
        # One buffer each: donated arrays must not share memory.
        shape = (slots, decoder.num_kv_heads, capacity, decoder.head_dim)
        return tuple(jnp.zeros(shape, dtype) for _ in range(layers))

    self_layers, cross_layers = decoder.num_self_attention_layers, len(decoder.cross_attention_layers)
    vectors = bank_capacity * config.vectors_per_frame
    rows = -(-(text_capacity + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    return StreamState(
        text=TextCache(
            keys=buffers(self_layers, rows),
            values=buffers(self_layers, rows),
            length=jnp.zeros(slots, jnp.int32),
            capacity=text_capacity,
        ),
        bank=MemoryBank(
            keys=buffers(cross_layers, vectors),
            values=buffers(cross_layers, vectors),
            positions=jnp.full((slots, bank_capacity), NO_POSITION, jnp.int32),
            length=jnp.zeros(slots, jnp.int32),
        ),
    )
