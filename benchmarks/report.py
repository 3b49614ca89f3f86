"""What every benchmark writes down beside its figures."""

import argparse
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import jax


def publish(script: str, args: argparse.Namespace, result: dict) -> None:
    """Prints a result as JSON with command, device and versions; writes it to `args.out` too, if given."""
    settings = [f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items() if name != "out"]
    command = f"python benchmarks/{script} {' '.join(settings)}"
    text = json.dumps({"command": command, "device": device(), "versions": versions()} | result, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")


def add_out(parser: argparse.ArgumentParser) -> None:
    """The flag that `publish` reads."""
    parser.add_argument("--out", type=Path, help="JSON file to write")


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
