"""What is done on the page's playground is understood by the shipped model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
        reason="there is no Chromium: apt-get install chromium",
    ),
]


def test_nine_of_ten_changes_are_told_right(tmp_path):
    result = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/playground.py", "--worlds", "3", "--out", result]
    subprocess.run(command, check=True, cwd=ROOT, timeout=900)
    found = json.loads(result.read_text(encoding="utf-8"))
    assert found["changes"] == 60
    assert found["told"] >= 0.9
    # Of each kind, some.
    assert {"appear", "leave", "move", "colour", "digit", "cover"} <= set(found["by_kind"])
