"""The check that an append fits."""

import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int


class CapacityError(ValueError):
    """A slot has no room for an append."""


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
