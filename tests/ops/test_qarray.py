"""Arrays in 8 bits with scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.contract import refuses
from ops.definitions import exact, half_step

from moss_jax.ops.qarray import DTYPES, QArray, dequantize, quantize


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize(("shape", "axes"), [((3, 4, 6, 8), 2), ((5, 16), 1)])
def test_rounds_each_vector_by_its_own_scale(shape, axes, dtype):
    rng = np.random.default_rng(0)
    x = np.float32(
        rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 1, (*shape[:axes], *(1,) * (len(shape) - axes)))
    )
    x[0, ..., :] = 0
    q = quantize(x, dtype, axes=axes)
    assert (q.shape, q.ndim, q.dtype, q.scale.shape) == (shape, len(shape), dtype, shape[:axes])
    largest = np.abs(x).max(axis=tuple(range(axes, len(shape))), keepdims=True)
    step = (
        largest / 127
        if dtype == jnp.int8
        else 2 * half_step(x * 448 / np.maximum(largest, 1e-30), dtype) * largest / 448
    )
    # float32 rounds the scale, the quotient, and what is dequantised.
    assert (np.abs(exact(q) - x) <= step / 2 + 1e-6 * largest).all()
    np.testing.assert_allclose(dequantize(q), exact(q), rtol=2**-23)
    assert dequantize(q, jnp.bfloat16).dtype == jnp.bfloat16
    assert dequantize(jnp.asarray(x), jnp.bfloat16).dtype == jnp.bfloat16


def test_what_does_not_fit():
    with refuses("a QArray is in int8 or float8_e4m3fn, not float32"):
        QArray(jnp.ones((2, 3)), jnp.ones(2))
    with refuses("scale has the leading axes of values (2, 3); got (3,)"):
        QArray(jnp.ones((2, 3), jnp.int8), jnp.ones(3))


def test_a_pytree_of_arrays():
    q = QArray(jnp.ones((2, 3), jnp.int8), jnp.ones(2), jnp.float32(2))
    assert [x.shape for x in jax.tree.leaves(q)] == [(2, 3), (2,), ()]
    np.testing.assert_array_equal(jax.jit(jax.vmap(dequantize))(QArray(q.values, q.scale)), jnp.ones((2, 3)))
    jax.tree.map(id, q)  # JAX rebuilds it around placeholders.
