"""Exports the model of a training run: `python -m moss_jax.convert export --workdir DIR --out DIR`."""

import argparse
import sys
from pathlib import Path

from moss_jax.convert import CheckpointError, run_checkpoint
from moss_jax.text import TokenizerError


def main() -> int:
    """Runs the command line and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m moss_jax.convert", description="Convert checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write the model of a training run in Hugging Face layout")
    add = command.add_argument
    add("--workdir", required=True, type=Path, metavar="DIR", help="folder of the training run")
    add("--step", type=int, metavar="N", help="step of the checkpoint; else the latest")
    add("--out", required=True, type=Path, metavar="DIR", help="new checkpoint folder")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: bfloat16")
    args = parser.parse_args()
    try:
        step = run_checkpoint.export(args.workdir, args.out, step=args.step, dtype=args.dtype)
    except (CheckpointError, TokenizerError) as error:
        print(f"moss_jax.convert: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: the model of {args.workdir} after {step} steps, in {args.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
