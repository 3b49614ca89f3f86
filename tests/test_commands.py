"""The commands of the package: `--help` explains each of them and does nothing else."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [ROOT / "serve.py", ROOT / "train.py"]
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for file in (ROOT / "moss_jax").rglob("*.py")
    if 'if __name__ == "__main__":' in file.read_text().splitlines()
)

# A module that is imported already is run again, as a program.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def state() -> dict[Path, int]:
    """When each file of the repository that a command might write was last written."""
    folders = ("moss_jax", "checkpoints", "configs", "assets")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file()]
    return {file: file.stat().st_mtime_ns for file in files if "__pycache__" not in file.parts}


def exit_code(command: str | Path, monkeypatch, *arguments: str) -> object:
    """Runs a module or script as a program, in this process."""
    monkeypatch.setattr("sys.argv", [str(command), *arguments])
    run = runpy.run_path if isinstance(command, Path) else runpy.run_module
    with pytest.raises(SystemExit) as end:
        run(str(command), run_name="__main__")
    return end.value.code


def test_all_commands_are_found():
    assert {"moss_jax.convert", "moss_jax.serve", "moss_jax.text.train_tokenizer", "moss_jax.train"} <= set(
        MODULES
    )


@pytest.mark.parametrize("command", [*MODULES, *SCRIPTS], ids=str)
def test_help_explains_and_does_nothing(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = state()
    assert exit_code(command, monkeypatch, "--help") in (0, None)
    assert capsys.readouterr().out.startswith("usage: ")
    assert state() == before
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_is_written_only_where_asked(tmp_path, monkeypatch, capsys):
    before = state()
    assert exit_code("moss_jax.text.train_tokenizer", monkeypatch) == 2
    assert "the following arguments are required: --out" in capsys.readouterr().err
    assert exit_code("moss_jax.text.train_tokenizer", monkeypatch, "--out", str(tmp_path)) == 2
    assert "--out cannot be written: " in capsys.readouterr().err
    assert state() == before
