"""State of a batch of streams: the text cache and the memory bank of every slot."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from moss_jax.config import ModelConfig
from moss_jax.memory.bank import NO_POSITION, MemoryBank
from moss_jax.memory.room import CapacityError
from moss_jax.memory.text import ROWS_MULTIPLE, TextCache
from moss_jax.ops.qarray import QArray
from moss_jax.sharding import pinned


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
    config: ModelConfig,
    slots: int,
    *,
    text_capacity: int,
    bank_capacity: int,
    dtype: DTypeLike,
    bank_dtype: DTypeLike | None = None,
    text_dtype: DTypeLike | None = None,
    merges: bool = False,
) -> StreamState:
    """Creates an empty state.

    Args:
      slots: number of concurrent streams.
      text_capacity: maximum number of tokens per slot.
      bank_capacity: maximum number of whole frames per slot.
      dtype: of keys and values.
      bank_dtype: of keys and values in the bank: int8 or float8_e4m3fn with one scale per vector; None for
        `dtype`.
      text_dtype: likewise in the text cache.
      merges: whether the bank counts how many vectors each of its vectors stands for.

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

    # A separate buffer each: donated arrays must not share memory.
    def buffer(rows: int, quantized: DTypeLike | None) -> jax.Array | QArray:
        shape = (slots, decoder.num_kv_heads, rows, decoder.head_dim)
        if quantized is None:
            return jnp.zeros(shape, dtype)
        return QArray(jnp.zeros(shape, quantized), jnp.zeros(shape[:3], jnp.float32))

    self_layers, cross_layers = decoder.num_self_attention_layers, len(decoder.cross_attention_layers)
    vectors = bank_capacity * config.vectors_per_frame
    rows = -(-(text_capacity + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    return StreamState(
        text=TextCache(
            keys=tuple(buffer(rows, text_dtype) for _ in range(self_layers)),
            values=tuple(buffer(rows, text_dtype) for _ in range(self_layers)),
            length=jnp.zeros(slots, jnp.int32),
            position=jnp.zeros(slots, jnp.int32),
            capacity=text_capacity,
        ),
        bank=MemoryBank(
            keys=tuple(buffer(vectors, bank_dtype) for _ in range(cross_layers)),
            values=tuple(buffer(vectors, bank_dtype) for _ in range(cross_layers)),
            positions=jnp.full((slots, vectors), NO_POSITION, jnp.int32),
            places=jnp.zeros((slots, vectors), jnp.int32),
            counts=jnp.zeros((slots, vectors), jnp.float32) if merges else None,
            length=jnp.zeros(slots, jnp.int32),
        ),
    )


def save_slot(state: StreamState) -> dict[str, np.ndarray]:
    """Copies the arrays of a single slot to the host, by names such as "bank.keys.0", cut to the rows in use.

    Args:
      state: of one slot.
    """
    lengths = {"text": int(np.asarray(state.text.length)[0]), "bank": int(np.asarray(state.bank.length)[0])}
    saved = {}
    for name, x in _named(state):
        x = pinned(x)[0]
        # A copy, so that the next array finds the pinned memory free.
        saved[name] = x[_rows(x.ndim, lengths[name.partition(".")[0]])].copy()
    return saved


def load_slot(state: StreamState, saved: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Pads the arrays that `save_slot` returned to a slot's capacity: [1, ...] each, by name.

    Args:
      state: has the target capacities; only its shapes and dtypes are read.

    Raises:
      ValueError: naming an array that is missing, unknown, or of another shape or dtype.
    """
    named = dict(_named(state))
    if "bank.counts" in named and "bank.counts" not in saved and "bank.positions" in saved:
        # Saved from a bank without merging: each vector stands for itself.
        saved = {**saved, "bank.counts": np.ones(saved["bank.positions"].shape, np.float32)}
    if wrong := named.keys() ^ saved.keys():
        raise ValueError(f"there should {'' if min(wrong) in named else 'not '}be an array {min(wrong)}")
    loaded = {}
    for name, like in named.items():
        part = name.partition(".")[0]
        x, length = saved[name], saved[f"{part}.length"]
        room = state.text.capacity if part == "text" else state.bank.capacity
        if length.shape or not 0 <= length <= room:
            raise ValueError(f"{part}.length is not a number of rows from 0 to {room}")
        # Rows past those in use are the same as in an empty slot.
        new = np.full((1, *like.shape[1:]), NO_POSITION if name == "bank.positions" else 0, like.dtype)
        rows = (0, *_rows(like.ndim - 1, int(length)))
        if (x.shape, x.dtype) != (new[rows].shape, like.dtype):
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}, not {like.dtype} {list(new[rows].shape)}")
        new[rows] = x
        loaded[name] = new
    return loaded


def _named(state: StreamState) -> Iterator[tuple[str, jax.Array]]:
    """The arrays of a state with their names."""
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        yield jax.tree_util.keystr(path, simple=True, separator="."), x


def _rows(ndim: int, length: int) -> tuple[slice, ...]:
    """Index of the first rows of one slot's array: [K, rows, D], [K, rows], [rows] or a scalar."""
    return (*[slice(None)] * (ndim > 1), *[slice(length)] * (ndim > 0))
