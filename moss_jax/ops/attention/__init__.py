"""Attention with one key range per query: over a KV cache, a memory bank, or the sequence itself."""

from moss_jax.ops.attention.api import (
    APPEND,
    ATTENTION,
    SELF_ATTENTION,
    append,
    attention,
    self_attention,
)
from moss_jax.ops.attention.base import Arguments, KeyRange, QuantizedProjection
from moss_jax.ops.attention.projected import QuantizedQKV, norm_self_attention
from moss_jax.ops.attention.residuals import save_projections, save_residuals, tag_projection
from moss_jax.ops.dispatch import Unsupported

__all__ = [
    "APPEND",
    "ATTENTION",
    "SELF_ATTENTION",
    "Arguments",
    "KeyRange",
    "QuantizedProjection",
    "QuantizedQKV",
    "Unsupported",
    "append",
    "attention",
    "norm_self_attention",
    "save_projections",
    "save_residuals",
    "self_attention",
    "tag_projection",
]
