"""Serving on a mesh: clients are told there what they are told on one device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json
import numpy as np
from moss_jax.config import EngineConfig, SchedulerConfig, SessionConfig
from moss_jax.convert import open_model
from moss_jax.sharding import parse_mesh
from moss_jax.serving.hub import Hub
from moss_jax.stream import Engine, Scheduler
from servers import Client, running

frames = np.random.default_rng(0).integers(0, 256, (6, 40, 60, 3), dtype=np.uint8)
TOLD = ("response.output_text.delta", "response.done", "conversation.item.done", "moss.silence")

def play(axes):
    opened = open_model(dtype="float32", mesh=parse_mesh(axes) if axes else None)
    config = EngineConfig(slots=2, text_capacity=256, bank_capacity=8)
    engine = Engine(opened.model, opened.tokenizer, config)
    scheduler = Scheduler(engine, SchedulerConfig(clock="lockstep"))
    hub = Hub(scheduler, session=SessionConfig(tokens_per_second=4))
    with running(hub) as server, Client(server.realtime) as first, Client(server.realtime) as second:
        for client in (first, second):
            client.negotiate()
            client.ask("What do you see?", moss={"time": 0.0})
        for at, frame in enumerate(frames):
            first.show(frame, moss={"time": float(at)})
            second.show(255 - frame, moss={"time": float(at)})
        for client in (first, second):
            client.send("moss.finish")
            client.until("moss.end", timeout=500)
    return [
        [
            (event["type"], event.get("delta"), event.get("response", {}).get("usage"), event.get("moss"))
            for event in client.events
            if event["type"] in TOLD
        ]
        for client in (first, second)
    ]

alone, split = play(None), play("tensor=2")
assert sum(event[0] == TOLD[0] for events in alone for event in events) > 8
assert json.dumps(split) == json.dumps(alone)
print("held")
"""


@pytest.mark.slow
def test_a_server_on_a_mesh_tells_what_it_tells_on_one_device():
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    path = f"{ROOT}:{ROOT / 'tests'}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert found.stdout.strip() == "held", found.stderr[-2000:]
