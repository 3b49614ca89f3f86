"""Servers over small engines, and one with the shipped model."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import FORGETS_NOTHING, ScriptedEngine, shown_in
from servers import Link, Running, running

from moss_jax.config import EngineConfig, SchedulerConfig, ServerConfig, SessionConfig
from moss_jax.serving.hub import Hub
from moss_jax.stream import Scheduler
from moss_jax.worlds.tabletop.language import WAIT

ROOT = Path(__file__).resolve().parents[2]
QUICK = ServerConfig(counters_seconds=0.05, grace_seconds=30.0, correction=WAIT)
# What is said to a question that has a word in it, and of a frame whose pixels have a value.
ANSWERS = {
    "cat": "A cat. It sleeps.",
    "story": "And then, " * 400,
    "colour": "It is grey. The cat is red - wait, the cat is black.",
}
REMARKS = {200: "Something has come."}


class AnsweringEngine(ScriptedEngine):
    """Answers questions and remarks on frames, however they are put into rows."""

    def step(self, state, rows, features=None):
        for slot, row in enumerate(rows):
            if row is None:
                continue
            said = self.tokenizer.decode([t for t in row.tokens if t >= 0])
            texts = [text for word, text in ANSWERS.items() if word in said]
            texts += [REMARKS[frame] for frame in shown_in(row, features) if frame in REMARKS]
            if row.new_turn:
                self.script[slot].clear()
            for text in texts:
                self.script[slot].extend([*self.tokenizer.encode(text), self.tokenizer.special.silence])
        return super().step(state, rows, features)


@pytest.fixture
def answering(tokenizer) -> AnsweringEngine:
    """An engine that answers by `ANSWERS`; each of its streams serves once."""
    config = EngineConfig(8, 4096, 256, FORGETS_NOTHING)
    return AnsweringEngine(tokenizer, {slot: [] for slot in range(config.slots)}, config)


@pytest.fixture
def served(answering) -> Iterator[Running]:
    """A server over such an engine."""
    with running(Hub(Scheduler(answering, SchedulerConfig()), QUICK, session=SessionConfig())) as server:
        yield server


@pytest.fixture(scope="module")
def link(tmp_path_factory) -> Iterator[Link]:
    """The server, as `python serve.py` starts it, behind a link."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    # Compiled well rather than fast: it has to keep up with the camera.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    with log.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, str(ROOT / "serve.py"), "--port", str(port)],
            stdout=file,
            stderr=file,
            env=environment,
            cwd=ROOT,
        )
    link = Link(port)
    try:
        end = time.monotonic() + 600
        while not is_ready(port):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield link
    finally:
        link.close()
        server.terminate()
        server.wait(60)


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz") as answer:
            return json.load(answer)["ready"]
    except (urllib.error.URLError, ConnectionError):
        return False
