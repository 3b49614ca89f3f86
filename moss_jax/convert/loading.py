"""Opens the model that a command runs: a checkpoint, or the small model that ships with the repository."""

import dataclasses
import os

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import DTypeLike

from moss_jax.config import DecoderWeights, EncoderWeights
from moss_jax.convert import hub
from moss_jax.convert.checkpoint import load
from moss_jax.nn import MossVideo, quantize
from moss_jax.shipped import shipped
from moss_jax.text import Tokenizer


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A model with its tokenizer and the name of its checkpoint."""

    model: MossVideo
    tokenizer: Tokenizer
    name: str


def open_model(
    checkpoint: str | os.PathLike | None = None,
    *,
    revision: str | None = None,
    dtype: DTypeLike | None = None,
    weights: DecoderWeights | None = None,
    encoder_weights: EncoderWeights | None = None,
    mesh: Mesh | None = None,
) -> OpenModel:
    """Loads model and tokenizer of a checkpoint.

    Args:
      checkpoint: a folder or a Hugging Face repo id, see `hub.resolve`; the shipped model if None.
      revision: revision of a repo id.
      dtype: bfloat16 on accelerators and float32 on CPU if None.
      weights, encoder_weights: 8-bit formats to quantize the decoder and the vision encoder to; see
        `nn.quantize`.
      mesh: to shard the parameters over; None for one device.

    Raises:
      CheckpointError, TokenizerError: the checkpoint cannot be used.
      ConfigError: there is no such 8-bit format.
    """
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    checkpoint = shipped("moss-tiny") if checkpoint is None else checkpoint
    folder = hub.resolve(checkpoint, revision)
    model = quantize(load(folder, dtype=dtype, mesh=mesh), decoder=weights, encoder=encoder_weights)
    # The folder of a downloaded snapshot is named by its commit.
    name = folder.resolve().name if os.path.isdir(checkpoint) else os.fspath(checkpoint)
    return OpenModel(model, Tokenizer.load(folder), name)
