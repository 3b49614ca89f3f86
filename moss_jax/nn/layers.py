"""The layers that both pathways are built of: parameters, linear maps, norms.

A parameter carries the logical names of its axes (`axes`), which `sharding.py` lays on a mesh. Everything
is computed in the dtype of the parameters, norms and softmax in float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from moss_jax.config import Remat
from moss_jax.ops.fused_linear import fused_linear
from moss_jax.ops.norm import layer_norm, rms_norm
from moss_jax.sharding import constrain

INIT_STDDEV = 0.02


def normal(rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str | None], dtype: DTypeLike) -> nnx.Param:
    """A parameter drawn from a normal distribution."""
    # Drawn in powers of two: a generator takes long to compile, and so a few serve all shapes.
    size = math.prod(shape)
    drawn = jax.random.normal(rngs.params(), (1 << max(16, (size - 1).bit_length()),), dtype)
    return parameter((drawn[:size] * INIT_STDDEV).reshape(shape), axes)


def full(fill: float, shape: Sequence[int], axes: Sequence[str | None], dtype: DTypeLike) -> nnx.Param:
    """A parameter of one value."""
    return parameter(jnp.full(tuple(shape), fill, dtype), axes)


def parameter(value: jax.Array, axes: Sequence[str | None]) -> nnx.Param:
    """A parameter of these values."""
    # Laid on the mesh one by one, so that a large model never lies whole on one device.
    return nnx.Param(constrain(value, axes), axes=tuple(axes))


def gate(fill: float, dtype: DTypeLike) -> nnx.Param:
    """A number whose tanh scales a branch."""
    return full(fill, (1,), (None,), dtype)


class Residual(NamedTuple):
    """The residual stream `x + scale * branch`, of which the branch is still to be added.

    The norm that comes next adds it on its way, which a GPU does in one pass over memory.
    """

    x: Float[Array, "... D"]
    branch: Float[Array, "... D"] | None = None
    scale: Float[Array, "..."] | None = None

    def sum(self) -> Float[Array, "... D"]:
        """For where no norm comes next."""
        if self.branch is None:
            return self.x
        return self.x + (self.branch if self.scale is None else self.scale * self.branch)


def remat(layer: Callable, keep: Remat) -> Callable:
    """The layer, such that its backward pass computes again what `ModelConfig.remat` doesn't keep."""
    match keep:
        case "none":
            return layer
        case "dots":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        case "full":
            policy = jax.checkpoint_policies.nothing_saveable
    again = jax.checkpoint(layer, policy=policy)
    # What a layer is called with is kept, and so a residual stream comes as one array, not as two.
    return lambda *args: again(*(Residual(x.sum()) if isinstance(x, Residual) else x for x in args))


class Linear(nnx.Module):
    """A linear map between groups of axes: the last axes of the input, `inputs`, become `outputs`.

    Fused projections keep their parts on an axis of their own, `[embed, kv_heads, parts, head_dim]`, so that
    one matmul serves them all and tensor parallelism still splits by head.
    """

    input_dtype: DTypeLike | None = None  # What inputs have to come in; None takes them as they are.

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        bias: bool = False,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        self.num_inputs = len(inputs)
        axes = (*inputs, *outputs)
        self.kernel = normal(rngs, (*inputs.values(), *outputs.values()), axes, dtype)
        self.bias = full(0, outputs.values(), tuple(outputs), dtype) if bias else None

    def __call__(self, x: Float[Array, "..."], out_dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        x = self.without_bias(x, out_dtype)
        return x if self.bias is None else x + self.bias[...]

    def add_to(
        self, stream: Float[Array, "... D"], x: Float[Array, "..."], scale: Float[Array, " 1"] | None
    ) -> Residual:
        """The stream with what becomes of x, times `scale`: as a branch, which the next norm adds."""
        return Residual(stream, self(x), scale)

    def without_bias(self, x: Float[Array, "..."], out_dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        """The product alone."""
        kernel = self.kernel[...]
        contract = (range(x.ndim - self.num_inputs, x.ndim), range(self.num_inputs))
        return jax.lax.dot_general(
            x, kernel, (contract, ((), ())), preferred_element_type=out_dtype or kernel.dtype
        )

    def gelu(self, x: Float[Array, "... K"], out_dtype: DTypeLike | None = None) -> Float[Array, "... N"]:
        """The exact gelu of a map from one axis to another, which it computes along with the map."""
        return fused_linear(x, self.kernel[...], bias=self.bias[...], gelu=True, out_dtype=out_dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, size: int, eps: float, *, dtype: DTypeLike):
        self.weight = full(1, (size,), (None,), dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.of_sum(Residual(x))[0]

    def of_sum(self, residual: Residual) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
        """The norm of the residual stream, and the stream with its branch added."""
        x, branch, scale = residual
        return rms_norm(x, self.weight[...], eps=self.eps, add=branch, scale=scale)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * weight + bias over the last axis."""

    def __init__(self, size: int, eps: float, *, dtype: DTypeLike):
        self.weight = full(1, (size,), (None,), dtype)
        self.bias = full(0, (size,), (None,), dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.of_sum(Residual(x))[0]

    def of_sum(
        self, residual: Residual, out_dtype: DTypeLike | None = None
    ) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
        """The norm of the residual stream, and the stream with its branch added."""
        x, branch, scale = residual
        weight, bias = self.weight[...], self.bias[...]
        return layer_norm(x, weight, bias, eps=self.eps, add=branch, scale=scale, out_dtype=out_dtype)


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x)), with gate and up fused."""

    def __init__(self, size: int, hidden: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.gate_up = Linear({"embed": size}, {"gate_up": 2, "mlp": hidden}, rngs=rngs, dtype=dtype)
        self.down = Linear({"mlp": hidden}, {"embed": size}, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = self.gate_up(x)  # [B, T, 2, F]
        return self.down(jax.nn.silu(x[..., 0, :]) * x[..., 1, :])


class GeluMLP(nnx.Module):
    """fc2(gelu(fc1(x))) with biases and the exact gelu."""

    def __init__(self, size: int, hidden: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.fc1 = Linear({"embed": size}, {"mlp": hidden}, bias=True, rngs=rngs, dtype=dtype)
        self.fc2 = Linear({"mlp": hidden}, {"embed": size}, bias=True, rngs=rngs, dtype=dtype)

    def add_to(
        self, stream: Float[Array, "B T D"], x: Float[Array, "B T D"], scale: Float[Array, " 1"] | None
    ) -> Residual:
        """The stream with what becomes of x, times `scale`."""
        return self.fc2.add_to(stream, self.fc1.gelu(x, out_dtype=self.fc2.input_dtype), scale)


INITIAL_GATE = math.pi / 4
