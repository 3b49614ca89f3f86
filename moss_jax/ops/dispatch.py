"""Dispatch of an op to the first implementation in a platform's order that supports the call."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moss_jax.ops.qarray import QArray, dequantize

logger = logging.getLogger(__name__)


class Unsupported(ValueError):
    """An implementation does not support these arguments; the message says which and why."""


def supports_everything(arguments: Any, platform: str) -> None:
    """The `unsupported` of an implementation without restrictions."""
    del arguments, platform


@dataclasses.dataclass(frozen=True)
class Implementation[Arguments, Result]:
    """One way to compute an op.

    Attributes:
      apply: computes the op; tunable implementations also take a `config`.
      unsupported: returns why it cannot take the arguments on a platform; None if it can.
    """

    apply: Callable[..., Result]
    unsupported: Callable[[Arguments, str], str | None] = supports_everything


@dataclasses.dataclass(frozen=True)
class Op[Arguments, Result]:
    """An op and its implementations.

    Attributes:
      name: for messages.
      implementations: by name.
      orders: for each platform, names in order of preference.
    """

    name: str
    implementations: Mapping[str, Implementation[Arguments, Result]]
    orders: Mapping[str, Sequence[str]]

    def __call__(
        self, arguments: Arguments, *, implementation: str | None = None, config: Any = None
    ) -> Result:
        """Runs the implementation that `choose` returns.

        Args:
          implementation: forces one by name.
          config: forces a kernel's tiling; only with a named implementation, whose config class it must be.

        Raises:
          Unsupported: see `choose`.
        """
        if config is not None and implementation is None:
            raise ValueError(f"a config of {self.name} needs the name of the implementation that it is for")
        apply = self.implementations[self.choose(arguments, implementation)].apply
        return apply(arguments) if config is None else apply(arguments, config)

    def choose(
        self, arguments: Arguments, implementation: str | None = None, platform: str | None = None
    ) -> str:
        """Returns the name of the implementation for a call; logs each choice and its reasons once.

        Args:
          implementation: forces one by name; None for the first in the platform's order that can take it.
          platform: None for the default backend.

        Raises:
          Unsupported: the named implementation does not exist or does not support the arguments, or none of
            the platform's does.
        """
        platform = platform or jax.default_backend()
        if implementation is not None:
            if implementation not in self.implementations:
                names = ", ".join(self.implementations)
                raise Unsupported(f"no {self.name} implementation {implementation!r}; there are {names}")
            if reason := self.implementations[implementation].unsupported(arguments, platform):
                raise Unsupported(f"{self.name} implementation {implementation!r} cannot be used: {reason}")
            return implementation
        passed_over = []
        for name in self.orders.get(platform, ("xla",)):
            reason = self.implementations[name].unsupported(arguments, platform)
            if reason is None:
                log_once(f"{self.name} on {platform}: using {name}", *passed_over)
                return name
            passed_over.append(f"not using {name}: {reason}")
        raise Unsupported(f"no {self.name} implementation for {platform}: {'; '.join(passed_over)}")


@functools.cache
def log_once(*lines: str) -> None:
    """Logs the lines once, ignoring repeats."""
    logger.info("%s", "; ".join(lines))


def in_float32[Arguments, Result](
    define: Callable[[Arguments], Result], out_dtypes: Callable[[Arguments], Any]
) -> Callable[[Arguments], Result]:
    """Builds the reference implementation of an op: its definition in float32 at the highest precision.

    Args:
      define: the definition, in the dtypes of its arguments. Arguments have a static `out_dtype` if the
        results' dtype is not that of an input.
      out_dtypes: returns the result dtypes of the original call, in the structure of the results.
    """

    def wide(x):
        if isinstance(x, QArray) or jnp.issubdtype(x.dtype, jnp.floating):
            return dequantize(x)
        return x

    def reference(arguments: Arguments) -> Result:
        widened: Any = jax.tree.map(wide, arguments, is_leaf=lambda x: isinstance(x, QArray))
        if hasattr(widened, "out_dtype"):
            widened = dataclasses.replace(widened, out_dtype=jnp.dtype(jnp.float32))
        with jax.default_matmul_precision("highest"):
            results = define(widened)
        return jax.tree.map(lambda x, dtype: x.astype(dtype), results, out_dtypes(arguments))

    return reference
