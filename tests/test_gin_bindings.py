"""gin files: bindings reach the config dataclasses, and errors name the nearest valid name."""

import shutil
from pathlib import Path

import pytest

from moss_jax import gin_bindings
from moss_jax.config import (
    ConfigError,
    ConversationConfig,
    DataConfig,
    FrameSampling,
    InitialModelConfig,
    MeshConfig,
    OptimizerConfig,
    SelectionConfig,
    SessionConfig,
    TabletopConfig,
    TokenSampling,
    TrainConfig,
)

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(autouse=True)
def clear_bindings():
    yield
    gin_bindings.parse()


def test_parameters_win_over_files(tmp_path):
    file = tmp_path / "a.gin"
    file.write_text("session.tokens_per_second = 8\nsession.clock = 'realtime'\n")
    gin_bindings.parse([str(file)], ["session.tokens_per_second = 9"])
    assert gin_bindings.settings(SessionConfig) == SessionConfig(clock="realtime", tokens_per_second=9)
    assert type(gin_bindings.settings(SessionConfig)) is SessionConfig
    assert gin_bindings.settings(TokenSampling) == TokenSampling()
    gin_bindings.parse()
    assert gin_bindings.settings(SessionConfig) == SessionConfig()


def test_the_selection_of_frames_is_bound():
    gin_bindings.parse([], ["selection.enabled = True", "selection.max_fps = 4"])
    assert gin_bindings.settings(SelectionConfig) == SelectionConfig(enabled=True, max_fps=4.0)


def test_training_configs_are_bound_to_short_names():
    gin_bindings.parse(
        [], ["train.steps = 7", "mesh.tensor = 2", "model.remat = 'full'", "tabletop.max_seconds = 9"]
    )
    assert gin_bindings.settings(TrainConfig) == TrainConfig(steps=7)
    assert gin_bindings.settings(MeshConfig) == MeshConfig(tensor=2)
    assert gin_bindings.settings(InitialModelConfig) == InitialModelConfig(remat="full")
    assert gin_bindings.settings(TabletopConfig) == TabletopConfig(max_seconds=9)


def test_lists_and_dicts_become_tuples():
    gin_bindings.parse([], ["train.loss_terms = {'z_loss': 1e-4}"])
    assert gin_bindings.settings(TrainConfig).loss_terms == (("z_loss", 1e-4),)
    gin_bindings.parse([], ["train.trainable = ['projector']", "conversations.files = ['a.json', 'b.json']"])
    assert gin_bindings.settings(TrainConfig).trainable == ("projector",)
    assert gin_bindings.settings(ConversationConfig).files == ("a.json", "b.json")


def test_macros_are_resolved():
    gin_bindings.parse([], ["size = 56", "tabletop.image_size = %size"])
    assert gin_bindings.settings(TabletopConfig).image_size == 56


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("sesion.clock = 'realtime'", "nearest valid name is session"),
        ("session.token_per_second = 8", "nearest valid name is tokens_per_second"),
        ("session.clock =", "parse"),
        ("train.stpes = 100", r"nearest valid name is steps\)"),
        ("moss_jax.train.stpes = 100", r"nearest valid name is steps\)"),
        ("trian.steps = 100", r"nearest valid name is train\)"),
        ("TrainConfig.steps = 100", r"TrainConfig is called train in gin files"),
        ("moss_jax.EngineConfig.slots = 1", r"EngineConfig is called engine in gin files"),
        ("FrameSampling.fps = 1.0", r"FrameSampling is called frames in gin files"),
        ("SessionConfig.clock = 'realtime'", r"SessionConfig is called session in gin files"),
        ("TokenSampling.top_k = 1", r"TokenSampling is called sampling in gin files"),
        # A field that another config has is suggested with the name of that config.
        ("train.learning_rate = 1e-3", r"nearest valid name is optimizer.learning_rate\)"),
        ("optimizer.clip = 1.0", r"nearest valid name is clip_norm\)"),
        # gin would silently take these for macros and scopes.
        ("steps = 100", "'steps' is set but never used; the nearest valid name is train.steps"),
        ("learning_rat = 1", "the nearest valid name is optimizer.learning_rate"),
        ("fast/train.steps = 100", "'fast/train' has a scope, but nothing here enters one; say 'train'"),
        ("train.steps = %nowhere", "nowhere"),
    ],
)
def test_bad_bindings_are_refused_in_one_line(binding, message):
    with pytest.raises(ConfigError, match=message) as error:
        gin_bindings.parse([], [binding])
    assert "\n" not in str(error.value)


def test_invalid_values_are_refused():
    gin_bindings.parse([], ["session.tokens_per_second = 0"])
    with pytest.raises(ConfigError, match=r"^session\.tokens_per_second must be at least 1, not 0$"):
        gin_bindings.settings(SessionConfig)


@pytest.mark.parametrize(
    ("binding", "kind", "message"),
    [
        ("train.steps = '3'", TrainConfig, "train.steps must be a whole number; got '3'"),
        ("train.steps = 1.5", TrainConfig, "train.steps must be a whole number; got 1.5"),
        ("train.steps = True", TrainConfig, "train.steps must be a whole number; got True"),
        (
            "train.seed = 99999999999999999999",
            TrainConfig,
            "train.seed must be at least 0 and less than 2**63",
        ),
        ("sampling.seed = -1", TokenSampling, "sampling.seed must be at least 0 and less than 2**63, not -1"),
        ("frames.fps = '1'", FrameSampling, "frames.fps must be a number; got '1'"),
        (
            "conversations.token_buckets = 4096",
            ConversationConfig,
            "conversations.token_buckets must be a tuple",
        ),
        ("model.pool = 'mean'", InitialModelConfig, "model.pool must be one of 'average'"),
        ("model.stride = -1", InitialModelConfig, "model.stride must be at least 1, not -1"),
        ("mesh.data = -1", MeshConfig, "mesh.data must be at least 1 device, or 0 for all the rest; got -1"),
        ("mesh.data = 0", MeshConfig, "mesh.data and fsdp are 0: only one mesh axis can be 0"),
        (
            "data.kind = 'videos'",
            DataConfig,
            "data.kind must be one of 'tabletop', 'conversations'; got 'vid",
        ),
        ("optimizer.b1 = 1", OptimizerConfig, "optimizer.b1 must be in [0, 1), not 1.0"),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence_with_its_name(binding, kind, message):
    gin_bindings.parse([], [binding])
    with pytest.raises(ConfigError) as error:
        gin_bindings.settings(kind)
    assert str(error.value).startswith(message)
    assert len(str(error.value).splitlines()) == 1
    assert "In call to" not in str(error.value)


def test_a_macro_without_a_value_is_named_alone():
    with pytest.raises(ConfigError, match=r"^No bindings specified for 'bar/gin\.macro'$"):
        gin_bindings.parse([], ["train.steps = %bar", "train.batch_size = 1"])


def test_whole_numbers_in_scientific_notation_and_single_strings(tmp_path):
    bindings = ["train.steps = 1e4", "train.trainable = 'projector'", "conversations.files = '/x.json'"]
    gin_bindings.parse([], bindings)
    settings = gin_bindings.settings(TrainConfig)
    assert settings == TrainConfig(steps=10_000, trainable=("projector",))
    assert type(settings.steps) is int
    assert gin_bindings.settings(ConversationConfig).files == ("/x.json",)
    # As do those of a run that is resumed.
    (tmp_path / "config.gin").write_text(gin_bindings.operative())
    gin_bindings.parse([str(tmp_path / "config.gin")])
    assert gin_bindings.settings(TrainConfig) == settings


def test_a_missing_file_is_named_with_the_shipped_ones():
    with pytest.raises(ConfigError, match=r"nowhere\.gin does not exist, .* realtime_sft\.gin, serve\.gin"):
        gin_bindings.parse(["nowhere.gin"])


def test_a_missing_include_is_named(tmp_path):
    (tmp_path / "a.gin").write_text("include 'nowhere.gin'")
    with pytest.raises(ConfigError, match=r"nowhere\.gin"):
        gin_bindings.parse([str(tmp_path / "a.gin")])


def test_a_shipped_file_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gin_bindings.parse(["realtime_sft.gin"])
    assert gin_bindings.settings(InitialModelConfig).preset == "moss_video_11b"


def test_an_include_is_looked_up_beside_its_file_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(CONFIGS / "stage2_temporal.gin", tmp_path / "mine.gin")
    gin_bindings.parse(["mine.gin"])
    assert gin_bindings.settings(InitialModelConfig).preset == "moss_video_11b"
    (tmp_path / "base_11b.gin").write_text("model.preset = 'moss_tiny'")
    gin_bindings.parse(["mine.gin"])
    assert gin_bindings.settings(InitialModelConfig).preset == "moss_tiny"
    # The files of another folder don't include it.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    gin_bindings.parse([str(tmp_path / "mine.gin"), "realtime_sft.gin"])
    assert gin_bindings.settings(InitialModelConfig).preset == "moss_video_11b"


def test_the_operative_config_is_complete_and_can_be_parsed(tmp_path):
    gin_bindings.parse([], ["train.steps = 7", "mesh.tensor = 2"])
    settings = gin_bindings.settings(TrainConfig)
    text = gin_bindings.operative()
    assert "train.steps = 7" in text.splitlines()
    assert f"train.batch_size = {TrainConfig().batch_size}" in text.splitlines()
    assert "mesh" not in text
    (tmp_path / "config.gin").write_text(text)
    gin_bindings.parse([str(tmp_path / "config.gin")])
    assert gin_bindings.settings(TrainConfig) == settings


# Published: fps, min_frames, max_frames, max_tokens, learning rate (arXiv 2606.07639).
STAGES = {
    "stage1_alignment": (2.0, 8, 64, 4096, 2e-5),
    "stage2_temporal": (2.0, 8, 64, 4096, 2e-5),
    "offline_sft": (1.0, 8, 256, 8192, 1e-5),
    "realtime_sft": (1.0, 1, 256, 4096, 2e-5),
}


@pytest.mark.parametrize("stage", STAGES)
def test_stages_of_the_11b(stage):
    gin_bindings.parse([str(CONFIGS / f"{stage}.gin")])
    frames = gin_bindings.settings(FrameSampling)
    conversations = gin_bindings.settings(ConversationConfig)
    optimizer = gin_bindings.settings(OptimizerConfig)
    train = gin_bindings.settings(TrainConfig)
    published = (frames.fps, frames.min_frames, frames.max_frames, conversations.max_tokens)
    assert (*published, optimizer.learning_rate) == STAGES[stage]
    assert conversations.token_buckets[-1] == conversations.max_tokens
    assert conversations.frame_buckets[-1] == frames.max_frames
    assert optimizer.warmup_share == 0.1
    assert optimizer.final_share == 0
    assert ("decoder" in train.trainable) == (stage != "stage1_alignment")
    model = gin_bindings.settings(InitialModelConfig)
    # Pooling is the checkpoint's, unless a run sets it.
    assert (model.preset, model.pool, model.stride, model.remat) == ("moss_video_11b", None, None, "full")


def test_silence_weight_of_the_realtime_stage():
    gin_bindings.parse([str(CONFIGS / "realtime_sft.gin")])
    assert gin_bindings.settings(TrainConfig).silence_weight == 0.1
