"""Arguments and definition of the part of a layer after attention.

B batch/slot, T tokens, H heads, D width of the stream, F hidden width
"""

import dataclasses

import jax
from jaxtyping import Array, Float

from moss_jax.ops import dispatch
from moss_jax.ops.linear import Weights, norm_linear, residual_add
from moss_jax.ops.linear.base import check_weights
from moss_jax.ops.norm import Norm, Residual
from moss_jax.ops.norm.base import check as check_norm
from moss_jax.ops.qarray import QArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
    """Validated arguments of one call, built by `post_attention`, which documents the fields."""

    x: Float[Array, "B T D"]
    heads: Float[Array, "..."] | QArray
    out: Weights
    norm: Norm
    up: Weights
    down: Weights
    attention_gate: Float[Array, "..."] | None = None
    mlp_gate: Float[Array, "..."] | None = None

    @property
    def gated(self) -> bool:
        """Whether the MLP is gated by SiLU; otherwise it has a GELU."""
        return len(self.up.outputs) == 2


def check(a: Arguments) -> None:
    """Raises ValueError unless shapes fit together."""
    check_norm(Residual(a.x), a.norm)
    for weights in (a.out, a.up, a.down):
        check_weights(weights)
    D, out = a.x.shape[-1], a.out.inputs
    if tuple(a.heads.shape[-len(out) :]) != out:
        raise ValueError(f"heads {a.heads.shape} must end with the inputs of `out`, {out}")
    if len(a.up.outputs) not in (1, 2) or (a.gated and a.up.outputs[0] != 2):
        raise ValueError(f"`up` has the outputs [F] for a GELU or [2, F] to be gated; got {a.up.outputs}")
    for name, size, expected in (
        ("outputs of `out`", a.out.outputs, (D,)),
        ("inputs of `up`", a.up.inputs, (D,)),
        ("inputs of `down`", a.down.inputs, a.up.outputs[-1:]),
        ("outputs of `down`", a.down.outputs, (D,)),
    ):
        if size != expected:
            raise ValueError(f"with a stream of {D} columns, the {name} must be {expected}; got {size}")


def define(a: Arguments) -> Residual:
    """The unfused definition; differentiable where `linear` is."""
    residual = residual_add(a.x, a.heads, a.out, a.attention_gate)
    hidden, x = norm_linear(residual, a.norm, a.up, gelu=not a.gated)
    if a.gated:
        assert not isinstance(hidden, QArray)
        hidden = jax.nn.silu(hidden[..., 0, :]) * hidden[..., 1, :]
    return residual_add(x, hidden, a.down, a.mlp_gate)


def reference(a: Arguments) -> Residual:
    """The definition in float32 at the highest precision, without a pending branch."""
    return Residual(_in_float32(a))


def _define_sum(a: Arguments) -> Float[Array, "B T D"]:
    return define(a).sum()


_in_float32 = dispatch.in_float32(_define_sum, lambda a: a.x.dtype)
