"""The training command: error messages for bad input, and training on conversations about videos."""

import json
import logging
import math
import os
import subprocess
import sys

import av
import numpy as np
import pytest
import runs

from moss_jax.config import ConversationConfig, TabletopConfig
from moss_jax.train import __main__ as command
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
        return command.main()

    logger = logging.getLogger("moss_jax")
    before = logger.level
    yield main
    logger.setLevel(before)


def params(*bindings: str) -> list[str]:
    return [word for binding in bindings for word in ("--gin_param", binding)]


def test_the_operative_config_has_only_settings_that_apply():
    tabletop = command.read_config([], ["data.kind = 'tabletop'"])
    conversations = command.read_config([], ["data.kind = 'conversations'"])
    assert isinstance(tabletop.source, TabletopConfig)
    assert isinstance(conversations.source, ConversationConfig)
    assert "conversations." not in tabletop.text
    assert "frames." not in tabletop.text
    assert "tabletop." not in conversations.text


def test_the_shipped_tabletop_config():
    config = command.read_config([str(CONFIGS / "tabletop_tiny.gin")], ["train.steps = 5"])
    assert config.train.steps == 5
    assert config.train.silence_weight == 1.0
    assert isinstance(config.source, TabletopConfig)


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("train.stpes = 100", "the nearest valid name is steps"),
        ("train.steps = 0", "steps must be at least 1, not 0"),
        ("model.checkpoint = 'nowhere'", "there is no such folder"),
        ("train.loss_terms = {'x_loss': 1}", "train.loss_terms must be some of z_loss; got x_loss"),
    ],
)
def test_bad_settings_exit_with_a_message(main, tmp_path, capsys, binding, message):
    assert main("--workdir", tmp_path / "run", *params(binding)) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ")
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["-m", "moss_jax.train"], [runs.ROOT / "train.py"]])
def test_the_command_from_another_folder(tmp_path, words):
    done = subprocess.run(
        [
            sys.executable,
            *words,
            "--gin_file",
            "tabletop_tiny.gin",
            "--workdir",
            "run",
            *params("mesh.data = -1"),
        ],
        env=os.environ | {"PYTHONPATH": str(runs.ROOT)},
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    name = "train.py" if words[0] != "-m" else "python -m moss_jax.train"
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"{name}: mesh.data must be at least 1 device")


def test_a_missing_cluster(main, tmp_path, capsys, monkeypatch):
    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(command.jax.distributed, "initialize", initialize)
    assert main("--workdir", tmp_path, "--distributed") == 2
    assert "--distributed found no cluster to join: coordinator_address" in capsys.readouterr().err


def test_missing_videos_abort_before_a_model_is_built(main, tmp_path, capsys, monkeypatch):
    def build(*_, **__):
        raise AssertionError("a model was built")

    monkeypatch.setattr(loop, "Trainer", build)
    rows = [sharegpt(f"clip{i}.mp4") for i in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    files = f"conversations.files = ('{tmp_path / 'rows.json'}',)"
    words = ["--gin_file", CONFIGS / "realtime_sft.gin", "--workdir", tmp_path / "run", *params(files)]
    assert main(*words) == 2
    error = capsys.readouterr().err
    assert "0 of 3 rows are usable" in error
    assert all(f"clip{i}.mp4" in error for i in range(3))
    assert "More than 10% of the rows are unusable" in error
    assert not (tmp_path / "run").exists()


def test_dropped_rows_within_the_limit_are_named(main, tmp_path, checkpoint, capsys, caplog):
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
    assert "2 of 3 rows are usable" in capsys.readouterr().err
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
