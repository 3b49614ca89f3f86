"""A layer's end in plain JAX around `linear`, which has kernels of its own; for any platform.

M rows, D embedding
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.linear import linear
from moss_jax.ops.norm import rms_norm
from moss_jax.ops.post_attention.arguments import Arguments


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """It takes everything."""
    del arguments, platform
    return None


def apply(a: Arguments) -> Float[Array, "M D"]:
    """Computes the op, with every intermediate in the dtype of x; differentiable where `linear` is."""

    branch = linear(a.heads.astype(a.x.dtype), a.out, a.out_scale)
    attention_gate, mlp_gate = (
        None if gate is None else gate[:, None] for gate in (a.attention_gate, a.mlp_gate)
    )
    normed, x = rms_norm(a.x, a.norm, eps=a.eps, add=branch, scale=attention_gate)
    gate, up = jnp.split(linear(normed, a.gate_up, a.gate_up_scale), 2, axis=-1)
    branch = linear(jax.nn.silu(gate) * up, a.down, a.down_scale)
    return x + (branch if mlp_gate is None else mlp_gate.astype(x.dtype) * branch)
