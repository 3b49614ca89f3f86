"""Logging: records that survive a kill, rates, and the loss curve."""

import math
import resource

import pytest
from matplotlib.figure import Figure
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from moss_jax.train.log import Log, draw_curve, read_metrics

METRICS = {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 100.0, "frames": 10.0}


def make_log(workdir, *, start=0, steps=4, every=2, peak_flops=None) -> Log:
    return Log(
        workdir, config="train.steps = 4", start=start, steps=steps, every=every, peak_flops=peak_flops
    )


def record(workdir, *steps, compiled=(), **options) -> None:
    """Records steps that take two seconds each."""
    with make_log(workdir, **options) as log:
        for step in steps:
            metrics = METRICS | {"loss": 1 / step}
            log.record(step, metrics, finished=100.0 + 2 * step, compiled=step in compiled, flops=5e9)


def scalars(workdir) -> dict[str, dict[int, float]]:
    """Reads TensorBoard files: records of 8 bytes of length, 4 of checksum, the event, 4 of checksum."""
    found: dict[str, dict[int, float]] = {}
    for file in sorted(workdir.glob("events.*")):
        content = file.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_every_step_is_recorded_exactly(tmp_path):
    record(tmp_path, 1, 2, 3)
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_a_resumed_run_replaces_later_records(tmp_path):
    record(tmp_path, 1, 2, 3, 4)
    record(tmp_path, 3, start=2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    record(tmp_path, 1)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_a_truncated_line_is_ignored(tmp_path):
    record(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    record(tmp_path, 3, start=2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_rates_since_the_last_report(tmp_path, capsys):
    record(tmp_path, 1, 2, 3, 4, peak_flops=1e10)
    first, second, last = capsys.readouterr().out.splitlines()
    # The first step is reported at once, without a rate, since it includes compilation.
    assert first.startswith("step 1/4  loss 1.0000")
    assert "tok/s" not in first
    # One step in two seconds, then two in four.
    assert second.startswith("step 2/4  loss 0.5000  grad 1  lr 1.00e-03  50 tok/s  5 frames/s  MFU 25.0%")
    assert last.startswith("step 4/4  loss 0.2917  grad 1  lr 1.00e-03  50 tok/s  5 frames/s  MFU 25.0%")


def test_rates_are_of_the_time_between_results(tmp_path):
    """Whenever the metrics are read: here all at once, as before a checkpoint."""
    record(tmp_path, 1, 2, 3, 4, every=1)
    assert scalars(tmp_path)["speed/tokens_per_second"] == {2: 50.0, 3: 50.0, 4: 50.0}


def test_rates_leave_out_steps_that_were_compiled(tmp_path, capsys):
    with make_log(tmp_path, steps=6, every=3) as log:
        for step, finished in enumerate([50.0, 52.0, 54.0, 99.0, 101.0, 103.0], 1):
            log.record(step, METRICS, finished=finished, compiled=step in (1, 4))
        assert "50 tok/s" in capsys.readouterr().out.splitlines()[-1]
    with make_log(tmp_path, steps=2, every=1) as log:
        log.record(1, METRICS, finished=50.0, compiled=True)
        log.record(2, METRICS, finished=99.0, compiled=True)
    assert "tok/s" not in capsys.readouterr().out


def test_means_are_over_the_targets_of_all_steps(tmp_path):
    """Steps without such targets have no loss, rather than one of 0."""
    onsets = [(4.0, 1.0), (0.0, 0.0), (0.0, 0.0), (1.0, 2.0)]
    with make_log(tmp_path, steps=4, every=3) as log:
        for step, (loss, count) in enumerate(onsets, 1):
            metrics = {"loss_after_silence": loss, "targets_after_silence": count, "targets": 2.0 * step}
            metrics |= {"loss": float(step), "z_loss": float(step)}
            log.record(step, METRICS | metrics, finished=float(step))
    rows = read_metrics(tmp_path)
    assert [row.get("loss_after_silence") for row in rows] == [4.0, None, None, 1.0]
    assert [row["targets_after_silence"] for row in rows] == [1, 0, 0, 2]
    found = scalars(tmp_path)
    assert found["train/loss_after_silence"] == {1: 4.0, 4: 1.0}  # The second report has no such target.
    # Steps 2 and 3 have 4 and 6 targets.
    assert found["train/loss"][3] == found["train/z_loss"][3] == pytest.approx((2 * 4 + 3 * 6) / 10)
    assert found["train/grad_norm"][3] == 1.0


def test_one_onset_in_three_steps_shows_its_loss(tmp_path):
    with make_log(tmp_path, steps=4, every=4) as log:
        for step, (loss, count) in enumerate([(0.0, 0.0), (4.0, 2.0), (0.0, 0.0), (0.0, 0.0)], 1):
            metrics = METRICS | {"loss_after_silence": loss, "targets_after_silence": count}
            log.record(step, metrics, finished=float(step))
    assert scalars(tmp_path)["train/loss_after_silence"] == {4: 4.0}


def test_steps_without_any_target(tmp_path, capsys):
    with make_log(tmp_path, steps=2) as log:
        for step in (1, 2):
            log.record(step, METRICS | {"loss": 0.0, "targets": 0.0}, finished=float(step))
    assert "train/loss" not in scalars(tmp_path)
    assert capsys.readouterr().out.splitlines()[1].startswith("step 2/2  no targets  grad 1")
    assert draw_curve(tmp_path) is None


def record_steps(log: Log, steps: range) -> None:
    for step in steps:
        log.record(step, METRICS, finished=float(step))


def test_a_full_disk_raises_instead_of_waiting(tmp_path):
    """Of a process without privileges: files are limited to a size instead."""
    with make_log(tmp_path, steps=10**6, every=1) as log:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                record_steps(log, range(1, 10**3))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert 5 < len(read_metrics(tmp_path)) < 100


def test_an_unknown_device_has_no_mfu(tmp_path, capsys):
    record(tmp_path, 1, 2)
    assert "MFU" not in capsys.readouterr().out


@pytest.mark.parametrize("losses", [[3.0, 2.0, 1.0], [1.0], [2.0, math.nan, 1.0], [0.5, 0.0]])
def test_the_curve(tmp_path, losses):
    with make_log(tmp_path) as log:
        for step, loss in enumerate(losses, 1):
            log.record(step, METRICS | {"loss": loss}, finished=float(step))
    with Image.open(draw_curve(tmp_path)) as image:
        assert image.format == "PNG"
        assert len(image.getcolors(maxcolors=1 << 24)) > 10


@pytest.mark.parametrize("losses", [[7.4, 7.1, 6.5], [30.0, 3.0, 0.2], [0.021, 0.02]])
def test_the_curve_has_plain_numbers(tmp_path, monkeypatch, losses):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    with make_log(tmp_path) as log:
        for step, loss in enumerate(losses, 1):
            log.record(step, METRICS | {"loss": loss}, finished=float(step))
    draw_curve(tmp_path)
    (axes,) = figures[0].axes
    figures[0].draw_without_rendering()
    low, high = axes.get_ylim()
    ticks = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
    shown = [tick.label1.get_text() for tick in ticks if low <= tick.get_loc() <= high]
    shown = [text for text in shown if text]
    assert 2 <= len(shown) <= 12
    assert all(low <= float(text) <= high for text in shown)


def test_no_curve_without_records(tmp_path):
    assert draw_curve(tmp_path) is None
