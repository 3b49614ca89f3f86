"""The wheel, installed into an environment of its own and run from another folder."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def run(*command, cwd: Path) -> subprocess.CompletedProcess:
    # What pytest and this process have on their path must not stand in for the wheel.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def output(*command, cwd: Path) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The `bin` of a virtual environment with the wheel, which is built from the sdist."""
    folder = tmp_path_factory.mktemp("package")
    output(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    output(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=folder)
    # The dependencies are those of this environment, since to install them again takes minutes. A folder in a
    # .pth file comes after site-packages, and .pth files in it, so editable installs, are not read.
    (site,) = folder.glob("venv/lib/*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python.parent


def test_the_wheel_is_imported(installed, tmp_path):
    file = output(installed / "python", "-c", "import moss_jax; print(moss_jax.__file__)", cwd=tmp_path)
    assert Path(file).is_relative_to(installed.parent)


def test_serve_watches_a_video_with_the_shipped_model(installed, tmp_path):
    code = "from moss_jax.shipped import shipped; print(shipped('assets/demo.mp4'))"
    video = Path(output(installed / "python", "-c", code, cwd=tmp_path).strip())
    assert video.is_relative_to(installed.parent)
    command = installed / "moss-jax-serve", "--video", video
    lines = output(*command, "--prompt", "What do you see?", "--json", cwd=tmp_path).splitlines()
    texts = [event["text"] for event in map(json.loads, lines) if event["type"] == "text"]
    assert "".join(texts).startswith("The table is")


def test_train_finds_the_shipped_configs(installed, tmp_path):
    command = installed / "moss-jax-train", "--gin_file", "tabletop_tiny.gin", "--workdir", tmp_path
    done = run(*command, "--gin_param", "train.steps = 0", cwd=tmp_path)
    assert done.returncode == 2
    assert "steps must be" in done.stderr
