"""The training command: error messages for bad input, and training on conversations about videos."""

import errno
import json
import logging
import math
import os
import subprocess
import sys
import types

import av
import numpy as np
import pytest
import runs

from moss_jax import convert
from moss_jax.config import CompressorConfig, ConversationConfig, TabletopConfig
from moss_jax.train import __main__ as command
from moss_jax.train import loop
from moss_jax.train.checkpoints import RunError
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
    # What the command changes for its whole process.
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    yield main
    logger.setLevel(before)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).removeFilter(command._is_no_failed_write)


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


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (
            ["data.kind = 'conversations'", "segments.per_step = 2", "segments.frames = 4"],
            "segments.per_step, segments.frames have no effect: data.kind is 'conversations'; set another",
        ),
        (
            ["data.kind = 'conversations'", "tabletop.max_seconds = 9"],
            "tabletop.max_seconds has no effect: data.kind is 'conversations'",
        ),
        (["conversations.files = 'a.json'"], "conversations.files has no effect: data.kind is 'tabletop'"),
        (["frames.fps = 2"], "frames.fps has no effect: data.kind is 'tabletop'"),
        (["segments.frames = 4"], "segments.frames has no effect: segments.per_step is 0; set it"),
        (
            ["segments.per_step = 2", "tabletop.max_tokens = 99"],
            "tabletop.max_tokens has no effect: segments.per_step is above 0",
        ),
    ],
)
def test_settings_without_effect_are_refused(main, tmp_path, capsys, bindings, message):
    assert main("--workdir", tmp_path / "run", *params(*bindings)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [["segments.per_step = 2"], ["data.kind = 'conversations'"], []])
def test_the_operative_config_can_be_read_again(tmp_path, kind):
    config = command.read_config([], [*kind, "train.steps = 5"])
    (tmp_path / "config.gin").write_text(config.text)
    assert command.read_config([str(tmp_path / "config.gin")], []) == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.gin")), ids=lambda path: path.name)
def test_the_shipped_configs_change_nothing_in_vain(path):
    if path.name not in ("serve.gin", "demo.gin"):
        command.read_config([str(path)], [])


def test_the_shipped_tabletop_config():
    config = command.read_config([str(CONFIGS / "tabletop_tiny.gin")], ["train.steps = 5"])
    assert config.train.steps == 5
    assert config.train.silence_weight == 1.0
    assert isinstance(config.source, TabletopConfig)


def test_a_stage_keeps_the_pooling_of_its_checkpoint(tmp_path, caplog):
    """And the recorded config names no preset, which is not what is trained."""
    stage, tiny = str(CONFIGS / "realtime_sft.gin"), runs.ROOT / "checkpoints" / "moss-tiny"
    config = command.read_config([stage], [f"model.checkpoint = '{tiny}'"])
    _, model = loop._load_model_config(config.model, tmp_path, None)
    assert model.compressor == convert.load_config(tiny).compressor
    assert model.compressor.stride == 2
    assert "moss_video_11b" not in config.text
    assert "model.preset = None" in config.text.splitlines()
    assert not caplog.records
    config = command.read_config([stage], [f"model.checkpoint = '{tiny}'", "model.stride = 4"])
    _, model = loop._load_model_config(config.model, tmp_path, None)
    assert model.compressor.stride == 4
    assert "model.stride = 4" in config.text.splitlines()
    assert (
        f"override the frame compressor of {tiny}: average with stride 4, not average with stride 2"
        in caplog.text
    )


@pytest.mark.parametrize("stage", ["stage1_alignment", "stage2_temporal", "offline_sft", "realtime_sft"])
def test_the_stages_of_the_11b_pool_as_it_does(tmp_path, stage):
    config = command.read_config([str(CONFIGS / f"{stage}.gin")], [])
    _, model = loop._load_model_config(config.model, tmp_path, None)
    assert model.compressor == CompressorConfig(mode="average", stride=4)
    assert "model.preset = 'moss_video_11b'" in config.text.splitlines()


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


def test_processes_are_joined_by_hand(main, tmp_path, capsys, monkeypatch):
    joined = []

    def initialize(**arguments):
        joined.append(arguments)
        raise RuntimeError("nobody answers.")

    monkeypatch.setattr(command.jax.distributed, "initialize", initialize)
    words = ("--workdir", tmp_path, "--coordinator", "host:123", "--processes", "2", "--process-id", "1")
    assert main(*words) == 2
    assert "--coordinator host:123 cannot be joined: nobody answers." in capsys.readouterr().err
    assert joined == [
        {
            "coordinator_address": "host:123",
            "num_processes": 2,
            "process_id": 1,
            "cluster_detection_method": "deactivate",
        }
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "2"], "belong together: give all three"),
        (["--coordinator", "host", "--processes", "2", "--process-id", "0"], "must be HOST:PORT, such as"),
        (["--coordinator", "host:1", "--processes", "2", "--process-id", "2"], "must be in [0, 2)"),
    ],
)
def test_flags_of_processes_that_do_not_fit(main, tmp_path, capsys, words, message):
    assert main("--workdir", tmp_path, *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RunError("training diverged at step 3"), "train.py: training diverged at step 3\n"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "cannot be written any more: No space left on device",
        ),
    ],
)
def test_a_run_that_cannot_go_on_exits_with_1(main, tmp_path, capsys, monkeypatch, error, message):
    def run(*_, **__):
        raise error

    monkeypatch.setattr(command, "run", run)
    assert main("--workdir", tmp_path) == 1
    assert message in capsys.readouterr().err


def test_only_failed_writes_are_kept_quiet(main, monkeypatch, caplog):
    reported = []
    monkeypatch.setattr(sys, "__unraisablehook__", lambda report: reported.append(str(report.exc_value)))
    command.quiet_failed_writes()
    failed = (ValueError, ValueError("x"), None)
    for text in ("/a/1.orbax-checkpoint-tmp is full", "something else"):
        logging.getLogger("asyncio").error(text, exc_info=failed)
    logging.getLogger("absl").warning("orbax says something")
    assert caplog.messages == ["something else", "orbax says something"]
    for text in ("Event loop is closed", "another failure"):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text)))
    assert reported == ["another failure"]


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

    # A resumed run notices other rows, though their number is the same.
    resume = (*words, "--resume", *params("data.max_dropped_share = 0.5"))
    assert main(*resume) == 0
    assert "the rows are not those of the checkpoint" not in caplog.text
    rows[1]["conversations"][0]["value"] = "<|video|>What was it?"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert main(*resume) == 0
    assert "the rows are not those of the checkpoint (2 then, 2 now)" in caplog.text


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
