"""The state of a stream: frozen pytrees, made by `init_state`, passed in, returned, never mutated."""

from moss_jax.memory.bank import NO_POSITION, MemoryBank, frames_visible, remember_frames
from moss_jax.memory.state import StreamState, init_state
from moss_jax.memory.text import ROWS_MULTIPLE, TextCache
from moss_jax.memory.writes import CapacityError, check_room, write_row, write_rows

__all__ = [
    "NO_POSITION",
    "ROWS_MULTIPLE",
    "CapacityError",
    "MemoryBank",
    "StreamState",
    "TextCache",
    "check_room",
    "frames_visible",
    "init_state",
    "remember_frames",
    "write_row",
    "write_rows",
]
