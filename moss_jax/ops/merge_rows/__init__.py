"""Weighted sums of rows of a KV cache, by which neighbouring vectors become one."""

from moss_jax.ops.merge_rows.api import MERGE_ROWS, merge_rows

__all__ = ["MERGE_ROWS", "merge_rows"]
