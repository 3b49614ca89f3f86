"""Masked writes into the buffers of a stream's state.

B slots, R runs of T rows, each for one slot, K kv heads, C capacity, D head
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num


def write_rows(
    buffer: Num[Array, "B K C ..."],
    rows: Num[Array, "R K T ..."],
    start: Int[Array, " R"],
    count: Int[Array, " R"],
    slots: Int[Array, " R"] | None = None,
) -> Num[Array, "B K C ..."]:
    """Writes the first `count[r]` rows of run `r` to a slot from `start[r]` on, as far as they fit.

    The slot is `slots[r]`, or `r` if None (R == B). Runs may share a slot but must not overlap in it.
    """
    (R, _, T), capacity = rows.shape[:3], buffer.shape[2]
    at = targets(start, count, T, capacity)
    if slots is None:
        slots = jnp.arange(R)
    else:
        # Targets past the end must be distinct over the runs of a slot too.
        at += jnp.where(at >= capacity, T * jnp.arange(R)[:, None], 0)
    return buffer.at[slots[:, None], :, at].set(
        rows.swapaxes(1, 2).astype(buffer.dtype), mode="drop", unique_indices=True
    )


def write_row(
    buffer: Num[Array, "B K C ..."], row: Num[Array, "B K 1 ..."], at: Int[Array, " B"]
) -> Num[Array, "B K C ..."]:
    """Writes a row to each `buffer[b]` at `at[b]`, which must be in bounds.

    The row that is replaced is not read, which would take one more kernel for each of many small writes.
    """
    if len(buffer) == 1:
        begin = (0, 0, at[0], *(0,) * (buffer.ndim - 3))
        return jax.lax.dynamic_update_slice(buffer, row.astype(buffer.dtype), begin)
    return buffer.at[jnp.arange(len(buffer)), :, at].set(
        row[:, :, 0].astype(buffer.dtype), mode="promise_in_bounds", unique_indices=True
    )


def targets(start: Int[Array, " R"], count: Int[Array, " R"], rows: int, capacity: int) -> Int[Array, "R T"]:
    """Target index of each row; rows that are not written get distinct ones past the end."""
    row = jnp.arange(rows)
    at = start[:, None] + row
    return jnp.where((row < count[:, None]) & (at < capacity), at, capacity + row)
