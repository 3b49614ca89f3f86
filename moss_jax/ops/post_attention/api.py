"""What follows attention in a decoder layer: its contract, and the choice among its implementations.

B batch/slot, T tokens, M = B * T rows, D embedding, K numbers of all heads, F hidden
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, Float32, Int8

from moss_jax.ops import dispatch
from moss_jax.ops.post_attention import mosaic_gpu, reference, xla
from moss_jax.ops.post_attention.arguments import Arguments

# Each is a module with `unsupported(arguments, platform) -> reason or None` and `apply(arguments)`.
IMPLEMENTATIONS = {"mosaic_gpu": mosaic_gpu, "xla": xla, "reference": reference}

# The first that supports the arguments is taken.
ORDER = {"gpu": ("mosaic_gpu", "xla")}


def post_attention(
    x: Float[Array, "B T D"],
    heads: Float[Array, "B T K"],
    *,
    out: Int8[Array, "D K"] | Float8e4m3fn[Array, "D K"],
    out_scale: Float32[Array, " D"],
    norm: Float[Array, " D"],
    gate_up: Int8[Array, "2*F D"] | Float8e4m3fn[Array, "2*F D"],
    gate_up_scale: Float32[Array, " 2*F"],
    down: Int8[Array, "D F"] | Float8e4m3fn[Array, "D F"],
    down_scale: Float32[Array, " D"],
    eps: float,
    attention_gate: Float[Array, "#B #T"] | None = None,
    mlp_gate: Float[Array, "#B #T"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T D"]:
    """Attention's output projection and the gated MLP, each added to the residual stream.

        x += attention_gate * (heads @ out.T * out_scale)
        gate, up = split(rmsnorm(x) * norm @ gate_up.T * gate_up_scale)
        return x + mlp_gate * (silu(gate) * up @ down.T * down_scale)

    What lies between two of these lines is rounded to the dtype of x, or kept in float32. It has gradients in
    x, heads, norm and the gates where `linear` has them, but not with `mosaic_gpu`.

    Args:
      x: the residual stream.
      heads: what attention returned, before its output projection.
      out: weights of the output projection, as `linear` takes them; `out_scale` is one number an output.
      norm: the weight of the norm.
      gate_up: weights of the MLP's first map, those of the gate in front.
      down: weights of the MLP's last map.
      eps: added to the mean square before its root is taken.
      attention_gate: what the attention branch is multiplied with: a number, or one for each row; 1 if None.
      mlp_gate: the same for the MLP's branch.
      implementation: a name in `IMPLEMENTATIONS`; None takes the first of the platform's order that can.

    Raises:
      ValueError: shapes or dtypes that don't fit together.
      Unsupported: the named implementation cannot take these arguments.
    """
    rows = x.shape[:-1]

    def flat(x):
        return x.reshape(-1, x.shape[-1])

    def gate(gate):
        return None if gate is None else jnp.broadcast_to(gate, rows).reshape(-1)

    a = Arguments(
        flat(x),
        flat(heads),
        out=out,
        out_scale=out_scale,
        norm=norm,
        gate_up=gate_up,
        gate_up_scale=gate_up_scale,
        down=down,
        down_scale=down_scale,
        attention_gate=gate(attention_gate),
        mlp_gate=gate(mlp_gate),
        eps=eps,
    )
    return IMPLEMENTATIONS[choose(a, implementation)].apply(a).reshape(x.shape)


def choose(arguments: Arguments, implementation: str | None = None, platform: str | None = None) -> str:
    """Name of the implementation that takes a call; the choice and its reasons are logged once each.

    Raises:
      Unsupported: the named implementation does not exist or cannot take the arguments.
    """
    return dispatch.choose("post_attention", IMPLEMENTATIONS, ORDER, arguments, implementation, platform)
