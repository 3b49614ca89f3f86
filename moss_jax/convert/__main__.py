"""`python -m moss_jax.convert export --workdir DIR --out DIR`: the model of a training run, to be served."""

import argparse
import sys
from pathlib import Path

from moss_jax.convert import CheckpointError, run_checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m moss_jax.convert", description="Convert checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write the model of a training run in Hugging Face layout")
    add = command.add_argument
    add("--workdir", required=True, type=Path, metavar="DIR", help="of the training run")
    add("--step", type=int, metavar="N", help="of the checkpoint; else the newest")
    add("--out", required=True, type=Path, metavar="DIR", help="a new folder; serve.py --checkpoint takes it")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the parameters (bfloat16)")
    args = parser.parse_args()
    try:
        step = run_checkpoint.export(args.workdir, args.out, step=args.step, dtype=args.dtype)
    except CheckpointError as error:
        print(f"moss_jax.convert: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: the model of {args.workdir} after {step} steps, {args.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
