"""Shared by all benchmarks: the command line, and results as JSON."""

import argparse
import json
import math
import platform
import subprocess
from importlib import metadata

import jax

from moss_jax.command import HelpFormatter, output_file


class DocFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description as they are."""


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Creates a parser whose help shows a script's docstring verbatim, and the defaults."""
    return argparse.ArgumentParser(description=doc, formatter_class=DocFormatter)


def add_out(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that `publish` reads."""
    parser.add_argument("--out", type=output_file, help="JSON file to write")


def known(parser: argparse.ArgumentParser, table: dict, name: str):
    """Looks up a name of the command line; exits with the list of known names if it is unknown."""
    return table[name] if name in table else parser.error(f"no {name}; there are {', '.join(table)}")


def publish(script: str, args: argparse.Namespace, result: dict) -> None:
    """Prints a result as JSON with command, device and versions, and writes it to `args.out` if given."""
    print(write(script, args, result))


def write(script: str, args: argparse.Namespace, result: dict) -> str:
    """Writes a result as JSON with command, device and versions to `args.out`, if given; returns the text."""
    command = " ".join([f"python benchmarks/{script}", *settings(args)])
    text = json.dumps({"command": command, "device": device(), "versions": versions()} | result, indent=2)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    return text


def settings(args: argparse.Namespace) -> list[str]:
    """The flags that reproduce a run; None, False and infinity are flags that were not given."""
    return [
        f"--{name.replace('_', '-')} {'' if value is True else value}"
        for name, value in vars(args).items()
        if name != "out" and value is not None and value is not False and value != math.inf
    ]


def device() -> str:
    """Names of the devices of this machine, one a line."""
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
    """Versions of the packages that figures depend on."""
    return {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")} | {
        "python": platform.python_version()
    }


def say(text: str) -> None:
    """Prints and flushes, so that an interrupted run has printed its rows."""
    print(text, flush=True)


def first_line(error: Exception) -> str:
    """Type and first line of an error, for a row."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:160]
