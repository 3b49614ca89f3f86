"""The model as a whole: its size, what its modules hold, what it refuses, and half precision."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moss_jax.config import PRESETS
from moss_jax.nn import MossVideo
from moss_jax.nn.decoder import CrossLayer
from moss_jax.ops.attention import Unsupported


def test_the_released_model_has_its_parameters():
    config = PRESETS["moss_video_11b"]()
    model = nnx.eval_shape(lambda: MossVideo(config, rngs=nnx.Rngs(0), dtype="bfloat16"))
    leaves = jax.tree.leaves(nnx.state(model))
    assert sum(leaf.size for leaf in leaves) == 10_670_220_835
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
    assert config.vectors_per_frame == 101


def test_modules_hold_parameters_only(small_config, random_model):
    for mode in ("average", "channelFusion"):
        model = random_model(small_config(mode))
        variables = [variable for _, variable in nnx.to_flat_state(nnx.state(model))]
        assert {type(variable) for variable in variables} == {nnx.Param}
        assert not jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param)))
        for variable in variables:
            assert len(variable.get_metadata()["axes"]) == variable.ndim


@pytest.fixture(scope="module")
def model(small_config, random_model):
    return random_model(small_config())


def test_a_new_layer_starts_small_with_open_gates(small_config):
    cross = CrossLayer(small_config().decoder, None, rngs=nnx.Rngs(0), dtype="float32")
    assert np.tanh(cross.attention_gate[...]) > 0.5
    assert np.tanh(cross.mlp_gate[...]) > 0.5
    assert np.std(cross.mlp.gate_up.kernel[...]) == pytest.approx(0.02, rel=0.1)
    np.testing.assert_array_equal(cross.attention.k_norm.weight[...], 1)


FRAMES, POSITIONS = (2, 1, 28, 28, 3), (2, 1)


@pytest.mark.parametrize(
    ("tokens", "pixels", "positions", "message"),
    [
        ((2,), FRAMES, POSITIONS, "tokens are integers [B, T]; got int32 (2,)"),
        ((2, 4), FRAMES[1:], POSITIONS, "pixels [B, F, H, W, 3] with frame_positions [B, F]"),
        ((2, 4), FRAMES, (2, 2), "got (2, 1, 28, 28, 3), (2, 2) and (2, 4)"),
        ((1, 4), FRAMES, POSITIONS, "for tokens [B, S]; got (2, 1, 28, 28, 3), (2, 1) and (1, 4)"),
        ((2, 4), (2, 1, 56, 56, 3), POSITIONS, "encode takes normalised pixels [B, 28, 28, 3]; got (2, 56,"),
        ((2, 4), (2, 1, 3, 28, 28), POSITIONS, "encode takes normalised pixels [B, 28, 28, 3]; got (2, 3,"),
    ],
)
def test_one_pass_refuses_shapes_that_do_not_fit(model, tokens, pixels, positions, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model(jnp.zeros(tokens, jnp.int32), jnp.zeros(pixels), jnp.zeros(positions, jnp.int32))


def test_encode_refuses_frames_that_are_not_normalised(model):
    size = model.config.vision.image_size
    frames = np.zeros((1, size, size, 3), np.uint8)
    with pytest.raises(ValueError, match=r"got uint8; normalise frames by moss_jax\.video\.preprocess"):
        model.encode(frames)
    with pytest.raises(ValueError, match="got uint8"):
        model(np.zeros((1, 4), np.int32), frames[None], np.zeros((1, 1), np.int32))


def test_encode_refuses_shapes_that_do_not_fit(model):
    for shape in ((28, 28, 3), (1, 28, 28, 4), (1, 28, 14, 3)):
        with pytest.raises(ValueError, match=re.escape(f"[B, 28, 28, 3]; got {shape}")):
            model.encode(jnp.zeros(shape))


@pytest.mark.parametrize(
    ("features", "position", "mask"),
    [
        ((2, 2, 32), (), None),
        ((2, 2, 32), (2, 1), None),
        ((2, 3, 32), (2,), None),
        ((2, 2, 31), (2,), None),
        ((1, 2, 32), (1,), None),
        ((2, 2, 32), (2,), (2, 1)),
        ((2, 3, 2, 32), (2,), None),
        ((2, 3, 2, 32), (2, 3), (2,)),
        ((3, 3, 2, 32), (3, 3), None),
        ((2, 3, 1, 32), (2, 3), None),
    ],
)
def test_remember_refuses_shapes_that_do_not_fit(model, features, position, mask):
    state = model.init_state(2, text_capacity=8, bank_capacity=4)
    mask = None if mask is None else jnp.ones(mask, bool)
    with pytest.raises(ValueError, match=r"for B = 2 slots and \[N, D\] = \[2, 32\]; got features \("):
        model.remember(state, jnp.zeros(features), jnp.zeros(position, jnp.int32), mask=mask)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (np.zeros((2, 3), np.float32), {}, "tokens are integers [B, T]; got float32 (2, 3)"),
        (np.zeros((3, 3), np.int32), {}, "the state has 2 slots, but tokens are (3, 3)"),
        (np.full((2, 3), 72), {}, "token ids must lie in [0, 72); got 72 to 72"),
        (np.array([[0, -1], [5, 9]]), {}, "token ids must lie in [0, 72); got -1 to 9"),
        (np.zeros((2, 3), np.int32), {"lengths": np.array(3)}, "lengths and mask are [B] = [2]; got ()"),
        (
            np.zeros((2, 3), np.int32),
            {"lengths": np.array([4, 0])},
            "lengths must lie in [0, 3], the tokens given",
        ),
        (np.zeros((2, 3), np.int32), {"lengths": np.array([1, -1])}, "the tokens given; got [1, -1]"),
        (np.zeros((2, 3), np.int32), {"mask": np.ones((2, 1), bool)}, "[B] = [2]; got (2,) and (2, 1)"),
    ],
)
def test_decode_refuses_what_does_not_fit(model, tokens, options, message):
    state = model.init_state(2, text_capacity=8, bank_capacity=4)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.decode(state, jnp.asarray(tokens), **options)


def test_a_named_implementation_that_cannot_fails_loudly(small_config, random_model):
    model = random_model(small_config(attention="cudnn"))
    with pytest.raises(Unsupported, match="attention implementation 'cudnn' cannot be used: it"):
        model.encode(jnp.zeros((1, 28, 28, 3)))


def test_bfloat16_is_close_to_float32(small_config, random_model, compiled, platform):
    """The same weights, rounded, in one pass and streamed in one chunk."""
    half_model = random_model(small_config(), dtype="bfloat16")
    graph, params = nnx.split(half_model)
    half = compiled(half_model)
    exact = compiled(nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float32), params)))
    rng = np.random.default_rng(0)
    tokens, positions = rng.integers(0, 64, (2, 12), np.int32), np.array([[1, 6], [0, 9]], np.int32)
    pixels = rng.standard_normal((2, 2, 28, 28, 3), np.float32)
    expected = np.asarray(exact(tokens, pixels, positions))
    logits = half(tokens, pixels, positions)
    assert logits.dtype == jnp.float32
    assert np.abs(logits - expected).max() < 0.15 * expected.std()

    state = half.init_state(2, text_capacity=12, bank_capacity=2)
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("bfloat16"), jnp.dtype("int32")}
    features = half.encode(pixels.reshape(-1, 28, 28, 3))
    state = half.remember(state, features.reshape(2, 2, *features.shape[1:]), positions)
    streamed, _ = half.decode(state, tokens)
    assert streamed.dtype == jnp.float32
    assert np.abs(streamed - expected).max() < 0.15 * expected.std()
