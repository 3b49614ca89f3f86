"""The choice among the implementations of an op: the first of a platform's order that takes a call."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax

logger = logging.getLogger(__name__)


class Unsupported(ValueError):
    """An implementation cannot take these arguments; the message says which and why."""


class Implementation(Protocol):
    """What an op chooses among: a module that says what it cannot take."""

    def unsupported(self, arguments: Any, platform: str) -> str | None:
        """Why it cannot take the arguments; None if it can."""


def choose(
    op: str,
    implementations: Mapping[str, Implementation],
    orders: Mapping[str, Sequence[str]],
    arguments: Any,
    named: str | None,
    platform: str | None,
) -> str:
    """Name of the implementation that takes a call; the choice and its reasons are logged once each.

    Args:
      op: what messages call it.
      orders: of each platform, names, the one that is asked first in front; elsewhere it is "xla".
      named: the one that must take it; None for any.
      platform: the default backend's if None.

    Raises:
      Unsupported: the named implementation does not exist or cannot take the arguments, or none of the order
        can.
    """
    platform = platform or jax.default_backend()
    if named is not None:
        if named not in implementations:
            raise Unsupported(f"no {op} implementation {named!r}; there are {', '.join(implementations)}")
        if reason := implementations[named].unsupported(arguments, platform):
            raise Unsupported(f"{op} implementation {named!r} cannot be used: {reason}")
        return named
    passed_over = []
    for name in orders.get(platform, ("xla",)):
        reason = implementations[name].unsupported(arguments, platform)
        if reason is None:
            log_once(f"{op} on {platform}: using {name}", *passed_over)
            return name
        passed_over.append(f"not using {name}: {reason}")
    raise Unsupported(f"no {op} implementation for {platform}: {'; '.join(passed_over)}")


@functools.cache
def log_once(*lines: str) -> None:
    """Says it the first time only."""
    logger.info("%s", "; ".join(lines))
