"""Building blocks of both pathways: parameters, linear maps, norms.

A parameter carries the logical names of its axes (`axes`), which `sharding.py` maps to a mesh. Everything
is computed in the dtype of the parameters, except norms and softmax, which are float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from moss_jax.config import Remat
from moss_jax.ops.attention import save_projections, save_residuals
from moss_jax.ops.linear import Layout, Weights, linear
from moss_jax.ops.norm import Norm, Residual, add_norm
from moss_jax.ops.qarray import QArray
from moss_jax.sharding import constrain

INIT_STDDEV = 0.02


def normal(rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str | None], dtype: DTypeLike) -> nnx.Param:
    """A parameter drawn from a normal distribution."""
    # Drawn in sizes of powers of two: the generator takes long to compile, and a few sizes serve all shapes.
    size = math.prod(shape)
    drawn = jax.random.normal(rngs.params(), (1 << max(16, (size - 1).bit_length()),), dtype)
    return parameter((drawn[:size] * INIT_STDDEV).reshape(shape), axes)


def full(fill: float, shape: Sequence[int], axes: Sequence[str | None], dtype: DTypeLike) -> nnx.Param:
    """A parameter filled with one value."""
    return parameter(jnp.full(tuple(shape), fill, dtype), axes)


def parameter(value: Any, axes: Sequence[str | None]) -> nnx.Param:
    """A parameter with these values, an array or a QArray, sharded over the mesh by its axis names."""
    # One parameter at a time, so that no device ever holds a large model whole.
    placed = jax.tree.map(lambda x: constrain(x, tuple(axes)[: x.ndim]), value)
    return nnx.Param(placed, axes=tuple(axes))


def gate(fill: float, dtype: DTypeLike) -> nnx.Param:
    """A scalar gate whose tanh scales a branch."""
    return full(fill, (1,), (None,), dtype)


def remat(layer: Callable, keep: Remat) -> Callable:
    """Wraps a layer in rematerialisation, which recomputes what `ModelConfig.remat` doesn't keep."""
    match keep:
        case "none":
            return layer
        case "dots":
            policies = jax.checkpoint_policies
            policy = policies.save_from_both_policies(
                save_residuals, policies.dots_with_no_batch_dims_saveable
            )
        case "projections":
            policy = save_projections
        case "attention":
            policy = save_residuals
        case "full":
            policy = jax.checkpoint_policies.nothing_saveable
    again = jax.checkpoint(layer, policy=policy)
    # A layer's inputs are saved, so the residual stream is passed as one array instead of two.
    return lambda *args: again(*(Residual(x.sum()) if isinstance(x, Residual) else x for x in args))


class Linear(nnx.Module):
    """A linear map between groups of axes: the last axes of the input, `inputs`, become `outputs`.

    Fused projections keep their parts on a separate axis, `[embed, kv_heads, parts, head_dim]`, so that one
    matmul computes them all and tensor parallelism still splits by head.

    Attributes:
      kernel: [inputs..., outputs...], or as `layout` says; an array or, in a quantised model, a QArray.
      bias: [outputs...], or None.
      layout: order of the kernel's axes.
    """

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
        self.layout: Layout = "inputs_first"
        axes = (*inputs, *outputs)
        self.kernel = normal(rngs, (*inputs.values(), *outputs.values()), axes, dtype)
        self.bias = full(0, tuple(outputs.values()), tuple(outputs), dtype) if bias else None

    def __call__(self, x: Float[Array, "..."], out_dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        y = linear(x, self.weights, out_dtype=out_dtype)
        assert not isinstance(y, QArray)
        return y

    @property
    def weights(self) -> Weights:
        """The weights as ops take them."""
        bias = None if self.bias is None else self.bias[...]
        return Weights(self.kernel.get_value(), bias, num_inputs=self.num_inputs, layout=self.layout)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, size: int, eps: float, *, dtype: DTypeLike):
        self.weight = full(1, (size,), (None,), dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return add_norm(Residual(x), self.params)[0]

    @property
    def params(self) -> Norm:
        """The parameters as ops take them."""
        return Norm(self.weight[...], eps=self.eps)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * weight + bias over the last axis."""

    def __init__(self, size: int, eps: float, *, dtype: DTypeLike):
        self.weight = full(1, (size,), (None,), dtype)
        self.bias = full(0, (size,), (None,), dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return add_norm(Residual(x), self.params)[0]

    @property
    def params(self) -> Norm:
        """The parameters as ops take them."""
        return Norm(self.weight[...], self.bias[...], eps=self.eps)


class GatedMLP(nnx.Module):
    """Weights of `down(silu(gate(x)) * up(x))`, with gate and up fused; `post_attention` computes it."""

    def __init__(self, size: int, hidden: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.gate_up = Linear({"embed": size}, {"gate_up": 2, "mlp": hidden}, rngs=rngs, dtype=dtype)
        self.down = Linear({"mlp": hidden}, {"embed": size}, rngs=rngs, dtype=dtype)


class GeluMLP(nnx.Module):
    """Weights of `fc2(gelu(fc1(x)))` with biases and the exact GELU; `post_attention` computes it."""

    def __init__(self, size: int, hidden: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.fc1 = Linear({"embed": size}, {"mlp": hidden}, bias=True, rngs=rngs, dtype=dtype)
        self.fc2 = Linear({"mlp": hidden}, {"embed": size}, bias=True, rngs=rngs, dtype=dtype)


# Its tanh is about 0.66, so the branches of a new model contribute.
INITIAL_GATE = math.pi / 4
