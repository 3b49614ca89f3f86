"""Errors, checks and type conversions shared by all settings."""

import functools
import itertools
import numbers
import os
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# Seeds that both JAX and numpy accept.
SEEDS = range(2**63)


class ConfigError(ValueError):
    """An invalid setting; the message begins with the name of the field and says what would be valid."""


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError` unless a condition holds."""
    if not condition:
        raise ConfigError(message)


def require_at_least(least: int, settings: Any, *names: str) -> None:
    """Raises `ConfigError` if any of the named settings is less than a number."""
    for name in names:
        value = getattr(settings, name)
        require(value >= least, f"{name} must be at least {least}, not {value}")


def require_share(settings: Any, *names: str) -> None:
    """Raises `ConfigError` if any of the named settings is not a valid share of a whole."""
    for name in names:
        value = getattr(settings, name)
        require(0 <= value <= 1, f"{name} must be in [0, 1], not {value}")


def require_seed(seed: int) -> None:
    """Raises `ConfigError` for a seed that JAX or numpy does not accept."""
    require(seed in SEEDS, f"seed must be at least 0 and less than 2**63, not {seed}")


def convert_fields(settings: Any) -> None:
    """Converts the values of a frozen dataclass to the types of its fields, where that is lossless.

    An integer may be written as 1e4, a list becomes a tuple, a dict a tuple of pairs, and a string a tuple of
    that one string.

    Raises:
      ConfigError: a value cannot be converted.
    """
    for name, kind in _field_types(type(settings)).items():
        value = getattr(settings, name)
        try:
            object.__setattr__(settings, name, _convert(value, kind))
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"{name} must be {_describe(kind)}; got {value!r}") from None


@functools.cache
def _field_types(settings: type) -> dict[str, Any]:
    return get_type_hints(settings)


def _convert(value: Any, kind: Any) -> Any:
    """Converts a value to a type for `convert_fields`; raises TypeError or ValueError if it can't."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _convert(value, arguments[0])
    if origin is Literal:
        return arguments[arguments.index(value)]
    if origin is tuple:
        if isinstance(value, str) and (arguments[0] is str or get_origin(arguments[0]) is Literal):
            value = (value,)
        if isinstance(value, dict) and get_origin(arguments[0]) is tuple:
            value = tuple(value.items())
        if not isinstance(value, list | tuple):
            raise TypeError
        elements = itertools.repeat(arguments[0], len(value)) if arguments[-1] is ... else arguments
        return tuple(_convert(v, element) for v, element in zip(value, elements, strict=True))
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind in (int, float):
        if type(value) is bool or not issubclass(type(value), numbers.Real):
            raise TypeError
        number = kind(value)
        if number != value:  # A fraction, or NaN.
            raise ValueError
        return number
    if not isinstance(value, kind):
        raise TypeError
    return value


def _describe(kind: Any) -> str:
    """Describes a type in words, for error messages."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return f"{_describe(arguments[0])} or None"
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is tuple and arguments[-1] is ...:
        return f"a tuple with each element {_describe(arguments[0])}"
    if origin is tuple:
        return f"({', '.join(map(_describe, arguments))})"
    return {int: "a whole number", float: "a number", str: "a string"}.get(kind) or kind.__name__
