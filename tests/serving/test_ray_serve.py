"""A fleet on a local Ray: streams keep to their replica, and go on elsewhere when it is killed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from servers import Client, wait_for
from websockets.exceptions import ConnectionClosed, InvalidHandshake

ROOT = Path(__file__).parents[2]
GREY = np.full((112, 112, 3), 128, np.uint8)


def replicas(parent: int) -> dict[str, int]:
    """The processes of replicas below a process, by the name of the replica."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text().split("\0")[0]
        except OSError:
            continue
    found = {}
    for process, name in names.items():
        if not name.startswith("ray::ServeReplica"):
            continue
        ancestor = process
        while ancestor in parents and ancestor != parent:
            ancestor = parents[ancestor]
        if ancestor == parent:
            found[f"{name}#{process}"] = process
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def fleet(folder: Path, *flags: str) -> Iterator[tuple[int, str]]:
    """A fleet of the small model with two streams a replica: its process, and where it listens."""
    pytest.importorskip("ray.serve")
    port = free_port()
    command = [sys.executable, "deploy/ray_serve.py", "--port", str(port), "--slots", "2", "--no-warm-up"]
    command += ["--cpus-per-replica", "0.1", "--state-dir", str(folder / "state"), "--drain-seconds", "1"]
    command += ["--gin_param", "session.max_tokens_per_turn = 8", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "RAY_TMPDIR": "/tmp/r"}
    path = folder / "log"
    with open(path, "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:

        def is_ready() -> bool:
            assert process.poll() is None, path.read_text()[-3000:]
            return "\nready" in path.read_text()

        wait_for(is_ready, 300, every=0.2)
        host = f"127.0.0.1:{port}"
        wait_for(lambda: httpx.get(f"http://{host}/readyz").status_code == 200, 60, every=0.2)
        yield process.pid, host
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.mark.slow
def test_a_replica_is_added_as_free_streams_become_few(tmp_path):
    with fleet(tmp_path, "--replicas", "1:2", "--free-streams", "1") as (parent, host):
        url = f"ws://{host}/v1/realtime"
        assert len(replicas(parent)) == 1
        with Client(url) as first, Client(url) as second:
            for client in (first, second):
                assert client.receive()["type"] == "session.created"
            wait_for(lambda: len(replicas(parent)) == 2, 300, every=0.5)


@pytest.mark.slow
def test_a_replica_is_killed_under_load(tmp_path):
    with fleet(tmp_path, "--replicas", "2") as (parent, host):
        check_a_killed_replica(parent, host)


def check_a_killed_replica(parent: int, host: str) -> None:
    url = f"ws://{host}/v1/realtime"
    clients, sessions, places = [], [], []
    # Both replicas get streams, of which each takes two.
    while len(clients) < 4:
        client = Client(url).__enter__()
        event = client.receive()
        if event["type"] == "error":
            assert event["error"]["code"] == "no_free_stream"
            continue
        session = client.negotiate()
        clients.append(client)
        sessions.append((session["id"], session["moss"]["token"]))
        places.append(session["id"][5:13])
    assert sorted(places.count(place) for place in set(places)) == [2, 2]
    for client in clients:
        client.show(GREY)
    for client in clients:
        while client.until("conversation.item.done", timeout=400)["moss"]["frame"] is None:
            pass
        client.send("moss.save")
        client.until("moss.saved", timeout=100)

    # A client that comes back finds its session where it was.
    clients[0].lose()
    client = clients[0] = Client(f"{url}?session={sessions[0][0]}&token={sessions[0][1]}").__enter__()
    resumed = client.receive()["session"]
    assert resumed["id"] == sessions[0][0]
    assert resumed["moss"]["resumed"]["saved"] is False

    running = replicas(parent)
    assert len(running) == 2
    for client in clients:
        client.ask("What is there?")
    victim = next(iter(running.values()))
    os.kill(victim, signal.SIGKILL)
    lost, kept = [], []
    for index, client in enumerate(clients):
        try:
            client.until("response.done", timeout=100)
            client.ask("And now?")
            client.until("response.done", timeout=100)
            kept.append(index)
        except ConnectionClosed:
            lost.append(index)
    assert len(lost) == len(kept) == 2
    assert len({places[index] for index in lost}) == len({places[index] for index in kept}) == 1

    # What was lost goes on as of its last save, once there is a place for it.
    for index in lost:
        identity, token = sessions[index]
        end = time.monotonic() + 300
        while True:
            assert time.monotonic() < end, "no replica took the place of the one that was killed"
            try:
                client = Client(f"{url}?session={identity}&token={token}").__enter__()
                event = client.receive()
            except (ConnectionClosed, InvalidHandshake, OSError):
                time.sleep(0.5)
                continue
            if event["type"] == "session.created":
                break
            assert event["error"]["code"] == "no_free_stream", json.dumps(event)
            time.sleep(0.5)
        assert event["session"]["id"] == identity
        assert event["session"]["moss"]["resumed"]["saved"] is True
        clients[index] = client
        client.ask("What is there?")
        client.until("response.done", timeout=400)
    for client in clients:
        client.__exit__(None, None, None)
