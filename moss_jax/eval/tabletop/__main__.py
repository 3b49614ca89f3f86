"""Command line of the tabletop evaluation.

python -m moss_jax.eval.tabletop --checkpoint checkpoints/moss-tiny --streams 200 --json scores.json
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import get_args

from rich.console import Console

from moss_jax import command
from moss_jax.config import ConfigError, DecoderWeights, EncoderWeights
from moss_jax.convert import CheckpointError
from moss_jax.eval.tabletop.evaluation import EvaluationConfig, evaluate
from moss_jax.eval.tabletop.report import print_tables
from moss_jax.text import TokenizerError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code, as `command.run` says."""
    bad_input = (CheckpointError, ConfigError, TokenizerError)
    return command.run("moss_jax.eval.tabletop", lambda: score(parse_arguments(arguments)), bad_input)


def score(args: argparse.Namespace) -> None:
    """Evaluates as the command line says, writes the result and prints it."""
    command.cache_compilations(args.compilation_cache)
    config = EvaluationConfig(
        checkpoint=args.checkpoint,
        weights=args.weights,
        encoder_weights=args.encoder_weights,
        streams=args.streams,
        seconds=args.seconds,
        seed=args.seed,
        slots=args.slots,
        tokens_per_second=args.tokens_per_second,
        offline=not args.skip_offline,
        blind_streams=0 if args.skip_blind else args.blind_streams,
    )
    log = Console(stderr=True, highlight=False, style="dim")
    result = evaluate(config, log.print)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_tables(result, command.PipeConsole(highlight=False))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line; `sys.argv` if None."""
    parser = argparse.ArgumentParser(
        prog="python -m moss_jax.eval.tabletop",
        description="Score a model on held-out streams of the tabletop world.",
        formatter_class=command.HelpFormatter,
    )
    default = EvaluationConfig()
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="DIR|REPO",
        help="folder in Hugging Face layout, or repo id as OWNER/NAME[@REVISION] (default: the small model "
        "that ships with the package)",
    )
    add(
        "--weights",
        choices=get_args(DecoderWeights),
        help="quantize the decoder's weights to 8 bits (default: as loaded)",
    )
    add(
        "--encoder-weights",
        choices=get_args(EncoderWeights),
        help="quantize the vision encoder to 8 bits (default: as loaded)",
    )
    positive = command.at_least(1)
    add("--streams", type=positive, default=default.streams, metavar="N", help="number of streams")
    add("--seconds", type=positive, default=default.seconds, metavar="N", help="length of a stream")
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
    add("--skip-offline", action="store_true", help="ask no questions about whole clips")
    add("--skip-blind", action="store_true", help="leave out the run without frames")
    add(
        "--blind-streams", type=positive, metavar="N", help="streams of the run without frames (default: all)"
    )
    command.add_compilation_cache(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
