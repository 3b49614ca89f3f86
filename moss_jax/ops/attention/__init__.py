"""Attention in which each query sees one range of the keys."""

from moss_jax.ops.attention.api import (
    IMPLEMENTATIONS,
    append_and_attend,
    attention,
    choose,
    self_attention,
)
from moss_jax.ops.attention.arguments import Arguments, KeyRange, RoundedProjection
from moss_jax.ops.attention.projected import RoundedQKV, norm_self_attention
from moss_jax.ops.dispatch import Unsupported

__all__ = [
    "IMPLEMENTATIONS",
    "Arguments",
    "KeyRange",
    "RoundedProjection",
    "RoundedQKV",
    "Unsupported",
    "append_and_attend",
    "attention",
    "choose",
    "norm_self_attention",
    "self_attention",
]
