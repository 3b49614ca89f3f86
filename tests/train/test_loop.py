"""Training runs: resuming, stopping, the files they write, dropped rows, and settings that are refused."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import pytest
import runs
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

import moss_jax
from moss_jax.config import ConfigError, MeshConfig
from moss_jax.convert import CheckpointError, run_checkpoint
from moss_jax.train import loop
from moss_jax.train.log import read_metrics

STEPS = 30


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Shares compiled programs between runs with the same settings."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, small_config, random_model) -> Path:
    return runs.make_checkpoint(tmp_path_factory.mktemp("start") / "small", small_config, random_model)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoint) -> Path:
    """The folder of a finished run of six steps, with checkpoints after 4 and 6."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    loop.run(runs.make_config(checkpoint), workdir)
    return workdir


def wait_for(workdir: Path, steps: int, process: subprocess.Popen) -> None:
    while len(read_metrics(workdir)) < steps:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def wrap_source(monkeypatch, change) -> None:
    """Replaces each loaded batch by `change(step, loaded)`."""

    class Changed:
        def __init__(self, source):
            self.source = source

        def __len__(self):
            return len(self.source)

        def __getitem__(self, step):
            return change(step, self.source[step])

    open_source = loop._open_source
    monkeypatch.setattr(loop, "_open_source", lambda *args: Changed(open_source(*args)))


def drop_rows(monkeypatch, *dropped: str) -> None:
    wrap_source(monkeypatch, lambda step, loaded: loaded._replace(dropped=dropped if step == 2 else ()))


def test_a_killed_and_resumed_run_has_the_same_losses(tmp_path, checkpoint):
    def start(workdir, *more, flags=()):
        more = (f"train.steps = {STEPS}", "train.checkpoint_every = 3", "train.log_every = 5", *more)
        return runs.start(workdir, checkpoint, *more, flags=flags, cache=tmp_path / "compiled")

    whole = start(tmp_path / "whole")
    output = whole.communicate()[0]
    assert whole.returncode == 0, output
    expected = runs.losses(tmp_path / "whole")
    assert [step for step, _ in expected] == list(range(1, STEPS + 1))
    assert len({loss for _, loss in expected}) > STEPS // 2

    workdir = tmp_path / "killed"
    recorded = []
    for workers, kill in [(1, True), (0, False)]:
        process = start(workdir, f"data.workers = {workers}", flags=["--resume"])
        if kill:
            wait_for(workdir, len(recorded) + 8, process)
            time.sleep(random.uniform(0, 0.2))
            process.kill()
        output = process.communicate()[0]
        assert process.returncode == (-signal.SIGKILL if kill else 0), output
        recorded = runs.losses(workdir)
        assert recorded == expected[: len(recorded)]
    assert recorded == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_run_after_a_checkpoint(tmp_path, finished, checkpoint, monkeypatch, number):
    def interrupt(step, loaded):
        if step == 2:
            os.kill(os.getpid(), number)
        return loaded

    before = signal.getsignal(number)
    wrap_source(monkeypatch, interrupt)
    config = runs.make_config(checkpoint, "train.checkpoint_every = 100")
    loop.run(config, tmp_path)
    assert signal.getsignal(number) is before
    assert runs.losses(tmp_path) == runs.losses(finished)[:3]
    assert run_checkpoint.find_checkpoint(tmp_path).name == "3"
    monkeypatch.undo()
    loop.run(config, tmp_path, resume=True)
    assert runs.losses(tmp_path) == runs.losses(finished)


def test_the_files_of_a_run(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"checkpoints", "config.gin", "loss.png", "metrics.jsonl", "tokenizer.json"} <= names
    assert "train.steps = 6" in (finished / "config.gin").read_text().splitlines()
    assert [folder.name for folder in run_checkpoint.list_checkpoints(finished)[0]] == ["4", "6"]
    saved = run_checkpoint.read_json(run_checkpoint.find_checkpoint(finished), "config")
    assert saved["gin"] == (finished / "config.gin").read_text()
    for row in read_metrics(finished):
        assert {"loss", "loss_silence", "grad_norm", "learning_rate", "tokens"} <= set(row)
        assert ("loss_text" in row) == (row["targets_text"] > 0)
    with Image.open(finished / "loss.png") as image:
        assert image.format == "PNG"
        assert image.width > 500


def test_tensorboard_files(finished):
    scalars = {}
    for file in finished.glob("events.*"):
        for event in events(file.read_bytes()):
            for value in event.summary.value:
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    assert set(scalars["train/loss"]) == {1, 2, 4, 6}
    rows = {row["step"]: row for row in read_metrics(finished)}
    assert scalars["train/loss"][1] == pytest.approx(rows[1]["loss"])
    total = sum(rows[step]["loss"] * rows[step]["targets"] for step in (3, 4))
    assert scalars["train/loss"][4] == pytest.approx(total / (rows[3]["targets"] + rows[4]["targets"]))
    assert scalars["speed/tokens_per_second"][4] > 0
    assert "config/text_summary" in scalars


def events(content: bytes) -> list[Event]:
    """Parses a TensorBoard file of records: 8 bytes of length, 4 of checksum, the event, 4 of checksum."""
    found = []
    while content:
        size = int.from_bytes(content[:8], "little")
        found.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    return found


def test_a_folder_with_checkpoints_is_refused_without_resume(finished, checkpoint):
    before = sorted(path.name for path in finished.rglob("*"))
    with pytest.raises(ConfigError, match=r"has checkpoints of an earlier run; resume it with --resume"):
        loop.run(runs.make_config(checkpoint), finished)
    assert sorted(path.name for path in finished.rglob("*")) == before


def test_changed_settings_are_warned_of(tmp_path, finished, checkpoint, caplog):
    shutil.copytree(finished, tmp_path / "copy")
    config = runs.make_config(checkpoint, "train.steps = 5", "train.seed = 3")
    # The newest checkpoint is after step 6, so nothing is trained.
    loop.run(config, tmp_path / "copy", resume=True)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    changes = {"-train.steps = 6", "+train.steps = 5", "-train.seed = 0", "+train.seed = 3"}
    assert {line.strip() for line in warning.splitlines()[1:]} == changes


def test_other_trained_parts_are_refused(finished, checkpoint):
    config = runs.make_config(checkpoint, "train.trainable = ('projector',)")
    with pytest.raises(CheckpointError, match="other parts were trained"):
        loop.run(config, finished, resume=True)


def test_dropped_rows_are_counted_by_reason(tmp_path, checkpoint, monkeypatch, caplog, capsys):
    drop_rows(monkeypatch, "a.mp4 is torn", "a.mp4 is torn")
    caplog.set_level("INFO", "moss_jax")
    loop.run(runs.make_config(checkpoint, "data.max_dropped_share = 0.5"), tmp_path)
    assert "2 of 12 rows could not be loaded:\n  2 x a.mp4 is torn" in caplog.messages
    assert "2 rows dropped" in capsys.readouterr().out
    position = run_checkpoint.read_json(run_checkpoint.find_checkpoint(tmp_path), "position")
    assert position == {"batch": 6, "drops": {"rows": 12, "dropped": 2, "reasons": {"a.mp4 is torn": 2}}}


def test_too_many_dropped_rows_abort_the_run(tmp_path, checkpoint, monkeypatch):
    drop_rows(monkeypatch, "a.mp4 is torn", "b.mp4 is torn")
    monkeypatch.setattr(loop, "MIN_ROWS", 8)
    with pytest.raises(
        loop.DataError,
        match=r"2 of 8 rows could not be loaded.*\n.*\n.*\nMore than 10% of the rows are unusable",
    ):
        loop.run(runs.make_config(checkpoint), tmp_path)
    # What was saved before stays.
    assert run_checkpoint.find_checkpoint(tmp_path).name == "2"


def test_many_reasons_are_summarised():
    drops = loop.DropCounts()
    drops.count(100, tuple(f"{i}.mp4 is torn" for i in range(loop.MAX_REASONS + 7)))
    assert str(drops).endswith("  and 7 more")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["tabletop.image_size = 64"], "tabletop.image_size 64 must be the model's image_size 56"),
        (["mesh.data = 3", "mesh.fsdp = 1"], "needs 3 devices, not 1; the product of mesh.data"),
        (
            ["model.checkpoint = None", "model.preset = 'moss_video_11b'", "tabletop.image_size = 560"],
            "predicts 128256 tokens, but its tokenizer has 1024; set model.checkpoint",
        ),
    ],
)
def test_settings_that_do_not_fit_together(tmp_path, checkpoint, more, message):
    with pytest.raises(ConfigError, match=message):
        loop.run(runs.make_config(checkpoint, *more), tmp_path)


def test_a_compressor_that_the_checkpoint_lacks_is_initialised(tmp_path, checkpoint):
    config = runs.make_config(
        checkpoint, "model.pool = 'channelFusion'", "train.trainable = ('compressor',)", "train.steps = 1"
    )
    loop.run(config, tmp_path / "run")
    run_checkpoint.export(tmp_path / "run", tmp_path / "out", dtype="float32")
    model, start = moss_jax.load(tmp_path / "out"), moss_jax.load(checkpoint)
    assert model.config.compressor.mode == "channelFusion"
    assert (model.projector.kernel[...] == start.projector.kernel[...]).all()


def test_a_mesh_axis_of_0_takes_the_remaining_devices(monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda *sizes: sizes)
    monkeypatch.setattr(loop.jax, "device_count", lambda: 8)
    assert loop._make_mesh(MeshConfig(tensor=2)) == (1, 4, 2)
    assert loop._make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)) == (2, 2, 2)
