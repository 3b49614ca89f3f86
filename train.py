#!/usr/bin/env python3
"""Trains a model: `python train.py --gin_file configs/tabletop_tiny.gin --workdir workdir/tabletop`."""

import argparse
import logging
import sys
from pathlib import Path

import jax

from moss_jax import gin_bindings
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
from moss_jax.text import TokenizerError
from moss_jax.train.loop import DataError, RunConfig, run

BAD_INPUT = (BatchError, CheckpointError, ConfigError, DataError, TokenizerError)


def main() -> int:
    args = parse_arguments()
    try:
        if args.distributed:
            join_cluster()
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        logging.getLogger("moss_jax").setLevel(logging.INFO if jax.process_index() == 0 else logging.ERROR)
        run(read_config(args.gin_file, args.gin_param), args.workdir, resume=args.resume)
    except BAD_INPUT as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


def read_config(files: list[str], parameters: list[str]) -> RunConfig:
    """The settings that gin files and bindings make."""
    gin_bindings.parse(files, parameters)
    read = gin_bindings.settings
    data = read(DataConfig)
    # What is not used is not read, so that it isn't in the operative config either.
    tabletop = data.kind == "tabletop"
    return RunConfig(
        train=read(TrainConfig),
        optimizer=read(OptimizerConfig),
        mesh=read(MeshConfig),
        model=read(InitialModelConfig),
        data=data,
        source=read(TabletopConfig if tabletop else ConversationConfig),
        sampling=None if tabletop else read(FrameSampling),
        text=gin_bindings.operative(),
    )


def join_cluster() -> None:
    """Makes this process one of several that train together."""
    try:
        jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"--distributed found no cluster to join: {error}") from error


def parse_arguments() -> argparse.Namespace:
    """The command line; argparse ends the program with exit code 2 when it makes no sense."""
    parser = argparse.ArgumentParser(
        description="Train a model.", epilog="configs/ has a file for each stage."
    )
    add = parser.add_argument
    add(
        "--gin_file", action="append", default=[], metavar="FILE", help="settings; may be given several times"
    )
    add("--gin_param", action="append", default=[], metavar="BINDING", help="such as 'train.steps = 100'")
    add(
        "--workdir",
        required=True,
        type=Path,
        metavar="DIR",
        help="for checkpoints, metrics, TensorBoard files and the loss curve",
    )
    add("--resume", action="store_true", help="go on from the newest checkpoint in it, if there is one")
    add("--distributed", action="store_true", help="be one of several processes; start one on each host")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
