"""Projections arranged for decoding: the same maps, and the same model."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from moss_jax.nn.contiguous import ContiguousLinear
from moss_jax.ops.contiguous import contiguous_linear

from moss_jax.nn import contiguous, for_decoding
from moss_jax.nn.layers import Linear


@pytest.fixture
def pays():
    """As on a GPU."""
    with (
        mock.patch("moss_jax.ops.contiguous.pays", return_value=True),
        mock.patch.object(contiguous, "pays", return_value=True),
    ):
        yield


@pytest.mark.parametrize("shape", [(48,), (1, 48), (1, 1, 48), (3, 48), (2, 8, 48)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("pays")
def test_is_the_product(shape, dtype):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(s), dtype) for s in (shape, (24, 48)))
    out = contiguous_linear(x, kernel, out_dtype=jnp.float32)
    exact = np.float64(np.float32(x)) @ np.float64(np.float32(kernel)).T
    assert out.shape == (*shape[:-1], 24)
    assert out.dtype == jnp.float32
    assert contiguous_linear(x, kernel).dtype == dtype
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)


def test_refuses_other_inputs():
    with pytest.raises(ValueError, match=r"must share K; got \(1, 4\) and \(3, 5\)"):
        contiguous_linear(jnp.zeros((1, 4)), jnp.zeros((3, 5)))


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ({"embed": 24}, {"kv_heads": 2, "parts": 3, "head_dim": 4}),
        ({"heads": 4, "head_dim": 6}, {"embed": 24}),
    ],
)
@pytest.mark.parametrize("rows", [(1, 1), (2, 5)])
@pytest.mark.usefixtures("pays")
def test_is_the_map(inputs, outputs, rows):
    linear = Linear(inputs, outputs, bias=True, rngs=nnx.Rngs(0), dtype=jnp.float32)
    linear.bias[...] = jnp.arange(linear.bias[...].size, dtype=jnp.float32).reshape(linear.bias.shape)
    x = jax.random.normal(jax.random.key(1), (*rows, *inputs.values()))
    arranged = ContiguousLinear(linear)
    np.testing.assert_allclose(arranged(x), linear(x), rtol=1e-4, atol=1e-5)
    axes = arranged.kernel.get_metadata()["axes"]
    assert axes == (*outputs, *inputs)


def test_elsewhere_the_decoder_stays_as_it_is(small_config, random_model):
    decoder = random_model(small_config()).decoder
    assert for_decoding(decoder) is decoder


@pytest.mark.usefixtures("pays")
def test_the_model_that_was_given_stays_as_it_is(small_config, random_model):
    model = random_model(small_config())
    arranged = for_decoding(model.decoder)

    def of_kind(module):
        return sum(isinstance(m, ContiguousLinear) for _, m in nnx.iter_modules(module))

    assert of_kind(model) == 0
    assert of_kind(arranged) == 2 * len(model.decoder.layers)
