"""Memory policies: what a bank keeps when it is full.

A policy is a pure function from a bank and a budget to a smaller bank, which the engine runs between two
steps. To add one, write it in a file of its own and register it in `POLICIES`.
"""

from collections.abc import Callable

from moss_jax.config import ConfigError, MemoryConfig, ModelConfig
from moss_jax.memory.policies.merge import merge
from moss_jax.memory.policies.policy import Compact, Policy, make_budget
from moss_jax.memory.policies.pyramid import pyramid
from moss_jax.memory.policies.window import window

FULL = "full"
# Factories of all policies except "full" by name, called with the settings, the model, and the capacity of
# the bank in whole frames.
POLICIES: dict[str, Callable[[MemoryConfig, ModelConfig, int], Policy]] = {
    "window": window,
    "pyramid": pyramid,
    "merge": merge,
}

__all__ = ["FULL", "POLICIES", "Compact", "Policy", "make_budget", "make_policy"]


def make_policy(memory: MemoryConfig, model: ModelConfig, frames: int) -> Policy | None:
    """Creates the policy that the settings name; None for "full", which never compacts.

    For one model and name, `Policy.compact` is the same function for all settings and banks: only the budget
    differs.

    Args:
      frames: capacity of the bank in whole frames.

    Raises:
      ConfigError: there is no such policy, or the bank is too small for it.
    """
    if memory.policy == FULL:
        return None
    if memory.policy not in POLICIES:
        names = ", ".join(map(repr, (FULL, *POLICIES)))
        raise ConfigError(f"memory.policy must be one of {names}; got {memory.policy!r}")
    return POLICIES[memory.policy](memory, model, frames)
