"""Arguments and definition of the eviction of rows.

B slots, N of them compacted, K kv heads, R rows of a buffer, C rows that may stay
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
    """Validated arguments of one call, built by `keep_rows`, which documents the fields."""

    buffers: tuple[Num[Array, "B K R _"], ...]
    kept: Int[Array, "N C"]
    length: Int[Array, " N"]
    slots: Int[Array, " N"] | None = None

    def __post_init__(self):
        if not hasattr(self.kept, "ndim"):  # JAX rebuilds pytrees around placeholders.
            return
        N, C = self.kept.shape
        for name, x in (("length", self.length), ("slots", self.slots)):
            if x is not None and x.shape != (N,):
                raise ValueError(f"{name} has one entry for each of {N} slots; got {x.shape}")
        for x in self.buffers:
            if self.slots is None and len(x) != N:
                raise ValueError(f"without `slots` there must be {N} of them; got {x.shape}")
            if x.shape[2] < C:
                raise ValueError(f"a buffer must have at least {C} rows; got {x.shape}")


def define(a: Arguments) -> tuple[Num[Array, "B K R _"], ...]:
    """The definition, a gather; differentiable in the buffers."""

    def gather(x, kept):
        rows = jnp.take_along_axis(x, kept[:, None, :, None], axis=2, mode="clip")
        return jax.lax.dynamic_update_slice(x, rows, (0, 0, 0, 0)) if rows.shape != x.shape else rows

    def gather_by_slot(x, slots):
        for kept, slot in zip(a.kept, slots, strict=True):
            new = gather(jax.lax.dynamic_slice_in_dim(x, slot, 1), kept[None])
            x = jax.lax.dynamic_update_slice_in_dim(x, new, slot, 0)
        return x

    return tuple(gather(x, a.kept) if a.slots is None else gather_by_slot(x, a.slots) for x in a.buffers)
