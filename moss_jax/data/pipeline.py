"""Runs a batch source ahead of the training loop, in worker processes if asked to.

A batch source makes the batch of any step on its own, so the position in the data is the step number: a run
that resumes at a step, with any number of workers, goes on with the batches that it would have had.
"""

import atexit
import os
import signal
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent import futures
from multiprocessing import parent_process
from typing import NamedTuple, Protocol

import grain
import jax
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray

from moss_jax.data.batch import Batch

_HINT = (
    "Exit code -9 may mean that memory has run out, and -7 that /dev/shm is full: fewer workers take less of "
    "both, and so does a smaller read_ahead."
)


class LoadedBatch(NamedTuple):
    """A batch in host memory, and what could not be loaded into it.

    Attributes:
      dropped: one sentence for each row that broke while it was loaded. Such a row is all padding.
    """

    batch: Batch
    dropped: tuple[str, ...] = ()


class BatchSource(Protocol):
    """Makes the batch of any step, always the same one. It can be pickled, and is small then."""

    def __len__(self) -> int:
        """Number of batches."""

    def __getitem__(self, step: int) -> LoadedBatch:
        """The rows of this process in the batch of `step`."""


class BatchError(RuntimeError):
    """A batch source failed; the message names the step and the error, whichever process it came from."""


def iterate(source: BatchSource, *, start: int, workers: int, read_ahead: int) -> Iterator[LoadedBatch]:
    """Yields the batches of a source in order of their steps, from `start` on.

    Args:
      workers: processes that make batches; 0 makes each in the calling thread when it is asked for. The
        batches are the same.
      read_ahead: batches that each worker keeps ready, at least 4 and else an even number.

    The workers start with the first batch that is asked for and end when the iterator is closed, or else with
    this process, however that ends. A script that uses them needs the usual `if __name__ == "__main__":`.

    Raises:
      BatchError: the source raised, or a worker was killed.
    """
    dataset = grain.MapDataset.source(_Guarded(source))[start:]
    batches = _make_in_workers(dataset, workers, read_ahead) if workers else _make_here(dataset)
    # A program that ends by an error still holds the iterator when grain is half gone already.
    atexit.register(_close, weakref.ref(batches))
    return batches


def _close(alive: weakref.ref) -> None:
    if batches := alive():
        batches.close()


def _make_here(dataset: grain.MapDataset) -> Iterator[LoadedBatch]:
    for step in range(len(dataset)):
        yield _checked(dataset[step])


def _make_in_workers(dataset: grain.MapDataset, workers: int, read_ahead: int) -> Iterator[LoadedBatch]:
    # grain reads absl flags of its own, which raise in a program that parses none.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    # Workers share the cores as it is. The numpy of this process has read the variable long ago.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Batches wait in the worker's queue and in a buffer here, one on its way between, and one copied.
    options = grain.MultiprocessingOptions(1, per_worker_buffer_size=max(1, read_ahead // 2 - 1))
    # One dataset per worker, because grain ends the workers of one dataset one after the other.
    shards = [
        # By default, grain would make 500 batches ahead in 16 threads of the worker.
        iter(
            dataset[i::workers]
            .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            .mp_prefetch(options, worker_init_fn=_start_worker)
        )
        for i in range(workers)
    ]
    with futures.ThreadPoolExecutor(workers) as threads:
        coming = deque((shard, threads.submit(_take, shard)) for shard in shards)
        try:
            while True:
                shard, batch = coming.popleft()
                try:
                    loaded = batch.result()
                except RuntimeError as error:
                    raise BatchError(f"{error} {_HINT}") from error
                if loaded is None:
                    return
                coming.append((shard, threads.submit(_take, shard)))
                yield _checked(loaded)
        finally:
            futures.wait([batch for _, batch in coming])
            try:
                list(threads.map(lambda shard: shard.close(), shards))
            except RuntimeError:  # the program ends, and nothing can be submitted any more
                for shard in shards:
                    shard.close()
            _await_release()


def _take(shard: grain.DatasetIterator) -> "LoadedBatch | BatchError | None":
    """Copies the next batch out of shared memory, which grain's arrays keep for as long as they are used."""
    loaded = next(shard, None)
    return jax.tree.map(lambda x: np.array(x) if isinstance(x, np.ndarray) else x, loaded)


def _await_release() -> None:
    # grain frees shared memory in a thread; at the end of a program the rest would be told of as leaked.
    if thread := getattr(SharedMemoryArray, "_del_thread_pool", None):
        thread.apply(int)


def _checked(loaded: "LoadedBatch | BatchError") -> LoadedBatch:
    if isinstance(loaded, BatchError):
        raise loaded
    return loaded


class _Guarded:
    """A source that returns its errors, because not every exception would find its way to the parent."""

    def __init__(self, source: BatchSource):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, step: int) -> "LoadedBatch | BatchError":
        try:
            return self._source[step]
        except Exception as error:
            failed = BatchError(f"the batch of step {step} cannot be made: {type(error).__name__}: {error}")
            failed.add_note(traceback.format_exc())
            return failed


def _start_worker(index: int, count: int) -> None:
    # Batches are numpy. Should anything reach for a device all the same, the accelerator is the parent's.
    jax.config.update("jax_platforms", "cpu")
    # Ctrl-C and a job's SIGTERM reach the whole process group; the parent decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)
