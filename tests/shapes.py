"""Hooks a check of jaxtyping's annotations into the import of moss_jax: dtypes and shapes of arrays.

conftest.py imports this module before moss_jax.
"""

import functools
import inspect
import types
import typing
from typing import Any

import jax
import jaxtyping

# Every function and dataclass in these packages.
CHECKED = ["moss_jax.memory", "moss_jax.nn", "moss_jax.ops"]


def check(function):
    """Wraps a function so that calling it checks the arrays among its arguments and in its result.

    Other annotations are left to pyright, and so is an array's class: arrays of numpy, references and
    ShapeDtypeStructs may stand for JAX's. A dataclass is not checked where JAX rebuilds it around something
    else, such as shardings or placeholders.
    """
    signature = inspect.signature(function)
    if signature.return_annotation is Any:
        # jaxtyping checks the arguments before a call, under this annotation, and again with the result. The
        # second check is enough, and leaves it to a function to refuse shapes with its own message.
        return function
    hints = {p.name: p.annotation for p in signature.parameters.values()}
    hints["return"] = signature.return_annotation
    hints = {name: hint for name, hint in hints.items() if _names_arrays(hint)}
    is_init = function.__name__ == "__init__"

    @functools.wraps(function)
    def checked(*args, **kwargs):
        values = signature.bind(*args, **kwargs).arguments
        values["return"] = result = function(*args, **kwargs)
        arrays = {name: values[name] for name in hints if name in values}
        if is_init and not all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(arrays)):
            return result
        for name, value in arrays.items():
            if not _fits(value, hints[name]):
                raise TypeError(f"{name} does not fit {hints[name]}")
        return result

    return checked if hints else function


def _names_arrays(hint) -> bool:
    return _is_array_hint(hint) or any(map(_names_arrays, typing.get_args(hint)))


def _is_array_hint(hint) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def _fits(value, hint) -> bool:
    """Whether a value fits, as far as the hint names arrays."""
    if _is_array_hint(hint):
        return isinstance(value, _of_any_class(hint))
    parts = typing.get_args(hint)
    match typing.get_origin(hint):
        case typing.Union | types.UnionType:
            return any(_fits(value, part) for part in parts)
        case origin if origin is tuple:
            if not isinstance(value, tuple):
                return False
            if parts[-1] is Ellipsis:
                parts = parts[:1] * len(value)
            return len(value) == len(parts) and all(map(_fits, value, parts))
    # Any, protocols and other special forms fit everything.
    return type(hint) is not type or isinstance(value, hint)


@functools.cache
def _of_any_class(hint):
    if hint.array_type is jax.Array:
        return hint.dtype[Any, hint.dim_str]
    # An array type of the project's own stands for numbers of any dtype, whatever it stores.
    return jaxtyping.Shaped[hint.array_type, hint.dim_str]


jaxtyping.install_import_hook(CHECKED, "shapes.check")
