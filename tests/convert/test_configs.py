"""Conversion of config.json and preprocessor_config.json to `ModelConfig` and back."""

import dataclasses
import json
import re

import pytest

from moss_jax.config import PRESETS, ConfigError, RopeConfig
from moss_jax.convert.configs import from_hugging_face, to_hugging_face


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


def test_a_number_of_the_wrong_type(raw):
    raw["text_config"]["hidden_size"] = "32"
    with pytest.raises(ConfigError, match="hidden_size must be a whole number; got '32'"):
        from_hugging_face(raw)


def test_normalisation_of_other_than_three_channels(raw):
    with pytest.raises(
        ConfigError, match=r"image_mean must be \(a number, a number, a number\); got \(0\.5,\)"
    ):
        from_hugging_face(raw, {"image_mean": [0.5], "image_std": [0.5]})
