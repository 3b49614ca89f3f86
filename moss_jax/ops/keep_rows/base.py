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

    def gather_by_slot(x, slots):
        for kept, slot in zip(a.kept, slots, strict=True):
            new = _gather(jax.lax.dynamic_slice_in_dim(x, slot, 1), kept[None])
            x = jax.lax.dynamic_update_slice_in_dim(x, new, slot, 0)
        return x

    if a.slots is None:
        return tuple(_keep(x, a.kept, a.length) for x in a.buffers)
    return tuple(gather_by_slot(x, a.slots) for x in a.buffers)


def _gather(x: Num[Array, "B K R _"], kept: Int[Array, "B C"]) -> Num[Array, "B K R _"]:
    """Moves rows to the front; those behind stay as they are."""
    rows = jnp.take_along_axis(x, kept[:, None, :, None], axis=2, mode="clip")
    return jax.lax.dynamic_update_slice(x, rows, (0, 0, 0, 0)) if rows.shape != x.shape else rows


@jax.custom_vjp
def _keep(
    x: Num[Array, "B K R _"], kept: Int[Array, "B C"], length: Int[Array, " B"]
) -> Num[Array, "B K R _"]:
    """`_gather`, whose gradient is a gather, too: a row is kept once at most.

    The automatic gradient would be a scatter with atomic sums.
    """
    del length
    return _gather(x, kept)


def _keep_forward(x, kept, length):
    return _gather(x, kept), (kept, length)


def _keep_backward(saved, d_rows):
    kept, length = saved
    R, C = d_rows.shape[2], kept.shape[1]
    # Where each row went; R for one that is dropped.
    counts = jnp.arange(C) < length[:, None]
    new = jax.vmap(lambda at: jnp.full(R, R).at[at].set(jnp.arange(C), mode="drop"))(
        jnp.where(counts, kept, R)
    )
    d_x = jnp.take_along_axis(d_rows, new[:, None, :, None], axis=2, mode="fill", fill_value=0)
    return d_x, None, None


_keep.defvjp(_keep_forward, _keep_backward)
