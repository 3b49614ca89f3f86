"""Attention in which each query sees one range of the keys."""

from moss_jax.ops.attention.api import (
    IMPLEMENTATIONS,
    append_and_attend,
    attention,
    choose,
    self_attention,
)
from moss_jax.ops.attention.arguments import Arguments, KeyRange, RoundedProjection
from moss_jax.ops.dispatch import Unsupported

__all__ = [
    "IMPLEMENTATIONS",
    "Arguments",
    "KeyRange",
    "RoundedProjection",
    "Unsupported",
    "append_and_attend",
    "attention",
    "choose",
    "self_attention",
]
