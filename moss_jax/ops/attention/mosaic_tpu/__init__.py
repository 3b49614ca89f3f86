"""Attention in Pallas for TPUs (Mosaic).

The query heads that share a kv head become rows beside each other, row n = t * G + g, so that every kernel
sees plain attention of K heads over N = T * G rows, each with its own range of keys. A tile of R rows visits
the tiles of X keys between the first and the last key that any of its rows sees (`tiles.py`), with a running
maximum and sum (`forward.py`; Dao et al., arXiv 2205.14135). The backward pass recomputes the scores from the
log-sum-exp, once by row for q and once by key for k, v and the bias, so memory grows with T + S
(`backward.py`).

*Decode* and *staircase* are two shapes of this walk. Few queries are one tile of rows that streams over long
tiles of keys; many are cut in square tiles, of which only those under the staircase are visited.

No TPU has run these kernels. Tests run them in JAX's interpreter, lower them for a TPU and, where libtpu is
installed, compile them for one; the sizes of tiles are reckoned, not measured.

B batch/slot, T query tokens, S keys, K kv heads, G query heads per kv head, H = K * G, D head, N = T * G rows
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.attention.arguments import Arguments, no_gradients
from moss_jax.ops.attention.mosaic_tpu.backward import backward
from moss_jax.ops.attention.mosaic_tpu.forward import forward
from moss_jax.ops.attention.mosaic_tpu.tiles import DecodeConfig, Keys, Rows, StaircaseConfig

# T * G up to which one tile takes all rows.
MAX_DECODE_ROWS = 64

# The largest for which the compiler was asked whether tiles of the default sizes fit into vector memory.
MAX_HEAD_DIM = 256


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """Why these kernels cannot take the arguments; None if they can."""
    if platform != "tpu":
        return f"it needs a TPU, and this is {platform}"
    dtype = arguments.q.dtype
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"TPUs compute in float32 and bfloat16, not {dtype}"
    stored = {arguments.k.dtype, arguments.v.dtype}
    if len(stored) > 1 or not (arguments.quantized or stored == {dtype}):
        names = " and ".join(sorted(x.name for x in stored))
        return f"q, k and v must have one dtype, or k and v be quantised, not {dtype} and {names}"
    if (head_dim := arguments.q.shape[-1]) > MAX_HEAD_DIM:
        return (
            f"head_dim {head_dim} is more than {MAX_HEAD_DIM}, and its tiles may not fit into vector memory"
        )
    return None


def attend(a: Arguments) -> Float[Array, "B T H D"]:
    """Computes the op; differentiable in q, k, v and bias."""
    _, T, H, _ = a.q.shape
    few = T * (H // a.k.shape[1]) <= MAX_DECODE_ROWS
    return decode(a, DecodeConfig()) if few else staircase(a, StaircaseConfig())


def decode(a: Arguments, config: DecodeConfig) -> Float[Array, "B T H D"]:
    """The op for few queries, all in one tile; its gradients are those of `staircase`."""
    return _on_rows(a, config)


def staircase(a: Arguments, config: StaircaseConfig) -> Float[Array, "B T H D"]:
    """The op for many queries."""
    return _on_rows(a, config)


def _on_rows(a: Arguments, config: DecodeConfig | StaircaseConfig) -> Float[Array, "B T H D"]:
    """Brings the arguments into the kernels' form, and the output back."""
    B, T, H, D = a.q.shape
    K, S = a.k.shape[1:3]
    G = H // K
    q = a.q.reshape(B, T, K, G, D).swapaxes(1, 2).reshape(B, K, T * G, D)
    start, end = (jnp.clip(bound, 0, S) for bound in a.bounds)
    empty = start >= end
    start, end = (jnp.repeat(jnp.where(empty, 0, bound), G, axis=1) for bound in (start, end))
    keys = Keys(
        k=a.k,
        v=a.v,
        bias=None if a.bias is None else a.bias[:, None, None, :].astype(jnp.float32),
        k_scale=None if a.k_scale is None else a.k_scale[:, :, None, :],
        v_scale=None if a.v_scale is None else a.v_scale[:, :, None, :],
    )
    out = _attend(config, a.scale, Rows(q, start, end), keys)
    return out.reshape(B, K, T, G, D).swapaxes(1, 2).reshape(B, T, H, D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(config, scale, rows: Rows, keys: Keys) -> Float[Array, "B K N D"]:
    return forward(config, scale, rows, keys, save=False)[0]


def _attend_forward(config, scale, rows, keys):
    out, log_total = forward(_differentiable(config), scale, rows, keys, save=True)
    return out, (rows, keys, out, log_total)


def _attend_backward(config, scale, residuals, d_out):
    rows, keys, out, log_total = residuals
    if keys.k_scale is not None:
        raise no_gradients(keys.k.dtype)
    d_q, d_k, d_v, d_bias = backward(_differentiable(config), scale, rows, keys, out, log_total, d_out)
    return Rows(d_q, None, None), Keys(d_k, d_v, d_bias, None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _differentiable(config: DecodeConfig | StaircaseConfig) -> StaircaseConfig:
    return StaircaseConfig() if isinstance(config, DecodeConfig) else config
