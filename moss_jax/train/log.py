"""Metrics of a run: metrics.jsonl, TensorBoard, a progress line, and the loss curve."""

import contextlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, SupportsFloat

import jax
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from moss_jax.train.losses import count_of

METRICS = "metrics.jsonl"
CURVE = "loss.png"
# Window of the moving average in the loss curve, as a share of the run.
SMOOTHING = 0.02


class Log:
    """Records every step of a run in WORKDIR/metrics.jsonl, and reports means at intervals.

    A context manager. Records of an earlier run are kept up to step `start`.

    Args:
      workdir: the run's folder.
      config: shown in TensorBoard.
      start: number of steps done before.
      steps: number of steps of the whole run.
      every: steps between two reports.
      peak_flops: peak FLOPS of all devices together; None if unknown.
    """

    def __init__(
        self, workdir: Path, *, config: str, start: int, steps: int, every: int, peak_flops: float | None
    ):
        self._steps, self._every, self._peak = steps, every, peak_flops
        self._metrics = _open_metrics(workdir / METRICS, start)
        # Not a SummaryWriter: when the disk is full its thread dies, and its callers block forever.
        self._board = EventsWriter(str(workdir / "events"))
        if start:
            # TensorBoard drops the events of later steps that an earlier run wrote.
            restart = SessionLog(status=SessionLog.START)
            self._board.write_event(Event(wall_time=time.time(), step=start + 1, session_log=restart))
        self._write_summary(start, summary.text("config", "```\n" + config + "\n```"))
        self._console = Console(highlight=False)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(table_column=Column(min_width=2 * len(str(steps)) + 1)),
            TimeRemainingColumn(table_column=Column(min_width=7)),
            TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True)),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps, completed=start, numbers="compiling")
        self._window: list[_Record] = []
        self._dropped = 0
        # When the previous step was finished.
        self._clock: float | None = None

    def __enter__(self) -> "Log":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()
        for file in (self._board, self._metrics):
            with contextlib.suppress(OSError):  # from a full disk, which has been raised before
                file.close()

    def record(
        self,
        step: int,
        metrics: Mapping[str, SupportsFloat],
        *,
        finished: float,
        compiled: bool = False,
        flops: float = 0.0,
        dropped: int = 0,
    ) -> None:
        """Records the metrics of a step; steps must be in order.

        A mean loss is left out for a step without targets of its kind; a report averages it over the targets
        of all its steps. `loss` itself is recorded for every step: without any target it is 0.

        Args:
          step: counted from 1.
          metrics: scalars by name, as returned by `Trainer.step`.
          finished: time at which the device finished the step, by `time.perf_counter`.
          compiled: whether a program was compiled for the step; rates exclude such steps.
          flops: model FLOPs of the step.
          dropped: number of rows dropped so far.
        """
        values = {name: float(value) for name, value in metrics.items()}
        counts = {name: values.get(count_of(name) or "", 1.0) for name in values}
        recorded = {name: value for name, value in values.items() if counts[name] or name == "loss"}
        self._metrics.write(json.dumps({"step": step, **recorded}) + "\n")
        self._metrics.flush()
        first = self._clock is None
        seconds = None if self._clock is None or compiled else finished - self._clock
        self._clock, self._dropped = finished, dropped
        self._window.append(_Record(values, counts, flops, seconds))
        if first or step % self._every == 0 or step == self._steps:
            self._report(step)

    def _report(self, step: int) -> None:
        """Reports the means since the last report, and the rates of the steps whose time is known."""
        window, self._window = self._window, []
        scalars = {}
        for name in window[0].values:
            if count := sum(record.counts[name] for record in window):
                total = sum(record.values[name] * record.counts[name] for record in window)
                scalars[f"train/{name}"] = total / count
        timed = [record for record in window if record.seconds is not None]
        if seconds := sum(record.seconds or 0 for record in timed):
            scalars["speed/steps_per_second"] = len(timed) / seconds
            for unit in ("tokens", "frames"):
                scalars[f"speed/{unit}_per_second"] = sum(r.values[unit] for r in timed) / seconds
            if self._peak:
                scalars["speed/mfu"] = sum(record.flops for record in timed) / seconds / self._peak
        if memory := (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"):
            scalars["memory/peak_gib"] = memory / 2**30
        if self._dropped:
            scalars["data/dropped_rows"] = self._dropped
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write_summary(step, Summary(value=values))
        numbers = _numbers(scalars)
        self._progress.update(self._task, completed=step, numbers=numbers)
        if not self._console.is_terminal:
            print(f"step {step}/{self._steps}  {numbers}", flush=True)

    def _write_summary(self, step: int, content: Summary) -> None:
        self._board.write_event(Event(wall_time=time.time(), step=step, summary=content))
        self._board.flush()


class _Record(NamedTuple):
    """Metrics of one step and their weights, as a report averages them.

    Attributes:
      values: metrics by name.
      counts: weight of each metric in a mean over several steps.
      flops: model FLOPs.
      seconds: since the step before was finished; None if a program was compiled in between.
    """

    values: dict[str, float]
    counts: dict[str, float]
    flops: float
    seconds: float | None


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """Reads the records of a run, except a last line that was truncated by a kill."""
    rows = []
    file = workdir / METRICS
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def draw_curve(workdir: Path) -> Path | None:
    """Draws the loss over the steps into WORKDIR/loss.png; returns None if no step was recorded."""
    rows = [row for row in read_metrics(workdir) if math.isfinite(row["loss"]) and row.get("targets", 1)]
    if not rows:
        return None
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    width = max(1, round(len(losses) * SMOOTHING))
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    smooth = [(sums[i] - sums[max(0, i - width)]) / min(i, width) for i in range(1, len(sums))]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.75", linewidth=0.7, label="each step")
    axes.plot(steps, smooth, color="C0", label=f"mean of {width} steps")
    if min(losses) > 0:
        axes.set_yscale("log")
        # Plain numbers, even if the losses span less than a decade.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(workdir / CURVE, dpi=120)
    return workdir / CURVE


def _open_metrics(file: Path, start: int):
    """Opens the file for appending after the records of the first `start` steps; removes later ones."""
    kept = [json.dumps(row) + "\n" for row in read_metrics(file.parent) if row["step"] <= start]
    draft = file.with_suffix(".draft")
    draft.write_text("".join(kept), encoding="utf-8")
    draft.replace(file)
    return file.open("a", encoding="utf-8")


def _numbers(scalars: Mapping[str, float]) -> str:
    """Formats the most important scalars on one line."""
    parts = [
        f"loss {scalars['train/loss']:.4f}" if "train/loss" in scalars else "no targets",
        f"grad {scalars['train/grad_norm']:.3g}",
        f"lr {scalars['train/learning_rate']:.2e}",
    ]
    if "speed/tokens_per_second" in scalars:
        parts.append(f"{scalars['speed/tokens_per_second']:,.0f} tok/s")
        parts.append(f"{scalars['speed/frames_per_second']:,.0f} frames/s")
    if "speed/mfu" in scalars:
        parts.append(f"MFU {scalars['speed/mfu']:.1%}")
    if "memory/peak_gib" in scalars:
        parts.append(f"{scalars['memory/peak_gib']:.1f} GiB")
    if "data/dropped_rows" in scalars:
        parts.append(f"{scalars['data/dropped_rows']} rows dropped")
    return "  ".join(parts)
