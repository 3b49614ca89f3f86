"""Trains a model: `python -m moss_jax.train --gin_file tabletop_tiny.gin --workdir workdir/tabletop`."""

import argparse
import logging
import sys
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
    TabletopConfig,
    TrainConfig,
)
from moss_jax.convert import CheckpointError
from moss_jax.data.pipeline import BatchError
from moss_jax.ops.dispatch import Unsupported
from moss_jax.text import TokenizerError
from moss_jax.train.loop import DataError, RunConfig, run

BAD_INPUT = (BatchError, CheckpointError, ConfigError, DataError, TokenizerError, Unsupported)


def main() -> int:
    """Runs the command and returns its exit code, as `command.run` says."""
    parser = make_parser()
    args = parser.parse_args()
    return command.run(parser.prog, lambda: train(args), BAD_INPUT)


def train(args: argparse.Namespace) -> None:
    """Trains as the command line says."""
    if args.distributed:
        join_cluster()
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("moss_jax").setLevel(logging.INFO if jax.process_index() == 0 else logging.ERROR)
    command.cache_compilations(args.compilation_cache)
    run(read_config(args.gin_file, args.gin_param), args.workdir, resume=args.resume)


def read_config(files: list[str], parameters: list[str]) -> RunConfig:
    """Reads the settings of a run from gin files and bindings."""
    gin_bindings.parse(files, parameters)
    settings = gin_bindings.settings
    data = settings(DataConfig)
    # Only settings that apply are read, so that the operative config has no others.
    tabletop = data.kind == "tabletop"
    return RunConfig(
        train=settings(TrainConfig),
        optimizer=settings(OptimizerConfig),
        mesh=settings(MeshConfig),
        model=settings(InitialModelConfig),
        data=data,
        source=settings(TabletopConfig) if tabletop else settings(ConversationConfig),
        sampling=None if tabletop else settings(FrameSampling),
        text=gin_bindings.operative(),
    )


def join_cluster() -> None:
    """Makes this process one of several that train together.

    Raises:
      ConfigError: no cluster was found.
    """
    try:
        jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"--distributed found no cluster to join: {error}") from error


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
    add("--distributed", action="store_true", help="join a cluster; start one process on each host")
    return parser


if __name__ == "__main__":
    sys.exit(main())
