"""Public API of the part of a layer after attention: its contract and implementations.

B batch/slot, T tokens, H heads, D width of the stream, F hidden width
"""

from jaxtyping import Array, Float

from moss_jax.ops.dispatch import Implementation, Op
from moss_jax.ops.linear import Weights
from moss_jax.ops.norm import Norm, Residual
from moss_jax.ops.post_attention import base, mosaic_gpu
from moss_jax.ops.post_attention.base import Arguments, check
from moss_jax.ops.qarray import QArray

POST_ATTENTION = Op(
    "post_attention",
    {
        "mosaic_gpu": Implementation(mosaic_gpu.apply, mosaic_gpu.unsupported),
        "xla": Implementation(base.define),
        "reference": Implementation(base.reference),
    },
    {"gpu": ("mosaic_gpu", "xla")},
)


def post_attention(
    x: Float[Array, "B T D"],
    heads: Float[Array, "..."] | QArray,
    *,
    out: Weights,
    norm: Norm,
    up: Weights,
    down: Weights,
    attention_gate: Float[Array, "..."] | None = None,
    mlp_gate: Float[Array, "..."] | None = None,
    implementation: str | None = None,
    config: mosaic_gpu.Config | None = None,
) -> Residual:
    """Attention's output projection and the MLP, each added to the residual stream.

        x += attention_gate * out(heads)
        gate, up = split(up(norm(x)))            hidden = silu(gate) * up         if `up` has outputs [2, F]
                                                 hidden = gelu(up(norm(x)))       if `up` has outputs [F]
        x += mlp_gate * down(hidden)

    Between two of these steps, values are rounded to the dtype of x, to 8 bits if the weights specify it, or
    kept in float32. It has gradients where `linear` has them, but not with `mosaic_gpu`.

    Args:
      x: the residual stream.
      heads: results of attention before its output projection: [B, T, *inputs of out].
      out: output projection.
      norm: before the MLP.
      up: first map of the MLP; if gated, the gate comes first.
      down: last map of the MLP.
      attention_gate, mlp_gate: factors of the branches, in shapes that broadcast to [B, T, 1]; 1 if None.
      implementation: a name in `POST_ATTENTION`; None takes the first in the platform's order that can.
      config: tiling of the named implementation.

    Returns:
      The stream, whose last branch may be pending.

    Raises:
      ValueError: shapes or dtypes that don't fit together.
      Unsupported: the named implementation cannot take these arguments.
    """
    a = Arguments(x, heads, out, norm, up, down, attention_gate, mlp_gate)
    check(a)
    return POST_ATTENTION(a, implementation=implementation, config=config)
