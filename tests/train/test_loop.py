"""Training runs: resuming, stopping, the files they write, dropped rows, and settings that are refused."""

import errno
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
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
from moss_jax.train.checkpoints import RunError
from moss_jax.train.log import read_metrics
from moss_jax.train.step import Trainer

STEPS = 30
# More than the tokenizer and compiled programs take, less than a checkpoint does.
MAX_FILE = 150_000


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory) -> Iterator[Path]:
    """The folder of compiled programs, which runs with the same settings share."""
    folder = tmp_path_factory.mktemp("compiled")
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield folder
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


@pytest.mark.slow
def test_a_killed_and_resumed_run_has_the_same_losses(tmp_path, checkpoint, compiled_programs):
    settings = (f"train.steps = {STEPS}", "train.checkpoint_every = 3", "train.log_every = 5")

    def start(workdir, *more, flags=()):
        return runs.start(workdir, checkpoint, *settings, *more, flags=flags, cache=compiled_programs)

    loop.run(runs.make_config(checkpoint, *settings), tmp_path / "whole")
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
    step_class = loop.DispatchedStep

    def dispatch(step, *args, **options):
        if step == 3:
            os.kill(os.getpid(), number)
        return step_class(step, *args, **options)

    before = signal.getsignal(number)
    monkeypatch.setattr(loop, "DispatchedStep", dispatch)
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


@pytest.mark.slow
def test_two_processes_train_together(tmp_path, checkpoint, compiled_programs):
    """In one folder, which only process 0 locks."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    workdir, cluster = tmp_path / "run", ["--coordinator", f"localhost:{port}", "--processes", "2"]
    more = ("train.steps = 2", "data.workers = 0")
    processes = [
        runs.start(workdir, checkpoint, *more, flags=[*cluster, "--process-id", i], cache=compiled_programs)
        for i in ("0", "1")
    ]
    try:
        outputs = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [step for step, _ in runs.losses(workdir)] == [1, 2]
    assert run_checkpoint.find_checkpoint(workdir).name == "2"


def test_a_second_run_in_a_folder_is_refused(tmp_path, finished, checkpoint, monkeypatch):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    config = runs.make_config(checkpoint)
    with loop._locked(workdir):
        before = sorted(path.name for path in workdir.rglob("*"))
        with pytest.raises(ConfigError, match=r"another run is training in .*/copy; choose another folder"):
            loop.run(config, workdir, resume=True)
        assert sorted(path.name for path in workdir.rglob("*")) == before
        # Of the processes of one run, only process 0 locks.
        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_index", lambda: 1)
            patch.setattr(loop, "_run", lambda *_, **__: None)
            loop.run(config, workdir, resume=True)
    loop.run(config, workdir, resume=True)


def test_a_folder_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(loop.fcntl, "flock", flock)
    with loop._locked(tmp_path):
        assert "cannot be locked (No locks available): start no other run there" in caplog.text


def test_a_folder_that_cannot_be_written_is_told_before_data_is_read(unprivileged, checkpoint, monkeypatch):
    def open_source(*_):
        raise AssertionError("data was read")

    monkeypatch.setattr(loop, "_open_source", open_source)
    config = runs.make_config(checkpoint)
    folder = unprivileged / "run"
    folder.mkdir(mode=0o555)
    for workdir in (folder, folder / "deeper"):
        with pytest.raises(ConfigError, match=f"nothing can be written to {workdir}: Permission denied"):
            loop.run(config, workdir)
    (unprivileged / "file").touch()
    with pytest.raises(ConfigError, match=r"nothing can be written to .*/file: File exists"):
        loop.run(config, unprivileged / "file")


def test_a_folder_that_was_there_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    for workdir in (tmp_path / "mine", tmp_path / "a" / "b"):
        with pytest.raises(ConfigError), loop._locked(workdir):
            raise ConfigError
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with loop._locked(tmp_path / "c"):
        (tmp_path / "c" / "metrics.jsonl").touch()
    assert (tmp_path / "c" / "metrics.jsonl").exists()


def test_resuming_without_a_checkpoint_says_that_it_starts_anew(tmp_path, finished, checkpoint, caplog):
    loop.run(runs.make_config(checkpoint), tmp_path / "new", resume=True)
    assert f"{tmp_path / 'new'} has no checkpoint to resume from: the run starts at step 1" in caplog.text
    assert runs.losses(tmp_path / "new") == runs.losses(finished)


@pytest.mark.slow
def test_a_run_that_diverges_stops_at_the_first_bad_step(tmp_path, finished, checkpoint):
    """With the checkpoint before it as it was."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    # The first bad step is the one to be saved next.
    more = ("train.steps = 12", "train.checkpoint_every = 7", "optimizer.learning_rate = 1e25")
    config = runs.make_config(checkpoint, *more)
    message = (
        r"^training diverged at step 7: .*the norm of the parameters of \w+(, \w+)* is (inf|nan)\. Nothing "
        r"of this step was saved; --resume continues from the checkpoint of step 6\."
    )
    with pytest.raises(RunError, match=message) as raised:
        loop.run(config, workdir, resume=True)
    assert "decoder" in str(raised.value)
    assert [folder.name for folder in run_checkpoint.list_checkpoints(workdir)[0]] == ["4", "6"]
    # Steps that were in flight are not recorded.
    assert read_metrics(workdir)[-1]["step"] == 7
    loop.run(runs.make_config(checkpoint, "train.steps = 8"), workdir, resume=True)
    assert run_checkpoint.find_checkpoint(workdir).name == "8"


@pytest.mark.parametrize(
    ("bad", "last", "message"),
    [
        ({"loss": math.nan, "grad_norm": math.nan}, 4, "step 5: the loss is nan. .* of step 4"),
        (
            {"grad_norm/vision": math.inf},
            0,
            "the gradient of vision is inf. .* there is no checkpoint before it",
        ),
        (
            {"param_norm/vision": math.nan, "param_norm/decoder": math.nan},
            4,
            "the parameters of vision, decoder is nan",
        ),
        ({"z_loss": math.inf}, 4, "step 5: z_loss"),
    ],
)
def test_numbers_that_are_not_finite(bad, last, message):
    good = {"loss": 1.0, "grad_norm": 1.0, "grad_norm/vision": 1.0, "param_norm/vision": 2.0}
    loop._check_finite(5, good, last)
    with pytest.raises(RunError, match=message):
        loop._check_finite(5, good | bad, last)


def test_metrics_are_read_two_steps_later(tmp_path, checkpoint, monkeypatch):
    """So that the device never waits for the host, except before a checkpoint."""
    placed, dispatched, read, compiled = [], [], [], []
    put, device_get, step_class = Trainer.put, jax.device_get, loop.DispatchedStep

    def note(self, batch):
        placed.append(batch)
        return put(self, batch)

    def dispatch(number, *args, **options):
        dispatched.append(number)
        return step_class(number, *args, **options)

    def get(x):
        read.append(len(dispatched))
        return device_get(x)

    class Recorded(loop.Log):
        def record(self, *args, **options):
            compiled.append(options["compiled"])
            super().record(*args, **options)

    monkeypatch.setattr(loop, "Log", Recorded)
    monkeypatch.setattr(loop, "DispatchedStep", dispatch)
    monkeypatch.setattr(Trainer, "put", note)
    monkeypatch.setattr(loop.jax, "device_get", get)
    loop.run(runs.make_config(checkpoint, "train.checkpoint_every = 100"), tmp_path)
    assert read == [3, 4, 5, 6, 6, 6]
    # The last step is saved though no checkpoint is due.
    assert run_checkpoint.find_checkpoint(tmp_path).name == "6"
    # The first step of each shape is known to be compiled.
    shapes = [(batch.frames.shape, batch.tokens.shape) for batch in placed]
    assert len(placed) == len(dispatched) == 6
    assert compiled == [shape not in shapes[:i] for i, shape in enumerate(shapes)]
    assert 0 < sum(compiled) < 6


def test_a_full_disk_ends_a_run_with_one_sentence(tmp_path, finished, checkpoint, compiled_programs):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    more = ("train.steps = 8", "data.workers = 0")
    process = runs.start(workdir, checkpoint, *more, flags=["--resume"], cache=compiled_programs)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (MAX_FILE, MAX_FILE))
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1, output
    assert "Traceback" not in output, output
    last = output.splitlines()[-1]
    assert last.startswith(
        "train.py: the checkpoint of step 8 could not be written: File too large; make room"
    )
    assert f"resume from {workdir / 'checkpoints' / '6'} with --resume" in last
    # The log of a run is the command's, in its own format, and no file is written in the locale's encoding.
    assert "moss_jax.train.loop: resuming after step 6 of 8" in output.splitlines()
    assert not [
        line for line in output.splitlines() if "EncodingWarning" in line and "moss_jax/train" in line
    ]
    assert run_checkpoint.find_checkpoint(workdir).name == "6"


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
    caplog.clear()
    loop.run(runs.make_config(checkpoint, "data.max_dropped_share = 0.5"), tmp_path, resume=True)
    assert "2 of 12 rows could not be loaded:\n  2 x a.mp4 is torn" in caplog.messages


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
        (["mesh.tensor = 2"], "^mesh.tensor = 2 needs a multiple of 2 devices, but there is 1$"),
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
    with pytest.raises(ConfigError, match=r"data = 3, mesh.tensor = 2 needs a multiple of 6 .* there are 8$"):
        loop._make_mesh(MeshConfig(data=3, tensor=2))
