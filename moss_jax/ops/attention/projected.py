"""Self-attention fused with its norm and QKV projection, for the vision encoder.

B frames, P positions, H heads, D head, E width of the stream
"""

import dataclasses

import jax
from jaxtyping import Array, Float

from moss_jax.ops.attention.api import self_attention
from moss_jax.ops.attention.base import QuantizedProjection
from moss_jax.ops.attention.residuals import tag_projection
from moss_jax.ops.linear import Weights, linear
from moss_jax.ops.norm import Norm, Residual, add_norm
from moss_jax.ops.qarray import QArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedQKV:
    """Weights (W8A8) of a QKV projection whose queries and keys are output in 8 bits.

    Attributes:
      qk: [2, H, D, E]; its scale is already divided by those of queries and keys.
      v: [1, H, D, E]; its scale is already divided by `v_scale`.
      qk_scale: factor of the scores: the product of the scales of queries and keys.
      v_scale: scale of values, and so of their averages.
    """

    qk: QArray
    v: QArray
    qk_scale: Float[Array, ""]
    v_scale: Float[Array, ""]

    @property
    def shape(self) -> tuple[int, ...]:
        """[3, H, D, E]."""
        return (3, *self.v.shape[1:])


def norm_self_attention(
    residual: Residual,
    norm: Norm,
    qkv: Float[Array, "E 3 H D"] | QuantizedQKV,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B P H D"] | QArray, Float[Array, "B P E"]]:
    """Dense self-attention on the normalised residual sum, before the output projection.

    Args:
      residual: the stream, [B, P, E].
      norm: parameters of the norm.
      qkv: weights of the fused projection.
      implementation: as in `self_attention`.

    Returns:
      [B, P, H, D], a QArray for a QuantizedQKV; and the residual sum.
    """
    if not isinstance(qkv, QuantizedQKV):
        normed, x = add_norm(residual, norm)
        projection = linear(normed, Weights(qkv))
        assert isinstance(projection, Array)
        return self_attention(tag_projection(projection), implementation=implementation), x
    normed, x = add_norm(residual, norm, out_scale=qkv.qk.input_scale)
    qk = linear(normed, Weights(qkv.qk, layout="outputs_first"), out_dtype=qkv.qk.dtype)
    v = linear(normed, Weights(qkv.v, layout="outputs_first"), out_dtype=x.dtype)
    assert isinstance(qk, Array)
    assert isinstance(v, Array)
    projection = QuantizedProjection(QArray(qk, qkv.qk_scale), v[:, :, 0])
    return self_attention(projection, out_scale=qkv.v_scale, implementation=implementation), x
