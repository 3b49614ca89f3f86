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
from moss_jax.config import DecoderWeights, EncoderWeights, KVDtype, SelectionConfig
from moss_jax.eval.arguments import BAD_INPUT, make_parser
from moss_jax.eval.tabletop.evaluation import EvaluationConfig, evaluate
from moss_jax.eval.tabletop.report import print_tables
from moss_jax.memory.policies import FULL, POLICIES


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code, as `command.run` says."""
    return command.run("moss_jax.eval.tabletop", lambda: score(parse_arguments(arguments)), BAD_INPUT)


def score(args: argparse.Namespace) -> None:
    """Runs the evaluation for parsed flags, writes the result and prints it."""
    command.cache_compilations(args.compilation_cache)
    config = EvaluationConfig(
        checkpoint=args.checkpoint,
        weights=args.weights,
        encoder_weights=args.encoder_weights,
        streams=args.streams,
        seconds=args.seconds,
        last=args.last,
        seed=args.seed,
        slots=args.slots,
        tokens_per_second=args.tokens_per_second,
        policy=args.policy,
        frames=args.budget,
        text_capacity=args.text_capacity,
        bank_dtype=args.bank_dtype,
        text_dtype=args.text_dtype,
        selection=SelectionConfig(enabled=args.select, max_gap=args.max_gap or SelectionConfig.max_gap),
        event_rate=args.event_rate,
        narrated=args.narrated,
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
    add(
        "--last",
        type=positive,
        metavar="N",
        help="score only the last N seconds of each stream (default: all)",
    )
    add(
        "--policy",
        choices=(FULL, *POLICIES),
        default=default.policy,
        help="of the memory bank, if it is too small for the stream",
    )
    add(
        "--budget",
        type=positive,
        metavar="FRAMES",
        help="size of the bank, in whole frames (default: the whole stream)",
    )
    add(
        "--text-capacity",
        type=positive,
        metavar="N",
        help="tokens in the text cache, which forgets as that of a live stream does (default: room for all)",
    )
    add(
        "--event-rate",
        type=_rates,
        metavar="LOW,HIGH",
        help="range of the rates of events, per second, that streams are drawn with (default: as usual)",
    )
    add(
        "--narrated",
        action="store_true",
        help="the user asks for a narration at the beginning of each stream, and for nothing else",
    )
    add(
        "--bank-dtype",
        choices=get_args(KVDtype),
        help="of keys and values in the bank (default: that of the model)",
    )
    add("--text-dtype", choices=get_args(KVDtype), help="likewise in the text cache")
    add("--select", action="store_true", help="do not show the model frames in which nothing has changed")
    add(
        "--max-gap",
        type=_seconds,
        metavar="SECONDS",
        help="with --select, seconds after which a frame is shown regardless of its change (default: "
        f"{default.selection.max_gap:g})",
    )
    add("--skip-offline", action="store_true", help="ask no questions about whole clips")
    add("--skip-blind", action="store_true", help="leave out the run without frames")
    add(
        "--blind-streams", type=positive, metavar="N", help="streams of the run without frames (default: all)"
    )
    args = parser.parse_args(arguments)
    if args.last and args.last > args.seconds:
        parser.error(f"--last {args.last} exceeds the {args.seconds} s of a stream; give at most that")
    if args.max_gap and not args.select:
        parser.error("--max-gap has no effect without --select; give both, or leave it out")
    if args.blind_streams and args.skip_blind:
        parser.error("--blind-streams has no effect with --skip-blind; leave one out")
    return args


def _rates(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be two numbers, LOW,HIGH, not {text!r}") from None
    if not 0 < low <= high <= 1:
        raise argparse.ArgumentTypeError(f"must be a range within (0, 1], not {text}")
    return low, high


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, not {text!r}") from None
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, not {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
