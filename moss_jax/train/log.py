"""Metrics of a run: metrics.jsonl, TensorBoard, a progress line, and the loss curve."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import SupportsFloat

import jax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from tensorboardX import SummaryWriter

METRICS = "metrics.jsonl"
CURVE = "loss.png"
# Window of the moving average in the loss curve, as a share of the run.
SMOOTHING = 0.02


class Log:
    """Records every step of a run in WORKDIR/metrics.jsonl, and reports means at intervals.

    A context manager. Records of an earlier run are kept up to step `start`.

    Args:
      workdir: of the run.
      config: shown in TensorBoard.
      start: number of steps done before.
      steps: of the whole run.
      every: steps between two reports.
      peak_flops: peak FLOPS of all devices together; None if unknown.
    """

    def __init__(
        self, workdir: Path, *, config: str, start: int, steps: int, every: int, peak_flops: float | None
    ):
        self._steps, self._every, self._peak = steps, every, peak_flops
        self._metrics = _open_metrics(workdir / METRICS, start)
        self._board = SummaryWriter(str(workdir), purge_step=start + 1 if start else None)
        self._board.add_text("config", "```\n" + config + "\n```", start)
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
        self._window: list[Mapping[str, float]] = []
        self._dropped = 0
        # The clock starts after the first step, so that compilation doesn't count.
        self._clock: float | None = None

    def __enter__(self) -> "Log":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()
        self._board.close()
        self._metrics.close()

    def record(
        self, step: int, metrics: Mapping[str, SupportsFloat], *, flops: float = 0.0, dropped: int = 0
    ) -> None:
        """Records the metrics of a step; steps must be in order.

        Args:
          step: counted from 1.
          metrics: scalars by name.
          flops: model FLOPs of the step.
          dropped: number of rows dropped so far.
        """
        metrics = {name: float(value) for name, value in metrics.items()}
        self._metrics.write(json.dumps({"step": step, **metrics}) + "\n")
        self._metrics.flush()
        self._window.append({**metrics, "flops": flops})
        self._dropped = dropped
        if self._clock is None:
            self._report(step, seconds=None)
        elif step % self._every == 0 or step == self._steps:
            self._report(step, seconds=time.perf_counter() - self._clock)

    def _report(self, step: int, *, seconds: float | None) -> None:
        """Reports the means since the last report, and rates if the time is known."""
        window, self._window = self._window, []
        self._clock = time.perf_counter()
        total = {name: sum(metrics[name] for metrics in window) for name in window[0]}
        scalars = {f"train/{name}": total[name] / len(window) for name in total if name != "flops"}
        if seconds:
            scalars["speed/steps_per_second"] = len(window) / seconds
            scalars["speed/tokens_per_second"] = total["tokens"] / seconds
            scalars["speed/frames_per_second"] = total["frames"] / seconds
            if self._peak:
                scalars["speed/mfu"] = total["flops"] / seconds / self._peak
        if memory := (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"):
            scalars["memory/peak_gib"] = memory / 2**30
        if self._dropped:
            scalars["data/dropped_rows"] = self._dropped
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        numbers = _numbers(scalars)
        self._progress.update(self._task, completed=step, numbers=numbers)
        if not self._console.is_terminal:
            print(f"step {step}/{self._steps}  {numbers}", flush=True)


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """Reads the records of a run, without a last line that was truncated by a kill."""
    rows = []
    file = workdir / METRICS
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def draw_curve(workdir: Path) -> Path | None:
    """Draws the loss over the steps into WORKDIR/loss.png; returns None if no step was recorded."""
    rows = [row for row in read_metrics(workdir) if math.isfinite(row["loss"])]
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
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(workdir / CURVE, dpi=120)
    return workdir / CURVE


def _open_metrics(file: Path, start: int):
    """Opens the file for appending after the records of the first `start` steps; others are removed."""
    kept = [json.dumps(row) + "\n" for row in read_metrics(file.parent) if row["step"] <= start]
    draft = file.with_suffix(".draft")
    draft.write_text("".join(kept))
    draft.replace(file)
    return file.open("a")


def _numbers(scalars: Mapping[str, float]) -> str:
    """Formats the most important scalars on one line."""
    parts = [
        f"loss {scalars['train/loss']:.4f}",
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
