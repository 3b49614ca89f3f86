"""Rows in 8 bits."""

from moss_jax.ops.rounding.api import IMPLEMENTATIONS, choose, round_rows

__all__ = ["IMPLEMENTATIONS", "choose", "round_rows"]
