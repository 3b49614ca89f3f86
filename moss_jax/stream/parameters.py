"""Modules as pure functions of a flat list of parameters."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

# A parameter of at most this many elements is always embedded as a constant, whatever its axes.
SMALL = 2**13


def functionalize(
    module: nnx.Module, call: Callable, uses: nnx.filterlib.Filter = ...
) -> tuple[list[jax.Array], Callable]:
    """Splits `call(module, ...)` into a list of parameters and a pure function of that list.

    JAX flattens a list in C++ at every call, an `nnx.State` in Python; and each array in it costs the host a
    microsecond or two. Norms, biases, gates and scales are many and small, so they are constants of the
    program and not arguments. They are numpy arrays, so that Python's operators on them are evaluated at
    trace time: XLA would not fold the product of a constant and a broadcast scale.

    Args:
      uses: filter of the parameters that the call uses; only the shapes of the others are kept.

    Returns:
      The parameters, and `pure(parameters, *arguments)`.
    """
    graph, params, others = nnx.split(module, uses, ...)
    leaves, structure = jax.tree.flatten(params)
    others = jax.eval_shape(lambda: others)
    constants = {i: np.asarray(x) for i, x in enumerate(leaves) if x.ndim <= 1 or x.size <= SMALL}
    count = len(leaves)

    def pure(leaves, *arguments):
        leaves = iter(leaves)
        params = [constants[i] if i in constants else next(leaves) for i in range(count)]
        return call(nnx.merge(graph, jax.tree.unflatten(structure, params), others), *arguments)

    return [x for i, x in enumerate(leaves) if i not in constants], pure
