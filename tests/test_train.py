"""train.py as a user runs it: what is wrong is said in words, and dialogues about videos are learnt."""

import json
import logging
import math
import sys

import av
import numpy as np
import pytest
import runs

import train
from moss_jax.config import ConversationConfig, TabletopConfig
from moss_jax.train import loop
from moss_jax.train.log import read_metrics

CONFIGS = runs.ROOT / "configs"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, small_config, random_model):
    return runs.make_checkpoint(tmp_path_factory.mktemp("start") / "small", small_config, random_model)


@pytest.fixture
def main(monkeypatch):
    """`main(*words)` runs train.py with these arguments."""

    def main(*words) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        return train.main()

    logger = logging.getLogger("moss_jax")
    before = logger.level
    yield main
    logger.setLevel(before)


def params(*bindings: str) -> list[str]:
    return [word for binding in bindings for word in ("--gin_param", binding)]


def test_settings_of_the_data_that_are_not_used_are_not_in_the_config():
    tabletop = train.read_config([], ["data.kind = 'tabletop'"])
    conversations = train.read_config([], ["data.kind = 'conversations'"])
    assert isinstance(tabletop.source, TabletopConfig)
    assert isinstance(conversations.source, ConversationConfig)
    assert "conversations." not in tabletop.text
    assert "frames." not in tabletop.text
    assert "tabletop." not in conversations.text


def test_the_tabletop_config_can_be_read():
    config = train.read_config([str(CONFIGS / "tabletop_tiny.gin")], ["train.steps = 5"])
    assert config.train.steps == 5
    assert config.train.silence_weight == 1.0
    assert isinstance(config.source, TabletopConfig)


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("train.stpes = 100", "the nearest valid name is steps"),
        ("train.steps = 0", "steps must be at least 1, not 0"),
        ("model.checkpoint = 'nowhere'", "there is no such folder"),
    ],
)
def test_bad_settings_end_it_with_a_sentence(main, tmp_path, capsys, binding, message):
    assert main("--workdir", tmp_path / "run", *params(binding)) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ")
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_cluster_that_is_not_there(main, tmp_path, capsys, monkeypatch):
    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(train.jax.distributed, "initialize", initialize)
    assert main("--workdir", tmp_path, "--distributed") == 2
    assert "--distributed found no cluster to join: coordinator_address" in capsys.readouterr().err


def test_rows_without_their_videos_end_it_before_a_model_is_built(main, tmp_path, capsys, monkeypatch):
    def build(*_, **__):
        raise AssertionError("it was built")

    monkeypatch.setattr(loop, "Trainer", build)
    rows = [sharegpt(f"clip{i}.mp4") for i in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    files = f"conversations.files = ('{tmp_path / 'rows.json'}',)"
    words = ["--gin_file", CONFIGS / "realtime_sft.gin", "--workdir", tmp_path / "run", *params(files)]
    assert main(*words) == 2
    error = capsys.readouterr().err
    assert "0 of 3 rows can be used" in error
    assert all(f"clip{i}.mp4" in error for i in range(3))
    assert "More than 10% of the rows cannot be used" in error
    assert not (tmp_path / "run").exists()


def test_some_rows_may_be_dropped_and_are_named(main, tmp_path, checkpoint, capsys, caplog):
    make_clip(tmp_path / "clip.mp4")
    rows = [sharegpt("clip.mp4"), sharegpt("clip.mp4"), sharegpt("gone.mp4")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = [
        "--gin_file",
        CONFIGS / "offline_sft.gin",
        "--workdir",
        tmp_path / "run",
        *params(
            f"model.checkpoint = '{checkpoint}'",
            "model.stride = 2",
            f"conversations.files = ('{tmp_path / 'rows.json'}',)",
            f"conversations.media_root = '{tmp_path}'",
            "conversations.token_buckets = (128, 8192)",
            "frames.min_frames = 1",
            "conversations.frame_buckets = (4, 256)",
            "data.workers = 0",
            "train.steps = 3",
            "train.batch_size = 2",
            "train.accumulate = 1",
            "train.compute_dtype = 'float32'",
            "model.remat = 'none'",
        ),
    ]
    assert main(*words) == 2
    assert "2 of 3 rows can be used" in capsys.readouterr().err
    assert main(*words, *params("data.max_dropped_share = 0.5")) == 0
    assert "gone.mp4" in caplog.text
    assert all(math.isfinite(row["loss"]) for row in read_metrics(tmp_path / "run"))
    assert [row["frames"] for row in read_metrics(tmp_path / "run")] == [4, 4, 4]


def sharegpt(video: str) -> dict:
    return {
        "conversations": [
            {"from": "human", "value": "<|video|>What is it?"},
            {"from": "gpt", "value": "A grey square."},
        ],
        "videos": [video],
    }


def make_clip(file, *, seconds: int = 2) -> None:
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 64
        for i in range(4 * seconds):
            rgb = np.full((64, 64, 3), 30 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())
