"""The tabletop world: a procedural camera stream over a table, and dialogues about it."""

from moss_jax.worlds.tabletop.stream import Stream, evaluation_stream

__all__ = ["Stream", "evaluation_stream"]
