"""The type of a memory policy: a compaction function and its budget."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from moss_jax.memory.bank import MemoryBank

# A pure function of a bank and a budget: [n] for all slots alike, or [n, B, 1] for each its own. Its static
# parts depend only on the model, so one compiled program serves every budget.
type Compact = Callable[[MemoryBank, Int[Array, "n ..."]], MemoryBank]


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """A policy for banks of one size; called with a bank, it returns the compacted one.

    Attributes:
      compact: the compaction, one program for all budgets of one model and policy.
      budget: what may remain, in the policy's own units; its length is fixed for one model and policy.
    """

    compact: Compact
    budget: Int[np.ndarray, " n"]

    def __call__(self, bank: MemoryBank) -> MemoryBank:
        return self.compact(bank, jnp.asarray(self.budget))


def make_budget(numbers: Sequence[int]) -> Int[np.ndarray, " n"]:
    """Converts numbers to a budget array."""
    return np.array(numbers, np.int32)
