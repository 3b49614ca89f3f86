"""Checkpoints of a training run: asynchronous, atomic, and restorable on any mesh.

`moss_jax.convert.run_checkpoint` documents their layout.
"""

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from moss_jax.convert import CheckpointError, run_checkpoint
from moss_jax.train.step import TrainState

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Restored:
    """The contents of a checkpoint.

    Attributes:
      state: with the requested shardings, whatever mesh it was saved from.
      position: of the run in its data.
      config: settings of the run.
    """

    state: TrainState
    position: dict[str, Any]
    config: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run. A context manager, whose exit waits for pending writes.

    Incomplete checkpoints are renamed to `STEP.damaged`, and temporary files of a killed run are removed.

    Args:
      workdir: of the run.
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

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def save(self, step: int, state: TrainState, *, position: dict[str, Any], config: dict[str, Any]) -> None:
        """Starts to write a checkpoint; `state` may be donated as soon as this returns.

        Waits for the previous write and raises its error, if any.

        Args:
          step: number of steps done.
          state: after these steps.
          position: of the run in its data, as JSON.
          config: settings of the run, as JSON.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave({"trained": state.trained, "frozen": state.frozen}),
                optimizer=ocp.args.StandardSave({"state": state.optimizer, "step": state.step}),
                position=ocp.args.JsonSave(position),
                config=ocp.args.JsonSave(config),
            ),
        )

    def restore(self, abstract: TrainState) -> Restored | None:
        """Reads the latest readable checkpoint; returns None if there is no checkpoint.

        Args:
          abstract: shapes, dtypes and shardings of the state (`Trainer.abstract`).

        Raises:
          CheckpointError: the latest checkpoint is of another model, or none can be read.
        """
        whole, _ = run_checkpoint.list_checkpoints(self._workdir)
        for folder in reversed(whole):
            try:
                _check_parameters(folder, abstract)
                return self._read(int(folder.name), abstract)
            except CheckpointError:
                raise
            except (OSError, ValueError) as error:
                # All processes must restore the same checkpoint, and only this one knows of the damage.
                if jax.process_count() > 1:
                    raise CheckpointError(f"{folder} cannot be read: {error}") from error
                _rename_damaged(folder, str(error).partition(" [tensorstore_spec")[0])
                self._manager.reload()
        if whole:
            raise CheckpointError(
                f"no checkpoint in {self._workdir} can be read; all were renamed to *.damaged"
            )
        return None

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
            f"{folder} is of another model, or other parts were trained: its {kind} parameters differ in "
            f"{differ[0]}{more}. To train other parts of its model, export it and start a new run from that"
        )


def _rename_damaged(folder: Path, reason: str) -> None:
    """Renames a damaged checkpoint, so that it is neither read nor overwritten."""
    target = folder.with_name(f"{folder.name}.damaged")
    while target.exists():
        target = target.with_name(f"{target.name}.again")
    _logger.warning("%s is damaged and renamed to %s: %s", folder, target.name, reason)
    folder.rename(target)
