"""Prefetching: the same batches with any number of workers, errors, signals and the end of workers."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import jax
import numpy as np
import pytest

from moss_jax.data.batch import Batch
from moss_jax.data.pipeline import BatchError, LoadedBatch, iterate

HERE = Path(__file__).parent


class Unpicklable(Exception):
    def __init__(self, part: str, number: int):
        super().__init__(f"{part} number {number} is broken")


class Source:
    """Twelve batches whose contents depend on their step."""

    def __init__(self, *, broken: int | None = None):
        self.broken = broken

    def __len__(self) -> int:
        return 12

    def __getitem__(self, step: int) -> LoadedBatch:
        if step == self.broken:
            raise Unpicklable("step", step)
        rng = np.random.default_rng(step)
        tokens = rng.integers(0, 99, (2, 5), np.int32)
        frames = rng.integers(0, 256, (2, step % 3, 4, 4, 3), np.uint8)
        positions = rng.integers(0, 5, (2, step % 3), np.int32)
        return LoadedBatch(Batch(tokens, -tokens, frames, positions), (f"of step {step}",) * (step % 2))


class Inside:
    """Batches that report the process they were made in."""

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> LoadedBatch:
        nothing = np.zeros((1, 1), np.int32)
        batch = Batch(nothing, nothing, np.zeros((1, 1, 1, 1, 3), np.uint8), nothing)
        return LoadedBatch(batch, (str(os.getpid()), str(jax.config.jax_platforms)))


@pytest.mark.parametrize(("workers", "start"), [(0, 0), (0, 5), (1, 0), (2, 5)])
def test_batches_are_the_same_with_any_number_of_workers(workers, start):
    source = Source()
    loaded = list(iterate(source, start=start, workers=workers, read_ahead=2))
    assert len(loaded) == 12 - start
    for step, (batch, dropped) in enumerate(loaded, start=start):
        expected = source[step]
        assert dropped == expected.dropped
        for given, right in zip(jax.tree.leaves(batch), jax.tree.leaves(expected.batch), strict=True):
            assert type(given) is np.ndarray
            assert given.dtype == right.dtype
            np.testing.assert_array_equal(given, right)
    assert not multiprocessing.active_children()


class Rows(Source):
    """Batches of four rows, of which each part reports the process that made it."""

    def __init__(self, rows=range(4), *, broken: int | None = None):
        super().__init__(broken=broken)
        self.rows = rows

    def split(self, most: int) -> list["Rows"]:
        count = max(count for count in range(1, most + 1) if len(self.rows) % count == 0)
        size = len(self.rows) // count
        return [Rows(self.rows[i * size : (i + 1) * size], broken=self.broken) for i in range(count)]

    def __getitem__(self, step: int) -> LoadedBatch:
        super().__getitem__(step)
        tokens = np.array([[100 * step + row] for row in self.rows], np.int32)
        return LoadedBatch(
            Batch(tokens, tokens, np.zeros((len(tokens), 0, 1, 1, 3), np.uint8), tokens[:, :0]),
            (str(os.getpid()),),
        )


@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (3, 2)])
def test_each_worker_makes_some_rows_of_every_batch(workers, processes):
    loaded = list(iterate(Rows(), start=4, workers=workers, read_ahead=2))
    for step, (batch, _) in enumerate(loaded, start=4):
        assert batch.tokens.tolist() == [[100 * step + row] for row in range(4)]
    assert {len(set(dropped)) for _, dropped in loaded} == {processes}
    assert len({dropped for _, dropped in loaded}) == 1
    batches = iterate(Rows(broken=3), start=2, workers=workers, read_ahead=2)
    assert next(batches).batch.tokens[0, 0] == 200
    with pytest.raises(BatchError, match=r"step 3 .* Unpicklable: step number 3 is broken"):
        next(batches)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_at_its_step(workers):
    batches = iterate(Source(broken=3), start=1, workers=workers, read_ahead=2)
    assert [next(batches).batch.tokens[0, 0] for _ in range(2)] == [
        Source()[step].batch.tokens[0, 0] for step in (1, 2)
    ]
    with pytest.raises(BatchError, match=r"step 3 .* Unpicklable: step number 3 is broken") as caught:
        next(batches)
    assert "raise Unpicklable" in caught.value.__notes__[0]
    assert not multiprocessing.active_children()


def test_workers_run_on_cpu_and_ignore_signals():
    batches = iterate(Inside(), start=0, workers=2, read_ahead=1)
    inside = [next(batches).dropped for _ in range(8)]
    pids = {int(pid) for pid, _ in inside}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert {platforms for _, platforms in inside} == {"cpu"}
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert {int(next(batches).dropped[0]) for _ in range(30)} == pids
    batches.close()
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_an_error():
    batches = iterate(Inside(), start=0, workers=1, read_ahead=1)
    os.kill(int(next(batches).dropped[0]), signal.SIGKILL)
    with pytest.raises(BatchError, match="exit code -9"):
        deque(batches)


SCRIPT = """
import sys, time
sys.path[:0] = {paths!r}
from test_pipeline import Inside
from moss_jax.data.pipeline import iterate

if __name__ == "__main__":
    batches = iterate(Inside(), start=0, workers=2, read_ahead=1)
    print(next(batches).dropped[0], next(batches).dropped[0], flush=True)
    {then}
"""


@pytest.fixture
def script(tmp_path):
    """Starts a program that takes a batch from each of two workers, then runs a statement."""

    def run(then: str) -> subprocess.Popen:
        file = tmp_path / "script.py"
        file.write_text(SCRIPT.format(paths=[str(HERE), str(HERE.parents[1])], then=then))
        return subprocess.Popen(
            [sys.executable, file], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return run


def test_no_worker_outlives_a_killed_program(script):
    program = script("time.sleep(600)")
    pids = [int(pid) for pid in program.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(_is_alive, pids))
    program.kill()
    deadline = time.monotonic() + 20
    while any(map(_is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    program.communicate()


def test_a_failing_program_prints_only_its_own_error(script):
    program = script("raise SystemError('the end')")
    _, errors = program.communicate(timeout=120)
    assert errors.endswith("SystemError: the end\n")
    assert errors.count("Traceback") == 1


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    # A zombie is dead, but not reaped yet.
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
