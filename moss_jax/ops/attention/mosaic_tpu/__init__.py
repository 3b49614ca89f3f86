"""FlashAttention in Pallas for TPUs (Mosaic).

The query heads that share a kv head are packed as rows, row n = t * G + g, so that every kernel sees plain
attention of K heads over N = T * G rows, each with its own range of keys. A tile of R rows visits the tiles
of X keys between the first and the last key that any of its rows sees (`tiles.py`), with an online softmax
(`forward.py`; Dao et al., arXiv 2205.14135). The backward pass recomputes the scores from the log-sum-exp,
once by row for q and once by key for k, v and the bias, so memory grows with T + S (`backward.py`).

`DecodeConfig` and `StaircaseConfig` are two tilings of this. Few queries are one tile of rows that streams
over long tiles of keys; many are split into square tiles; only those under the staircase are visited.

These kernels have not been run on a TPU. Tests run them in JAX's interpreter, lower them for a TPU and, if
libtpu is installed, compile them for one; tile sizes are estimated, not measured.

B batch/slot, T query tokens, S keys, K kv heads, G query heads per kv head, H = K * G, D head, N = T * G rows
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moss_jax.ops.attention.base import Arguments, no_gradients, no_gradients_by_slot
from moss_jax.ops.attention.mosaic_tpu.backward import backward
from moss_jax.ops.attention.mosaic_tpu.forward import forward
from moss_jax.ops.attention.mosaic_tpu.tiles import DecodeConfig, Keys, Rows, StaircaseConfig
from moss_jax.ops.attention.residuals import tag
from moss_jax.ops.qarray import QArray

# Largest T * G for which one tile takes all rows.
MAX_DECODE_ROWS = 64

# Largest head_dim for which the compiler is known to fit tiles of the default sizes in vector memory.
MAX_HEAD_DIM = 256


def unsupported_platform(platform: str) -> str | None:
    """Why these kernels do not run on a platform; None if they do."""
    return None if platform == "tpu" else f"it needs a TPU, and this is {platform}"


def unsupported(arguments: Arguments, platform: str) -> str | None:
    """Why these kernels cannot take the arguments; None if they can."""
    if reason := unsupported_platform(platform):
        return reason
    dtype = arguments.q.dtype
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"TPUs compute in float32 and bfloat16, not {dtype}"
    stored = {arguments.k.dtype, arguments.v.dtype}
    if len(stored) > 1 or not (arguments.quantized or stored == {dtype}):
        names = " and ".join(sorted(x.name for x in stored))
        return f"q, k and v must have one dtype, or k and v be quantised, not {dtype} and {names}"
    if (head_dim := arguments.q.shape[-1]) > MAX_HEAD_DIM:
        return f"head_dim {head_dim} is more than {MAX_HEAD_DIM}, and its tiles may not fit vector memory"
    return None


def apply(a: Arguments, config: DecodeConfig | StaircaseConfig | None = None) -> Float[Array, "B T H D"]:
    """Computes the op; differentiable in q, k, v and bias without slots, if K and V are not quantised.

    Args:
      config: sizes of the tiles; None for the default by the number of queries. The gradients of a
        `DecodeConfig` are computed with a default `StaircaseConfig`.
    """
    if config is None:
        config = DecodeConfig() if a.group_rows <= MAX_DECODE_ROWS else StaircaseConfig()
    B, T, H, D = a.q.shape
    K, S = a.k.shape[1:3]
    G = H // K
    q = a.q.reshape(B, T, K, G, D).swapaxes(1, 2).reshape(B, K, T * G, D)
    start, end = (jnp.clip(bound, 0, S) for bound in a.bounds)
    empty = start >= end
    start, end = (jnp.repeat(jnp.where(empty, 0, bound), G, axis=1) for bound in (start, end))
    (k, k_scale), (v, v_scale) = (_with_scale(x) for x in (a.k, a.v))
    keys = Keys(
        k=k,
        v=v,
        bias=None if a.bias is None else a.bias[:, None, None, :].astype(jnp.float32),
        k_scale=k_scale,
        v_scale=v_scale,
    )
    out = _attend(config, a.scale, Rows(q, start, end, a.slots), keys)
    return out.reshape(B, K, T, G, D).swapaxes(1, 2).reshape(B, T, H, D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(config, scale, rows: Rows, keys: Keys) -> Float[Array, "B K N D"]:
    return forward(config, scale, rows, keys, save=False)[0]


def _attend_forward(config, scale, rows, keys):
    out, log_sum = tag(*forward(_differentiable(config), scale, rows, keys, save=True))
    return out, (rows, keys, out, log_sum)


def _attend_backward(config, scale, residuals, d_out):
    rows, keys, out, log_sum = residuals
    if keys.k_scale is not None:
        raise no_gradients(keys.k.dtype)
    if rows.slots is not None:
        raise no_gradients_by_slot()
    d_q, d_k, d_v, d_bias = backward(_differentiable(config), scale, rows, keys, out, log_sum, d_out)
    ranges: Any = (None, None, None)  # Integers have no gradients.
    return Rows(d_q, *ranges), Keys(d_k, d_v, d_bias, None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _with_scale(x: Array | QArray):
    """Keys or values as stored, and their scales along the lanes, [B, K, 1, S]."""
    return (x.values, x.scale[:, :, None, :]) if isinstance(x, QArray) else (x, None)


def _differentiable(config: DecodeConfig | StaircaseConfig) -> StaircaseConfig:
    return StaircaseConfig() if isinstance(config, DecodeConfig) else config
