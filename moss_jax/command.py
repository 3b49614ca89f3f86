"""Shared parts of the commands: exit codes, signals, output, flags, and the compilation cache."""

import argparse
import contextlib
import errno
import gc
import logging
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from moss_jax.config import SEEDS

BAD_OUTPUT, BAD_INPUT = 1, 2
# Base exit code of a process terminated by a signal, to which the signal's number is added.
SIGNALLED = 128
# Errors of writing to an open file, which do not name it.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

_logger = logging.getLogger(__name__)


def freeze_heap() -> None:
    """Excludes all present objects from garbage collection, in a process that serves streams from now on.

    Compiled programs consist of a million and more Python objects, which live as long as the process. To go
    through them takes the collector most of a second, in which no stream gets a token.
    """
    gc.collect()
    gc.freeze()


def run(name: str, body: Callable[[], int | None], bad_input: tuple[type[Exception], ...]) -> int:
    """Runs the body of a command and returns its exit code, with a sentence on stderr if it failed.

    The code is the body's result, or 0 if None; 1 if the output cannot be written, 2 for bad input, 130 after
    Ctrl-C. A reader that closes the pipe behind stdout, as `head` does, is not an error.

    Args:
      name: name of the command; the sentence starts with it.
      body: the command; it may raise.
      bad_input: exceptions that it raises for bad input.
    """
    # Characters that the terminal can't show, and undecodable bytes of a path, are written as escapes.
    sys.stdout = _escaping(sys.stdout)
    sys.stderr = _escaping(sys.stderr)
    try:
        code = body() or 0
        sys.stdout.flush()
    except bad_input as error:
        tell(f"{name}: {error}")
        code = BAD_INPUT
    except KeyboardInterrupt:
        code = SIGNALLED + signal.SIGINT
    except BrokenPipeError:
        code = 0
    except OSError as error:
        if error.filename is None and error.errno not in DISK_ERRORS:
            raise
        tell(f"{name}: {error.filename or 'the output'}: {error.strerror}")
        code = BAD_OUTPUT
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                # Redirected to the null device, so that the interpreter can flush the rest at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def _escaping(stream):
    if stream is None:  # Closed by the shell, as in `command >&-`.
        return open(os.devnull, "w", encoding="utf-8")
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return stream


def tell(text: str, end: str = "\n") -> None:
    """Prints on stderr; ignores write errors, such as a closed pipe."""
    with contextlib.suppress(OSError):
        print(text, end=end, file=sys.stderr, flush=True)


class PipeConsole(Console):
    """A console on stdout that leaves a closed pipe to `run`."""

    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError, for which the base class would exit."""
        raise BrokenPipeError


@contextlib.contextmanager
def progress(task: str) -> Iterator[None]:
    """Reports a long task on stderr: a running clock on a terminal, otherwise a line at start and end."""
    started = time.monotonic()
    done = threading.Event()

    def show(begin: str = "", end: str = "\n") -> None:
        tell(f"{begin}{task}: {time.monotonic() - started:.0f} s", end=end)

    def tick() -> None:
        while not done.wait(1):
            show("\r", end="")

    clock = threading.Thread(target=tick, name="progress", daemon=True)
    terminal = sys.stderr.isatty()
    if terminal:
        clock.start()
    else:
        tell(f"{task} ...")
    try:
        yield
    finally:
        done.set()
        if terminal:
            clock.join()
        show("\r" if terminal else "")


class _Rate(ProgressColumn):
    """Column with the rate, in items a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


def counted[T](task: str, items: Iterable[T], total: int) -> Iterator[T]:
    """Yields the items; if stderr is a terminal, a progress bar shows count, rate and time left.

    Args:
      task: what is counted.
      total: number of items.
    """
    console = Console(file=sys.stderr)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not (sys.stderr.isatty() and console.is_terminal),
    )
    with bar:
        yield from bar.track(items, total=total, description=task)


# ---------------------------------------------------------------------------------------- signals


def leave(number: int) -> None:
    """Ends the process with the exit code of a signal, whatever its threads are doing."""
    os._exit(SIGNALLED + number)


@contextlib.contextmanager
def on_stop_signal(handle: Callable[[int], object]) -> Iterator[None]:
    """Calls `handle` with the number of the first SIGINT or SIGTERM; the second ends the process immediately.

    It is called in a separate thread, so it runs even while the main thread compiles a program, when Python
    runs no signal handlers. After a signal, the handlers stay in place until the process ends.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    came = threading.Event()

    def watch() -> None:
        with reader, writer:
            if number := reader.recv(1):
                came.set()
                handle(number[0])
            if number := reader.recv(1):
                leave(number[0])

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    # With a handler in Python, the interpreter writes the number to the socket immediately.
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
    descriptor = signal.set_wakeup_fd(writer.fileno())
    try:
        yield
    finally:
        if not came.is_set():
            signal.set_wakeup_fd(descriptor)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            writer.shutdown(socket.SHUT_WR)
            thread.join()


# ------------------------------------------------------------------------------------------ flags


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of each flag that has one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unset = action.default is None or action.default is False or action.default in ([], "", math.inf)
        return action.help if unset else super()._get_help_string(action)


def at_least(least: int) -> Callable[[str], int]:
    """Flag type: a whole number with a lower bound."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        return value

    return convert


def seed(text: str) -> int:
    """Flag type: the seed of a random number generator."""
    value = at_least(0)(text)
    if value not in SEEDS:
        raise argparse.ArgumentTypeError(f"must be less than 2**63, not {value}")
    return value


def output_file(text: str) -> Path:
    """Flag type: an output file, whose folder is created; rejected immediately if it can't be written."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {error.strerror}") from error
    return path


def check_writable(path: Path) -> None:
    """Checks that a file can be written, without changing it.

    Raises:
      OSError: it cannot.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not path.exists():
        path.touch()
        path.unlink()
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


# ------------------------------------------------------------------------------ compiled programs


def add_compilation_cache(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that `cache_compilations` reads."""
    parser.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="folder that keeps compiled programs for the next run; empty for none (default: "
        "$JAX_COMPILATION_CACHE_DIR, or moss_jax in $XDG_CACHE_HOME or ~/.cache)",
    )


def cache_compilations(folder: str | None) -> None:
    """Enables JAX's persistent compilation cache in a folder.

    The setting affects the whole process, so this is for commands. If the folder can't be written, it logs a
    warning and changes nothing.

    Args:
      folder: "" for none; None for the one already set in JAX, or `default_cache` if there is none.
    """
    if folder is None and jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        path = str(_prepared(default_cache() if folder is None else Path(folder))) if folder != "" else None
    except (OSError, RuntimeError) as error:
        _logger.warning("compiled programs are not kept for the next run: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", path)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Each program of the small model compiles within JAX's default of one second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _prepared(folder: Path) -> Path:
    """Creates a folder if it is missing, and checks that it is writable; raises OSError if not."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"0")
    return folder.resolve()


def default_cache() -> Path:
    """The folder for compiled programs in the user's cache, by the XDG base directory specification.

    Raises:
      RuntimeError: there is no home directory.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "moss_jax" / "compiled"
