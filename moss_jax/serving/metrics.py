"""Prometheus metrics, most of them read from the counters of hub and scheduler at scrape time."""

import itertools
from collections.abc import Iterator, Mapping

import jax
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from moss_jax.serving.hub import Hub
from moss_jax.serving.security import Gate
from moss_jax.stream import Engine

# Histogram buckets in seconds, from a GPU's steps to a laptop's.
SECONDS = (
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    0.75,
    1.0,
    1.5,
    2.0,
    3.0,
    5.0,
    10.0,
)
# Histogram buckets for numbers of rows and frames.
SIZES = (1, 2, 4, 8, 16, 32, 64)
DURATIONS = {
    "ttft": ("moss_ttft_seconds", "From a question to the first text of its answer"),
    "frame": ("moss_frame_wait_seconds", "From the arrival of a frame to the step that appends it"),
    "extend": ("moss_extend_seconds", "From the arrival of a frame to the token after it"),
    "save": ("moss_save_seconds", "Saves of streams"),
}


class Metrics(Collector):
    """Metrics of one server, in their own registry.

    Args:
      gate: gate whose refusals are exported; None for none.

    Attributes:
      registry: registry of these metrics and those of the process.
    """

    def __init__(self, hub: Hub, gate: Gate | None = None):
        self._hub, self._gate = hub, gate
        self.registry = CollectorRegistry()
        self._durations = {
            name: Histogram(metric, text, registry=self.registry, buckets=SECONDS)
            for name, (metric, text) in DURATIONS.items()
        }
        hub.counters.observers.append(self._observe)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def _observe(self, name: str, seconds: float) -> None:
        if name in self._durations:
            self._durations[name].observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics from the current counters."""
        yield from self._streams()
        yield from self._totals()
        yield from self._work()
        yield from self._memory()

    def _streams(self) -> Iterator[Metric]:
        hub = self._hub
        sessions = list(hub.sessions.values())
        streams = hub.scheduler.streams
        yield _gauge("moss_ready", "Whether streams can be opened", hub.is_ready)
        yield _gauge("moss_slots", "Maximum number of concurrent streams", hub.scheduler.engine.config.slots)
        yield _gauge("moss_streams_open", "Streams that are open", len(streams))
        yield _gauge("moss_streams_free", "Streams that could be opened now", hub.free_slots)
        yield _gauge("moss_sessions", "Sessions that are held, with those that may be resumed", len(sessions))
        lost = sum(not session.is_connected for session in sessions)
        yield _gauge("moss_sessions_disconnected", "Sessions waiting for their client to reconnect", lost)
        yield _gauge("moss_connections_open", "Open WebSocket connections", hub.counters.connections)
        with hub.scheduler.changed:
            waiting = sum(len(stream.conversation.unclaimed_frames()) for stream in streams)
        yield _gauge("moss_frames_waiting", "Frames in the inboxes of all streams", waiting)
        unsent = sum(session.unsent for session in sessions)
        yield _gauge("moss_events_waiting", "Events not yet sent to clients", unsent)

    def _totals(self) -> Iterator[Metric]:
        counters = self._hub.counters
        yield _counter(
            "moss_connections", "WebSocket connections that were opened", counters.connections_total
        )
        yield _counter("moss_sessions_begun", "Sessions started", counters.sessions_total)
        yield _counter("moss_sessions_resumed", "Connections that resumed a session", counters.resumed_total)
        yield _labelled("moss_streams_ended", "Streams that are over", "reason", counters.streams_by_end)
        yield _labelled("moss_frames", "Frames by fate", "fate", counters.frames_by_fate)
        yield _counter("moss_prompts", "Questions that were asked", counters.prompts)
        yield _counter("moss_tokens", "Tokens of answers", counters.tokens)
        yield _counter("moss_responses", "Responses started", counters.responses)
        yield _counter("moss_interruptions", "Answers interrupted", counters.interruptions)
        yield _labelled("moss_errors", "Errors sent to clients", "code", counters.errors_by_code)
        yield _counter(
            "moss_slow_clients", "Connections closed because the client did not read", counters.slow_clients
        )
        saves = {"done": counters.saves, "failed": counters.failed_saves}
        yield _labelled("moss_saves", "Saves of streams", "result", saves)
        refused = self._gate.refused if self._gate else {}
        yield _labelled("moss_refused", "Requests and connections that were refused", "reason", refused)

    def _work(self) -> Iterator[Metric]:
        counters = self._hub.scheduler.counters
        yield _counter("moss_steps", "Steps that were dispatched", counters.step_rows.total())
        yield _counter("moss_step_failures", "Steps that failed, which ends all streams", counters.failures)
        yield _counter(
            "moss_restarts", "Starts of the scheduler after a failure", self._hub.counters.restarts
        )
        yield _histogram("moss_step_rows", "Streams that take part in a step", counters.step_rows)
        yield _histogram("moss_step_frames", "Frames that a step appends", counters.step_frames)
        yield _histogram("moss_encoded_frames", "Frames that are encoded together", counters.encoded_frames)

    def _memory(self) -> Iterator[Metric]:
        engine, streams = self._hub.scheduler.engine, self._hub.scheduler.streams
        text = sum(stream.conversation.text_length for stream in streams)
        yield _gauge("moss_text_tokens", "Tokens in the text caches of all streams", text)
        if isinstance(engine, Engine):
            held = engine.slot_bytes * len(streams)
            yield _gauge("moss_slots_held_bytes", "Device memory of the slots that are taken", held)
        in_use = GaugeMetricFamily("moss_device_memory_bytes", "Device memory in use", labels=["device"])
        limit = GaugeMetricFamily("moss_device_memory_limit_bytes", "Its limit", labels=["device"])
        for device in jax.local_devices():
            statistics = device.memory_stats() or {}
            for family, key in ((in_use, "bytes_in_use"), (limit, "bytes_limit")):
                if key in statistics:
                    family.add_metric([str(device.id)], statistics[key])
        yield from (in_use, limit)

    def route(self) -> Route:
        """Route of the scrape endpoint."""

        async def metrics(_: Request) -> Response:
            return Response(generate_latest(self.registry), headers={"content-type": CONTENT_TYPE_LATEST})

        return Route("/metrics", metrics)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=float(value))


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _labelled(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for key, value in dict(values).items():
        family.add_metric([key], value)
    return family


def _histogram(name: str, text: str, numbers: Mapping[int, int]) -> Metric:
    """A histogram from the count of each value."""
    numbers = dict(numbers)
    bounds = [*SIZES, float("inf")]
    within = [sum(count for n, count in numbers.items() if n <= bound) for bound in bounds]
    buckets = [
        (str(float(bound)) if bound in SIZES else "+Inf", n) for bound, n in zip(bounds, within, strict=True)
    ]
    total = sum(itertools.starmap(int.__mul__, numbers.items()))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=total)
