"""Checkpoints of a training run: written in the background, whole or not at all, and taken up again.

`moss_jax.convert.run_checkpoint` says where things lie in one.
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
    """What a checkpoint holds.

    Attributes:
      state: laid out as it was asked for, whatever mesh it was saved from.
      position: where the run stands in its data.
      config: what the run was started with.
    """

    state: TrainState
    position: dict[str, Any]
    config: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run. A context manager: leaving it waits until everything is written.

    Checkpoints that are not whole are renamed to `STEP.damaged`, and what a killed run left half-written is
    removed.

    Args:
      workdir: of the run.
      keep: the newest so many stay.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int):
        self._workdir = Path(workdir)
        if jax.process_index() == 0:
            _, broken = run_checkpoint.list_checkpoints(self._workdir)
            for folder in broken:
                _set_aside(folder, "it is not whole")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("broken checkpoints are set aside")
        self._manager = ocp.CheckpointManager(
            self._workdir.absolute() / run_checkpoint.CHECKPOINTS,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def save(self, step: int, state: TrainState, *, position: dict[str, Any], config: dict[str, Any]) -> None:
        """Begins to save; `state` may be donated as soon as this returns.

        Waits for the save before, and raises what went wrong in it.
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
        """The newest checkpoint that can be read; None where there is no checkpoint.

        Args:
          abstract: shapes, dtypes and shardings of the state (`Trainer.abstract`).

        Raises:
          CheckpointError: the newest is of another model, or none can be read.
        """
        whole, _ = run_checkpoint.list_checkpoints(self._workdir)
        for folder in reversed(whole):
            try:
                _check_parameters(folder, abstract)
                return self._read(int(folder.name), abstract)
            except CheckpointError:
                raise
            except (OSError, ValueError) as error:
                # Every process must take the same one, and here only this one knows of the damage.
                if jax.process_count() > 1:
                    raise CheckpointError(f"{folder} cannot be read: {error}") from error
                _set_aside(folder, str(error).partition(" [tensorstore_spec")[0])
                self._manager.reload()
        if whole:
            raise CheckpointError(
                f"no checkpoint in {self._workdir} can be read; they are renamed to *.damaged"
            )
        return None

    def _read(self, step: int, abstract: TrainState) -> Restored:
        read = self._manager.restore(
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
    """Refuses a checkpoint of another model, or of one that other parts are trained of."""
    saved = run_checkpoint.read_array_metadata(folder, "params")
    for kind, here in (("trained", abstract.trained), ("frozen", abstract.frozen)):
        there = {name: tuple(array.shape) for name, array in saved.get(kind, {}).items()}
        if there == (expected := {name: array.shape for name, array in here.items()}):
            continue
        differ = sorted(name for name in there | expected if there.get(name) != expected.get(name))
        more = f" and {len(differ) - 1} more" if differ[1:] else ""
        raise CheckpointError(
            f"{folder} is of another model, or other parts of it were trained: its {kind} parameters differ "
            f"in {differ[0]}{more}. To train its model otherwise, export it and start a new run from that"
        )


def _set_aside(folder: Path, reason: str) -> None:
    """Renames a checkpoint, so that it is neither read nor in the way."""
    target = folder.with_name(f"{folder.name}.damaged")
    while target.exists():
        target = target.with_name(f"{target.name}.again")
    _logger.warning("%s is set aside as %s: %s", folder, target.name, reason)
    folder.rename(target)
