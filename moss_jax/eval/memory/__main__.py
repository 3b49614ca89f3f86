"""Command line of the evaluation of memory.

python -m moss_jax.eval.memory --minutes 10 --slots 32 --policy pyramid,merge --budget 64 --json memory.json
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import get_args

from rich.console import Console

from moss_jax import command
from moss_jax.config import KVDtype
from moss_jax.eval.arguments import BAD_INPUT, make_parser
from moss_jax.eval.memory.evaluation import MemoryEvaluationConfig, evaluate
from moss_jax.eval.memory.report import draw, print_tables
from moss_jax.memory.policies import POLICIES


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code, as `command.run` says."""
    return command.run("moss_jax.eval.memory", lambda: score(parse_arguments(arguments)), BAD_INPUT)


def score(args: argparse.Namespace) -> None:
    """Runs the evaluation for parsed flags, writes the result and prints it."""
    command.cache_compilations(args.compilation_cache)
    config = MemoryEvaluationConfig(
        checkpoint=args.checkpoint,
        minutes=args.minutes,
        streams=args.streams,
        seed=args.seed,
        past=args.past,
        old=args.old,
        quiet=args.quiet,
        policies=args.policy,
        budgets=args.budget,
        bank_dtypes=args.bank_dtype,
        slots=args.slots,
        tokens_per_second=args.tokens_per_second,
        text_capacity=args.text_capacity,
        render_processes=args.render_processes,
    )
    log = Console(stderr=True, highlight=False, style="dim")
    result = evaluate(config, log.print)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.figure:
        draw(result, args.figure)
    print_tables(result, command.PipeConsole(highlight=False))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line; `sys.argv` if None."""
    default = MemoryEvaluationConfig()
    parser = make_parser(
        "moss_jax.eval.memory",
        "Score what a model still answers about the past of long tabletop streams, by "
        "the age of the evidence, under one memory policy after the other.",
        default,
    )
    add, positive = parser.add_argument, command.at_least(1)
    add("--minutes", type=_minutes, default=default.minutes, metavar="M", help="length of a stream")
    add(
        "--past",
        type=_share,
        default=default.past,
        metavar="SHARE",
        help="share of the questions that are about the past",
    )
    add(
        "--old",
        type=_share,
        default=default.old,
        metavar="SHARE",
        help="share of those that are drawn again for evidence older than 15 seconds to 5 minutes",
    )
    add(
        "--quiet",
        type=_share,
        default=default.quiet,
        metavar="SHARE",
        help="share of a stream, at its beginning, in which the user says nothing: no earlier answer helps",
    )
    add(
        "--policy",
        type=_several(_one_of(tuple(POLICIES))),
        default=default.policies,
        metavar="P[,P...]",
        help=f"memory policies to compare: {', '.join(POLICIES)}; window and the baselines are always there",
    )
    add(
        "--budget",
        type=_several(positive),
        default=default.budgets,
        metavar="FRAMES[,...]",
        help="sizes of the bank, in whole frames",
    )
    add(
        "--bank-dtype",
        type=_several(_bank_dtype),
        default=default.bank_dtypes,
        metavar="DTYPE[,...]",
        help=f"of keys and values in the bank: {', '.join(DTYPE_NAMES)}",
    )
    add(
        "--text-capacity",
        type=positive,
        default=default.text_capacity,
        metavar="N",
        help="tokens in the text cache, which forgets as that of a live stream does",
    )
    add(
        "--render-processes",
        type=command.at_least(0),
        default=default.render_processes,
        metavar="N",
        help="processes that render the frames; 0 for a thread",
    )
    add(
        "--figure",
        type=command.output_file,
        metavar="FILE",
        help="also draw right answers over the age of the evidence (.png, .svg or .pdf)",
    )
    return parser.parse_args(arguments)


DTYPE_NAMES = ("none", *get_args(KVDtype))


def _several[T](convert: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Flag type: comma-separated values."""
    return lambda text: tuple(map(convert, text.split(",")))


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    """Flag type: one of several names."""

    def convert(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}, not {text!r}")
        return text

    return convert


def _bank_dtype(text: str) -> str | None:
    return None if _one_of(DTYPE_NAMES)(text) == "none" else text


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None


def _minutes(text: str) -> float:
    value = _number(text)
    if not 1 <= 60 * value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least a second, not {text} minutes")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, not {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
