"""Weights in 8 bits: what a map is, what a model of them still keeps, and what is refused."""

import contextlib
import dataclasses
import functools
import gc
import re
import weakref
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from moss_jax.nn.quantized import Fp8Linear, QuantizedLinear
from moss_jax.ops.fused_linear import api as fused_linear
from moss_jax.ops.norm_linear import api as norm_linear

import moss_jax
from moss_jax.config import PRESETS, ConfigError, EngineConfig, OptimizerConfig, TrainConfig
from moss_jax.convert import open_model
from moss_jax.nn import MossVideo, decoder, is_quantized, quantize, quantized
from moss_jax.nn.layers import Linear, Residual, remat
from moss_jax.nn.vision import VisionLayer
from moss_jax.ops.norm import api as norm
from moss_jax.ops.post_attention import api as post_attention
from moss_jax.sharding import make_mesh
from moss_jax.stream import PENDING, Engine, Row
from moss_jax.train.step import Trainer
from moss_jax.video import preprocess

DTYPES = [jnp.int8, jnp.float8_e4m3fn]
# Half a step of the rounding: of 1/127 of the largest weight, or of 1/8 of the weight itself.
HALF_STEP = {jnp.int8: 0.5 / 127, jnp.float8_e4m3fn: 1 / 16}


def copy(model):
    """Modules of their own over the same arrays."""
    return nnx.merge(*nnx.split(model))


def random_linear(inputs, outputs, *, bias=False, dtype="float32"):
    linear = Linear(inputs, outputs, bias=bias, rngs=nnx.Rngs(0), dtype=dtype)
    rng = np.random.default_rng(0)
    # Outputs of very different sizes, as they are in trained models.
    size = 10.0 ** rng.uniform(-3, 1, tuple(outputs.values()))
    linear.kernel[...] = jnp.asarray(rng.standard_normal(linear.kernel.shape) * size, dtype)
    if bias:
        linear.bias[...] = jnp.asarray(rng.standard_normal(linear.bias.shape), dtype)
    return linear


def dequantized(linear, small):
    """The `Linear` with the weights that the quantized one stands for."""
    num_outputs = small.scale.ndim
    scale = small.scale[...].reshape(*small.scale.shape, *(1,) * linear.num_inputs)
    wide = small.kernel[...].astype(jnp.float32) * scale
    order = (*range(num_outputs, wide.ndim), *range(num_outputs))
    linear.kernel[...] = wide.transpose(order)
    return linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("inputs", "outputs", "bias"),
    [
        ({"embed": 48}, {"kv_heads": 2, "group_and_kv": 4, "head_dim": 8}, False),
        ({"heads": 4, "head_dim": 8}, {"embed": 24}, False),
        ({"embed": 24}, {"mlp": 40}, True),
    ],
)
def test_a_map_is_the_one_of_its_dequantized_weights(inputs, outputs, bias, dtype):
    linear = random_linear(inputs, outputs, bias=bias)
    small = QuantizedLinear(linear, dtype)
    assert small.kernel.shape == (*outputs.values(), *inputs.values())
    assert small.kernel.get_metadata()["axes"] == (*outputs, *inputs)
    assert small.scale.get_metadata()["axes"] == tuple(outputs)
    assert (small.kernel.dtype, small.scale.dtype) == (dtype, jnp.float32)
    exact = linear.kernel[...]
    linear = dequantized(linear, small)
    over = tuple(range(len(inputs)))
    step = HALF_STEP[dtype] * jnp.abs(exact).max(axis=over)
    assert (jnp.abs(linear.kernel[...] - exact) <= 1.001 * step).all()

    x = np.random.default_rng(1).standard_normal((3, 5, *inputs.values()), np.float32)
    expected = linear(x)
    bound = 1e-6 * np.abs(expected).max(axis=(0, 1))
    assert small(x).shape == expected.shape
    assert (np.abs(small(x) - expected) <= bound).all()
    assert small(x[:0]).shape == linear(x[:0]).shape


@pytest.mark.parametrize("bias", [False, True])
def test_a_part_of_a_map_gives_a_part_of_its_outputs(bias):
    small = QuantizedLinear(random_linear({"embed": 16}, {"qkv": 3, "mlp": 8}, bias=bias), jnp.int8)
    x = np.random.default_rng(1).standard_normal((4, 16), np.float32)
    for which in (slice(2), slice(2, 3)):
        np.testing.assert_allclose(small.part(which)(x), small(x)[:, which], rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_of_the_result(dtype):
    linear = random_linear({"embed": 16}, {"mlp": 8}, dtype="bfloat16")
    small = QuantizedLinear(linear, dtype)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 16)), jnp.bfloat16)
    assert small(x).dtype == jnp.bfloat16
    wide = small(x, out_dtype=jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide.astype(jnp.bfloat16), small(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros(dtype):
    linear = random_linear({"embed": 16}, {"mlp": 8})
    linear.kernel[...] = linear.kernel[...].at[:, 3].set(0)
    y = QuantizedLinear(linear, dtype)(jnp.ones((2, 16)))
    np.testing.assert_array_equal(y[:, 3], 0)
    assert np.isfinite(y).all()


def vision_layers(config, dtype="float32", gated=False):
    """A layer of the vision encoder whose columns have very different sizes, and the same in 8 bits."""
    layer = VisionLayer(config, None, gated=gated, rngs=nnx.Rngs(0), dtype=dtype)
    rng = np.random.default_rng(0)
    for path, x in nnx.to_flat_state(nnx.state(layer)):
        size = 10.0 ** rng.uniform(-2, 1, x.shape[-1])
        size *= 1 if path[-1] != "kernel" else 1 / np.sqrt(x.shape[0])
        x[...] = jnp.asarray(size * rng.standard_normal(x.shape), dtype)
    # Values and hidden numbers that are too large for 8 bits as they are.
    qkv, hidden = layer.attention.qkv.kernel, layer.mlp.fc1.kernel
    qkv[...], hidden[...] = qkv[...].at[:, 2].multiply(100), 100 * hidden[...]
    small = copy(layer)
    quantized._to_float8(small)
    return layer, small


def vision_config(small_config, **changes):
    return dataclasses.replace(small_config().vision, hidden_size=64, num_heads=4, **changes)


def branches(layer, x):
    """What attention and the MLP of a layer add to x."""
    zeros = jnp.zeros_like(x)
    normed, _ = layer.attention_norm.of_sum(Residual(x), layer.attention.qkv.input_dtype)
    attended = layer.attention.add_to(zeros, normed, None)
    normed, _ = layer.mlp_norm.of_sum(Residual(x), layer.mlp.fc1.input_dtype)
    return attended.sum(), layer.mlp.add_to(zeros, normed, None).sum()


def test_an_encoders_layer_in_8_bits(small_config):
    layer, small = vision_layers(vision_config(small_config, intermediate_size=128))
    x = np.random.default_rng(1).standard_normal((2, 16, 64), np.float32)
    x *= np.float32([0.01, 100])[:, None, None]
    for found, expected in zip(branches(small, x), branches(layer, x), strict=True):
        for row, exact in zip(found, expected, strict=True):
            assert 0.01 < np.linalg.norm(row - exact) / np.linalg.norm(exact) < 0.15
    # A frame doesn't tell in another's features.
    np.testing.assert_array_equal(branches(small, x)[0][:1], branches(small, x[:1])[0])


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_map_in_8_bits_adds_to_the_stream_itself(dtype, scale):
    """As the next norm would, but for rounding."""
    linear = random_linear({"heads": 4, "head_dim": 8}, {"embed": 24}, dtype=dtype)
    small = Fp8Linear(linear, jnp.float32(1 / 8))
    rng = np.random.default_rng(1)
    x = jnp.asarray(8 * rng.standard_normal((2, 5, 4, 8)), small.input_dtype)
    stream = jnp.asarray(rng.standard_normal((2, 5, 24)), dtype)
    scale = None if scale is None else jnp.full(1, scale, dtype)
    found, later = small.add_to(stream, x, scale), Residual(stream, small(x), scale)
    assert found.branch is None
    assert found.x.dtype == dtype
    size = np.abs(np.float32(stream)) + np.abs(np.float32(later.branch))
    difference = np.abs(np.float32(found.x) - np.float32(later.sum()))
    assert (difference <= float(jnp.finfo(dtype).eps) * size).all()


@pytest.mark.parametrize("gated", [False, True])
def test_an_encoders_layer_in_8_bits_leaves_no_branch(small_config, gated):
    """Its stream is the one that it has if norms add the branches, but for what is rounded in another way."""
    layer, small = vision_layers(vision_config(small_config, intermediate_size=128), "bfloat16", gated)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 16, 64)), jnp.bfloat16)
    assert layer(Residual(x))[0].branch is not None
    found, inputs = small(Residual(x))
    assert found.branch is None
    np.testing.assert_array_equal(inputs, x)
    with mock.patch.object(Fp8Linear, "add_to", Linear.add_to):
        later, _ = small(Residual(x))
    assert later.branch is not None
    expected = np.float32(later.sum())
    # A number in bfloat16 that is another one can be the next one in 8 bits.
    assert np.linalg.norm(np.float32(found.x) - expected) < 0.02 * np.linalg.norm(expected)
    again, _ = remat(small, "full")(Residual(x))
    np.testing.assert_array_equal(again.x, found.x)


def test_nothing_that_is_rounded_is_out_of_range(small_config):
    """Not even where a row makes an output as large as it can become: out of range would be NaN."""
    layer, small = vision_layers(vision_config(small_config, intermediate_size=128))
    for its_norm, kernel in (
        (layer.attention_norm, layer.attention.qkv.kernel[:, 2].reshape(64, -1)),
        (layer.mlp_norm, layer.mlp.fc1.kernel[...]),
    ):
        row = np.asarray(its_norm.weight[...][:, None] * kernel)
        x = np.concatenate([row.T, -row.T, 1e3 * np.eye(64, dtype=np.float32)])[None]
        assert all(np.isfinite(branch).all() for branch in branches(small, x))


def test_norms_are_scaled_by_powers_of_two(small_config):
    """Which changes no digit of theirs."""
    layer, small = vision_layers(vision_config(small_config, intermediate_size=128), dtype="bfloat16")
    for name in ("attention_norm", "mlp_norm"):
        for part in ("weight", "bias"):
            before, after = (np.float64(getattr(getattr(x, name), part)[...]) for x in (layer, small))
            (exponent,) = set(np.log2(before / after))
            assert exponent == round(exponent)


# How far the logits of the golden model go, as a share of what sets them apart; frames tell little in them.
PARTS = [
    ({"decoder": "int8"}, 0.018),
    ({"decoder": "fp8"}, 0.081),
    ({"encoder": "fp8"}, 0.0018),
]


@pytest.mark.parametrize(("parts", "found"), PARTS, ids=str)
def test_how_far_the_logits_go(golden, compiled, parts, found):
    inputs = golden.tokens, golden.pixels, golden.frame_positions

    def centred(model):
        logits = compiled(model)(*inputs)
        return logits - logits.mean(axis=-1, keepdims=True)

    exact = centred(golden.model)
    off = jnp.linalg.norm(centred(quantize(copy(golden.model), **parts)) - exact) / jnp.linalg.norm(exact)
    assert off == pytest.approx(found, rel=0.3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_projects_what_it_norms(small_config, random_model, dtype):
    """As the norm and the map do by themselves, whether or not a branch is still to be added."""
    model = quantize(random_model(small_config(), dtype=dtype), decoder="int8")
    x, branch = (jnp.asarray(x, dtype) for x in np.random.default_rng(0).standard_normal((2, 2, 3, 32)))
    for layer in model.decoder.layers:
        projection = layer.attention.qkv if isinstance(layer, decoder.SelfLayer) else layer.attention.q
        for residual in (Residual(x), Residual(x, branch, jnp.full(1, 0.5, dtype))):
            normed, expected = layer.attention_norm.of_sum(residual)
            found, y = decoder._before_attention(layer, residual, projection)
            np.testing.assert_array_equal(y, expected)
            np.testing.assert_array_equal(found, projection(normed))


@contextlib.contextmanager
def as_if_on_gpu(*ops):
    """These ops choose what they would there."""

    def gpu(refuses, arguments, _):
        return refuses(arguments, "gpu")

    with contextlib.ExitStack() as patches:
        for op in ops:
            kernel = op.IMPLEMENTATIONS["mosaic_gpu"]
            refuses = functools.partial(gpu, kernel.unsupported)
            patches.enter_context(mock.patch.object(kernel, "unsupported", refuses))
            patches.enter_context(mock.patch.dict(op.ORDER, {jax.default_backend(): op.ORDER["gpu"]}))
        yield


def test_a_layer_of_few_rows_is_two_kernels_around_attention(small_config):
    """As it is compiled for a GPU, of sizes that the kernels take."""
    config = small_config()
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_heads": 16}
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **sizes))
    model = nnx.eval_shape(
        lambda: quantize(MossVideo(config, rngs=nnx.Rngs(0), dtype="bfloat16"), decoder="int8")
    )
    state = jax.eval_shape(lambda: model.init_state(1, text_capacity=8, bank_capacity=2))
    graph, params = nnx.split(model.decoder)
    tokens, count = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 2), (1,)))

    with as_if_on_gpu(norm_linear, post_attention):
        program = jax.jit(lambda params, *given: nnx.merge(graph, params).decode(*given))
        lowered = program.trace(params, state, tokens, count).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("call @few_rows") == 2 * config.decoder.num_layers


def lowered_vision_layer(config, prepare=lambda layer: None):
    """As it is compiled for a GPU, in bfloat16."""

    def make():
        layer = VisionLayer(config, "xla", gated=False, rngs=nnx.Rngs(0), dtype="bfloat16")
        prepare(layer)
        return layer

    graph, params = nnx.split(nnx.eval_shape(make))
    x = jax.ShapeDtypeStruct((2, 128, config.hidden_size), jnp.bfloat16)
    with as_if_on_gpu(fused_linear, norm):
        program = jax.jit(lambda params, *given: nnx.merge(graph, params)(Residual(*given)))
        return program.trace(params, x, x).lower(lowering_platforms=("cuda",)).as_text()


def test_an_encoders_layer_is_kernels(small_config):
    """Of sizes that the kernels take: both norms, and the map before the gelu; in 8 bits all maps, of which
    that of the values is one of its own.

    These leave nothing to be added to the second norm.
    """
    sizes = {"hidden_size": 768, "intermediate_size": 768, "num_heads": 8}
    config = dataclasses.replace(small_config().vision, **sizes)
    for prepare, maps, arrays in ((lambda layer: None, 1, [4, 4]), (quantized._to_float8, 5, [4, 3])):
        lowered = lowered_vision_layer(config, prepare)
        assert lowered.count("call @many_rows") == maps
        norms = re.findall(r"call @one_pass\w*\((.*?)\)", lowered)
        assert [len(given.split(",")) for given in norms] == arrays


def test_a_frame_has_the_features_that_it_has_alone(compiled, small_config, random_model):
    model = compiled(quantize(random_model(small_config()), encoder="fp8"))
    frames = np.random.default_rng(0).standard_normal((4, 28, 28, 3), np.float32)
    frames *= np.array([0.01, 1, 3, 0])[:, None, None, None]
    together = model.encode(frames)
    for frame, features in zip(frames, together, strict=True):
        np.testing.assert_allclose(model.encode(frame[None])[0], features, rtol=0, atol=1e-6)


def kinds(model) -> dict[str, set]:
    """The dtypes of the kernels, by name of the map."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path[-1] == "kernel":
            name = ".".join(str(part) for part in path[:-1] if not isinstance(part, int))
            found.setdefault(name, set()).add(str(variable.dtype))
    return found


def test_which_maps_are_in_8_bits(small_config, random_model):
    model = random_model(small_config("channelFusion"))
    before = kinds(model)
    quantize(model, decoder="int8", encoder="fp8")
    changed = {name: kind for name, (kind,) in kinds(model).items() if before.get(name) != {kind}}
    decoder = ("attention.qkv", "attention.q", "attention.kv", "attention.out", "mlp.gate_up", "mlp.down")
    encoder = ("attention.qkv.qk", "attention.qkv.v", "attention.out", "mlp.fc1", "mlp.fc2")
    assert changed == (
        {f"decoder.layers.{name}": "int8" for name in decoder}
        | {
            f"vision.{layers}.{name}": "float8_e4m3fn"
            for layers in ("layers", "global_layers")
            for name in encoder
        }
        | {"decoder.lm_head": "int8"}
    )
    assert model.dtype == jnp.float32
    variables = [variable for _, variable in nnx.to_flat_state(nnx.state(model))]
    assert {type(variable) for variable in variables} == {nnx.Param}
    for variable in variables:
        assert len(variable.get_metadata()["axes"]) == variable.ndim


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


def test_no_two_models_are_held(small_config, random_model, monkeypatch):
    """While a kernel is quantized, all that were before it are gone."""
    model = random_model(small_config())
    kernels = [
        weakref.ref(variable[...])
        for path, variable in nnx.to_flat_state(nnx.state(model))
        if path[-1] == "kernel" and path[0] == "decoder"
    ]
    gc.collect()  # Of what the fixture made the model of.
    alive = []

    def counting(*arguments):
        alive.append(sum(kernel() is not None for kernel in kernels))
        return one(*arguments)

    one = quantized._quantize_kernel
    monkeypatch.setattr(quantized, "_quantize_kernel", counting)
    quantize(model, decoder="int8")
    assert alive == list(range(len(kernels), 0, -1))
    assert not any(kernel() for kernel in kernels)


def test_it_streams(compiled, model, tokenizer, frames):
    model = quantize(copy(model), decoder="fp8", encoder="fp8")
    engine = Engine(model, tokenizer, EngineConfig(text_capacity=32, bank_capacity=4))
    image = tokenizer.special.image
    pool = engine.encode(frames[:2])
    state, drawn = engine.step(engine.start(), [Row([1, 2, image], [0])], pool)
    tokens = np.array([[1, 2, image, int(drawn.tokens[0]), image, 5]])
    _, drawn = engine.step(state, [Row([PENDING, image, 5], [1])], pool)
    vision = model.config.vision
    pixels = preprocess(
        np.stack(frames[:2]), image_size=vision.image_size, mean=vision.image_mean, std=vision.image_std
    )
    expected = compiled(model)(tokens, pixels[None], np.array([[2, 4]]))[0, -1]
    np.testing.assert_allclose(drawn.logits[0], expected, atol=1e-3)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"decoder": "int4"}, "the decoder's weights can be int8 or fp8, not 'int4'"),
        ({"encoder": "int8"}, "the encoder's weights can be fp8, not 'int8'"),
    ],
)
def test_unknown_weights_are_refused(small_config, random_model, parts, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        quantize(random_model(small_config()), **parts)


def test_what_a_quantized_model_is_not_for(small_config, random_model, tmp_path):
    model = quantize(random_model(small_config()), encoder="fp8")
    assert is_quantized(model)
    with pytest.raises(ConfigError, match="quantized already"):
        quantize(model, decoder="int8")
    with pytest.raises(moss_jax.CheckpointError, match="a quantized model cannot be saved"):
        moss_jax.save(tmp_path / "saved", model)
    assert not (tmp_path / "saved").exists()
    trainer = Trainer(model.config, TrainConfig(), OptimizerConfig(), make_mesh(), silence_id=7)
    with pytest.raises(ValueError, match="other parameters"):
        trainer.adopt(model)


def test_opening_a_model_in_8_bits():
    model = open_model(weights="int8", encoder_weights="fp8").model
    assert kinds(model)["decoder.lm_head"] == {"int8"}
    assert kinds(model)["vision.layers.mlp.fc1"] == {"float8_e4m3fn"}
