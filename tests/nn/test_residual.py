"""The residual stream: its branches are added by the norms that come next, and by nothing else."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moss_jax.nn import MossVideo
from moss_jax.nn.layers import LayerNorm, Residual, RMSNorm, remat
from moss_jax.ops.norm import api, mosaic_gpu

WIDTH = 256


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_a_norm_adds_the_branch(norm, scale):
    rng = np.random.default_rng(0)
    norm = norm(16, 1e-5, dtype="float32")
    norm.weight[...] = rng.standard_normal(16)
    x, branch = rng.standard_normal((2, 3, 4, 16), np.float32)[:2]
    residual = Residual(jnp.asarray(x), jnp.asarray(branch), scale)
    normed, y = norm.of_sum(residual)
    np.testing.assert_allclose(y, x + (scale or 1) * branch, rtol=1e-6)
    np.testing.assert_allclose(residual.sum(), y, rtol=1e-6)
    np.testing.assert_allclose(normed, norm(y), rtol=1e-5, atol=1e-6)
    assert Residual(y).sum() is y


@pytest.mark.parametrize("keep", ["dots", "full"])
def test_remat_keeps_one_array_of_a_stream(keep):
    def kept(residual):
        layer = remat(lambda residual: Residual(jnp.sin(residual.sum())), keep)
        _, backward = jax.eval_shape(lambda r: jax.vjp(layer, r), residual)
        return [leaf.shape for leaf in jax.tree.leaves(backward)]

    x = jnp.ones((2, 3, 16))
    assert kept(Residual(x, x)) == kept(Residual(x)) == [(2, 3, 16)]


def test_each_norm_of_the_stream_is_one_kernel(small_config):
    """As it is compiled for a GPU, of a width that its kernel takes."""
    config = small_config()
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, hidden_size=WIDTH),
        decoder=dataclasses.replace(config.decoder, hidden_size=WIDTH),
    )
    graph, params = nnx.split(nnx.eval_shape(lambda: MossVideo(config, rngs=nnx.Rngs(0), dtype="bfloat16")))
    tokens, positions = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 4), (1, 2)))
    pixels = jax.ShapeDtypeStruct((1, 2, 28, 28, 3), jnp.bfloat16)
    refuses = mosaic_gpu.unsupported
    with (
        mock.patch.dict(api.ORDER, {jax.default_backend(): api.ORDER["gpu"]}),
        mock.patch.object(mosaic_gpu, "unsupported", lambda arguments, _: refuses(arguments, "gpu")),
    ):
        program = jax.jit(lambda params, *given: nnx.merge(graph, params)(*given))
        lowered = program.trace(params, tokens, pixels, positions).lower(lowering_platforms=("cuda",))
    # Two a layer, one before and one behind those of the vision encoder, one at the decoder's end.
    layers = config.vision.num_layers + config.vision.num_global_layers + config.decoder.num_layers
    assert lowered.as_text().count("call @one_pass") == 2 * layers + 3
