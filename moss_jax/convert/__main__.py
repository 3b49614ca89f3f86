"""Exports the model of a training run: `python -m moss_jax.convert export --workdir DIR --out DIR`."""

import argparse
import sys
from pathlib import Path

from moss_jax import command
from moss_jax.convert import CheckpointError, run_checkpoint
from moss_jax.text import TokenizerError


def main() -> int:
    """Runs the command and returns its exit code, as `command.run` says."""
    return command.run("moss_jax.convert", convert, (CheckpointError, TokenizerError))


def convert() -> None:
    """Exports the model that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m moss_jax.convert", description="Convert checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = "write the model of a training run in Hugging Face layout"
    export = commands.add_parser("export", help=text, description=text, formatter_class=command.HelpFormatter)
    add = export.add_argument
    add("--workdir", required=True, type=Path, metavar="DIR", help="folder of the training run")
    add("--step", type=int, metavar="N", help="step of the checkpoint (default: the latest)")
    add("--out", required=True, type=Path, metavar="DIR", help="new checkpoint folder")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the parameters")
    args = parser.parse_args()
    step = run_checkpoint.export(args.workdir, args.out, step=args.step, dtype=args.dtype)
    print(f"{args.out}: the model of {args.workdir} after {step} steps, in {args.dtype}")


if __name__ == "__main__":
    sys.exit(main())
