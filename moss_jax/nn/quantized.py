"""Linear maps whose weights are kept in 8 bits, and models made of them.

What a decoded token waits for is its weights' way out of memory, and the way of half the bytes is half as
long. The vision encoder works on whole frames, so there it is the arithmetic that counts: its inputs are
rounded to 8 bits too.
"""

import functools
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from moss_jax.config import ConfigError, DecoderWeights, EncoderWeights
from moss_jax.nn.layers import Linear, parameter
from moss_jax.nn.model import MossVideo
from moss_jax.ops.fp8_linear import fp8_linear
from moss_jax.ops.linear import linear
from moss_jax.ops.rounding import Rounded, round_rows

_DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


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

    def _rows(self, x: Float[Array, "..."]) -> Float[Array, "... K"]:
        """The inputs on one axis."""
        return jax.lax.collapse(x, x.ndim - (self.kernel[...].ndim - self.scale[...].ndim))

    @property
    def matrix(self) -> Array:
        """The kernel as [outputs, inputs]."""
        return self.kernel[...].reshape(self.scale[...].size, -1)


class Fp8Linear(QuantizedLinear):
    """A `Linear` in float8_e4m3fn whose inputs are rounded too, each row of them by a scale of its own."""

    rounds_inputs = True

    def __init__(self, linear: Linear):
        super().__init__(linear, jnp.float8_e4m3fn)
        self.dtype = linear.kernel[...].dtype

    def __call__(self, x: Float[Array, "..."] | Rounded) -> Float[Array, "..."]:
        return self._compute(x)

    def gelu(self, x: Float[Array, "..."] | Rounded) -> Float[Array, "..."]:
        """The exact gelu of the map's result, as `Linear` has it."""
        return self._compute(x, gelu=True)

    def _compute(self, x, *, gelu=False):
        x = x if isinstance(x, Rounded) else round_rows(self._rows(x))
        scale, bias = self.scale[...], None if self.bias is None else self.bias[...].reshape(-1)
        y = fp8_linear(x, self.matrix, scale.reshape(-1), bias, gelu=gelu, out_dtype=self.dtype)
        return y.reshape(*x.scale.shape, *scale.shape)


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
      encoder: "fp8" for the matmuls of the vision encoder's layers, in which the inputs are rounded too;
        patch embedding, compressor and projector stay as they are. None leaves it alone.

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
        _replace_linears(model.decoder, functools.partial(QuantizedLinear, dtype=_DTYPES[decoder]))
    if encoder:
        for layer in (*model.vision.layers, *model.vision.global_layers):
            _replace_linears(layer, Fp8Linear)
    return model


def is_quantized(model: nnx.Module) -> bool:
    """Whether there are weights in 8 bits."""
    return any(isinstance(module, QuantizedLinear) for _, module in nnx.iter_modules(model))


def _replace_linears(root: nnx.Module, by: Callable[[Linear], QuantizedLinear]) -> None:
    parents = [module for _, module in nnx.iter_modules(root) if not isinstance(module, Linear)]
    for parent in parents:
        for name in [name for name, child in vars(parent).items() if isinstance(child, Linear)]:
            full = getattr(parent, name)
            setattr(parent, name, by(full))
            # The garbage collector takes its time with modules, which are in reference cycles.
            del full.kernel
