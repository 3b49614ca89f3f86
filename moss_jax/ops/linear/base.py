"""Arguments and definition of the linear map with its epilogue.

M rows, K inputs, N outputs: the products of the axes that a map goes from and to
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moss_jax.ops import dispatch
from moss_jax.ops.linear.gelu import gelu
from moss_jax.ops.norm import Norm, Residual
from moss_jax.ops.qarray import QArray

# Order of a kernel's axes. "outputs_first" keeps the weights of one output contiguous.
Layout = Literal["inputs_first", "outputs_first"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a linear map between groups of axes.

    Attributes:
      kernel: [inputs..., outputs...] or [outputs..., inputs...], as `layout` says.
      bias: [outputs...].
      num_inputs: axes that the map contracts.
      layout: order of the kernel's axes; a QArray has its outputs first.
    """

    kernel: Float[Array, "..."] | QArray
    bias: Float[Array, "..."] | None = None
    num_inputs: int = dataclasses.field(default=1, kw_only=True, metadata={"static": True})
    layout: Layout = dataclasses.field(default="inputs_first", kw_only=True, metadata={"static": True})

    @property
    def outputs_first(self) -> bool:
        return self.layout == "outputs_first"

    @property
    def inputs(self) -> tuple[int, ...]:
        """Sizes of the axes that are contracted."""
        shape, n = self.kernel.shape, self.num_inputs
        return tuple(shape[len(shape) - n :] if self.outputs_first else shape[:n])

    @property
    def outputs(self) -> tuple[int, ...]:
        """Sizes of the axes of the result."""
        shape, n = self.kernel.shape, self.num_inputs
        return tuple(shape[: len(shape) - n] if self.outputs_first else shape[n:])

    @property
    def scheme(self) -> Literal["float", "W8A16", "W8A8"]:
        """Precision of the GEMM: floats, 8-bit weights (W8A16), or 8-bit weights and inputs (W8A8)."""
        if not isinstance(self.kernel, QArray):
            return "float"
        return "W8A16" if self.kernel.input_scale is None else "W8A8"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
    """Validated arguments of one call, built by `arguments` and read by implementations.

    Attributes:
      x: the inputs; a QArray for W8A8.
      scale: dequantisation factors of 8-bit products.
      out_factor: factor of 8-bit results before they are rounded.
      residual: added last.
      gate: factor of the results before the residual is added.
      gelu: whether the exact GELU is applied after the bias.
      out_dtype: of the results.
    """

    x: Float[Array, "..."] | QArray
    weights: Weights
    scale: Float[Array, " N"] | None = None
    out_factor: Float[Array, ""] | None = None
    residual: Float[Array, "..."] | None = None
    gate: Float[Array, " 1"] | None = None
    gelu: bool = dataclasses.field(default=False, kw_only=True, metadata={"static": True})
    out_dtype: jnp.dtype = dataclasses.field(kw_only=True, metadata={"static": True})

    @property
    def rows(self) -> tuple[int, ...]:
        """Sizes of the leading axes."""
        return tuple(self.x.shape[: self.x.ndim - self.weights.num_inputs])

    @property
    def shape(self) -> tuple[int, int, int]:
        """M, K, N."""
        return math.prod(self.rows), math.prod(self.weights.inputs), math.prod(self.weights.outputs)

    @property
    def matrix(self) -> Array:
        """The kernel's values as [N, K] or, with inputs first, [K, N]."""
        kernel, (_, K, N) = self.weights.kernel, self.shape
        values = kernel.values if isinstance(kernel, QArray) else kernel
        return values.reshape((N, K) if self.weights.outputs_first else (K, N))

    def unflatten(self, y: Float[Array, "..."]) -> Float[Array, "..."]:
        """Reshapes results to the axes of the inputs' rows and of the outputs."""
        return y.reshape(*self.rows, *self.weights.outputs)


def arguments(
    x: Float[Array, "..."] | QArray,
    weights: Weights,
    out_scale: Float[Array, ""] | None = None,
    *,
    residual: Float[Array, "..."] | None = None,
    gate: Float[Array, " 1"] | None = None,
    gelu: bool = False,
    out_dtype: jnp.dtype,
) -> Arguments:
    """Builds the arguments of a call and combines its scales.

    Scales are combined here because inside implementations, transformations hide that they are constants.

    Args:
      out_scale: divisor of 8-bit results before they are rounded.
    """
    scale = None
    if isinstance(weights.kernel, QArray):
        scale = weights.kernel.scale.reshape(-1)
        scale = scale * x.scale if isinstance(x, QArray) else scale
    factor = None if out_scale is None else 1 / out_scale
    return Arguments(x, weights, scale, factor, residual, gate, gelu=gelu, out_dtype=out_dtype)


def check(a: Arguments) -> None:
    """Raises ValueError unless shapes and dtypes fit together."""
    w, n = a.weights, a.weights.num_inputs
    if not 0 < n < w.kernel.ndim or tuple(a.x.shape[a.x.ndim - n :]) != w.inputs:
        raise ValueError(
            f"x {a.x.shape} must end with the inputs of the kernel, {w.inputs} of {w.kernel.shape}"
        )
    check_weights(w)
    if isinstance(a.x, QArray) and w.scheme != "W8A8":
        raise ValueError(f"inputs in 8 bits need a kernel for W8A8, not {w.scheme}")
    if a.residual is None:
        return
    if (a.residual.shape, a.residual.dtype) != ((*a.rows, *w.outputs), a.out_dtype):
        raise ValueError(
            f"the residual is like the results, {a.out_dtype} {(*a.rows, *w.outputs)}; "
            f"got {a.residual.dtype} {a.residual.shape}"
        )


def check_weights(w: Weights) -> None:
    """Raises ValueError unless the shapes of a kernel, its scale and a bias fit together."""
    if isinstance(w.kernel, QArray) and not w.outputs_first:
        raise ValueError("a quantised kernel has its outputs first")
    if isinstance(w.kernel, QArray) and w.kernel.scale.shape != w.outputs:
        raise ValueError(
            f"a quantised kernel has one scale an output, {w.outputs}; got {w.kernel.scale.shape}"
        )
    if w.bias is not None and w.bias.shape != w.outputs:
        raise ValueError(f"bias is one number an output, {w.outputs}; got {w.bias.shape}")


def define(a: Arguments) -> Float[Array, "..."]:
    """`residual + gate * gelu(x @ kernel + bias)`, rounded after each step; differentiable."""
    y, bias = _product(a), a.weights.bias
    if a.gelu:
        y = gelu(y, bias)
    elif bias is not None:
        y = y + bias
    if a.out_factor is not None:
        y = y * a.out_factor
    if a.gate is not None:
        y = y * a.gate
    return (y if a.residual is None else a.residual + y).astype(a.out_dtype)


def _product(a: Arguments) -> Float[Array, "..."]:
    x, kernel, n = a.x, a.weights.kernel, a.weights.num_inputs
    if not a.weights.outputs_first:
        assert isinstance(x, Array)
        assert not isinstance(kernel, QArray)
        # Contracted on the original axes, over which a mesh may shard them.
        contract = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
        if a.out_dtype.itemsize > x.dtype.itemsize:
            return _wide_dot((contract, ((), ())), a.out_dtype, x, kernel)
        return lax.dot_general(x, kernel, (contract, ((), ())), preferred_element_type=a.out_dtype)
    wide = a.out_dtype
    if isinstance(x, QArray):
        x = x.values
    matrix = a.matrix
    if a.weights.scheme == "W8A16":
        matrix = matrix.astype(x.dtype)  # Represents all 8-bit numbers exactly.
    x = lax.collapse(x, x.ndim - n)
    quantised = a.weights.scheme != "float"
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    y = lax.dot_general(x, matrix, contract, preferred_element_type=jnp.float32 if quantised else wide)
    if quantised:
        assert a.scale is not None
        y = (y * a.scale).astype(jnp.bfloat16 if wide.itemsize == 1 else wide)
    return y.reshape(*a.rows, *a.weights.outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _wide_dot(dimensions, out_dtype, x, kernel):
    """`lax.dot_general` whose results are wider than its operands, and whose gradients are not.

    By default, the backward pass would multiply in the dtype of the results: on a GPU four times as long.
    """
    return lax.dot_general(x, kernel, dimensions, preferred_element_type=out_dtype)


def _wide_dot_forward(dimensions, out_dtype, x, kernel):
    return _wide_dot(dimensions, out_dtype, x, kernel), (x, kernel)


def _wide_dot_backward(dimensions, out_dtype, operands, dy):
    del out_dtype
    y, pull = jax.vjp(lambda x, kernel: lax.dot_general(x, kernel, dimensions), *operands)
    return pull(dy.astype(y.dtype))


_wide_dot.defvjp(_wide_dot_forward, _wide_dot_backward)


reference = dispatch.in_float32(define, lambda a: a.out_dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NormArguments:
    """Validated arguments of one call of `norm_linear`, which builds them for implementations."""

    residual: Residual
    norm: Norm
    weights: Weights
    out_scale: Float[Array, ""] | None = None
    gelu: bool = dataclasses.field(default=False, kw_only=True, metadata={"static": True})
    out_dtype: jnp.dtype = dataclasses.field(kw_only=True, metadata={"static": True})

    def linear(self, x: Float[Array, "..."] | QArray) -> Arguments:
        """Arguments of the linear map on normalised rows."""
        return arguments(x, self.weights, self.out_scale, gelu=self.gelu, out_dtype=self.out_dtype)

    @property
    def shape(self) -> tuple[int, int, int]:
        """M, K, N."""
        *rows, K = self.residual.x.shape
        return math.prod(rows), K, math.prod(self.weights.outputs)
