"""The examples of docs/extending.md: their edits, in a copy of the package, and their code."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECTIONS = re.split(r"^## (.+)\n", (ROOT / "docs" / "extending.md").read_text(), flags=re.M)[1:]


def edit(file: Path, diff: str) -> None:
    """Applies a diff without line numbers, whose old lines are once in the file."""
    lines = diff.splitlines(keepends=True)
    old, new = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
    text = file.read_text()
    assert text.count(old) == 1, f"{file.name} has this {text.count(old)} times:\n{old}"
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "text", [pytest.param(text, id=title) for title, text in zip(SECTIONS[::2], SECTIONS[1::2], strict=True)]
)
def test_example(text, tmp_path):
    shutil.copytree(ROOT / "moss_jax", tmp_path / "moss_jax")
    for shared in ("checkpoints", "configs"):
        (tmp_path / shared).symlink_to(ROOT / shared)
    script = ""
    for language, path, code in re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", text, re.M | re.S):
        file = tmp_path / path
        if language == "diff":
            edit(file, code)
        elif path:
            file.parent.mkdir(exist_ok=True)
            file.write_text(code)
        else:
            script += code
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
