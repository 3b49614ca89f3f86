"""What Prometheus reads, and what tells that the server is ready."""

import json
import re
from pathlib import Path

import httpx
import numpy as np
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from servers import Client, running, wait_for

from moss_jax.config import SchedulerConfig
from moss_jax.serving.hub import Hub
from moss_jax.serving.metrics import Metrics
from moss_jax.serving.security import Gate, protection
from moss_jax.stream import Scheduler

GREY = np.full((24, 32, 3), 128, np.uint8)
DEPLOY = Path(__file__).parents[2] / "deploy"


def values(url: str) -> dict[str, float]:
    """The samples by name and labels, as Prometheus reads them."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return {
        sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_tell_what_happened(answering):
    hub, gate = Hub(Scheduler(answering, SchedulerConfig())), Gate()
    with running(hub, routes=[Metrics(hub, gate).route()], middleware=protection(gate)) as server:
        before = values(server.url)
        assert before["moss_ready"] == 1
        assert before["moss_slots"] == before["moss_streams_free"] == 8
        assert before["moss_streams_open"] == before["moss_steps_total"] == 0
        assert before["process_open_fds"] > 0
        with Client(server.realtime) as client:
            client.negotiate()
            client.show(GREY)
            client.until("conversation.item.done")
            client.ask("Is there a cat?")
            client.until("response.done")
            client.send("make.coffee")
            client.until("error")
            now = values(server.url)
            assert now["moss_streams_open"] == now["moss_connections_open"] == 1
            assert now["moss_streams_free"] == 7
            assert now["moss_text_tokens"] > 10
            assert now["moss_frames_total[seen]"] == now["moss_frames_total[received]"] == 1
            assert now["moss_ttft_seconds_count"] == 1
            assert now["moss_extend_seconds_count"] == now["moss_frame_wait_seconds_count"] == 1
            assert now["moss_errors_total[unknown_event]"] == 1
            assert now["moss_tokens_total"] > 3
            steps = now["moss_steps_total"]
            assert steps == now["moss_step_rows_count"] == now["moss_step_rows_bucket[1.0]"] > 5
            assert now["moss_step_frames_sum"] == now["moss_encoded_frames_count"] == 1
        wait_for(lambda: not hub.scheduler.streams or hub.sessions)
        httpx.get(server.url, headers={"Origin": "https://evil.example"})
        after = values(server.url)
        assert after["moss_refused_total[origin_not_allowed]"] == 1
        assert after["moss_connections_total"] == 1


def test_two_servers_of_a_process_have_metrics_of_their_own(answering):
    first, second = (Metrics(Hub(Scheduler(answering))) for _ in range(2))
    first._observe("ttft", 0.1)
    assert first.registry.get_sample_value("moss_ttft_seconds_count") == 1
    assert second.registry.get_sample_value("moss_ttft_seconds_count") == 0


def test_ready_follows_the_scheduler(answering):
    hub = Hub(Scheduler(answering, SchedulerConfig()))
    with running(hub) as server:
        assert httpx.get(f"{server.url}/readyz").json() == {"ready": True, "free_streams": 8}
        server.call(setattr, hub, "is_warm", False)
        assert httpx.get(f"{server.url}/readyz").status_code == 503
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        with Client(server.realtime) as client:
            assert client.receive()["error"]["message"] == "the server is not ready yet"
        server.call(setattr, hub, "is_warm", True)
        assert httpx.get(f"{server.url}/readyz").status_code == 200


def test_dashboard_and_alerts_use_metrics_that_exist(answering):
    metrics = Metrics(Hub(Scheduler(answering)), Gate())
    exposed = generate_latest(metrics.registry).decode()
    # With labels that nothing has happened for yet, a metric has no sample.
    known = set(re.findall(r"^# TYPE (\S+)", exposed, re.M))
    known |= {f"{name}_{part}" for name in known for part in ("bucket", "count", "sum")}
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    texts = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    texts += [variable["query"]["query"] for variable in dashboard["templating"]["list"][1:]]
    texts.append((DEPLOY / "alerts.yml").read_text())
    used = {name for text in texts for name in re.findall(r"\b(?:moss|process)_[a-z_]+", text)} - {"moss_jax"}
    assert len(used) > 25
    # The small engine of the test has no slots in a device's memory.
    assert used - known <= {"moss_slots_held_bytes"}
    assert {panel["id"] for panel in dashboard["panels"]} == set(range(1, len(dashboard["panels"]) + 1))
