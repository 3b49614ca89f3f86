"""Rows in float8_e4m3fn: the op's contract, and the choice among its implementations.

M rows, K columns
"""

from jaxtyping import Array, Float

from moss_jax.ops import dispatch
from moss_jax.ops.rounding import mosaic_gpu, xla
from moss_jax.ops.rounding.rounded import Rounded

# Each is a module with `unsupported(x, platform) -> reason or None` and `apply(x)`.
IMPLEMENTATIONS = {"mosaic_gpu": mosaic_gpu, "xla": xla}

# The first that supports the arguments is taken.
ORDER = {"gpu": ("mosaic_gpu", "xla")}


def round_rows(x: Float[Array, "... K"], *, implementation: str | None = None) -> Rounded:
    """Rounds rows to float8_e4m3fn, each by a scale of its own, with which its largest number is the dtype's.

    It has gradients in x.

    Args:
      x: the rows.
      implementation: a name in `IMPLEMENTATIONS`; None takes the first of the platform's order that can.

    Raises:
      Unsupported: the named implementation cannot take x.
    """
    rows = x.reshape(-1, x.shape[-1])
    numbers, scale = IMPLEMENTATIONS[choose(rows, implementation)].apply(rows)
    return Rounded(numbers.reshape(x.shape), scale.reshape(x.shape[:-1]))


def choose(x: Float[Array, "M K"], implementation: str | None = None, platform: str | None = None) -> str:
    """Name of the implementation that takes a call; the choice and its reasons are logged once each.

    Raises:
      Unsupported: the named implementation does not exist or cannot take x.
    """
    return dispatch.choose("rounding", IMPLEMENTATIONS, ORDER, x, implementation, platform)
