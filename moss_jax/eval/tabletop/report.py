"""Tables of an evaluation's result, for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from moss_jax.worlds.tabletop.language import PAST


def print_tables(result: Mapping[str, Any], console: Console) -> None:
    """Prints the result of `evaluate`."""
    blind, offline = result.get("blind"), result.get("offline")
    alerts, revision, narration = result["alerts"], result["revision"], result["narration"]
    rows = [
        ("answers right when probed, each question once", result["accuracy"]),
        ("  over all probes", result["accuracy_all_probes"]),
        ("  at first probes", result["accuracy_first_probes"]),
        ("  about the present", result["accuracy_now"]),
        ("  best constant guess", result["constant_guess"]),
        *([("  frames taken away", blind["accuracy"])] if blind else []),
        *([("  one question a stream, clip seen whole first", offline["accuracy"])] if offline else []),
        *([("  the same questions live", offline["streaming_accuracy"])] if offline else []),
        ("alerts: F1", {"value": alerts["f1"]}),
        ("  recall", alerts["recall"]),
        ("  precision", alerts["precision"]),
        ("silent when nothing is due, frames", result["silence"]),
        ("revised within 3 s", revision),
        ("  corrections in mid-sentence, true", revision["mid_sentence"]),
        ("narration: recall", narration["recall"]),
        ("  precision", narration["precision"]),
        ("statements that were false", result["stale"]),
        ("statements understood", result["understood"]),
        *([("frames encoded", result["encoded"])] if result["selection"]["enabled"] else []),
    ]
    last = f", the last {result['last']} s of each" if result["last"] else ""
    console.print(
        f"{result['checkpoint']} · seed {result['seed']} · {result['streams']} streams of "
        f"{result['seconds']} s{last} · {result['times_real_time']:.1f} x real time",
        markup=False,
    )
    table = Table("", "share", "n")
    for name, found in rows:
        table.add_row(name, _number(found["value"]), str(found.get("n", "")))
    if revision["median_delay_s"] is not None:
        table.add_row("revision delay, median", f"{revision['median_delay_s']:.2f} s", "")
    if result["streams_cut_short"]:
        table.add_row("streams that ran out of room", "", str(result["streams_cut_short"]))
    console.print(table)
    table = Table("question", "right", "n", "constant guess", *(["frames taken away"] if blind else []))
    for kind, found in result["by_kind"].items():
        unseen = [_number(blind["by_kind"].get(kind, {}).get("value"))] if blind else []
        when = " (past)" if kind in PAST else ""
        table.add_row(
            kind + when, _number(found["value"]), str(found["n"]), _number(found["constant_guess"]), *unseen
        )
    console.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
