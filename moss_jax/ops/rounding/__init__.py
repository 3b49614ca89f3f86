"""Rows in 8 bits."""

from moss_jax.ops.rounding.api import IMPLEMENTATIONS, choose, round_rows
from moss_jax.ops.rounding.rounded import Rounded

__all__ = ["IMPLEMENTATIONS", "Rounded", "choose", "round_rows"]
