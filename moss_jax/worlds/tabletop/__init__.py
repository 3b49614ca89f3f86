"""The tabletop world: a procedural camera stream over a table, and dialogues about it."""

from moss_jax.worlds.tabletop.stream import TabletopStream, evaluation_stream

__all__ = ["TabletopStream", "evaluation_stream"]
