"""Trains a model: `python -m moss_jax.train --gin_file tabletop_tiny.gin --workdir workdir/tabletop`."""

import argparse
import dataclasses
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax

from moss_jax import command, gin_bindings
from moss_jax.config import (
    ConfigError,
    ConversationConfig,
    DataConfig,
    FrameSampling,
    InitialModelConfig,
    MeshConfig,
    OptimizerConfig,
    SegmentsConfig,
    TabletopConfig,
    TrainConfig,
)
from moss_jax.convert import CheckpointError
from moss_jax.data.pipeline import BatchError
from moss_jax.ops.dispatch import Unsupported
from moss_jax.text import TokenizerError
from moss_jax.train.checkpoints import RunError
from moss_jax.train.loop import DataError, RunConfig, run

# Settings of the tabletop world that apply to long streams, too.
SHARED = ("image_size", "offline_share")
BAD_INPUT = (BatchError, CheckpointError, ConfigError, DataError, TokenizerError, Unsupported)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code, like `command.run`; 1 also if the run cannot continue.

    Args:
      words: command-line arguments; `sys.argv[1:]` if None.
    """
    parser = make_parser()
    args = parser.parse_args(words)
    return command.run(parser.prog, lambda: train(args, parser.prog), BAD_INPUT)


def train(args: argparse.Namespace, name: str) -> int:
    """Trains with the settings of the command line; returns the exit code."""
    join_cluster(args)
    set_up_logging()
    quiet_failed_writes()
    command.cache_compilations(args.compilation_cache)
    try:
        run(read_config(args.gin_file, args.gin_param), args.workdir, resume=args.resume)
    except RunError as error:
        command.tell(f"{name}: {error}")
        return command.BAD_OUTPUT
    except OSError as error:
        if error.errno not in command.DISK_ERRORS:
            raise
        command.tell(
            f"{name}: {args.workdir} cannot be written any more: {error.strerror}; make room and resume with "
            "--resume"
        )
        return command.BAD_OUTPUT
    return 0


def set_up_logging() -> None:
    """Logs infos of `moss_jax` in process 0, and warnings of libraries, as `NAME: MESSAGE`."""
    logging.basicConfig()
    # basicConfig does nothing if there is a handler, and orbax adds one when it is imported.
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logging.getLogger("moss_jax").setLevel(logging.INFO if jax.process_index() == 0 else logging.ERROR)


def quiet_failed_writes() -> None:
    """Drops library output about a checkpoint that cannot be written, which the run raises as one RunError.

    orbax and asyncio log tracebacks, coroutines of orbax may never be awaited, and tensorstore reports an
    exception for each array to an event loop that orbax has closed, which only `sys.unraisablehook` can keep
    off stderr: 3000 lines for the small model. Threads keep reporting after the run has raised, so this stays
    in place until the process ends.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_no_failed_write)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = _report_unraisable


def _is_no_failed_write(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in record.pathname + record.getMessage())


def _report_unraisable(unraisable) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def read_config(files: list[str], parameters: list[str]) -> RunConfig:
    """Reads the settings of a run from gin files and bindings.

    Raises:
      ConfigError: a name or a value is invalid, or a setting is changed that does not apply to the run.
    """
    gin_bindings.parse(files, parameters)
    settings = gin_bindings.settings
    if settings(InitialModelConfig).checkpoint:
        # The checkpoint replaces the preset, which the recorded config must not name.
        gin_bindings.parse(files, [*parameters, "model.preset = None"])
    data = settings(DataConfig)
    # Only settings that apply are read, so that the operative config has no others.
    tabletop = data.kind == "tabletop"
    segments = settings(SegmentsConfig) if tabletop else None
    config = RunConfig(
        train=settings(TrainConfig),
        optimizer=settings(OptimizerConfig),
        mesh=settings(MeshConfig),
        model=settings(InitialModelConfig),
        data=data,
        source=settings(TabletopConfig) if tabletop else settings(ConversationConfig),
        sampling=None if tabletop else settings(FrameSampling),
        segments=segments if segments and segments.per_step else None,
        text=gin_bindings.operative(),
    )
    _refuse_ineffective(config)
    return config


def _refuse_ineffective(config: RunConfig) -> None:
    """Refuses changed settings that do not apply to the data of a run; called after the operative config."""
    refuse = gin_bindings.refuse_changed
    because = f"data.kind is {config.data.kind!r}; set another kind, or leave them out"
    if config.data.kind == "conversations":
        refuse(TabletopConfig, because)
        refuse(SegmentsConfig, because)
        return
    refuse(ConversationConfig, because)
    refuse(FrameSampling, because)
    if config.segments:
        # Streams are as long as `segments.streams` says, and cut into segments.
        lengths = [field.name for field in dataclasses.fields(TabletopConfig) if field.name not in SHARED]
        refuse(
            TabletopConfig, "segments.per_step is above 0, so streams are those of segments.*", fields=lengths
        )
    else:
        refuse(SegmentsConfig, "segments.per_step is 0; set it, or leave them out")


def join_cluster(args: argparse.Namespace) -> None:
    """Joins the processes that train together, if the arguments describe such a cluster.

    Raises:
      ConfigError: the arguments are incomplete, or the cluster cannot be joined.
    """
    by_hand = (args.coordinator, args.processes, args.process_id)
    if by_hand == (None, None, None):
        if not args.distributed:
            return
        found = {}
    elif None in by_hand:
        raise ConfigError("--coordinator, --processes and --process-id belong together: give all three")
    else:
        host, _, port = args.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ConfigError(
                f"--coordinator must be HOST:PORT, such as 10.0.0.1:1234; got {args.coordinator}"
            )
        if not 0 <= args.process_id < args.processes:
            raise ConfigError(
                f"--process-id must be in [0, {args.processes}), the number of --processes; got "
                f"{args.process_id}"
            )
        found = {
            "coordinator_address": args.coordinator,
            "num_processes": args.processes,
            "process_id": args.process_id,
            "cluster_detection_method": "deactivate",
        }
        # When the wait times out, JAX aborts the process without naming the address.
        command.tell(f"joining {args.processes} processes at {args.coordinator}, which may take 5 minutes")
    try:
        jax.distributed.initialize(**found)
    except (RuntimeError, ValueError) as error:
        if found:
            raise ConfigError(f"--coordinator {args.coordinator} cannot be joined: {error}") from error
        raise ConfigError(
            f"--distributed found no cluster to join: {error} Without a cluster manager, give --coordinator, "
            "--processes and --process-id"
        ) from error


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    program = Path(sys.argv[0]).name
    parser = argparse.ArgumentParser(
        prog="python -m moss_jax.train" if program == "__main__.py" else program,
        description="Train a model.",
        epilog="configs/ has a gin file for each training stage.",
        formatter_class=command.HelpFormatter,
    )
    add = parser.add_argument
    add(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="settings: a file, or the name of one that ships with moss_jax; may be repeated",
    )
    add(
        "--gin_param",
        action="append",
        default=[],
        metavar="BINDING",
        help="a single setting, such as 'train.steps = 100'; may be repeated",
    )
    add(
        "--workdir",
        required=True,
        type=Path,
        metavar="DIR",
        help="for checkpoints, metrics, TensorBoard files and the loss curve",
    )
    command.add_compilation_cache(parser)
    add("--resume", action="store_true", help="resume from the latest checkpoint in DIR, if there is one")
    add(
        "--distributed",
        action="store_true",
        help="join the processes that Slurm, Open MPI, Kubernetes or a TPU pod has started",
    )
    add(
        "--coordinator",
        metavar="HOST:PORT",
        help="join processes that were started by hand; the address of process 0, and a free port there",
    )
    add("--processes", type=command.at_least(1), metavar="N", help="their number")
    add("--process-id", type=int, metavar="I", help="of this process, from 0 on")
    return parser


if __name__ == "__main__":
    sys.exit(main())
