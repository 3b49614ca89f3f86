"""Tables of the evaluation of memory for the terminal, and its figure."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from moss_jax.eval.memory.ages import WHOLE

GUESS = "best constant guess"
# Baselines of the figure, in grey.
STYLES: dict[str, dict[str, Any]] = {
    "full": {"color": "0.2", "linestyle": "-"},
    "window 4": {"color": "0.35", "linestyle": "-."},
    "recent-4": {"color": "0.45", "linestyle": (0, (5, 1))},
    GUESS: {"color": "0.5", "linestyle": "--"},
    "empty bank": {"color": "0.65", "linestyle": ":"},
}


def print_tables(result: Mapping[str, Any], console: Console) -> None:
    """Prints the result of `evaluate`."""
    console.print(
        f"{result['checkpoint']} · seed {result['seed']} · {result['streams']} streams of "
        f"{result['minutes']:g} min · {result['device']}",
        markup=False,
    )
    rows, totals = list(_rows(result)), result["constant_guess"]
    ages = totals["by_age"]
    table = Table("age of the evidence", "all", *ages)
    for name, found in rows:
        table.add_row(name, share(found["all"]), *(share(found["by_age"][age]) for age in ages))
    table.add_row("n", *(str(count["total"]) for count in (totals["all"], *ages.values())))
    console.print(table)
    table = Table("question", "n", *(name for name, _ in rows))
    for kind, count in totals["by_kind"].items():
        table.add_row(kind, str(count["total"]), *(share(found["by_kind"][kind]) for _, found in rows))
    console.print(table)
    table = Table(
        "last minute (first)", "right about now", "alerts, F1", "silent", "revised", "false statements"
    )
    # The newest frames alone are no stream: they have no minutes, and no speed.
    streams = [run for run in result["runs"] if "last_minute" in run]
    for run in streams:
        last, first = run["last_minute"], run["first_minute"]
        figures = (
            [minute["accuracy"]["value"], minute["alerts"]["f1"]]
            + [minute[key]["value"] for key in ("silence", "revision", "stale")]
            for minute in (last, first)
        )
        table.add_row(label(run), *(f"{number(a)} ({number(b)})" for a, b in zip(*figures, strict=True)))
    console.print(table)
    table = Table("cost", "kB a bank", "ms a token", "ms a frame", "x real time")
    for run in streams:
        table.add_row(
            label(run),
            f"{run['bank_bytes'] / 1000:,.0f}",
            number(run["ms_per_token"]),
            number(run["ms_per_frame"]),
            f"{run['times_real_time']:.1f}",
        )
    console.print(table)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draws how much is right over the age of the evidence, one line a run.

    Args:
      result: result of `evaluate`.
      path: path of the file; its suffix selects the format.
    """
    totals = result["constant_guess"]["by_age"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, found in _rows(result):
        shares = [found["by_age"][age]["right"] / found["by_age"][age]["total"] for age in totals]
        # Evidence that is spread over the whole stream has no age, so no line leads to it.
        aged = len(shares) - (WHOLE in totals)
        style = STYLES.get(name, {"marker": "o"})
        (line,) = axes.plot(range(aged), shares[:aged], markersize=4, label=name, **style)
        axes.plot(range(aged, len(shares)), shares[aged:], "o", markersize=4, color=line.get_color())
    axes.set_xticks(range(len(totals)), [f"{age}\nn = {found['total']}" for age, found in totals.items()])
    axes.set(xlabel="age of the evidence", ylabel="right answers", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)


def label(run: Mapping[str, Any]) -> str:
    """Label of a run: the memory, the size of its bank unless that is the baseline's own, and its dtype."""
    chosen = "" if run["memory"].startswith(("recent", "full", "empty")) else f" {run['frames']}"
    return f"{run['memory']}{chosen}{' ' + run['bank_dtype'] if run['bank_dtype'] else ''}"


def share(count: Mapping[str, float]) -> str:
    """Formats a count of right answers as a share."""
    return number(count["right"] / count["total"] if count["total"] else None)


def number(value: float | None) -> str:
    """Formats a number for a table."""
    return "-" if value is None else f"{value:.3f}"


def _rows(result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The name and the counts of every run, and of the constant guess."""
    for run in result["runs"]:
        yield label(run), run
    yield GUESS, result["constant_guess"]
