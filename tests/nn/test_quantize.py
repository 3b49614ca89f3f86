"""Models with weights in 8 bits: what they are made of, how far they are off, and what is refused."""

import dataclasses
import gc
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moss_jax
from moss_jax.config import PRESETS, ConfigError, EngineConfig, OptimizerConfig, TrainConfig
from moss_jax.convert import open_model
from moss_jax.nn import MossVideo, is_quantized, quantize, stored_weights
from moss_jax.nn.layers import Linear
from moss_jax.ops.attention import QuantizedQKV
from moss_jax.ops.linear import norm_linear, residual_add
from moss_jax.ops.norm import Residual
from moss_jax.ops.qarray import DTYPES, QArray, dequantize
from moss_jax.sharding import make_mesh
from moss_jax.stream import PENDING, Engine, Row
from moss_jax.train.step import Trainer
from moss_jax.video import preprocess

# Half a step of the rounding: of 1/127 of the largest weight, or of 1/8 of the weight itself.
HALF_STEP = {"int8": 0.5 / 127, "fp8": 1 / 16}
UNIT = 2.0**-24  # Largest relative error of rounding to float32.


def copy(module):
    """Modules of their own over the same arrays."""
    return nnx.merge(*nnx.split(module))


def linears(module) -> dict[str, Linear]:
    return {".".join(map(str, path)): m for path, m in nnx.iter_modules(module) if isinstance(m, Linear)}


def inputs_first(kernel, num_inputs: int) -> np.ndarray:
    """A kernel with its outputs first, in 8 bits or not, in the order of a model's own."""
    return np.moveaxis(np.asarray(dequantize(kernel)), range(-num_inputs, 0), range(num_inputs))


@pytest.mark.parametrize("weights", DTYPES)
def test_a_map_is_that_of_its_dequantised_weights(small_config, random_model, weights):
    model = random_model(small_config())
    small = quantize(copy(model), decoder=weights)
    for name, old in linears(model.decoder).items():
        new = linears(small.decoder)[name]
        kernel, n, axes = new.weights.kernel, old.num_inputs, old.kernel.get_metadata()["axes"]
        assert (kernel.dtype, new.layout, new.num_inputs) == (DTYPES[weights], "outputs_first", n)
        assert new.kernel.get_metadata()["axes"] == (*axes[n:], *axes[:n])
        exact, rounded = np.asarray(old.kernel[...]), inputs_first(kernel, n)
        largest = np.abs(exact).max(axis=tuple(range(n)))
        # float32 rounds the scale, the quotient and the product.
        assert (np.abs(rounded - exact) <= (HALF_STEP[weights] + 4 * UNIT) * largest).all()

        x = np.random.default_rng(1).standard_normal((3, 5, *old.weights.inputs), np.float32)
        flat, matrix = np.float64(x).reshape(15, -1), np.float64(rounded).reshape(x[0, 0].size, -1)
        bound = 2 * len(matrix) * UNIT * np.abs(flat) @ np.abs(matrix)
        y = new(x)
        assert y.shape == (3, 5, *old.weights.outputs)
        assert (np.abs(np.asarray(y).reshape(15, -1) - flat @ matrix) <= bound).all()


def test_queries_and_keys_are_a_part_of_the_projection(small_config, random_model):
    """And so are values; scales of their results have been divided out."""
    model = random_model(small_config())
    kernel = quantize(copy(model), encoder="fp8").vision.layers[0].attention.qkv.kernel.get_value()
    assert isinstance(kernel, QuantizedQKV)
    exact = np.asarray(model.vision.layers[0].attention.qkv.kernel[...])
    assert kernel.shape == (*exact.shape[1:], exact.shape[0])
    qk, v = (inputs_first(part, 1) for part in (kernel.qk, kernel.v))
    half_step = HALF_STEP["fp8"] * np.abs(exact).max(axis=0)
    assert (np.abs(v * kernel.v_scale - exact[:, 2:]) <= half_step[2:]).all()
    # The divisors of queries and keys are powers of two, of which only the product is kept.
    q_scale, k_scale = (
        2.0 ** np.round(np.log2(np.abs(exact[:, i]).max() / np.abs(qk[:, i]).max())) for i in (0, 1)
    )
    assert q_scale * k_scale == kernel.qk_scale
    for i, scale in enumerate((q_scale, k_scale)):
        assert (np.abs(qk[:, i] * scale - exact[:, i]) <= half_step[i]).all()


@pytest.fixture(params=["float32", "bfloat16"])
def encoders(request, small_config):
    """A vision encoder whose columns have very different sizes, and the same in 8 bits."""
    config = small_config()
    sizes = {"hidden_size": 64, "num_heads": 4, "intermediate_size": 128}
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, **sizes))
    model = MossVideo(config, rngs=nnx.Rngs(0), dtype=request.param)
    rng = np.random.default_rng(0)
    for layer in (*model.vision.layers, *model.vision.global_layers):
        for path, x in nnx.to_flat_state(nnx.state(layer)):
            size = 10.0 ** rng.uniform(-2, 1, x.shape[-1]) / (
                np.sqrt(x.shape[0]) if path[-1] == "kernel" else 1
            )
            x[...] = jnp.asarray(size * rng.standard_normal(x.shape), x.dtype)
        # Values and hidden numbers that are too large for 8 bits as they are.
        qkv, hidden = layer.attention.qkv.kernel, layer.mlp.fc1.kernel
        qkv[...], hidden[...] = qkv[...].at[:, 2].multiply(100), 100 * hidden[...]
    return model.vision, quantize(copy(model), encoder="fp8").vision


def layers(encoders):
    """A layer without gates and one with, and the same in 8 bits."""
    return [(getattr(x, name)[0] for x in encoders) for name in ("layers", "global_layers")]


@jax.jit
def branches(layer, x):
    """The branches of attention and MLP of a layer, before their gates."""
    zeros = jnp.zeros_like(x)
    heads, _ = layer.attention(Residual(x), layer.attention_norm.params)
    hidden, _ = norm_linear(Residual(x), layer.mlp_norm.params, layer.mlp.fc1.weights, gelu=True)
    maps = (heads, layer.attention.out), (hidden, layer.mlp.fc2)
    return [residual_add(zeros, y, linear.weights).sum().astype(jnp.float32) for y, linear in maps]


def test_an_encoder_layer_in_8_bits(encoders):
    x = np.random.default_rng(1).standard_normal((2, 16, 64), np.float32)
    x = jnp.asarray(x * np.float32([0.01, 100])[:, None, None], encoders[0].class_embedding.dtype)
    for layer, small in layers(encoders):
        for found, expected in zip(branches(small, x), branches(layer, x), strict=True):
            for row, exact in zip(found, expected, strict=True):
                assert 0.01 < np.linalg.norm(row - exact) / np.linalg.norm(exact) < 0.15
        # A frame has no influence on another's numbers.
        for found, expected in zip(branches(small, x), branches(small, x.at[1].set(1)), strict=True):
            np.testing.assert_array_equal(found[0], expected[0])


def test_an_encoder_layer_in_8_bits_leaves_no_branch_pending(encoders):
    """Its GEMMs add to the stream."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 16, 64)), encoders[0].class_embedding.dtype)
    for layer, small in layers(encoders):
        assert layer(Residual(x))[0].branch is not None
        found, inputs = small(Residual(x))
        assert found.branch is None
        np.testing.assert_array_equal(inputs, x)


def test_nothing_that_is_rounded_is_out_of_range(encoders):
    """Not even where a row makes an output as large as it can become: out of range would be NaN."""
    for layer, small in layers(encoders):
        for norm, kernel in (
            (layer.attention_norm, layer.attention.qkv.kernel[:, 2].reshape(64, -1)),
            (layer.mlp_norm, layer.mlp.fc1.kernel[...]),
        ):
            row = np.float32(norm.weight[...][:, None] * kernel)
            x = np.concatenate([row.T, -row.T, 1e3 * np.eye(64, dtype=np.float32)])[None]
            assert all(np.isfinite(branch).all() for branch in branches(small, jnp.asarray(x, kernel.dtype)))


def test_scales_of_activations_are_powers_of_two(encoders):
    """By which dividing changes no digit."""
    for _, small in layers(encoders):
        attention, mlp = small.attention, small.mlp
        qkv, out, fc1, fc2 = (m.kernel.get_value() for m in (attention.qkv, attention.out, mlp.fc1, mlp.fc2))
        scales = [x.input_scale for x in (qkv.qk, qkv.v, out, fc1, fc2)] + [fc1.output_scale, qkv.qk_scale]
        assert all(float(np.frexp(x)[0]) == 0.5 for x in scales)
        assert (out.input_scale, fc2.input_scale) == (qkv.v_scale, fc1.output_scale)


# How far the logits of the golden model go, as a share of what sets them apart; frames tell little in them.
PARTS = (({"decoder": "int8"}, 0.018), ({"decoder": "fp8"}, 0.081), ({"encoder": "fp8"}, 0.0018))


@pytest.mark.parametrize(("parts", "expected"), PARTS, ids=str)
def test_how_far_the_logits_go(golden, compiled, parts, expected):
    def centred(model):
        logits = compiled(model)(golden.tokens, golden.pixels, golden.frame_positions)
        return logits - logits.mean(axis=-1, keepdims=True)

    exact = centred(golden.model)
    off = jnp.linalg.norm(centred(quantize(copy(golden.model), **parts)) - exact) / jnp.linalg.norm(exact)
    assert off == pytest.approx(expected, rel=0.3)


def test_a_frame_has_no_influence_on_the_features_of_another(compiled, small_config, random_model):
    model = compiled(quantize(random_model(small_config()), encoder="fp8"))
    frames = np.random.default_rng(0).standard_normal((4, 28, 28, 3), np.float32)
    frames *= np.array([0.01, 1, 3, 0])[:, None, None, None]
    together = model.encode(frames)
    for i in range(4):
        others = 1 - frames
        others[i] = frames[i]
        np.testing.assert_array_equal(model.encode(others)[i], together[i])


def test_which_weights_are_in_8_bits(small_config, random_model):
    model = random_model(small_config("channelFusion"))
    classes = [type(module) for _, module in nnx.iter_modules(model)]
    dtypes = {name: linear.kernel.dtype for name, linear in linears(model).items()}
    assert stored_weights(model) == {"decoder": "float32", "encoder": "float32"}
    quantize(model, decoder="int8", encoder="fp8")
    assert stored_weights(model) == {"decoder": "int8", "encoder": "fp8"}
    assert [type(module) for _, module in nnx.iter_modules(model)] == classes
    for name, linear in linears(model).items():
        kernel = linear.kernel.get_value()
        in_8_bits = {x.dtype.name for x in jax.tree.leaves(kernel) if x.dtype.itemsize == 1}
        part = re.match(r"decoder\.|vision\.(global_)?layers\.", name)
        if part is None:
            assert (in_8_bits, kernel.dtype) == (set(), dtypes[name]), name
        else:
            assert in_8_bits == {"int8" if part[0] == "decoder." else "float8_e4m3fn"}, name
    assert model.dtype == jnp.float32
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        assert type(variable) is nnx.Param
        assert len(variable.get_metadata()["axes"]) == len(variable.get_value().shape)


def test_the_size_of_the_released_model():
    """It was 21.3 GB."""
    config = PRESETS["moss_video_11b"]()

    def size(**parts):
        model = nnx.eval_shape(
            lambda: quantize(MossVideo(config, rngs=nnx.Rngs(0), dtype="bfloat16"), **parts)
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model))) / 1e9

    assert size(decoder="fp8") == pytest.approx(12.10, rel=1e-3)
    assert size(decoder="int8", encoder="fp8") == pytest.approx(11.31, rel=1e-3)


def test_no_two_models_are_held(small_config, random_model):
    """A kernel is freed before the next one is rounded."""
    model = random_model(small_config())
    gc.collect()  # Drawing it has left cycles that hold its kernels.
    maps, rounded_when_freed = list(linears(model.decoder).values()), []

    def freed(_):
        rounded_when_freed.append(sum(isinstance(m.kernel.get_value(), QArray) for m in maps))

    references = [weakref.ref(m.kernel.get_value(), freed) for m in maps]
    quantize(model, decoder="int8")
    assert not any(reference() is not None for reference in references)
    np.testing.assert_allclose(rounded_when_freed, np.arange(len(maps)) + 0.5, atol=0.5)


def test_it_streams(compiled, model, tokenizer, frames):
    model = quantize(copy(model), decoder="fp8", encoder="fp8")
    engine = Engine(model, tokenizer, EngineConfig(text_capacity=32, bank_capacity=4))
    image = tokenizer.special.image
    features = engine.encode(frames[:2])
    state, drawn = engine.step(engine.start(), [Row([1, 2, image], [0])], features)
    tokens = np.array([[1, 2, image, int(drawn.tokens[0]), image, 5]])
    _, drawn = engine.step(state, [Row([PENDING, image, 5], [1])], features)
    vision = model.config.vision
    pixels = preprocess(
        np.stack(frames[:2]), image_size=vision.image_size, mean=vision.image_mean, std=vision.image_std
    )
    expected = compiled(model)(tokens, pixels[None], np.array([[2, 4]]))[0, -1]
    # float32's last bit can decide between two numbers in 8 bits, of which an encoder has thousands.
    np.testing.assert_allclose(drawn.logits[0], expected, rtol=0, atol=0.02)


def test_unknown_weights_are_refused(small_config, random_model):
    for parts, message in (
        ({"decoder": "int4"}, "the decoder's weights can be int8 or fp8, not 'int4'"),
        ({"encoder": "int8"}, "the encoder's weights can be fp8, not 'int8'"),
    ):
        with pytest.raises(ConfigError, match=message):
            quantize(random_model(small_config()), **parts)


def test_what_a_quantised_model_is_not_for(small_config, random_model, tmp_path):
    model = quantize(random_model(small_config()), encoder="fp8")
    assert is_quantized(model)
    with pytest.raises(ConfigError, match="quantised already"):
        quantize(model, decoder="int8")
    with pytest.raises(moss_jax.CheckpointError, match="a quantized model cannot be saved"):
        moss_jax.save(tmp_path / "saved", model)
    assert not (tmp_path / "saved").exists()
    trainer = Trainer(model.config, TrainConfig(), OptimizerConfig(), make_mesh(), silence_id=7)
    with pytest.raises(ValueError, match="are not those of the trainer's model_config"):
        trainer.adopt(model)


def test_opening_a_model_in_8_bits():
    model = open_model(weights="int8", encoder_weights="fp8").model
    assert model.decoder.lm_head.kernel.dtype == jnp.int8
    assert model.vision.layers[0].mlp.fc1.kernel.dtype == jnp.float8_e4m3fn
