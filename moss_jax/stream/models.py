"""The model that a command runs: a checkpoint, the one that ships here, or a random one."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

from moss_jax.config import moss_tiny
from moss_jax.convert import load
from moss_jax.nn import MossVideo
from moss_jax.text import Tokenizer

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "moss-tiny"


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A model with its tokenizer, and what to tell the user of it."""

    model: MossVideo
    tokenizer: Tokenizer
    description: str


def open_model(checkpoint: Path | None = None, *, dtype: DTypeLike | None = None, seed: int = 0) -> OpenModel:
    """Loads a checkpoint folder; without one the shipped model, or as long as there is none, a random one.

    Args:
      dtype: bfloat16 on accelerators and float32 on CPU if None.
      seed: of the random model's parameters.

    Raises:
      CheckpointError, TokenizerError: the folder cannot be used.
    """
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    folder = checkpoint or SHIPPED
    if checkpoint or SHIPPED.is_dir():
        return OpenModel(load(folder, dtype=dtype), Tokenizer.load(folder), str(folder.name))
    model = MossVideo(moss_tiny(), rngs=nnx.Rngs(seed), dtype=dtype)
    return OpenModel(
        model, Tokenizer.moss_tiny(), "moss_tiny, UNTRAINED: random weights, so expect noise and no sense"
    )
