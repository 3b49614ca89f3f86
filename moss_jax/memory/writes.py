"""Masked writes into the buffers of a stream's state, and the check that an append fits.

B slots, K kv heads, T tokens, C capacity, D head
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int


class CapacityError(ValueError):
    """A slot has no room for an append."""


def write_rows(
    buffer: Float[Array, "B K C D"],
    rows: Float[Array, "B K T D"],
    start: Int[Array, " B"],
    count: Int[Array, " B"],
) -> Float[Array, "B K C D"]:
    """Writes the first `count[b]` of `rows[b]` to `buffer[b]` from `start[b]` on, as far as there is room."""
    slots, _, capacity, _ = buffer.shape
    at = targets(start, count, rows.shape[2], capacity)
    return buffer.at[jnp.arange(slots)[:, None], :, at].set(
        rows.swapaxes(1, 2).astype(buffer.dtype), mode="drop", unique_indices=True
    )


def write_row(
    buffer: Float[Array, "B K C D"], row: Float[Array, "B K 1 D"], at: Int[Array, " B"]
) -> Float[Array, "B K C D"]:
    """Writes a row to each `buffer[b]` at `at[b]`, which must be in bounds.

    It doesn't read the row that it replaces: that would be one more kernel for each of many small writes.
    """
    if len(buffer) == 1:
        return jax.lax.dynamic_update_slice(buffer, row.astype(buffer.dtype), (0, 0, at[0], 0))
    return buffer.at[jnp.arange(len(buffer)), :, at].set(
        row[:, :, 0].astype(buffer.dtype), mode="promise_in_bounds", unique_indices=True
    )


def check_room(what: str, length: Int[Array, " B"], count: Int[Array, " B"], capacity: int) -> None:
    """Refuses an append that would not fit.

    Only where the numbers are known: inside `jax.jit` what has no room is dropped, and the caller who
    traces keeps count.

    Raises:
      CapacityError: naming the slots and what they hold.
    """
    if isinstance(length, Tracer) or isinstance(count, Tracer):
        return
    held, more = np.asarray(length), np.asarray(count)
    full = np.flatnonzero((more > 0) & (held + more > capacity))
    if full.size:
        slots = ", ".join(f"slot {b} holds {held[b]} and would get {more[b]} more" for b in full)
        raise CapacityError(f"the {what} has room for {capacity}: {slots}; make the state with a larger one")


def targets(start, count, rows, capacity):
    """Target index of each row, [B, T]; rows that are not written get distinct ones past the end."""
    row = jnp.arange(rows)
    at = start[:, None] + row
    return jnp.where((row < count[:, None]) & (at < capacity), at, capacity + row)
