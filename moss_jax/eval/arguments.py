"""Arguments that the command lines of the evaluations share."""

import argparse
from typing import Protocol

from moss_jax import command
from moss_jax.config import ConfigError
from moss_jax.convert import CheckpointError
from moss_jax.text import TokenizerError

BAD_INPUT = (CheckpointError, ConfigError, TokenizerError)


class Defaults(Protocol):
    """Defaults of the shared arguments: settings that every evaluation has."""

    @property
    def streams(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def tokens_per_second(self) -> int: ...


def make_parser(module: str, description: str, default: Defaults) -> argparse.ArgumentParser:
    """Creates a parser with flags for the checkpoint, the streams, the speed of speech, and the result."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=command.HelpFormatter
    )
    add, positive = parser.add_argument, command.at_least(1)
    add(
        "--checkpoint",
        metavar="DIR|REPO",
        help="folder in Hugging Face layout, or repo id as OWNER/NAME[@REVISION] (default: the small model "
        "that ships with the package)",
    )
    add("--streams", type=positive, default=default.streams, metavar="N", help="number of streams")
    add("--seed", type=command.seed, default=default.seed, help="which held-out streams")
    add("--slots", type=positive, default=default.slots, metavar="N", help="streams side by side")
    add(
        "--tokens-per-second",
        type=positive,
        default=default.tokens_per_second,
        metavar="N",
        help="speed of speech",
    )
    add("--json", type=command.output_file, metavar="FILE", help="also write the result to this file")
    command.add_compilation_cache(parser)
    return parser
