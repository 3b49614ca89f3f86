"""The model that a command runs: a checkpoint, or the one that ships here."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from moss_jax.config import DecoderWeights, EncoderWeights
from moss_jax.convert.checkpoint import load
from moss_jax.nn import MossVideo, quantize
from moss_jax.shipped import shipped
from moss_jax.text import Tokenizer


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A model with its tokenizer, and what it is called."""

    model: MossVideo
    tokenizer: Tokenizer
    name: str


def open_model(
    checkpoint: Path | None = None,
    *,
    dtype: DTypeLike | None = None,
    weights: DecoderWeights | None = None,
    encoder_weights: EncoderWeights | None = None,
) -> OpenModel:
    """Loads a checkpoint folder, or without one the small model that ships here.

    Args:
      dtype: bfloat16 on accelerators and float32 on CPU if None.
      weights, encoder_weights: what to keep of the decoder and of the vision encoder in 8 bits; see
        `nn.quantize`.

    Raises:
      CheckpointError, TokenizerError: the folder cannot be used.
      ConfigError: there are no such weights.
    """
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    folder = checkpoint or shipped("moss-tiny")
    model = quantize(load(folder, dtype=dtype), decoder=weights, encoder=encoder_weights)
    return OpenModel(model, Tokenizer.load(folder), folder.resolve().name)
