"""Linear maps arranged for decoding: the same numbers, in the order that a single token reads fastest."""

import functools

import jax
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from moss_jax.nn.decoder import CrossAttention, SelfAttention
from moss_jax.nn.layers import Linear, parameter
from moss_jax.ops.contiguous import contiguous_linear, pays

# The projections, by their modules. The MLP's are so large that its matmuls read as fast as they are, and
# prompts would pay for another order.
PROJECTIONS = {SelfAttention: ("qkv", "out"), CrossAttention: ("q", "out")}


class ContiguousLinear(Linear):
    """A `Linear` whose kernel lies `[outputs..., inputs...]`: what makes one output is contiguous.

    Args:
      linear: is left as it is.
    """

    def __init__(self, linear: Linear):
        n, kernel, axes = linear.num_inputs, linear.kernel[...], linear.kernel.get_metadata()["axes"]
        self.num_inputs, self.bias = n, linear.bias
        self.kernel = parameter(_outputs_first(kernel, n), (*axes[n:], *axes[:n]))

    def without_bias(self, x: Float[Array, "..."], out_dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        kernel = self.kernel[...]
        outputs = kernel.shape[: kernel.ndim - self.num_inputs]
        x = jax.lax.collapse(x, x.ndim - self.num_inputs)
        kernel = kernel.reshape(-1, x.shape[-1])
        return contiguous_linear(x, kernel, out_dtype=out_dtype).reshape(*x.shape[:-1], *outputs)


@functools.partial(jax.jit, static_argnums=1)
def _outputs_first(kernel: Array, num_inputs: int) -> Array:
    return kernel.transpose(*range(num_inputs, kernel.ndim), *range(num_inputs))


def for_decoding(decoder: nnx.Module) -> nnx.Module:
    """A decoder with the same parameters, arranged as this platform decodes fastest.

    What is arranged anew is copied, the rest shared; the decoder that is given stays as it is.
    """
    if not pays():
        return decoder
    decoder = nnx.merge(*nnx.split(decoder))
    attentions = [m for _, m in nnx.iter_modules(decoder) if isinstance(m, tuple(PROJECTIONS))]
    for attention in attentions:
        for name in PROJECTIONS[type(attention)]:
            linear = getattr(attention, name)
            if type(linear) is Linear:
                setattr(attention, name, ContiguousLinear(linear))
    return decoder
