"""What every benchmark shares: the command line, what is printed, and what is written beside the figures."""

import argparse
import json
import math
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import jax


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_out(parser: argparse.ArgumentParser) -> None:
    """The flag that `publish` reads."""
    parser.add_argument("--out", type=Path, help="JSON file to write")


def known(parser: argparse.ArgumentParser, table: dict, name: str):
    """What `table` has under a name that the command line gives."""
    return table[name] if name in table else parser.error(f"no {name}; there are {', '.join(table)}")


def publish(script: str, args: argparse.Namespace, result: dict) -> None:
    """Prints a result as JSON with command, device and versions; writes it to `args.out` too, if given."""
    command = " ".join([f"python benchmarks/{script}", *settings(args)])
    text = json.dumps({"command": command, "device": device(), "versions": versions()} | result, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")


def settings(args: argparse.Namespace) -> list[str]:
    """The flags that make the same run again; those that were left off have None, False or no limit."""
    return [
        f"--{name.replace('_', '-')} {'' if value is True else value}"
        for name, value in vars(args).items()
        if name != "out" and value is not None and value is not False and value != math.inf
    ]


def device() -> str:
    """The devices of this machine, one a line."""
    if jax.default_backend() == "cpu":
        return f"CPU, {platform.machine()}"
    name = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return name.stdout.strip() or str(jax.devices()[0])


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")} | {
        "python": platform.python_version()
    }


def say(text: str) -> None:
    """Prints at once, so that a run that is cut off has said what it found."""
    print(text, flush=True)


def first_line(error: Exception) -> str:
    """An error as a row has it."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:160]
