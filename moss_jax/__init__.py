"""A model that watches a video stream and talks about it while it watches."""

from moss_jax.config import PRESETS, ModelConfig
from moss_jax.convert import CheckpointError, load, save
from moss_jax.nn import MossVideo

__all__ = ["PRESETS", "CheckpointError", "ModelConfig", "MossVideo", "load", "save"]
