"""Checkpoints of a training run: asynchronous, atomic, and restorable on any mesh.

`moss_jax.convert.run_checkpoint` documents their layout.
"""

import dataclasses
import logging
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from moss_jax.convert import CheckpointError, run_checkpoint
from moss_jax.train.step import TrainState, part_norms

# A checkpoint takes at least this share of the previous one's size: how well it compresses may differ.
MIN_SHARE = 0.9

_logger = logging.getLogger(__name__)


class RunError(RuntimeError):
    """A run that cannot continue; the message says why, and which checkpoint it can resume from."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """The contents of a checkpoint.

    Attributes:
      state: with the requested shardings, whatever mesh it was saved from.
      position: position of the run in its data.
      config: settings of the run.
    """

    state: TrainState
    position: dict[str, Any]
    config: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run. A context manager, whose exit waits for pending writes.

    Incomplete checkpoints are renamed to `STEP.damaged`, and temporary files of a killed run are removed.
    The exit raises RunError if the last checkpoint could not be written.

    Args:
      workdir: the run's folder.
      keep: number of recent checkpoints to keep.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int):
        self._workdir = Path(workdir)
        if jax.process_index() == 0:
            _, broken = run_checkpoint.list_checkpoints(self._workdir)
            for folder in broken:
                _rename_damaged(folder, "it is incomplete")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are renamed")
        self._manager = ocp.CheckpointManager(
            self._workdir.absolute() / run_checkpoint.CHECKPOINTS,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )
        # Step of the latest checkpoint whose write was started.
        self._begun = 0

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _, raised: BaseException | None, __) -> None:
        try:
            self._manager.close()
        except (OSError, ValueError) as error:
            if not isinstance(raised, RunError):
                raise self._failure(error) from error

    def save(self, step: int, state: TrainState, *, position: dict[str, Any], config: dict[str, Any]) -> None:
        """Starts writing a checkpoint; `state` may be donated as soon as this returns.

        Waits for the previous write.

        Args:
          step: number of steps done.
          state: after these steps.
          position: position of the run in its data, as JSON.
          config: settings of the run, as JSON.

        Raises:
          RunError: the previous checkpoint could not be written, or the disk is too full for this one.
        """
        try:
            self._manager.wait_until_finished()
            self._begun = step
            self._check_space()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave({"trained": state.trained, "frozen": state.frozen}),
                    optimizer=ocp.args.StandardSave({"state": state.optimizer, "step": state.step}),
                    position=ocp.args.JsonSave(position),
                    config=ocp.args.JsonSave(config),
                ),
            )
        except (OSError, ValueError) as error:
            raise self._failure(error) from error

    def restore(self, abstract: TrainState) -> Restored | None:
        """Reads the latest readable checkpoint; returns None if there is no checkpoint.

        Args:
          abstract: shapes, dtypes and shardings of the state (`Trainer.abstract`).

        Raises:
          CheckpointError: the latest checkpoint is of another model, or its numbers are not finite, or none
            can be read.
        """
        whole, _ = run_checkpoint.list_checkpoints(self._workdir)
        for folder in reversed(whole):
            try:
                _check_parameters(folder, abstract)
                restored = self._read(int(folder.name), abstract)
                _check_finite(folder, restored.state)
                return restored
            except CheckpointError:
                raise
            except (OSError, ValueError) as error:
                # All processes must restore the same checkpoint, and only this one has seen the damage.
                if jax.process_count() > 1:
                    raise CheckpointError(f"{folder} cannot be read: {error}") from error
                _rename_damaged(folder, _first_clause(error))
                self._manager.reload()
        if whole:
            raise CheckpointError(
                f"no checkpoint in {self._workdir} can be read; all were renamed to *.damaged"
            )
        return None

    def _check_space(self) -> None:
        """Raises OSError if the disk is too full for a checkpoint as large as the last one.

        The steps until the next checkpoint would be lost otherwise, since orbax fails in the background.
        """
        whole, _ = run_checkpoint.list_checkpoints(self._workdir)
        if not whole or jax.process_index() > 0:
            return
        size = sum(file.stat().st_size for file in whole[-1].rglob("*") if file.is_file())
        free = shutil.disk_usage(self._workdir).free
        if free < MIN_SHARE * size:
            raise OSError(f"it takes {size / 2**20:,.1f} MiB, and the disk has {free / 2**20:,.1f} MiB left")

    def _failure(self, error: Exception) -> RunError:
        """Returns the error for a checkpoint that could not be written."""
        whole, _ = run_checkpoint.list_checkpoints(self._workdir)
        last = f"make room and resume from {whole[-1]} with --resume" if whole else "there is no earlier one"
        # tensorstore's message names every file and has the operating system's error as a number.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        reason = os.strerror(int(code[1])) if code else _first_clause(error)
        return RunError(f"the checkpoint of step {self._begun} could not be written: {reason}; {last}")

    def _read(self, step: int, abstract: TrainState) -> Restored:
        read: Any = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore({"trained": abstract.trained, "frozen": abstract.frozen}),
                optimizer=ocp.args.StandardRestore({"state": abstract.optimizer, "step": abstract.step}),
                position=ocp.args.JsonRestore(),
                config=ocp.args.JsonRestore(),
            ),
        )
        state = TrainState(
            step=read.optimizer["step"],
            trained=read.params["trained"],
            frozen=read.params["frozen"],
            optimizer=read.optimizer["state"],
        )
        return Restored(state, read.position, read.config)


def _check_parameters(folder: Path, abstract: TrainState) -> None:
    """Raises CheckpointError for a checkpoint of another model, or with other trained parts."""
    saved = run_checkpoint.read_array_metadata(folder, "params")
    for kind, here in (("trained", abstract.trained), ("frozen", abstract.frozen)):
        there = {name: tuple(array.shape) for name, array in saved.get(kind, {}).items()}
        if there == (expected := {name: array.shape for name, array in here.items()}):
            continue
        differ = sorted(name for name in there | expected if there.get(name) != expected.get(name))
        more = f" and {len(differ) - 1} more" if differ[1:] else ""
        raise CheckpointError(
            f"{folder} belongs to another model, or other parts were trained: its {kind} parameters "
            f"differ in {differ[0]}{more}. To train other parts of its model, export it and start a new run "
            "from that"
        )


def _check_finite(folder: Path, state: TrainState) -> None:
    """Raises CheckpointError for a checkpoint with a NaN or an infinity."""
    moments = {f"optimizer/{i}": x for i, x in enumerate(jax.tree.leaves(state.optimizer))}
    norms = jax.device_get(jax.jit(part_norms)(state.trained | state.frozen | moments))
    if bad := [part for part, norm in norms.items() if not math.isfinite(norm)]:
        raise CheckpointError(
            f"{folder} has numbers that are not finite, in {', '.join(bad)}: a run cannot resume from it; "
            "remove it to resume from the one before"
        )


def _first_clause(error: Exception) -> str:
    """Returns an error's message without the spec that tensorstore appends."""
    return str(error).partition(" [tensorstore_spec")[0]


def _rename_damaged(folder: Path, reason: str) -> None:
    """Renames a damaged checkpoint, so that it is neither read nor overwritten."""
    target = folder.with_name(f"{folder.name}.damaged")
    while target.exists():
        target = target.with_name(f"{target.name}.again")
    _logger.warning("%s is damaged and renamed to %s: %s", folder, target.name, reason)
    folder.rename(target)
