"""Several processes train together as one does, and resume its checkpoints, as it does theirs."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import runs

from moss_jax.train.__main__ import main

# Of losses, which are sums over at most 2 rows x 128 tokens, none negative. In another order, a float32 sum
# of n such terms differs by at most n * 2^-23 of itself.
RTOL = 2 * 128 * 2**-23


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, small_config, random_model) -> Path:
    return runs.make_checkpoint(tmp_path_factory.mktemp("start") / "small", small_config, random_model)


@pytest.fixture(scope="module")
def train(tmp_path_factory, checkpoint):
    """`train(workdir, processes)` trains, or resumes a run, and returns its losses."""
    cache = tmp_path_factory.mktemp("compiled")

    def train(workdir: Path, processes: int, *more: str, flags: Sequence[str] = ()) -> list[float]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            cluster = ["--coordinator", f"127.0.0.1:{server.getsockname()[1]}", "--processes", str(processes)]
        started = [
            runs.start(
                workdir, checkpoint, *more, flags=[*cluster, "--process-id", str(i), *flags], cache=cache
            )
            for i in range(processes)
        ]
        try:
            for process in started:
                output = process.communicate(timeout=300)[0]
                assert process.returncode == 0, output
        finally:
            for process in started:
                process.kill()
        return [loss for _, loss in runs.losses(workdir)]

    return train


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory, train) -> dict[int, tuple[Path, list[float]]]:
    """Folder and losses of a run of six steps, by the number of its processes."""
    folder = tmp_path_factory.mktemp("runs")
    return {n: (folder / str(n), train(folder / str(n), n)) for n in (1, 2)}


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(runs_of):
    (_, one), (_, two) = runs_of[1], runs_of[2]
    assert len(set(one)) == 6
    np.testing.assert_allclose(two, one, rtol=RTOL)


@pytest.mark.slow
def test_two_processes_that_share_every_row_have_the_losses_of_one(tmp_path, runs_of, train):
    losses = train(tmp_path / "run", 2, "mesh.fsdp = 1", "mesh.tensor = 2")
    # Sums inside a layer have another order, too.
    np.testing.assert_allclose(losses, runs_of[1][1], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("saved_by", "resumed_by"), [(2, 1), (1, 2)])
def test_a_run_resumes_with_another_number_of_processes(tmp_path, runs_of, train, saved_by, resumed_by):
    workdir, losses = runs_of[saved_by]
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    (tmp_path / "run" / "loss.png").unlink()
    resumed = train(tmp_path / "run", resumed_by, flags=["--resume"])
    assert (tmp_path / "run" / "checkpoints" / "6").is_dir()
    np.testing.assert_allclose(resumed, losses, rtol=RTOL)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--coordinator h:1 --processes 2", "--process-id belong together: give all three"),
        ("--processes 2 --process-id 0", "--process-id belong together: give all three"),
        ("--coordinator h:1 --process-id 0", "--process-id belong together: give all three"),
        ("--coordinator h:1 --processes 2 --process-id 2", "--process-id must be in [0, 2)"),
        ("--coordinator h:1 --processes 2 --process-id -1", "--process-id must be in [0, 2)"),
        ("--coordinator h --processes 2 --process-id 0", "must be HOST:PORT, such as 10.0.0.1:1234; got h"),
        ("--coordinator h: --processes 2 --process-id 0", "must be HOST:PORT"),
        ("--coordinator :1 --processes 2 --process-id 0", "must be HOST:PORT"),
        ("--coordinator h:0 --processes 2 --process-id 0", "must be HOST:PORT"),
        ("--coordinator h:65536 --processes 2 --process-id 0", "must be HOST:PORT"),
    ],
)
def test_wrong_flags_are_one_sentence(tmp_path, capsys, flags, message):
    assert main(["--workdir", str(tmp_path / "run"), *flags.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_no_processes(capsys):
    with pytest.raises(SystemExit):
        main(["--workdir", "run", "--coordinator", "h:1", "--processes", "0", "--process-id", "0"])
    assert capsys.readouterr().err.endswith("argument --processes: must be at least 1, not 0\n")


@pytest.mark.slow
def test_two_workers_of_ray_have_the_losses_of_one_process(tmp_path, checkpoint, runs_of):
    pytest.importorskip("ray")
    words = [word for binding in runs.bindings(checkpoint) for word in ("--gin_param", binding)]
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(runs.ROOT)}
    # Ray writes to the home folder, and reports to its makers.
    environment |= {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [
            sys.executable,
            runs.ROOT / "deploy" / "ray_train.py",
            *("--hosts", "2"),
            *("--workdir", tmp_path / "run"),
            *words,
        ],
        env=os.environ | runs.FAST_COMPILING | environment,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    np.testing.assert_allclose([loss for _, loss in runs.losses(tmp_path / "run")], runs_of[1][1], rtol=RTOL)
