"""Compares `streaming.py` of two source trees of the project on one GPU, in immediate succession.

    git worktree add /tmp/before COMMIT
    python benchmarks/before_after.py --before /tmp/before --out benchmarks/results/before_after_h200.json

Runs the 11B in bfloat16, and with int8 weights and the encoder in float8, each before and after; prints the
ratio of each figure, after over before.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from report import add_out, make_parser, publish, say

ROOT = Path(__file__).parents[1]
VARIANTS = {"bf16": [], "8-bit": ["--weights", "int8", "--encoder-weights", "fp8"]}
FIGURES = ("mean", "rate", "seconds")  # Rows are compared by the first of these that they have.


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--before", type=Path, required=True, help="folder with the tree of another commit")
    parser.add_argument("--preset", default="moss_video_11b", help="model")
    parser.add_argument("--frames", default="256", help="frames in the bank")
    parser.add_argument("--only", default="decode,extend,sustained,offline", help="measures of streaming.py")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names, comma-separated")
    parser.add_argument("--limit", type=float, default=140, help="seconds for each run")
    add_out(parser)
    args = parser.parse_args()
    result = {}
    for variant in args.variants.split(","):
        flags = VARIANTS[variant]
        runs = {name: run(tree, flags, args) for name, tree in (("before", args.before), ("after", ROOT))}
        result[variant] = runs | {"ratios": ratios(runs["before"], runs["after"])}
        say(f"{variant}: {result[variant]['ratios']}")
    # The folder is somebody's own.
    args.before = "DIR"
    publish("before_after.py", args, result)


def run(tree: Path, flags: list[str], args) -> list[dict]:
    """Runs `streaming.py` of a tree and returns its rows; empty if it fails or times out."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [
            sys.executable,
            "benchmarks/streaming.py",
            "--preset",
            args.preset,
            "--frames",
            args.frames,
        ]
        command += ["--only", args.only, *flags, "--out", str(out)]
        paths = [str(tree.absolute()), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        try:
            subprocess.run(command, cwd=tree, env=env, check=True, timeout=args.limit)
        except subprocess.SubprocessError as error:
            say(f"{tree}: {error}")
            return []
        return json.loads(out.read_text(encoding="utf-8"))["rows"]


def ratios(before: list[dict], after: list[dict]) -> dict[str, float]:
    """Returns the ratio of after to before for each measure."""
    found, now = {}, {row["measure"]: row for row in after}
    for old in before:
        new = now.get(old["measure"], {})
        figure = next((name for name in FIGURES if name in old and name in new), None)
        if figure:
            found[f"{old['measure']}, {old['unit']}"] = new[figure] / old[figure]
    return found


if __name__ == "__main__":
    main()
