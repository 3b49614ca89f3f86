"""The kernels that layers become where they are compiled for a GPU, of sizes that the kernels take."""

import dataclasses
import re

import interpreted
import jax
import pytest
from flax import nnx

from moss_jax.nn import MossVideo, quantize
from moss_jax.ops.norm import Residual


def lowered(module, call, *arguments) -> str:
    """The program of a call of an abstract module."""
    graph, params = nnx.split(module)
    with interpreted.lowering_for("gpu"):
        program = jax.jit(lambda params, *arguments: call(nnx.merge(graph, params), *arguments))
        return program.trace(params, *arguments).lower(lowering_platforms=("cuda",)).as_text()


def abstract(shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_each_norm_of_the_stream_is_one_kernel(small_config):
    config = small_config(attention="xla")
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, hidden_size=256),
        decoder=dataclasses.replace(config.decoder, hidden_size=256),
    )
    model = nnx.eval_shape(lambda: MossVideo(config, rngs=nnx.Rngs(0), dtype="bfloat16"))
    arguments = abstract((1, 4), "int32"), abstract((1, 2, 28, 28, 3)), abstract((1, 2), "int32")
    # Two a layer, one before and one behind those of the vision encoder, one at the decoder's end.
    layers = config.vision.num_layers + config.vision.num_global_layers + config.decoder.num_layers
    text = lowered(model, lambda model, *arguments: model(*arguments), *arguments)
    assert len(re.findall(r"call @one_pass", text)) == 2 * layers + 3


def test_a_decoder_layer_of_few_rows_is_two_kernels_around_attention(small_config):
    config = small_config(attention="xla")
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_heads": 16}
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **sizes))
    model = nnx.eval_shape(
        lambda: quantize(MossVideo(config, rngs=nnx.Rngs(0), dtype="bfloat16"), decoder="int8")
    )
    state = jax.eval_shape(lambda: model.init_state(1, text_capacity=8, bank_capacity=2))
    arguments = state, abstract((1, 2), "int32"), abstract((1,), "int32")
    text = lowered(model.decoder, lambda decoder, *arguments: decoder.decode(*arguments), *arguments)
    assert text.count("call @few_rows") == 2 * config.decoder.num_layers


@pytest.mark.parametrize(("encoder", "gemms", "arrays"), [(None, 1, [4, 4]), ("fp8", 5, [4, 3])])
def test_an_encoder_layer_is_kernels(small_config, encoder, gemms, arrays):
    """Both norms, and the GEMM in front of the GELU; in 8 bits all GEMMs, of which that of values is its own.

    These leave nothing to be added to the second norm.
    """
    config = small_config(attention="xla")
    sizes = {"hidden_size": 768, "intermediate_size": 768, "num_heads": 8}
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, **sizes))
    model = nnx.eval_shape(
        lambda: quantize(MossVideo(config, rngs=nnx.Rngs(0), dtype="bfloat16"), encoder=encoder)
    )
    x = abstract((2, 128, 768))
    text = lowered(model.vision.layers[0], lambda layer, *x: layer(Residual(*x)), x, x)
    assert text.count("call @many_rows") == gemms
    norms = re.findall(r"call @one_pass\w*\((.*?)\)", text)
    assert [len(given.split(",")) for given in norms] == arrays
