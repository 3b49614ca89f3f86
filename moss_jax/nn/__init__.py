"""The model as Flax NNX modules that hold parameters only."""

from moss_jax.nn.contiguous import for_decoding
from moss_jax.nn.model import MossVideo
from moss_jax.nn.quantized import is_quantized, quantize

__all__ = ["MossVideo", "for_decoding", "is_quantized", "quantize"]
