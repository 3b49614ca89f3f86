"""The tabletop world: a procedural camera stream over a table, and dialogues about it."""

from moss_jax.data.tabletop.batches import TabletopBatches
from moss_jax.data.tabletop.stream import Stream, evaluation_stream

__all__ = ["Stream", "TabletopBatches", "evaluation_stream"]
