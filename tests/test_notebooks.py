"""The notebooks run, and what they show is what they were committed with.

`python tests/test_notebooks.py` runs them and writes what they show into them.
"""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 400_000
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def run(path: Path, check: str = "", folder: Path = FOLDER) -> NotebookNode:
    """Runs a notebook in a folder, and in the end `check` in the same kernel."""
    notebook = nbformat.read(path, as_version=4)
    if check:
        notebook.cells.append(nbformat.v4.new_code_cell(check))
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    return client.execute()


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook: NotebookNode) -> dict[str, str]:
    """Printed output of each cell, by its id."""
    return {
        cell.id: "".join(output.text for output in cell.outputs if output.output_type == "stream")
        for cell in code(notebook)
    }


def unchanged(path: Path, now: NotebookNode) -> None:
    """Asserts that the cells print what is committed."""
    for cell, text in texts(nbformat.read(path, as_version=4)).items():
        assert texts(now)[cell] == text, f"{path.name} shows old output: run python tests/test_notebooks.py"


@pytest.mark.slow
def test_ask_and_watch(tmp_path):
    path = FOLDER / "ask_and_watch.ipynb"
    check = 'assert "card" in moss_jax.ask(video, "What do you see?", engine=engine)'
    notebook = run(path, check, folder=tmp_path)
    assert "wait, now there is a blue circle" in texts(notebook)["watch"].replace("▫", "")
    unchanged(path, notebook)


@pytest.mark.slow
def test_watch_a_stream(tmp_path):
    path = FOLDER / "watch_a_stream.ipynb"
    check = """
first = positions[0, 0]
total = weights.sum(axis=(-1, -2))
assert first > 0 and not total[..., :first].any()
assert abs(total[..., first:] - 1).max() < 1e-5

# The digits that were said are those that were there to be read.
assert [word for _, word in digits] == [stream.world.truth[frame]["digit"] for frame in newest]
# The card lies at the left, in the lower half.
for (i, _), frame in zip(digits, newest):
    grid = in_frame[i - 1, frame, 1:].reshape(4, 4)
    assert grid.argmax() in (8, 12)
    # These 2 of 16 places; evenly spread they would have an eighth.
    assert grid[2:, 0].sum() > 0.3 * grid.sum()
"""
    notebook = run(path, check, folder=tmp_path)
    transcript = texts(notebook)["transcript"]
    _, answers = transcript.split("> What does the card show?")
    number, star = answers.split("> What is under the cover?")
    assert re.search(r"\b3\b", number)
    assert "star" in star
    unchanged(path, notebook)


@pytest.mark.slow
def test_train_a_little(monkeypatch, tmp_path):
    # It computes more than it compiles, which the other tests do not.
    monkeypatch.delenv("XLA_FLAGS")
    path = FOLDER / "train_a_little.ipynb"
    check = """
assert len(losses) == STEPS
assert losses[0] > 6
assert sum(losses[-5:]) / 5 < 0.6 * losses[0]
"""
    unchanged(path, run(path, check, folder=tmp_path))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_is_fit_to_be_read(path):
    assert path.stat().st_size < MAX_BYTES
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata == METADATA
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    for cell in code(notebook):
        assert all(output.output_type != "error" for output in cell.outputs)
        assert all(output.get("name") != "stderr" for output in cell.outputs)
        for statement in ast.walk(ast.parse(cell.source)):
            if isinstance(statement, ast.Import):
                assert {alias.name.split(".")[0] for alias in statement.names} == {"moss_jax"}
            if isinstance(statement, ast.ImportFrom):
                assert statement.module.split(".")[0] == "moss_jax"
        shown = "".join(texts(notebook).values()) + cell.source
        assert not re.search(r"site-packages|/(home|root|tmp|usr|work)/", shown)


def main() -> None:
    for path in PATHS:
        notebook = run(path)
        notebook.metadata = METADATA
        nbformat.write(notebook, path)
        print(path)


if __name__ == "__main__":
    main()
