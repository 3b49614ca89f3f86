"""Stream state as immutable pytrees, created by `init_state` and updated functionally."""

from moss_jax.memory.bank import NO_POSITION, MemoryBank, remember_frames, vectors_visible
from moss_jax.memory.room import CapacityError, check_room
from moss_jax.memory.state import StreamState, init_state, load_slot, save_slot
from moss_jax.memory.text import ROWS_MULTIPLE, TextCache, keep_tokens

__all__ = [
    "NO_POSITION",
    "ROWS_MULTIPLE",
    "CapacityError",
    "MemoryBank",
    "StreamState",
    "TextCache",
    "check_room",
    "init_state",
    "keep_tokens",
    "load_slot",
    "remember_frames",
    "save_slot",
    "vectors_visible",
]
