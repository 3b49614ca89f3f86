"""Capacity check for appends."""

import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int


class CapacityError(ValueError):
    """A slot has no room for an append."""


def check_room(what: str, length: Int[Array, " B"], count: Int[Array, " B"], capacity: int) -> None:
    """Raises if an append would not fit.

    Checks concrete values only: inside `jax.jit`, what does not fit is dropped, and the caller must keep
    count.

    Raises:
      CapacityError: names the slots and their lengths.
    """
    if isinstance(length, Tracer) or isinstance(count, Tracer):
        return
    held, more = np.asarray(length), np.asarray(count)
    full = np.flatnonzero((more > 0) & (held + more > capacity))
    if full.size:
        slots = ", ".join(f"slot {b} holds {held[b]} and would get {more[b]} more" for b in full)
        raise CapacityError(f"the {what} has room for {capacity}: {slots}; make the state with a larger one")
