"""The definition of the op: plain float32.

M rows, D embedding
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.post_attention.arguments import Arguments


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """The reference takes everything."""
    del arguments, platform
    return None


def apply(a: Arguments) -> Float[Array, "M D"]:
    """Computes the op in float32 at the highest matmul precision."""

    def linear(x, weights, scale):
        return jnp.matmul(x, weights.astype(jnp.float32).T, precision="highest") * scale

    def gated(gate, branch):
        return branch if gate is None else gate.astype(jnp.float32)[:, None] * branch

    x, heads, norm = (x.astype(jnp.float32) for x in (a.x, a.heads, a.norm))
    x += gated(a.attention_gate, linear(heads, a.out, a.out_scale))
    normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + a.eps) * norm
    gate, up = jnp.split(linear(normed, a.gate_up, a.gate_up_scale), 2, axis=-1)
    branch = linear(jax.nn.silu(gate) * up, a.down, a.down_scale)
    return (x + gated(a.mlp_gate, branch)).astype(a.x.dtype)
