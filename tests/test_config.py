"""Validation of the settings, and the properties derived from them."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from moss_jax.config import (
    PRESETS,
    CompressorConfig,
    ConfigError,
    ConversationConfig,
    DataConfig,
    EngineConfig,
    FrameSampling,
    InitialModelConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RopeConfig,
    SessionConfig,
    TabletopConfig,
    TokenSampling,
    TrainConfig,
    moss_tiny,
    moss_video_11b,
)

VISION, DECODER = moss_video_11b().vision, moss_video_11b().decoder


def assert_refused(config, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 561}, "image_size 561 must be a multiple of patch_size 14"),
        ({"num_heads": 7}, "vision hidden_size 1280 must be a multiple of num_heads 7"),
        ({"intermediate_layers": (3, 32)}, "intermediate_layers (3, 32) must be in [0, 32)"),
        ({"intermediate_layers": (-1,)}, "intermediate_layers (-1,) must be in [0, 32)"),
        ({"image_std": (0.5, 0.0, 0.5)}, "image_std (0.5, 0.0, 0.5) must be positive"),
        ({"patch_size": 0}, "patch_size must be at least 1, not 0"),
        ({"num_heads": -2}, "num_heads must be at least 1, not -2"),
        ({"image_mean": (0.5,)}, "image_mean must be (a number, a number, a number); got (0.5,)"),
    ],
)
def test_vision(changes, message):
    assert_refused(VISION, changes, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 33}, "decoder hidden_size 4096 must be a multiple of num_heads 33"),
        ({"num_kv_heads": 5}, "num_heads 32 must be a multiple of num_kv_heads 5"),
        ({"hidden_size": 96}, "head_dim 3 (hidden_size / num_heads) must be even"),
        ({"cross_attention_layers": (3, 40)}, "cross_attention_layers (3, 40) must be in [0, 40)"),
        ({"cross_attention_layers": (8, 3)}, "cross_attention_layers (8, 3) must be ascending"),
        ({"cross_attention_layers": (3, 3)}, "cross_attention_layers (3, 3) must be ascending"),
        ({"cross_attention_layers": ()}, "must name some, but not all, of the 40 layers"),
        ({"cross_attention_layers": tuple(range(40))}, "but not all"),
    ],
)
def test_decoder(changes, message):
    assert_refused(DECODER, changes, message)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            CompressorConfig(),
            {"mode": "mean"},
            "mode must be one of 'average', 'max', 'bilinear', 'channelFusion'; got 'mean'",
        ),
        (CompressorConfig(), {"stride": 0}, "stride must be at least 1, not 0"),
        (
            moss_tiny(),
            {"compressor": CompressorConfig(stride=9)},
            "pool stride 9 exceeds the patch grid of 8",
        ),
        (moss_tiny(), {"rows_before_first_frame": "drop"}, "must be one of 'skip', 'attend'; got 'drop'"),
        (RopeConfig(), {"low_freq_factor": 4.0}, "high_freq_factor 4.0 must exceed low_freq_factor 4.0"),
    ],
)
def test_model(config, changes, message):
    assert_refused(config, changes, message)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (FrameSampling(), {"fps": 0.0}, "fps must be a positive number of frames per second, not 0"),
        (FrameSampling(), {"fps": float("nan")}, "fps must be a number; got nan"),
        (FrameSampling(), {"fps": float("inf")}, "not inf"),
        (FrameSampling(), {"min_frames": 0}, "min_frames 0 must be at least 1"),
        (
            FrameSampling(),
            {"min_frames": 300},
            "min_frames 300 must be at least 1 and at most max_frames 256",
        ),
        (TokenSampling(), {"temperature": -1.0}, "temperature -1.0 must not be negative"),
        (TokenSampling(), {"top_k": -1}, "top_k -1 must not be negative; 0 disables it"),
        (TokenSampling(), {"top_p": 0.0}, "top_p 0.0 must be in (0, 1]"),
        (TokenSampling(), {"top_p": 1.5}, "top_p 1.5 must be in (0, 1]"),
        (TokenSampling(), {"repetition_penalty": 0.0}, "repetition_penalty 0.0 must be positive"),
        (EngineConfig(), {"slots": 0}, "slots must be at least 1, not 0"),
        (EngineConfig(), {"text_capacity": 0}, "text_capacity must be at least 1, not 0"),
        (EngineConfig(), {"bank_capacity": -2}, "bank_capacity must be at least 1, not -2"),
        (SessionConfig(), {"clock": "wall"}, "clock must be one of 'lockstep', 'realtime'; got 'wall'"),
        (SessionConfig(), {"tokens_per_second": 0}, "tokens_per_second must be at least 1, not 0"),
        (SessionConfig(), {"tail_seconds": -0.5}, "tail_seconds -0.5 must not be negative"),
        (SessionConfig(), {"inbox_frames": 0}, "inbox_frames must be at least 1, not 0"),
    ],
)
def test_stream(config, changes, message):
    assert_refused(config, changes, message)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (InitialModelConfig(), {"preset": "tiny"}, "preset must be one of 'moss_video_11b', 'moss_tiny'"),
        (MeshConfig(), {"data": 0}, "only one mesh axis can be 0"),
        (TrainConfig(), {"steps": 0}, "steps must be at least 1, not 0"),
        (TrainConfig(), {"trainable": ()}, "trainable must name at least one of vision, compressor"),
        (TrainConfig(), {"trainable": ("head",)}, "element one of 'vision', 'compressor'"),
        (TrainConfig(), {"compute_dtype": "int8"}, "compute_dtype must be one of 'bfloat16', 'float32'"),
        (DataConfig(), {"kind": "videos"}, "kind must be one of 'tabletop', 'conversations'"),
        (ConversationConfig(), {"frame_buckets": (4, 4)}, "frame_buckets (4, 4) must be positive and asc"),
    ],
)
def test_training(config, changes, message):
    assert_refused(config, changes, message)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (TrainConfig(steps=1e4, batch_size=np.int64(4)), TrainConfig(steps=10_000, batch_size=4)),
        (TrainConfig(trainable="projector"), TrainConfig(trainable=("projector",))),
        (TrainConfig(loss_terms={"z_loss": 1}), TrainConfig(loss_terms=(("z_loss", 1.0),))),
        (ConversationConfig(files="/x.json"), ConversationConfig(files=("/x.json",))),
        (ConversationConfig(files=[Path("a.json")]), ConversationConfig(files=("a.json",))),
        (
            ConversationConfig(token_buckets=[1e3, 4096.0]),
            ConversationConfig(token_buckets=(1000, 4096)),
        ),
        (FrameSampling(fps=2), FrameSampling(fps=2.0)),
        (TokenSampling(seed=2**63 - 1), TokenSampling(seed=2**63 - 1)),
    ],
)
def test_values_that_mean_the_same_are_the_same(made, expected):
    assert made == expected
    assert repr(made) == repr(expected)
    assert hash(made) == hash(expected)


CONFIGS = [
    FrameSampling,
    TokenSampling,
    EngineConfig,
    SessionConfig,
    InitialModelConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    DataConfig,
    ConversationConfig,
    TabletopConfig,
]
NUMBERS = [(kind, f.name) for kind in CONFIGS for f in dataclasses.fields(kind) if f.type in (int, float)]


@pytest.mark.parametrize("value", ["3", True, None, (1, 2), float("nan"), -7])
def test_a_wrong_number_is_refused_in_one_sentence(value):
    assert len(NUMBERS) > 30
    for kind, name in NUMBERS:
        with pytest.raises(ConfigError, match=rf"\b{name}\b") as error:
            kind(**{name: value})
        assert re.fullmatch(rf".* must .*|.*{re.escape(str(value))}.*", str(error.value))


def test_a_fraction_is_no_whole_number():
    whole = [(kind, name) for kind, name in NUMBERS if type(getattr(kind(), name)) is int]
    assert len(whole) > 20
    for kind, name in whole:
        with pytest.raises(ConfigError, match=rf"^{name} must be a whole number; got 1\.5$"):
            kind(**{name: 1.5})


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (TrainConfig(), {"steps": "3"}, "steps must be a whole number; got '3'"),
        (TrainConfig(), {"steps": float("inf")}, "steps must be a whole number; got inf"),
        (TrainConfig(), {"trainable": 3}, "trainable must be a tuple with each element one of 'vision',"),
        (
            TrainConfig(),
            {"loss_terms": {"z_loss": "a"}},
            "loss_terms must be a tuple with each element (a string",
        ),
        (TrainConfig(), {"loss_terms": {"z_loss": float("inf")}}, "loss_terms has inf for 'z_loss'"),
        (
            TrainConfig(),
            {"seed": 10**20},
            "seed must be at least 0 and less than 2**63, not 100000000000000000000",
        ),
        (TokenSampling(), {"seed": -1}, "seed must be at least 0 and less than 2**63, not -1"),
        (ConversationConfig(), {"files": 3}, "files must be a tuple with each element a string; got 3"),
        (ConversationConfig(), {"token_buckets": 4096}, "a tuple with each element a whole number; got 4096"),
        (
            ConversationConfig(),
            {"token_buckets": (1.5,)},
            "a tuple with each element a whole number; got (1.5,)",
        ),
        (
            InitialModelConfig(),
            {"remat": "all"},
            "one of 'none', 'dots', 'projections', 'attention', 'full'; got 'all'",
        ),
        (InitialModelConfig(), {"pool": "mean"}, "'channelFusion' or None; got 'mean'"),
        (InitialModelConfig(), {"checkpoint": 3}, "checkpoint must be a string or None; got 3"),
        (InitialModelConfig(), {"stride": 0}, "stride must be at least 1, not 0"),
        (OptimizerConfig(), {"learning_rate": float("inf")}, "learning_rate inf must be positive"),
        (TabletopConfig(), {"warmup_factor": 0}, "warmup_factor must be at least 1, not 0"),
        (SessionConfig(), {"clock": ["lockstep"]}, "clock must be one of 'lockstep', 'realtime'; got ['lock"),
        (moss_tiny(), {"vision": None}, "vision must be VisionConfig; got None"),
    ],
)
def test_types(config, changes, message):
    assert_refused(config, changes, message)


def test_settings_are_frozen_values():
    assert moss_tiny() == moss_tiny()
    assert len({moss_tiny(), moss_tiny(), moss_video_11b()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        moss_tiny().attention = "xla"


def test_derived_sizes_of_the_released_model():
    config = moss_video_11b()
    assert (config.vision.grid, config.vision.num_positions) == (40, 1601)
    assert (config.vision.head_dim, config.vision.output_size) == (80, 7680)
    assert config.vectors_per_frame == 101
    assert (config.decoder.head_dim, config.decoder.image_token_id) == (128, 128256)
    assert config.decoder.num_self_attention_layers == 32


def test_tile_arrangements_are_in_the_order_of_their_ids():
    expected = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
    assert VISION.supported_aspect_ratios == expected
    assert VISION.num_aspect_ratio_ids == 9


@pytest.mark.parametrize(("mode", "vectors"), [("average", 1 + 4), ("max", 1 + 4), ("bilinear", 1 + 9)])
def test_vectors_per_frame_of_grids_that_the_stride_does_not_divide(mode, vectors):
    vision = dataclasses.replace(moss_tiny().vision, image_size=5 * 14)
    config = ModelConfig(vision=vision, compressor=CompressorConfig(mode, 2), decoder=moss_tiny().decoder)
    assert config.vectors_per_frame == vectors


@pytest.mark.parametrize("name", PRESETS)
def test_presets_follow_the_released_model(name):
    config = PRESETS[name]()
    assert config.rows_before_first_frame == "skip"
    assert config.compressor.mode == "average"
    assert config.vision.grid % config.compressor.stride == 0
