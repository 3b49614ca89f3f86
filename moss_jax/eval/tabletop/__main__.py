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
from moss_jax.config import DecoderWeights, EncoderWeights
from moss_jax.eval.arguments import BAD_INPUT, make_parser
from moss_jax.eval.tabletop.evaluation import EvaluationConfig, evaluate
from moss_jax.eval.tabletop.report import print_tables


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code, as `command.run` says."""
    return command.run("moss_jax.eval.tabletop", lambda: score(parse_arguments(arguments)), BAD_INPUT)


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
    default = EvaluationConfig()
    parser = make_parser(
        "moss_jax.eval.tabletop",
        "Score a model on held-out streams of the tabletop world.",
        default,
    )
    add, positive = parser.add_argument, command.at_least(1)
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
    add("--seconds", type=positive, default=default.seconds, metavar="N", help="length of a stream")
    add("--skip-offline", action="store_true", help="ask no questions about whole clips")
    add("--skip-blind", action="store_true", help="leave out the run without frames")
    add(
        "--blind-streams", type=positive, metavar="N", help="streams of the run without frames (default: all)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
