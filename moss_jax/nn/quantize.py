"""Quantisation of weights to 8 bits, and the weight layout that decodes fastest.

Decoding is bound by reading the weights, and half the bytes take half the time, so the decoder is quantised
weight-only (W8A16). The vision encoder works on whole frames and is compute-bound, so its inputs are rounded
to 8 bits too (W8A8).
"""

import functools
import math
import typing

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moss_jax.config import ConfigError, DecoderWeights, EncoderWeights
from moss_jax.nn.decoder import CrossAttention, Decoder, SelfAttention
from moss_jax.nn.layers import LayerNorm, Linear, parameter
from moss_jax.nn.model import MossVideo
from moss_jax.nn.vision import VisionLayer
from moss_jax.ops import qarray
from moss_jax.ops.attention import QuantizedQKV
from moss_jax.ops.linear import Layout, decode_layout
from moss_jax.ops.qarray import QArray

# Largest scaled bound in float8_e4m3fn, whose maximum is 448: the headroom is for rounding errors.
LIMIT = 384

# Projections that decode faster with another layout. The MLP's kernels are so large that their matmuls
# already read at full bandwidth, and another layout would slow down prefill.
PROJECTIONS = {SelfAttention: ("qkv", "out"), CrossAttention: ("q", "out")}


def quantize(
    model: MossVideo, *, decoder: DecoderWeights | None = None, encoder: EncoderWeights | None = None
) -> MossVideo:
    """Quantises the weights of parts of a model to 8 bits, in place; returns the model.

    Each kernel is freed before the next one is quantised, so that memory never holds two models.

    Args:
      decoder: dtype for the decoder's layers and head; the embedding, norms and gates are unchanged. None
        skips the decoder.
      encoder: dtype for the vision encoder's layers, whose GEMMs run in 8 bits, and for attention's queries
        and keys; patch embedding, compressor and projector are unchanged. None skips the encoder.

    Raises:
      ConfigError: there is no such dtype of weights, or the model is quantised already.
    """
    for part, name, known in (("decoder", decoder, DecoderWeights), ("encoder", encoder, EncoderWeights)):
        names = typing.get_args(known)
        if name is not None and name not in names:
            raise ConfigError(f"the {part}'s weights can be {' or '.join(names)}, not {name!r}")
    if is_quantized(model):
        raise ConfigError("the model is quantised already; quantise the one that was loaded")
    if decoder:
        for _, linear in nnx.iter_modules(model.decoder):
            if isinstance(linear, Linear):
                _replace(linear, _round(linear.kernel[...], linear.num_inputs, qarray.DTYPES[decoder]))
    if encoder:
        for layer in (*model.vision.layers, *model.vision.global_layers):
            _round_layer(layer, qarray.DTYPES[encoder])
    return model


def is_quantized(model: nnx.Module) -> bool:
    """Whether any weights are in 8 bits."""
    linears = (module for _, module in nnx.iter_modules(model) if isinstance(module, Linear))
    return any(not isinstance(linear.kernel.get_value(), jax.Array) for linear in linears)


def stored_weights(model: MossVideo) -> dict[str, str]:
    """How the weights of "decoder" and "encoder" are stored: "int8", "fp8" or the model's dtype."""

    def stored(part: nnx.Module) -> str:
        dtypes = {x.dtype for x in jax.tree.leaves(nnx.state(part, nnx.Param))}
        return next((name for name, dtype in qarray.DTYPES.items() if dtype in dtypes), str(model.dtype))

    return {"decoder": stored(model.decoder), "encoder": stored(model.vision)}


def for_decoding(decoder: Decoder, layout: Layout | None = None) -> Decoder:
    """Returns the decoder with its attention projections in the layout that decodes fastest.

    Kernels whose layout changes are copied, all others are shared; the given decoder is not modified.

    Args:
      layout: None for the one that this platform prefers.
    """
    layout = layout or decode_layout()
    if layout == "inputs_first":
        return decoder
    decoder = nnx.merge(*nnx.split(decoder))
    for _, module in nnx.iter_modules(decoder):
        for name in PROJECTIONS.get(type(module), ()):
            linear = getattr(module, name)
            if linear.layout == "inputs_first":
                kernel, axes, n = linear.kernel[...], linear.kernel.get_metadata()["axes"], linear.num_inputs
                linear.kernel = parameter(_outputs_first(kernel, n), (*axes[n:], *axes[:n]))
                linear.layout = layout
    return decoder


@functools.partial(jax.jit, static_argnums=1)
def _outputs_first(kernel: Array, num_inputs: int) -> Array:
    return kernel.transpose(*range(num_inputs, kernel.ndim), *range(num_inputs))


# One program per kernel shape, of which even a large model has only a dozen.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _round(kernel: Array, num_inputs: int, dtype: jnp.dtype) -> QArray:
    kernel = _outputs_first(kernel, num_inputs)
    return qarray.quantize(kernel, dtype, axes=kernel.ndim - num_inputs)


def _replace(linear: Linear, kernel: QArray | QuantizedQKV) -> None:
    """Replaces the kernel of a linear map by a quantised one."""
    axes, n = linear.kernel.get_metadata()["axes"], linear.num_inputs
    linear.kernel = parameter(kernel, (*axes[n:], *axes[:n]))
    linear.layout = "outputs_first"


def _round_layer(layer: VisionLayer, dtype: jnp.dtype) -> None:
    """Quantises the kernels of a vision encoder layer, with static scales for its activations.

    The relative error of a floating-point number doesn't depend on its magnitude, so scales are neither
    computed at run time nor calibrated: it is enough that nothing overflows. A norm's weights bound its
    output, the kernels of its projections bound theirs, and neither an average of values nor the GELU exceeds
    its arguments. With D columns the bound is about sqrt(D) times a typical number, which for 1,280 leaves
    range for columns some hundred times smaller than the largest.
    """
    attention, mlp = layer.attention, layer.mlp

    qkv, n = attention.qkv, attention.qkv.num_inputs
    q_scale, k_scale, v_scale = (_scale(bound) for bound in _bounds(layer.attention_norm, qkv))
    kernel, input_scale = _round(qkv.kernel[...], n, dtype), _norm_scale(layer.attention_norm)
    divisors = jnp.stack([q_scale, k_scale, v_scale])[:, None, None]
    scale = kernel.scale / divisors
    parts = (QArray(kernel.values[part], scale[part], input_scale) for part in (slice(2), slice(2, 3)))
    _replace(qkv, QuantizedQKV(*parts, qk_scale=q_scale * k_scale, v_scale=v_scale))
    _replace(attention.out, _with_scales(attention.out, dtype, input_scale=v_scale))

    hidden_scale = _scale(_bounds(layer.mlp_norm, mlp.fc1))
    _replace(mlp.fc1, _with_scales(mlp.fc1, dtype, _norm_scale(layer.mlp_norm), output_scale=hidden_scale))
    _replace(mlp.fc2, _with_scales(mlp.fc2, dtype, input_scale=hidden_scale))


def _with_scales(linear: Linear, dtype, input_scale, output_scale=None) -> QArray:
    kernel = _round(linear.kernel[...], linear.num_inputs, dtype)
    return QArray(kernel.values, kernel.scale, input_scale, output_scale)


def _norm_scale(norm: LayerNorm) -> Float[Array, ""]:
    """Scale with which the norm's outputs fit float8_e4m3fn."""
    weight, bias = norm.weight[...], norm.bias[...]
    return _scale(math.sqrt(weight.size) * jnp.abs(weight) + jnp.abs(bias))


def _bounds(norm: LayerNorm, linear: Linear) -> Float[Array, "..."]:
    """Upper bounds of |linear(norm(x))| over all x, one per output.

    Before weight and bias, a normalised row of D numbers has an L2 norm of at most sqrt(D).
    Source: the Cauchy-Schwarz inequality.
    """
    bias = 0 if linear.bias is None else linear.bias[...].astype(jnp.float32)
    return _product_bounds(norm.weight[...], norm.bias[...], linear.kernel[...]) + jnp.abs(bias)


@jax.jit
def _product_bounds(weight, bias, kernel):
    weight, bias, kernel = (x.astype(jnp.float32) for x in (weight, bias, kernel))
    lengths = jnp.sqrt(jnp.tensordot(weight**2, kernel**2, 1))
    return math.sqrt(weight.size) * lengths + jnp.abs(jnp.tensordot(bias, kernel, 1))


def _scale(bounds: Float[Array, "..."]) -> Float[Array, ""]:
    """The smallest power of two that scales numbers up to these bounds into float8_e4m3fn.

    Dividing by a power of two is exact.
    """
    return jnp.ldexp(jnp.float32(1), jnp.frexp(bounds.astype(jnp.float32).max() / LIMIT)[1])
