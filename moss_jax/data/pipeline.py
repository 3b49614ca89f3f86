"""Prefetches batches, optionally in worker processes.

A batch source has random access by step, so the position in the data is the step number: a run that resumes
at a step, with any number of workers, sees the same batches as an uninterrupted one.
"""

import atexit
import itertools
import os
import signal
import threading
import traceback
import weakref
from collections.abc import Generator, Sequence
from concurrent import futures
from multiprocessing import parent_process
from typing import NamedTuple, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray

from moss_jax.data.batch import Batch

_HINT = (
    "Exit code -9 may mean that memory has run out, and -7 that /dev/shm is full: fewer workers or a smaller "
    "read_ahead need less of both."
)


class LoadedBatch(NamedTuple):
    """A batch in host memory, and the rows that could not be loaded.

    Attributes:
      batch: dropped rows are replaced by padding.
      dropped: one sentence for each dropped row.
    """

    batch: Batch
    dropped: tuple[str, ...] = ()


class BatchSource(Protocol):
    """Deterministic random access to batches by step; picklable, and small when pickled."""

    def __len__(self) -> int:
        """Number of batches."""
        ...

    def __getitem__(self, step: int, /) -> LoadedBatch:
        """This process's rows of the batch of `step`."""
        ...


@runtime_checkable
class RowSource(BatchSource, Protocol):
    """A batch source whose rows continue from batch to batch: a worker builds some rows of every batch."""

    def split(self, most: int) -> Sequence[BatchSource]:
        """Splits the rows evenly, in order, among as many sources as possible, at most `most`."""
        ...


class BatchError(RuntimeError):
    """A batch source failed, here or in a worker; the message names the step and the error."""


def iterate(source: BatchSource, *, start: int, workers: int, read_ahead: int) -> Generator[LoadedBatch]:
    """Yields the batches of a source in order of their steps, from `start` on.

    The workers start with the first batch and end when the iterator is closed, or with this process, however
    it ends. A script that uses them needs the usual `if __name__ == "__main__":`.

    Args:
      source: the source of the batches.
      start: first step.
      workers: worker processes, of which a `RowSource` may use fewer; 0 builds each batch on demand in the
        calling thread. The batches are the same.
      read_ahead: batches that each worker prefetches, rounded down to an even number and at least 4.

    Raises:
      BatchError: the source raised, or a worker was killed.
    """
    steps = range(start, len(source))
    batches = _make_in_workers(source, steps, workers, read_ahead) if workers else _make_here(source, steps)
    # A program that ends with an exception still holds the iterator while the interpreter tears grain down.
    atexit.register(_close, weakref.ref(batches))
    return batches


def _close(alive: weakref.ref) -> None:
    if batches := alive():
        batches.close()


def _make_here(source: BatchSource, steps: range) -> Generator[LoadedBatch]:
    guarded = _Guarded(source, steps)
    for index in range(len(guarded)):
        yield _checked(guarded[index])


def _make_in_workers(
    source: BatchSource, steps: range, workers: int, read_ahead: int
) -> Generator[LoadedBatch]:
    # grain reads absl flags, which raise in a program that doesn't parse them.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    # For the workers, which share the cores already; numpy in this process has read the variable long ago.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # The buffer size counts twice, for the worker's queue and for a buffer here; one more batch is in transit
    # between them, and one is being copied.
    buffered = max(1, read_ahead // 2 - 1)
    options = grain.MultiprocessingOptions(1, per_worker_buffer_size=buffered)
    if by_rows := isinstance(source, RowSource):
        parts = [_Guarded(part, steps) for part in source.split(workers)]
    else:
        parts = [_Guarded(source, steps[worker::workers]) for worker in range(workers)]
    # One dataset per worker, because grain shuts the workers of one dataset down one after the other.
    shards = [
        # By default, grain would prefetch 500 batches in 16 threads of each worker.
        iter(
            grain.MapDataset.source(part)
            .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            .mp_prefetch(options, worker_init_fn=_start_worker)
        )
        for part in parts
    ]
    with futures.ThreadPoolExecutor(len(shards)) as threads:
        pending = [threads.submit(_take, shard) for shard in shards]
        try:
            for index in range(len(steps)):
                makers = range(len(shards)) if by_rows else [index % len(shards)]
                try:
                    loaded = [pending[maker].result() for maker in makers]
                except RuntimeError as error:
                    raise BatchError(f"{error} {_HINT}") from error
                for maker in makers:
                    pending[maker] = threads.submit(_take, shards[maker])
                yield _joined([_checked(part) for part in loaded])
        finally:
            futures.wait(pending)
            try:
                list(threads.map(lambda shard: shard.close(), shards))
            except RuntimeError:  # at interpreter shutdown, when executors accept no more work
                for shard in shards:
                    shard.close()
            _await_release()


def _take(shard: grain.DatasetIterator) -> "LoadedBatch | BatchError | None":
    """Copies the next batch out of shared memory, which stays allocated as long as grain's arrays live."""
    loaded = next(shard, None)
    return jax.tree.map(lambda x: np.array(x) if isinstance(x, np.ndarray) else x, loaded)


def _await_release() -> None:
    # grain frees shared memory in a thread; what is left at exit would be reported as leaked.
    if thread := getattr(SharedMemoryArray, "_del_thread_pool", None):
        thread.apply(int)


def _checked(loaded: "LoadedBatch | BatchError | None") -> LoadedBatch:
    if isinstance(loaded, BatchError):
        raise loaded
    assert loaded is not None  # only filtered datasets of grain have gaps
    return loaded


def _joined(parts: list[LoadedBatch]) -> LoadedBatch:
    """Concatenates the rows of partial batches."""
    if len(parts) == 1:
        return parts[0]
    batch = jax.tree.map(lambda *rows: np.concatenate(rows), *(part.batch for part in parts))
    return LoadedBatch(batch, tuple(itertools.chain.from_iterable(part.dropped for part in parts)))


class _Guarded:
    """The batches of one worker; errors are returned, because not every exception can be pickled."""

    def __init__(self, source: BatchSource, steps: range):
        self._source, self._steps = source, steps

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> "LoadedBatch | BatchError":
        step = self._steps[index]
        try:
            return self._source[step]
        except Exception as error:
            failed = BatchError(f"the batch of step {step} cannot be made: {type(error).__name__}: {error}")
            failed.add_note(traceback.format_exc())
            return failed


def _start_worker(index: int, count: int) -> None:
    # Batches are numpy arrays. If anything uses JAX nevertheless, it must not take the parent's accelerator.
    jax.config.update("jax_platforms", "cpu")
    # Ctrl-C and a job's SIGTERM reach the whole process group; the parent handles them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
