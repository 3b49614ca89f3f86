"""A model that watches a video stream and talks about it while it watches."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from moss_jax.config import PRESETS, ModelConfig
from moss_jax.convert import CheckpointError, load, save
from moss_jax.nn import MossVideo

if TYPE_CHECKING:
    from moss_jax.api import ask, open_engine, watch

__all__ = [
    "PRESETS",
    "CheckpointError",
    "ModelConfig",
    "MossVideo",
    "__version__",
    "ask",
    "load",
    "open_engine",
    "save",
    "watch",
]

try:
    __version__ = importlib.metadata.version("moss_jax")
except importlib.metadata.PackageNotFoundError:
    __version__ = "0+source"  # A source tree on the path that is not installed.


def __getattr__(name: str) -> Any:
    """Imports `api` when it is first used, since it needs the video decoder."""
    if name in ("ask", "open_engine", "watch"):
        return getattr(importlib.import_module("moss_jax.api"), name)
    raise AttributeError(f"module 'moss_jax' has no attribute {name!r}")
