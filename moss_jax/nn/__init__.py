"""The model as Flax NNX modules that hold parameters only."""

from moss_jax.nn.model import MossVideo

__all__ = ["MossVideo"]
