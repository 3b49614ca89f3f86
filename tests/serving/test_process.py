"""The command as a process: its page, its signals, and streams that outlive it."""

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from servers import Client, wait_for
from websockets.exceptions import ConnectionClosed

import moss_jax

ROOT = Path(__file__).parents[2]
GREY = np.full((24, 32, 3), 128, np.uint8)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model, tokenizer):
    """A checkpoint that loads and compiles quickly."""
    folder = moss_jax.save(tmp_path_factory.mktemp("checkpoint") / "small", model)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def start(checkpoint, tmp_path):
    """Starts servers over one folder of streams; the process and its address."""
    processes = []

    def start():
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        command = [sys.executable, ROOT / "serve.py", "--checkpoint", checkpoint, "--port", str(port)]
        small = ["--gin_param", "engine.text_capacity = 512", "--gin_param", "engine.bank_capacity = 32"]
        state = ["--slots", "2", "--state-dir", tmp_path / "state"]
        with open(tmp_path / "log", "w") as log:
            process = subprocess.Popen([*command, *state, *small], stderr=log)
        processes.append(process)
        wait_for(lambda: process.poll() is not None or "ready" in (tmp_path / "log").read_text(), 300)
        assert process.poll() is None, (tmp_path / "log").read_text()
        return process, f"127.0.0.1:{port}"

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_streams_outlive_the_process(start):
    """Once told to end, once killed."""
    process, address = start()
    with urllib.request.urlopen(f"http://{address}/readyz") as answer:
        assert json.load(answer) == {"ready": True, "free_streams": 2}
    with urllib.request.urlopen(f"http://{address}/") as answer:
        assert answer.headers["Content-Type"].startswith("text/html")
    with Client(f"ws://{address}/v1/realtime") as client:
        session = client.negotiate()
        client.show(GREY)
        client.until("conversation.item.done")
        process.send_signal(signal.SIGTERM)
        end = client.until("moss.end")
        assert (end["reason"], end["saved"]) == ("shutdown", True)
        with pytest.raises(ConnectionClosed) as closed:
            client.receive()
        assert closed.value.rcvd.code == 1012
    assert process.wait(60) == 128 + signal.SIGTERM
    where = f"?session={session['id']}&token={session['moss']['token']}"
    process, address = start()
    with Client(f"ws://{address}/v1/realtime{where}") as client:
        assert client.receive()["session"]["moss"]["resumed"]["saved"] is True
        client.show(GREY)
        assert client.until("conversation.item.added")["moss"]["frame"]["index"] == 1
        client.until("conversation.item.done")
        client.send("moss.save")
        saved = client.until("moss.saved")["time"]
        process.kill()
        with pytest.raises(ConnectionClosed):
            client.until("never")
    process.wait(60)
    process, address = start()
    with Client(f"ws://{address}/v1/realtime{where}") as client:
        resumed = client.receive()["session"]["moss"]["resumed"]
        assert resumed["saved"] is True
        client.show(GREY)
        added = client.until("conversation.item.added")["moss"]["frame"]
        assert added["index"] == 2
        assert added["time"] >= saved
        client.send("moss.finish")
        assert client.until("moss.end")["counters"]["frames"] == 3
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
