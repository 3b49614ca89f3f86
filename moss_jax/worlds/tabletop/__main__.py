"""Command that writes held-out streams: `python -m moss_jax.worlds.tabletop --out DIR --streams 4`."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from moss_jax import command
from moss_jax.text import Tokenizer
from moss_jax.worlds.tabletop.dialogue import converse
from moss_jax.worlds.tabletop.stream import evaluation_stream
from moss_jax.worlds.tabletop.write import ground_truth, to_row, write_video


def main() -> int:
    """Runs the command and returns its exit code, as `command.run` says."""
    return command.run("moss_jax.worlds.tabletop", write, ())


def write() -> None:
    """Parses the command line and writes the streams."""
    parser = argparse.ArgumentParser(
        prog="python -m moss_jax.worlds.tabletop",
        description="Write held-out streams of the tabletop world as mp4 with their truth as JSON.",
        formatter_class=command.HelpFormatter,
    )
    positive = command.at_least(1)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for N.mp4, N.json and rows.json")
    add("--seed", type=command.seed, default=0, help="which held-out streams")
    add("--first", type=command.at_least(0), default=0, metavar="N", help="index of the first stream")
    add("--streams", type=positive, default=1, help="number of streams")
    add("--seconds", type=positive, default=32, help="length of a stream")
    add("--size", type=int, default=448, help="side of the frames in pixels; even, at least 32")
    add("--tokens-per-second", type=positive, default=8, help="the ideal assistant's speed of speech")
    args = parser.parse_args()
    if args.size % 2 or args.size < 32:
        parser.error(f"--size must be an even number of at least 32, not {args.size}")
    tokenizer = Tokenizer.moss_tiny()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(args.first, args.first + args.streams):
        stream = evaluation_stream(args.seed, index, args.seconds)
        dialogue = converse(
            stream.world,
            stream.requests,
            tokenizer,
            tokens_per_second=args.tokens_per_second,
            rng=np.random.default_rng([args.seed, index]),
        )
        video = args.out / f"{index}.mp4"
        write_video(stream, video, size=args.size)
        truth = json.dumps(ground_truth(stream, dialogue), indent=1) + "\n"
        (args.out / f"{index}.json").write_text(truth, encoding="utf-8")
        rows.append(to_row(dialogue, tokenizer, video.name))
        print(f"{video}: {video.stat().st_size} bytes")
    text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    (args.out / "rows.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
