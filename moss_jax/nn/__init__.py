"""The model as Flax NNX modules that hold parameters only."""

from moss_jax.nn.model import MossVideo
from moss_jax.nn.quantize import for_decoding, is_quantized, quantize, stored_weights

__all__ = ["MossVideo", "for_decoding", "is_quantized", "quantize", "stored_weights"]
