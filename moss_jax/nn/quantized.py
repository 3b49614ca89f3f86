"""Linear maps whose weights are kept in 8 bits, and models made of them.

What a decoded token waits for is its weights' way out of memory, and the way of half the bytes is half as
long. The vision encoder works on whole frames, so there it is the arithmetic that counts: its inputs are
rounded to 8 bits too.
"""

import functools
import math
import typing
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Float8e4m3fn

from moss_jax.config import ConfigError, DecoderWeights, EncoderWeights
from moss_jax.nn.layers import LayerNorm, Linear, Residual, parameter
from moss_jax.nn.model import MossVideo
from moss_jax.nn.vision import VisionLayer
from moss_jax.ops.attention import QuantizedProjection
from moss_jax.ops.fused_linear import fused_linear
from moss_jax.ops.linear import linear
from moss_jax.ops.qarray import QArray

_DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}

# Of the 448 that float8_e4m3fn goes up to: the rest is for what rounding may add.
ROOM = 384


class QuantizedLinear(nnx.Module):
    """A `Linear` in 8 bits, with a scale for each output.

    The kernel lies `[outputs..., inputs...]`: what makes one output is contiguous.

    Args:
      linear: is left as it is.
      dtype: of the kernel, int8 or float8_e4m3fn.
    """

    def __init__(self, linear: Linear, dtype: DTypeLike):
        axes, num_inputs = linear.kernel.get_metadata()["axes"], linear.num_inputs
        kernel, scale = _quantize_kernel(linear.kernel[...], num_inputs, jnp.dtype(dtype))
        self.kernel = parameter(kernel, (*axes[num_inputs:], *axes[:num_inputs]))
        self.scale = parameter(scale, axes[num_inputs:])
        self.bias = linear.bias

    def __call__(self, x: Float[Array, "..."], out_dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        x, scale = self._rows(x), self.scale[...]
        y = linear(x, self.matrix, scale.reshape(-1), out_dtype=out_dtype)
        y = y.reshape(*x.shape[:-1], *scale.shape)
        return y if self.bias is None else y + self.bias[...]

    def part(self, which: slice) -> Self:
        """The map to a part of its outputs, by the first of their axes."""
        part = nnx.clone(self)
        for name in ("kernel", "scale", "bias"):
            if (whole := getattr(self, name)) is not None:
                setattr(part, name, parameter(whole[...][which], whole.get_metadata()["axes"]))
        return part

    def _rows(self, x: Float[Array, "..."]) -> Float[Array, "... K"]:
        """The inputs on one axis."""
        return jax.lax.collapse(x, x.ndim - (self.kernel[...].ndim - self.scale[...].ndim))

    @property
    def matrix(self) -> Array:
        """The kernel as [outputs, inputs]."""
        return self.kernel[...].reshape(self.scale[...].size, -1)


class Fp8Linear(QuantizedLinear):
    """A `Linear` in float8_e4m3fn of inputs that come in float8_e4m3fn too.

    Args:
      linear: is left as it is.
      input_scale: what the numbers that come are multiplied with.
      result_scale: what the numbers of the gelu are to be multiplied with, where 8 bits are asked for.
    """

    input_dtype = jnp.float8_e4m3fn

    def __init__(
        self, linear: Linear, input_scale: Float[Array, ""], result_scale: Float[Array, ""] | None = None
    ):
        super().__init__(linear, self.input_dtype)
        self.scale[...] *= input_scale
        self.inverse = None if result_scale is None else parameter(1 / result_scale[None], (None,))
        self.dtype = linear.kernel[...].dtype

    def __call__(
        self, x: Float8e4m3fn[Array, "..."], out_dtype: DTypeLike | None = None
    ) -> Float[Array, "..."]:
        return self._compute(x, out_dtype=out_dtype or self.dtype)

    def add_to(
        self, stream: Float[Array, "... D"], x: Float8e4m3fn[Array, "..."], scale: Float[Array, " 1"] | None
    ) -> Residual:
        """The stream with what becomes of x, times `scale`: added by the map itself."""
        scale = None if scale is None else scale.astype(jnp.float32)
        return Residual(self._compute(x, out_scale=scale, residual=stream, out_dtype=self.dtype))

    def gelu(self, x: Float8e4m3fn[Array, "..."], out_dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        """The exact gelu of the map's result, as `Linear` has it."""
        if out_dtype is None:
            return self._compute(x, gelu=True, out_dtype=self.dtype)
        return self._compute(x, gelu=True, out_scale=self.inverse[...], out_dtype=out_dtype)

    def _compute(self, x, **options):
        x, scale = self._rows(x), self.scale[...]
        bias = None if self.bias is None else self.bias[...].reshape(-1)
        y = fused_linear(x, self.matrix, scale.reshape(-1), bias, **options)
        return y.reshape(*x.shape[:-1], *scale.shape)


class Fp8Projection(nnx.Module):
    """The projection to queries, keys and values in float8_e4m3fn, which gives the first two so too.

    Args:
      linear: from one axis to `[3, heads, head_dim]`, without bias; is left as it is.
      input_scale: what the numbers that come are multiplied with.
      scales: by what queries, keys and values are divided.
    """

    input_dtype = Fp8Linear.input_dtype

    def __init__(self, linear: Linear, input_scale: Float[Array, ""], scales: Float[Array, " 3"]):
        whole = Fp8Linear(linear, input_scale)
        whole.scale[...] /= scales[:, None, None]
        self.qk, self.v = whole.part(slice(2)), whole.part(slice(2, 3))
        self.scale = parameter(scales[:1] * scales[1:2], (None,))

    def __call__(self, x: Float8e4m3fn[Array, "B P K"]) -> QuantizedProjection:
        qk = self.qk(x, out_dtype=jnp.float8_e4m3fn)
        return QuantizedProjection(QArray(qk, self.scale[0]), self.v(x)[:, :, 0])


# A program for each shape of kernel, of which even a large model has a dozen.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize_kernel(kernel, num_inputs, dtype):
    """A kernel `[inputs..., outputs...]` as one `[outputs..., inputs...]` and a scale for each output."""
    floating = jnp.issubdtype(dtype, jnp.floating)
    limit = float(jnp.finfo(dtype).max if floating else jnp.iinfo(dtype).max)
    kernel = kernel.astype(jnp.float32)
    largest = jnp.abs(kernel).max(axis=range(num_inputs))
    # Never 0, which nothing can be divided by: zeros stay zeros under any scale.
    scale = jnp.maximum(largest / limit, jnp.finfo(jnp.float32).tiny)
    kernel /= scale
    kernel = (kernel if floating else jnp.round(kernel)).astype(dtype)
    return kernel.transpose(*range(num_inputs, kernel.ndim), *range(num_inputs)), scale


def quantize(
    model: MossVideo, *, decoder: DecoderWeights | None = None, encoder: EncoderWeights | None = None
) -> MossVideo:
    """Puts parts of a model into 8 bits, in place: the model that is given is changed and returned.

    A kernel is let go before the next one is taken, so that there is never room needed for two models.

    Args:
      decoder: "int8" or "fp8" for the weights of the decoder's layers and of its head; the embedding, norms
        and gates stay as they are. None leaves it alone.
      encoder: "fp8" for the matmuls of the vision encoder's layers, in which the inputs are rounded too, and
        attention's queries and keys; patch embedding, compressor and projector stay as they are. None leaves
        it alone.

    Raises:
      ConfigError: there are no such weights, or the model is quantized already.
    """
    for part, name, known in (("decoder", decoder, DecoderWeights), ("encoder", encoder, EncoderWeights)):
        names = typing.get_args(known)
        if name is not None and name not in names:
            raise ConfigError(f"the {part}'s weights can be {' or '.join(names)}, not {name!r}")
    if is_quantized(model):
        raise ConfigError("the model is quantized already; quantize the one that was loaded")
    if decoder:
        _replace_linears(model.decoder, _DTYPES[decoder])
    if encoder:
        for layer in (*model.vision.layers, *model.vision.global_layers):
            _to_float8(layer)
    return model


def is_quantized(model: nnx.Module) -> bool:
    """Whether there are weights in 8 bits."""
    return any(isinstance(module, QuantizedLinear) for _, module in nnx.iter_modules(model))


def _replace_linears(root: nnx.Module, dtype: DTypeLike) -> None:
    parents = [module for _, module in nnx.iter_modules(root) if not isinstance(module, Linear)]
    for parent in parents:
        for name in [name for name, child in vars(parent).items() if isinstance(child, Linear)]:
            _replace(parent, name, functools.partial(QuantizedLinear, dtype=dtype))


def _replace(parent: nnx.Module, name: str, by: Callable[[Linear], nnx.Module]) -> None:
    full = getattr(parent, name)
    setattr(parent, name, by(full))
    # The garbage collector takes its time with modules, which are in reference cycles.
    del full.kernel


def _to_float8(layer: VisionLayer) -> None:
    """Puts a layer's maps into 8 bits, and what they are given.

    A floating-point number is rounded by the same share whatever its size, so nothing has to look for the
    largest before it rounds: it is enough that none is out of range. The largest that a norm can give is
    known from its weights, what a map makes of that at most is known from its own, and neither an average
    of values nor the gelu makes anything larger. With D columns that is about sqrt(D) times what is typical,
    which for 1,280 leaves room below for columns some hundred times smaller than the largest.
    """
    attention, mlp = layer.attention, layer.mlp

    scales = jnp.stack([_room(x) for x in _largest(layer.attention_norm, attention.qkv)])
    given = _scale_down(layer.attention_norm)
    _replace(attention, "qkv", functools.partial(Fp8Projection, input_scale=given, scales=scales))
    _replace(attention, "out", functools.partial(Fp8Linear, input_scale=scales[2]))

    hidden = _room(_largest(layer.mlp_norm, mlp.fc1))
    given = _scale_down(layer.mlp_norm)
    _replace(mlp, "fc1", functools.partial(Fp8Linear, input_scale=given, result_scale=hidden))
    _replace(mlp, "fc2", functools.partial(Fp8Linear, input_scale=hidden))


def _scale_down(norm: LayerNorm) -> Float[Array, ""]:
    """Divides what a norm gives by a power of two, so that it has room in 8 bits, and returns that."""
    weight, bias = norm.weight[...], norm.bias[...]
    scale = _room(math.sqrt(weight.size) * jnp.abs(weight) + jnp.abs(bias))
    norm.weight, norm.bias = (parameter(x / scale.astype(x.dtype), (None,)) for x in (weight, bias))
    return scale


def _largest(norm: LayerNorm, linear: Linear) -> Float[Array, "..."]:
    """What no output of a map from what a norm gives goes beyond, by size.

    A normed row of D numbers is no longer than sqrt(D) before the norm's weight and bias.
    Source: the inequality of Cauchy and Schwarz.
    """
    bias = 0 if linear.bias is None else linear.bias[...].astype(jnp.float32)
    return _largest_outputs(norm.weight[...], norm.bias[...], linear.kernel[...]) + jnp.abs(bias)


@jax.jit
def _largest_outputs(weight, bias, kernel):
    weight, bias, kernel = (x.astype(jnp.float32) for x in (weight, bias, kernel))
    lengths = jnp.sqrt(jnp.tensordot(weight**2, kernel**2, 1))
    return math.sqrt(weight.size) * lengths + jnp.abs(jnp.tensordot(bias, kernel, 1))


def _room(largest: Float[Array, "..."]) -> Float[Array, ""]:
    """The least power of two by which numbers up to these have room in 8 bits."""
    return jnp.ldexp(jnp.float32(1), jnp.frexp(largest.astype(jnp.float32).max() / ROOM)[1])
