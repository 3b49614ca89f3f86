"""Remat: the one-pass call keeps less for its backward pass, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo

from moss_jax.nn import MossVideo
from moss_jax.nn.layers import remat
from moss_jax.ops.attention.residuals import CUDNN_FORWARD
from moss_jax.ops.norm import Residual

B, S, F = 2, 8, 2


@pytest.fixture(scope="module")
def arguments():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (B, S), np.int32)
    positions = np.array([[1, 4], [2, S]], np.int32)
    return tokens, rng.standard_normal((B, F, 28, 28, 3), np.float32), positions


def loss_of(model):
    graph, params = nnx.split(model)

    def loss(params, *arguments):
        logits = nnx.merge(graph, params)(*arguments)
        return (jax.nn.logsumexp(logits, axis=-1) * jnp.arange(S)).mean()

    return loss, params


@pytest.fixture(scope="module")
def expected(random_model, tiny_config, arguments):
    loss, params = loss_of(random_model(tiny_config(remat="none")))
    return jax.jit(jax.value_and_grad(loss))(params, *arguments)


@pytest.mark.parametrize("keep", ["dots", "projections", "attention", "full"])
def test_loss_and_gradients_are_the_same(random_model, tiny_config, arguments, expected, keep):
    loss, params = loss_of(random_model(tiny_config(remat=keep)))
    actual = jax.jit(jax.value_and_grad(loss))(params, *arguments)
    for value, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # Sums of some hundred numbers, one after the other through the layers, added up in another order.
        np.testing.assert_allclose(value, other, rtol=0, atol=1e-4 * float(jnp.abs(other).max()))


def test_less_is_kept(random_model, tiny_config, arguments):
    """In the order that the settings promise."""

    def kept(remat):
        loss, params = loss_of(random_model(tiny_config(remat=remat)))
        _, backward = jax.eval_shape(lambda p: jax.vjp(lambda p: loss(p, *arguments), p), params)
        return sum(x.size for x in jax.tree.leaves(backward))

    assert kept("full") < kept("attention") < kept("projections") < kept("dots") < kept("none")


@pytest.mark.parametrize("keep", ["dots", "projections", "attention", "full"])
def test_one_array_of_a_residual_stream_is_kept(keep):
    def kept(residual):
        layer = remat(lambda residual: Residual(jnp.sin(residual.sum())), keep)
        _, backward = jax.eval_shape(lambda r: jax.vjp(layer, r), residual)
        return [leaf.shape for leaf in jax.tree.leaves(backward)]

    x = jnp.ones((2, 3, 16))
    assert kept(Residual(x, x)) == kept(Residual(x)) == [(2, 3, 16)]


def test_streaming_programs_are_the_same(tiny_config):
    def programs(remat):
        model = MossVideo(tiny_config(remat=remat), rngs=nnx.Rngs(0))
        graph, params = nnx.split(model)
        state = model.init_state(1, text_capacity=8, bank_capacity=2)

        def program(verb, *arguments):
            return str(
                jax.make_jaxpr(lambda p, *a: getattr(nnx.merge(graph, p), verb)(*a))(params, *arguments)
            )

        features = jnp.zeros((1, model.config.vectors_per_frame, 32))
        yield program("encode", jnp.zeros((1, 28, 28, 3)))
        yield program("remember", state, features, jnp.zeros(1, jnp.int32))
        yield program("decode", state, jnp.zeros((1, 2), jnp.int32))

    assert list(programs("full")) == list(programs("none"))


def test_the_primitive_of_cudnn_has_the_name_that_the_policy_looks_for():
    assert fused_attention_stablehlo._dot_product_attention_fwd_p_wrapper.name.startswith(CUDNN_FORWARD)
