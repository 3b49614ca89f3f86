"""The pages: their links lead somewhere, the files that they name exist, and their Python code runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "checkpoints" / "moss-tiny" / "README.md",
]
FOLDERS = (
    "assets",
    "benchmarks",
    "checkpoints",
    "configs",
    "deploy",
    "docs",
    "moss_jax",
    "notebooks",
    "tests",
)
FILE = re.compile(
    r"`((?:[\w.-]+/)*[\w-]+\.(?:py|gin|json|png|npz|ipynb|md|toml|txt|log|svg|mp4)|(?:[\w.-]+/)+)`"
)
# Written by a run, or part of a checkpoint.
ELSEWHERE = {
    "config.gin",
    "config.json",
    "metrics.jsonl",
    "loss.png",
    "preprocessor_config.json",
    "processor_config.json",
    "result.json",
}


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Names by which the headings of a page are linked, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


# The log and the changelog name files that are gone.
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in ("log.md", "CHANGELOG.md")],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_files_that_pages_name_exist(page):
    # A table or a section may name paths from a folder on.
    paths = [*ROOT.iterdir(), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    known = [f"/{path.relative_to(ROOT).as_posix()}" for path in paths]
    named = {name.rstrip("/") for name in FILE.findall(without_code(page))} - ELSEWHERE
    assert not {name for name in named if not any(path.endswith(f"/{name}") for path in known)}


def snippets() -> list:
    """The Python blocks of all pages but extending.md, whose edits and files have a test of their own."""
    found = []
    for page in PAGES:
        if page.name != "extending.md":
            blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
            found += [pytest.param(block, id=f"{page.stem}-{i}") for i, block in enumerate(blocks)]
    return found


# What a block prints on some line.
PRINTS = {
    "moss_jax.ask(": "a card with an 8.",  # The offline answer.
    "one_pass": "a yellow ring and a card with an 8.",  # By the three verbs, over the first frames.
    "session.push_prompt": "Text(slot=0",
}


@pytest.mark.slow
@pytest.mark.parametrize("code", snippets())
def test_a_snippet_runs_by_itself(code):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name, line in PRINTS.items():
        if name in code:
            assert line in done.stdout
