"""Files in `deploy/` as Prometheus and systemd read them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest

from moss_jax.config import SchedulerConfig
from moss_jax.serving.hub import Hub
from moss_jax.serving.metrics import Metrics
from moss_jax.serving.security import Gate
from moss_jax.stream import Scheduler

DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS = DEPLOY / "alerts.yml"
RULES = {rule["alert"]: rule for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]}
SERVER = 'instance="here", job="moss_jax"'
# By alert: samples of each minute of a server that is well, of one that is not, and the minute of the alert.
# In Prometheus' notation, "0+3x2 0x2" is 0 3 6, then 0 0 0.
CASES = {
    "MossDown": ({"up": "1x30"}, {"up": "1x5 0x30"}, 8),
    "MossNotReady": ({"moss_ready": "1x5 0x3 1x30"}, {"moss_ready": "1x5 0x30"}, 11),
    "MossStepsFail": ({"moss_step_failures_total": "4x30"}, {"moss_step_failures_total": "4x5 5x30"}, 6),
    "MossDropsFrames": (
        {'moss_frames_total{fate="received"}': "0+1000x30", 'moss_frames_total{fate="dropped"}': "0+5x30"},
        {'moss_frames_total{fate="received"}': "0+1000x30", 'moss_frames_total{fate="dropped"}': "0+50x30"},
        6,
    ),
    "MossFull": ({"moss_streams_free": "0x14 1x30"}, {"moss_streams_free": "1x5 0x30"}, 21),
    "MossCannotSave": (
        {'moss_saves_total{result="failed"}': "2x30", 'moss_saves_total{result="done"}': "0+9x30"},
        {'moss_saves_total{result="failed"}': "2x5 3x30"},
        6,
    ),
}

pytestmark = pytest.mark.slow
promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="there is no promtool: apt-get install prometheus"
)


def check(*command, **options) -> str:
    """Runs a command, which must succeed; returns its output."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def labelled(series: str) -> str:
    """A series with the labels that a scrape adds."""
    name, _, labels = series.rstrip("}").partition("{")
    return f"{name}{{{', '.join(filter(None, (labels, SERVER)))}}}"


@promtool
def test_prometheus_reads_its_configuration(tmp_path):
    shipped = (DEPLOY / "prometheus.yml").read_text()
    token = tmp_path / "moss-token"
    token.write_text("a-token-that-is-long-enough")
    assert "/etc/prometheus/moss-token" in shipped
    config = tmp_path / "prometheus.yml"
    config.write_text(shipped.replace("/etc/prometheus/moss-token", str(token)))
    shutil.copy(ALERTS, tmp_path)
    assert f"{len(CASES)} rules found" in check("promtool", "check", "config", config)


@promtool
@pytest.mark.parametrize("alert", RULES)
def test_an_alert_fires_when_it_should(tmp_path, alert):
    healthy, ill, minutes = CASES[alert]
    summary = RULES[alert]["annotations"]["summary"].replace("{{ $labels.instance }}", "here")
    labels = {"instance": "here", "job": "moss_jax"}
    labels |= {"result": "failed"} if alert == "MossCannotSave" else {}
    fired = [{"exp_labels": labels, "exp_annotations": {"summary": summary}}]
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": labelled(name), "values": of} for name, of in series.items()],
            "alert_rule_test": [
                {"eval_time": f"{at}m", "alertname": alert, "exp_alerts": expected} for at, expected in times
            ],
        }
        for series, times in (
            (healthy, [(minute, []) for minute in range(31)]),
            (ill, [(minutes - 1, []), (minutes, fired)]),
        )
    ]
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "tests": tests}))
    check("promtool", "test", "rules", file)


@promtool
def test_metrics_follow_prometheus_conventions(answering):
    metrics = Metrics(Hub(Scheduler(answering, SchedulerConfig())), Gate())
    check("promtool", "check", "metrics", input=generate_latest(metrics.registry).decode())


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_systemd_reads_the_unit(tmp_path):
    shipped = (DEPLOY / "moss-jax.service").read_text()
    command = "/opt/moss-jax/bin/moss-jax-serve"
    assert command in shipped
    unit = tmp_path / "moss-jax.service"
    unit.write_text(shipped.replace(command, sys.executable))
    # Of settings that it does not know it only warns, as of those of other units.
    assert unit.name not in check("systemd-analyze", "verify", unit)
    if "--offline" in check("systemd-analyze", "--help"):
        exposure = check("systemd-analyze", "security", "--offline=true", "--no-pager", unit)
        (level,) = re.findall(r"Overall exposure level .*?: ([\d.]+)", exposure)
        assert float(level) < 3
