"""Checkpoints: restored bit for bit; damaged, incomplete and foreign ones are detected."""

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moss_jax.convert import CheckpointError, run_checkpoint
from moss_jax.train.checkpoints import Checkpoints, RunError
from moss_jax.train.step import TrainState

CONFIG = {"gin": "train.steps = 3", "model": {}}
STEP = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)


def make_state(step: int, *, width: int = 5) -> TrainState:
    rng = np.random.default_rng(step)
    trained = {"projector/kernel": jnp.asarray(rng.standard_normal((3, width)), jnp.float32)}
    frozen = {"decoder/layers/0/norm/weight": jnp.asarray(rng.standard_normal(4), jnp.bfloat16)}
    return TrainState(jnp.int32(step), trained, frozen, optax.adamw(1e-3).init(trained))


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save(workdir, *steps: int, keep: int = 10, width: int = 5) -> None:
    with Checkpoints(workdir, keep=keep) as checkpoints:
        for step in steps:
            state = make_state(step, width=width)
            checkpoints.save(step, state, position={"batch": step}, config=CONFIG)


def restore(workdir):
    with Checkpoints(workdir, keep=10) as checkpoints:
        return checkpoints.restore(abstract(make_state(0)))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_restored_bit_for_bit(tmp_path):
    save(tmp_path, 1, 2)
    restored = restore(tmp_path)
    assert_same(restored.state, make_state(2))
    assert restored.position == {"batch": 2}
    assert restored.config == CONFIG


def test_restore_without_checkpoints(tmp_path):
    assert restore(tmp_path) is None


def test_the_state_may_be_donated_during_the_write(tmp_path):
    state = make_state(1, width=100_000)
    expected = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, position={"batch": 1}, config=CONFIG)
        for _ in range(20):
            state = STEP(state)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert_same(checkpoints.restore(abstract(state)).state, expected)


def test_recent_checkpoints_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=2)
    whole, broken = run_checkpoint.list_checkpoints(tmp_path)
    assert [int(folder.name) for folder in whole] == [3, 4]
    assert not broken


def cut_metadata(folder):
    (folder / "_CHECKPOINT_METADATA").unlink()


def uncommit(folder):
    file = folder / "_CHECKPOINT_METADATA"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"commit_timestamp_nsecs": None}))


def drop_item(folder):
    shutil.rmtree(folder / "optimizer")


def cut_text(folder):
    (folder / "position" / "metadata").write_text('{"bat')


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def cut_arrays(folder):
    for file in (folder / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])


# tensorstore goes on reading the damaged file in the background, where its error is unraisable.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("harm", [cut_metadata, uncommit, drop_item, cut_text, empty, cut_arrays])
def test_a_damaged_checkpoint_is_skipped_and_renamed(tmp_path, harm):
    save(tmp_path, 1, 2, 3)
    harm(tmp_path / run_checkpoint.CHECKPOINTS / "3")
    assert_same(restore(tmp_path).state, make_state(2))
    names = {folder.name for folder in (tmp_path / run_checkpoint.CHECKPOINTS).iterdir()}
    assert names == {"1", "2", "3.damaged"}
    # A new one can be saved for the same step.
    save(tmp_path, 3)
    assert_same(restore(tmp_path).state, make_state(3))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_readable_checkpoint_is_an_error(tmp_path):
    save(tmp_path, 1)
    cut_arrays(tmp_path / run_checkpoint.CHECKPOINTS / "1")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read"):
        restore(tmp_path)


SAVE_SLOWLY = """
import sys
sys.path.insert(0, sys.argv[1])
from test_checkpoints import CONFIG, Checkpoints, make_state
with Checkpoints(sys.argv[2], keep=10) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, make_state(step, width=5_000_000), position={"batch": step}, config=CONFIG)
"""


def test_a_killed_save_leaves_the_previous_checkpoint(tmp_path):
    folder = tmp_path / run_checkpoint.CHECKPOINTS
    here = str(__file__).rsplit("/", 1)[0]
    process = subprocess.Popen([sys.executable, "-c", SAVE_SLOWLY, here, str(tmp_path)])
    while not list(folder.glob("2.orbax-checkpoint-tmp*/*/*")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(folder.glob("2.orbax-checkpoint-tmp*")), "it was killed too late"
    assert [path.name for path in run_checkpoint.list_checkpoints(tmp_path)[0]] == ["1"]
    with Checkpoints(tmp_path, keep=10) as checkpoints:
        restored = checkpoints.restore(abstract(make_state(1, width=5_000_000)))
    assert_same(restored.state, make_state(1, width=5_000_000))
    assert [path.name for path in folder.iterdir()] == ["1"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save(tmp_path, 1)
    state = make_state(1)
    others = {
        "wider": make_state(1, width=6),
        "all trained": TrainState(state.step, state.trained | state.frozen, {}, state.optimizer),
    }
    with Checkpoints(tmp_path, keep=10) as checkpoints:
        for other in others.values():
            with pytest.raises(CheckpointError, match=r"another model, or other parts .* export it"):
                checkpoints.restore(abstract(other))
    assert_same(restore(tmp_path).state, state)


@pytest.mark.parametrize("part", ["trained", "frozen", "moments"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path, part, value):
    save(tmp_path, 1)
    state = make_state(2)
    if part == "moments":
        bad = jax.tree.map(lambda x: jnp.full_like(x, value) if x.ndim else x, state.optimizer)
        state = dataclasses.replace(state, optimizer=bad)
    else:
        params = getattr(state, part)
        bad = {name: x.at[(0,) * x.ndim].set(value) for name, x in params.items()}
        state = dataclasses.replace(state, **{part: bad})
    with Checkpoints(tmp_path, keep=10) as checkpoints:
        checkpoints.save(2, state, position={"batch": 2}, config=CONFIG)
    where = {"trained": "projector", "frozen": "decoder", "moments": "optimizer"}[part]
    with pytest.raises(
        CheckpointError, match=f"/2 has numbers that are not finite, in {where}: .* remove it"
    ):
        restore(tmp_path)
    # It is not taken for a damaged one, and the one before is as it was.
    assert [path.name for path in run_checkpoint.list_checkpoints(tmp_path)[0]] == ["1", "2"]
    shutil.rmtree(tmp_path / run_checkpoint.CHECKPOINTS / "2")
    assert_same(restore(tmp_path).state, make_state(1))


def test_a_disk_without_room_for_another_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoints" / "1").rglob("*") if file.is_file())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))
    save(tmp_path, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size // 2))
    message = (
        r"step 3 could not be written: it takes .* the disk has .* left; make room and resume from .*/2 with"
    )
    with pytest.raises(RunError, match=message):
        save(tmp_path, 3)
    assert_same(restore(tmp_path).state, make_state(2))


# tensorstore reports each array to an event loop that is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("more", [(), (3,)])
def test_a_write_that_fails_in_the_background(tmp_path, more):
    """It is raised by the next save, or at the end."""
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    message = (
        r"^the checkpoint of step 2 could not be written: File too large; make room and resume from .*/1 with"
    )
    try:
        with pytest.raises(RunError, match=message):
            save(tmp_path, 2, *more, width=10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_same(restore(tmp_path).state, make_state(1))


def test_the_error_that_ends_a_run_is_raised_though_a_write_failed(tmp_path, monkeypatch):
    def close():
        raise OSError("the disk is gone")

    checkpoints = Checkpoints(tmp_path, keep=1)
    monkeypatch.setattr(checkpoints._manager, "close", close)
    with pytest.raises(RunError, match="diverged"), checkpoints:
        raise RunError("diverged")
    with pytest.raises(RunError, match="could not be written: the disk is gone"), checkpoints:
        pass
