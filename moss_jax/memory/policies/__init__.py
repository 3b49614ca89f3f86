"""Memory policies: what a bank keeps when it runs out of room.

A policy is a pure function from a bank to a smaller one that the engine runs between two steps. To add one,
write a function in a file of its own and name it in `POLICIES`.
"""

from collections.abc import Callable

from moss_jax.config import ConfigError, MemoryConfig, ModelConfig
from moss_jax.memory.bank import MemoryBank
from moss_jax.memory.policies.merge import merge
from moss_jax.memory.policies.pyramid import pyramid
from moss_jax.memory.policies.window import window

type Policy = Callable[[MemoryBank], MemoryBank]

FULL = "full"
# The others by name: from the settings, the model, and the whole frames that the bank has room for.
POLICIES: dict[str, Callable[[MemoryConfig, ModelConfig, int], Policy]] = {
    "window": window,
    "pyramid": pyramid,
    "merge": merge,
}

__all__ = ["FULL", "POLICIES", "Policy", "make_policy"]


def make_policy(memory: MemoryConfig, model: ModelConfig, frames: int) -> Policy | None:
    """The compaction that the settings name; None for "full", which never forgets and so ends.

    Args:
      frames: whole frames that the bank has room for.

    Raises:
      ConfigError: there is no such policy, or the bank is too small for it.
    """
    if memory.policy == FULL:
        return None
    if memory.policy not in POLICIES:
        names = ", ".join(map(repr, (FULL, *POLICIES)))
        raise ConfigError(f"memory.policy must be one of {names}; got {memory.policy!r}")
    return POLICIES[memory.policy](memory, model, frames)
