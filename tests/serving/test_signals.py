"""A server process that is ended under load, and one that takes its place."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from servers import Client, wait_for

ROOT = Path(__file__).parents[2]
GREY = np.full((112, 112, 3), 128, np.uint8)

SERVER = """
import sys
from moss_jax.config import EngineConfig, SchedulerConfig, ServerConfig, SessionConfig
from moss_jax.convert import open_model
from moss_jax.serving.app import make_app, make_server
from moss_jax.serving.hub import Hub
from moss_jax.stream import Engine, Scheduler

port, folder = sys.argv[1:]
opened = open_model()
engine = Engine(opened.model, opened.tokenizer, EngineConfig(slots=3, text_capacity=512, bank_capacity=32))
hub = Hub(
    Scheduler(engine, SchedulerConfig()),
    ServerConfig(save_seconds=0.5),
    session=SessionConfig(max_tokens_per_turn=8),
    state_folder=folder,
)
server = make_server(make_app(hub, warm_up=False), hub, port=int(port))
server.run()
sys.exit(128 + server.stopped_by if server.stopped_by else 0)
"""


@pytest.fixture
def start(tmp_path):
    """Starts a server over a folder of streams; gives the process and its address."""
    processes = []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])

    def start() -> tuple[subprocess.Popen, str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", SERVER, port, str(tmp_path / "state")]
        process = subprocess.Popen(command, cwd=ROOT, env=environment)
        processes.append(process)

        def is_ready() -> bool:
            assert process.poll() is None
            try:
                return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
            except httpx.HTTPError:
                return False

        wait_for(is_ready, 120)
        return process, f"ws://127.0.0.1:{port}/v1/realtime"

    yield start
    for process in processes:
        process.kill()
        process.wait()


def begin(url: str, client: Client) -> str:
    """Begins a session that can be resumed; the address to resume it at."""
    session = client.negotiate()
    client.show(GREY)
    client.until("conversation.item.done", timeout=300)
    client.ask("What is there?")
    client.until("response.done", timeout=300)
    return f"{url}?session={session['id']}&token={session['moss']['token']}"


def check_resumed(address: str) -> None:
    """Resumes a session, which goes on with what it has seen."""
    with Client(address) as client:
        resumed = client.receive()["session"]["moss"]["resumed"]
        assert resumed["saved"] is True
        client.ask("And now?")
        client.until("response.done", timeout=300)
        client.send("moss.finish")
        counters = client.until("moss.end", timeout=300)["counters"]
        assert counters["frames"] == 1
        assert counters["prompts"] == 2


@pytest.mark.slow
def test_sigterm_under_load(start, tmp_path):
    process, url = start()
    with Client(url) as first, Client(url) as second, Client(url) as plain:
        addresses = [begin(url, client) for client in (first, second)]
        plain.ask("What is there?")
        for client in (first, second):
            client.ask("And now?")
        process.send_signal(signal.SIGTERM)
        for client in (first, second):
            end = client.until("moss.end")
            assert (end["reason"], end["saved"]) == ("shutdown", True)
        assert plain.until("error")["error"]["code"] == "server_shutdown"
        for client in (first, second, plain):
            assert client.until_closed() == 1012
        assert process.wait(60) == 128 + signal.SIGTERM
    # Of both, the stream and its dialogue.
    assert len(os.listdir(tmp_path / "state")) == 4
    _, url = start()
    with Client(addresses[0]) as client:
        resumed = client.receive()["session"]["moss"]["resumed"]
        assert resumed["saved"] is True
        client.send("moss.finish")
        assert client.until("moss.end", timeout=300)["counters"]["frames"] == 1
    wait_for(lambda: len(os.listdir(tmp_path / "state")) == 2)


@pytest.mark.slow
def test_sigkill_under_load(start, tmp_path):
    process, url = start()
    with Client(url) as first, Client(url) as second:
        addresses = [begin(url, client) for client in (first, second)]
        # A save that begins now has all of that.
        for client in (first, second):
            client.send("moss.save")
            client.until("moss.saved")
        process.kill()
        for client in (first, second):
            assert client.until_closed() is None
    process.wait()
    start()
    for address in addresses:
        check_resumed(address)
