"""Logging: records that survive a kill, rates, and the loss curve."""

import math

import pytest
from PIL import Image

from moss_jax.train import log as log_module
from moss_jax.train.log import Log, draw_curve, read_metrics

METRICS = {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 100.0, "frames": 10.0}


def make_log(workdir, *, start=0, steps=4, every=2, peak_flops=None) -> Log:
    return Log(
        workdir, config="train.steps = 4", start=start, steps=steps, every=every, peak_flops=peak_flops
    )


def record(workdir, *steps, **options) -> None:
    with make_log(workdir, **options) as log:
        for step in steps:
            log.record(step, METRICS | {"loss": 1 / step}, flops=5e9)


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


def test_rates_since_the_last_report(tmp_path, capsys, monkeypatch):
    clock = iter([100.0, 102.0, 102.0, 106.0, 106.0])
    monkeypatch.setattr(log_module.time, "perf_counter", lambda: next(clock))
    record(tmp_path, 1, 2, 3, 4, peak_flops=1e10)
    first, second, last = capsys.readouterr().out.splitlines()
    # The first step is reported at once, without a rate, since it includes compilation.
    assert first.startswith("step 1/4  loss 1.0000")
    assert "tok/s" not in first
    # One step in two seconds, then two in four.
    assert second.startswith("step 2/4  loss 0.5000  grad 1  lr 1.00e-03  50 tok/s  5 frames/s  MFU 25.0%")
    assert last.startswith("step 4/4  loss 0.2917  grad 1  lr 1.00e-03  50 tok/s  5 frames/s  MFU 25.0%")


def test_an_unknown_device_has_no_mfu(tmp_path, capsys):
    record(tmp_path, 1, 2)
    assert "MFU" not in capsys.readouterr().out


@pytest.mark.parametrize("losses", [[3.0, 2.0, 1.0], [1.0], [2.0, math.nan, 1.0], [0.5, 0.0]])
def test_the_curve(tmp_path, losses):
    with make_log(tmp_path) as log:
        for step, loss in enumerate(losses, 1):
            log.record(step, METRICS | {"loss": loss})
    with Image.open(draw_curve(tmp_path)) as image:
        assert image.format == "PNG"
        assert len(image.getcolors(maxcolors=1 << 24)) > 10


def test_no_curve_without_records(tmp_path):
    assert draw_curve(tmp_path) is None
