"""Eviction from a KV cache: the rows that stay close up, in place."""

from moss_jax.ops.keep_rows.api import KEEP_ROWS, keep_rows

__all__ = ["KEEP_ROWS", "keep_rows"]
