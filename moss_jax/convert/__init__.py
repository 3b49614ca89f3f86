"""Conversion between the model and checkpoints in Hugging Face layout."""

from moss_jax.convert.checkpoint import load, load_config, save
from moss_jax.convert.hub import CheckpointError
from moss_jax.convert.loading import OpenModel, open_model
from moss_jax.convert.names import to_hugging_face

__all__ = ["CheckpointError", "OpenModel", "load", "load_config", "open_model", "save", "to_hugging_face"]
