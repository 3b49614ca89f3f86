"""Conversion of config.json and preprocessor_config.json to `ModelConfig` and back."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from moss_jax.config import PRESETS, ConfigError, RopeConfig
from moss_jax.convert.configs import from_hugging_face, to_hugging_face
from moss_jax.video import preprocess


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name):
    config = PRESETS[name]()
    assert from_hugging_face(*json.loads(json.dumps(to_hugging_face(config)))) == config


@pytest.mark.parametrize("mode", ["max", "bilinear", "channelFusion"])
def test_other_settings_round_trip(small_config, mode):
    config = small_config(mode)
    vision = dataclasses.replace(
        config.vision, image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 0.6, 0.7), max_num_tiles=2, norm_eps=1e-6
    )
    rope = RopeConfig(
        theta=1e4, factor=2.0, low_freq_factor=3.0, high_freq_factor=5.0, original_max_positions=9
    )
    decoder = dataclasses.replace(config.decoder, rope=rope, norm_eps=1e-4, max_positions=77)
    config = dataclasses.replace(config, vision=vision, decoder=decoder)
    assert from_hugging_face(*json.loads(json.dumps(to_hugging_face(config)))) == config


@pytest.fixture
def raw(small_config):
    config, _ = to_hugging_face(small_config())
    return json.loads(json.dumps(config))


def test_normalisation_comes_from_the_preprocessor_alone(raw, small_config):
    assert from_hugging_face(raw) == small_config()
    preprocessor = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "do_resize": True}
    vision = from_hugging_face(raw, preprocessor).vision
    assert (vision.image_mean, vision.image_std) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("settings", "factor", "mean", "std"),
    [
        ({"rescale_factor": 1 / 127.5}, 1 / 127.5, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)),
        ({"do_rescale": False}, 1, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)),
        ({"do_normalize": False}, 1 / 255, 0, 1),
        ({"do_normalize": False, "do_rescale": False}, 1, 0, 1),
        (
            {"do_normalize": None, "rescale_factor": None, "do_convert_rgb": False},
            1 / 255,
            (0.1, 0.2, 0.3),
            (0.5, 0.6, 0.7),
        ),
        ({"image_mean": 0.5, "image_std": [0.25] * 3}, 1 / 255, 0.5, 0.25),
        ({"size": 28, "resample": 2, "max_image_tiles": 4}, 1 / 255, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)),
    ],
)
def test_pixels_are_those_of_the_image_processor(raw, settings, factor, mean, std):
    preprocessor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]} | settings
    vision = from_hugging_face(raw, preprocessor).vision
    rgb = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    pixels = preprocess(rgb, image_size=28, mean=vision.image_mean, std=vision.image_std)
    expected = (rgb * factor - np.array(mean)) / np.array(std)
    # A few roundings of float32, of terms that are no larger than the largest pixel and mean / std.
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=8e-7 * (np.abs(expected).max() + 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resample": 3}, "the image processor.resample is 3; only 2 is supported"),
        ({"size": {"height": 28, "width": 56}}, "the image processor.size.width is 56; only 28 is supported"),
        ({"size": {"shortest_edge": 28}}, "the image processor.size.height is None; only 28 is supported"),
        ({"do_resize": False}, "the image processor.do_resize is False; only True is supported"),
        ({"do_pad": False}, "the image processor.do_pad is False; only True is supported"),
        ({"rescale_factor": 0}, "the image processor.rescale_factor is 0.0; it must be positive"),
        ({"rescale_factor": "a"}, "the image processor has a value of the wrong type"),
        ({"image_mean": [0, 0, math.nan]}, "the image processor has a value of the wrong type"),
        ({"image_std": [1, 1, 0]}, "image_std (1.0, 1.0, 0.0) must be positive"),
    ],
)
def test_image_processors_that_differ_are_refused(raw, settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        from_hugging_face(raw, settings)


def test_rope_parameters_of_transformers_5(raw, small_config):
    text = raw["text_config"]
    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    text["rope_parameters"]["rope_theta"] = 123.0
    assert from_hugging_face(raw).decoder.rope == dataclasses.replace(
        small_config().decoder.rope, theta=123.0
    )


def test_no_scaling_is_a_factor_of_one(raw):
    raw["text_config"]["rope_scaling"] = None
    assert from_hugging_face(raw).decoder.rope.factor == 1
    raw["text_config"]["rope_scaling"] = {"rope_type": "default"}
    assert from_hugging_face(raw).decoder.rope.factor == 1


def test_compressor_keys_of_the_original(raw):
    raw.pop("mllama_pool_mode")
    raw.pop("mllama_pool_stride")
    raw |= {"model_type": "video_mllama", "pool_mode": "max", "stride": 1}
    compressor = from_hugging_face(raw).compressor
    assert (compressor.mode, compressor.stride) == ("max", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'; supported are mllama and video_mllama"),
        ({"model_type": None}, "model_type None"),
        (
            {"mllama_pool_mode": "median"},
            "mode must be one of 'average', 'max', 'bilinear', 'channelFusion'; got 'median'",
        ),
        (
            {"text_config": {"hidden_act": "gelu"}},
            "text_config.hidden_act is 'gelu'; only 'silu' is",
        ),
        ({"text_config": {"tie_word_embeddings": True}}, "text_config.tie_word_embeddings is True"),
        ({"text_config": {"num_key_value_heads": 3}}, "num_heads 4 must be a multiple of num_kv_heads 3"),
        ({"text_config": {"rope_scaling": {"rope_type": "yarn"}}}, "rope_type 'yarn' is not supported"),
        ({"text_config": {"rope_scaling": {"rope_type": "llama3"}}}, "lacks the key 'factor'"),
        ({"vision_config": {"hidden_act": "relu"}}, "vision_config.hidden_act is 'relu'"),
        ({"vision_config": {"num_channels": 1}}, "vision_config.num_channels is 1"),
        (
            {"vision_config": {"supported_aspect_ratios": [[1, 1]]}},
            "lists 1 aspect ratios, but 4 tiles have 8",
        ),
    ],
)
def test_unsupported_values_are_refused(raw, change, message):
    for key, value in change.items():
        raw[key] = raw[key] | value if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=re.escape(message)):
        from_hugging_face(raw)


@pytest.mark.parametrize("key", ["vision_config", "text_config"])
def test_a_missing_key_is_named(raw, key):
    raw[key].pop("hidden_size")
    with pytest.raises(ConfigError, match="lacks the key 'hidden_size'"):
        from_hugging_face(raw)
    raw.pop(key)
    with pytest.raises(ConfigError, match=f"lacks the key '{key}'"):
        from_hugging_face(raw)


@pytest.mark.parametrize(("key", "value"), [("text_config", None), ("vision_config", []), ("text_config", 3)])
def test_a_section_of_the_wrong_type(raw, key, value):
    raw[key] = value
    with pytest.raises(ConfigError, match=r"config\.json holds a value of the wrong type"):
        from_hugging_face(raw)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("text_config", "hidden_size", "32", "'32'; it must be an integer of at least 1"),
        ("text_config", "hidden_size", 32.0, "32.0; it must be an integer of at least 1"),
        ("text_config", "num_attention_heads", 0, "0; it must be an integer of at least 1"),
        ("text_config", "rms_norm_eps", math.nan, "nan; it must be a positive number"),
        ("text_config", "rope_theta", math.inf, "inf; it must be a positive number"),
        ("vision_config", "patch_size", True, "True; it must be an integer of at least 1"),
        ("vision_config", "norm_eps", None, "None; it must be a positive number"),
    ],
)
def test_a_number_of_the_wrong_type(raw, section, key, value, message):
    raw[section][key] = value
    with pytest.raises(ConfigError, match=re.escape(f"config.json has {key} {message}")):
        from_hugging_face(raw)


def test_aspect_ratios_of_the_wrong_type(raw):
    raw["vision_config"]["supported_aspect_ratios"] = 8
    with pytest.raises(ConfigError, match=r"config\.json holds a value of the wrong type"):
        from_hugging_face(raw)


def test_normalisation_of_other_than_three_channels(raw):
    with pytest.raises(
        ConfigError, match=r"image_mean must be \(a number, a number, a number\); got \(0\.5,\)"
    ):
        from_hugging_face(raw, {"image_mean": [0.5], "image_std": [0.5]})
