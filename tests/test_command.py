"""What the commands share: exit codes, output, signals, flags, compiled programs on disk."""

import argparse
import errno
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from moss_jax import command, serve
from moss_jax.convert import __main__ as convert_command
from moss_jax.eval.tabletop import __main__ as eval_command
from moss_jax.train import __main__ as train_command

ROOT = Path(__file__).resolve().parents[1]


def write_streams() -> None:
    """Runs `python -m moss_jax.worlds.tabletop`."""
    runpy.run_module("moss_jax.worlds.tabletop", run_name="__main__")


class Terminal(io.StringIO):
    """A stand-in for a terminal."""

    def isatty(self) -> bool:
        return True


def test_what_is_counted_shows_on_a_terminal_alone(monkeypatch):
    for out, is_shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", out)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "100")
        counted = command.counted("frames", iter("abc"), 3)
        assert out.getvalue() == ""
        assert list(counted) == ["a", "b", "c"]
        assert ("frames" in out.getvalue()) == is_shown
        assert ("3/3" in out.getvalue()) == is_shown


# ------------------------------------------------------------------------------ exit codes, output


def raises(error: BaseException):
    def body():
        raise error

    return body


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (lambda: None, 0, ""),
        (lambda: 7, 7, ""),
        (raises(LookupError("no such thing")), 2, "name: no such thing\n"),
        (raises(KeyboardInterrupt()), 130, ""),
        (raises(BrokenPipeError()), 0, ""),
        (
            raises(OSError(errno.ENOSPC, "No space left on device")),
            1,
            "name: the output: No space left on device\n",
        ),
        (
            raises(PermissionError(errno.EACCES, "Permission denied", "/x.png")),
            1,
            "name: /x.png: Permission denied\n",
        ),
    ],
)
def test_exit_codes(capsys, body, code, message):
    assert command.run("name", body, (LookupError,)) == code
    assert capsys.readouterr().err == message


def test_other_errors_are_raised():
    for error in (ConnectionError("reset"), ZeroDivisionError()):
        with pytest.raises(type(error)):
            command.run("name", raises(error), (LookupError,))


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", rb"\xe9\u4e2d\udcff"),
        ("latin-1", b"\xe9" + rb"\u4e2d\udcff"),
        ("utf-8", "é中".encode() + rb"\udcff"),
    ],
)
def test_every_character_is_printed_if_only_as_an_escape(monkeypatch, encoding, shown):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert command.run("name", lambda: print("é中\udcff", end=""), ()) == 0
    assert written.getvalue() == shown


def test_closed_streams_are_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert command.run("name", lambda: print("text", file=sys.stderr), ()) == 0
    assert command.run("name", raises(LookupError("no such thing")), (LookupError,)) == 2


def test_progress_is_a_line_at_either_end_or_one_that_runs(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, shown in (
        (io.StringIO(), "compiling ...\ncompiling: 0 s\n"),
        (Terminal(), "\rcompiling: 0 s\n"),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        with command.progress("compiling"):
            pass
        assert stream.getvalue() == shown


# ---------------------------------------------------------------------------------------- signals

BUSY = """
import hashlib, os, signal
from moss_jax import command

with command.on_stop_signal(lambda number: os.write(1, b"stopping\\n")):
    os.write(1, b"busy\\n")
    # As a compiler does, this runs for long without a look at signals.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_the_process_at_once(number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "busy\n"
    process.send_signal(number)
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (code, "")


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with command.on_stop_signal(command.leave):
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# ------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    ("main", "words", "shown"),
    [
        (
            serve.main,
            [],
            [
                "video (default: 1)",
                "the wall clock (default: lockstep;",
                "sampling (default: 0)",
                "before it (default: 0)",
            ],
        ),
        (train_command.main, [], ["$JAX_COMPILATION_CACHE_DIR"]),
        (convert_command.main, ["export"], ["parameters (default: bfloat16)", "(default: the latest)"]),
        (
            eval_command.main,
            [],
            [
                "streams (default: 200)",
                "stream (default: 32)",
                "held-out streams (default: 0)",
                "(default: 8)",
            ],
        ),
        (
            write_streams,
            [],
            ["stream (default: 32)", "streams (default: 0)", "least 32 (default: 448)"],
        ),
    ],
)
def test_helps_show_defaults(monkeypatch, capsys, main, words, shown):
    monkeypatch.setattr(sys, "argv", ["command", *words, "--help"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in shown:
        assert part in text
    assert "(default: None)" not in text
    assert "(default: False)" not in text
    assert "(default: [])" not in text


def test_helps_of_benchmarks_show_defaults(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import report  # pyright: ignore[reportMissingImports]

    parser = report.make_parser("First line.\n\n    python script.py\n")
    report.add_out(parser)
    parser.add_argument("--repeats", type=int, default=9, help="samples")
    text = parser.format_help()
    assert "samples (default: 9)" in text
    assert "JSON file to write\n" in text
    assert "\n    python script.py\n" in text


SEEDS = [("-1", "must be at least 0, not -1"), ("9" * 20, "must be less than 2**63"), ("a", "whole number")]


@pytest.mark.parametrize(("text", "message"), SEEDS)
@pytest.mark.parametrize(
    ("main", "words"),
    [(serve.main, ["--video", "x.mp4"]), (eval_command.main, []), (write_streams, ["--out", "x"])],
)
def test_bad_seeds_are_refused_by_every_command(monkeypatch, capsys, main, words, text, message):
    monkeypatch.setattr(sys, "argv", ["command", *words, f"--seed={text}"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_largest_seed_is_taken():
    assert command.seed(str(2**63 - 1)) == 2**63 - 1
    jax.random.key(2**63 - 1)


def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    assert command.output_file(str(tmp_path / "new" / "x.json")) == tmp_path / "new" / "x.json"
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    for bad in (tmp_path, tmp_path / "file" / "x.json", tmp_path / ("x" * 300)):
        with pytest.raises(argparse.ArgumentTypeError, match="cannot be written"):
            command.output_file(str(bad))
    monkeypatch.setattr(eval_command, "evaluate", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit):
        eval_command.main(["--json", str(tmp_path)])
    assert "Is a directory" in capsys.readouterr().err


def test_an_evaluation_is_written_though_no_one_reads_its_tables(tmp_path, monkeypatch):
    def print_tables(*_):
        raise BrokenPipeError

    monkeypatch.setattr(eval_command, "evaluate", lambda *_: {"accuracy": 1})
    monkeypatch.setattr(eval_command, "print_tables", print_tables)
    assert eval_command.main(["--json", str(tmp_path / "scores.json")]) == 0
    assert (tmp_path / "scores.json").read_text() == '{\n  "accuracy": 1\n}\n'


# ------------------------------------------------------------------------------ compiled programs


@pytest.fixture
def jax_cache(monkeypatch):
    """JAX as it is without a folder for compiled programs; its settings are restored."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: jax.config.jax_compilation_cache_dir
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_in_the_users_cache(jax_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command.cache_compilations(None)
    assert jax_cache() == str(tmp_path / "cache" / "moss_jax" / "compiled")
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # Not valid, so ignored.
    monkeypatch.setenv("HOME", str(tmp_path))
    command.cache_compilations(None)
    assert jax_cache() == str(tmp_path / ".cache" / "moss_jax" / "compiled")


def test_the_folder_that_jax_is_set_to_is_used_but_for_a_flag(jax_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", "/theirs")
    command.cache_compilations(None)
    assert jax_cache() == "/theirs"
    command.cache_compilations(str(tmp_path / "mine"))
    assert jax_cache() == str(tmp_path / "mine")
    command.cache_compilations("")
    assert jax_cache() is None


def test_a_folder_that_cannot_be_written_is_one_warning(jax_cache, tmp_path, caplog):
    (tmp_path / "file").touch()
    command.cache_compilations(str(tmp_path / "file" / "folder"))
    assert jax_cache() is None
    (record,) = caplog.records
    assert "compiled programs are not kept for the next run" in record.getMessage()
    assert str(tmp_path / "file") in record.getMessage()


def test_a_second_process_finds_the_programs(tmp_path):
    code = """
import jax, sys
from moss_jax import command
command.cache_compilations(None)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append("cache_hits" in event))
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8))).block_until_ready()
print(any(hits))
"""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    script = [sys.executable, "-c", code]
    found = [subprocess.check_output(script, cwd=ROOT, env=environment, text=True) for _ in range(2)]
    assert found == ["False\n", "True\n"]
    assert list((tmp_path / "moss_jax" / "compiled").iterdir())


def test_the_library_changes_no_setting_of_jax(jax_cache):
    import moss_jax.api  # noqa: F401

    assert jax_cache() is None
