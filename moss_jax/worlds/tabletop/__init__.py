"""The tabletop world: procedural camera streams of a table, and dialogues about them."""

from moss_jax.worlds.tabletop.stream import TabletopStream, evaluation_stream

__all__ = ["TabletopStream", "evaluation_stream"]
