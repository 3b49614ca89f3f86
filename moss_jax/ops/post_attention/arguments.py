"""What every implementation is called with.

M rows, D embedding, K numbers of all heads, F hidden
"""

import dataclasses

import jax
from jaxtyping import Array, Float, Float8e4m3fn, Int8

from moss_jax.ops.linear.arguments import QUANTIZED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
    """One checked call; `post_attention` builds it and says what is in it, implementations read it."""

    x: Float[Array, "M D"]
    heads: Float[Array, "M K"]
    _: dataclasses.KW_ONLY
    out: Int8[Array, "D K"] | Float8e4m3fn[Array, "D K"]
    out_scale: Float[Array, " D"]
    norm: Float[Array, " D"]
    gate_up: Int8[Array, "2*F D"] | Float8e4m3fn[Array, "2*F D"]
    gate_up_scale: Float[Array, " 2*F"]
    down: Int8[Array, "D F"] | Float8e4m3fn[Array, "D F"]
    down_scale: Float[Array, " D"]
    attention_gate: Float[Array, " M"] | None = None
    mlp_gate: Float[Array, " M"] | None = None
    eps: float = dataclasses.field(metadata={"static": True})

    def __post_init__(self):
        if not hasattr(self.x, "ndim"):  # JAX rebuilds pytrees around placeholders.
            return
        (M, D), K, F = self.x.shape, self.heads.shape[-1], self.down.shape[-1]
        expected = {
            "heads": (M, K),
            "out": (D, K),
            "out_scale": (D,),
            "norm": (D,),
            "gate_up": (2 * F, D),
            "gate_up_scale": (2 * F,),
            "down": (D, F),
            "down_scale": (D,),
        }
        for name, shape in expected.items():
            if (got := getattr(self, name).shape) != shape:
                sizes = f"{M} rows, {D} embedding, {K} in the heads, {F} hidden"
                raise ValueError(f"with {sizes}, {name} must be {shape}; got {got}")
        for weights in (self.out, self.gate_up, self.down):
            if weights.dtype.name not in QUANTIZED:
                raise ValueError(f"weights are in {' or '.join(QUANTIZED)}, not {weights.dtype}")
