"""Logs say what happened, and neither content nor secrets."""

import io
import json
import logging

import httpx
import numpy as np
import pytest
from servers import Client, running, wait_for
from starlette.middleware import Middleware

from moss_jax.config import SchedulerConfig
from moss_jax.serving import logs
from moss_jax.serving.hub import Hub
from moss_jax.serving.protocol import SessionUpdate
from moss_jax.serving.security import Gate, Tokens, protection
from moss_jax.stream import Scheduler

TOKEN = "a-token-that-nobody-may-read"
GREY = np.full((24, 32, 3), 128, np.uint8)


@pytest.fixture
def log():
    """What is logged, as a file."""
    names = ("moss_jax", "uvicorn", "uvicorn.error")
    before = {name: dict(vars(logging.getLogger(name))) for name in names}
    file = io.StringIO()
    logs.set_up(file)
    yield file
    for name, settings in before.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = settings["handlers"], settings["propagate"]
        logger.setLevel(settings["level"])


def entries(file: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in file.getvalue().splitlines()]


def test_a_session_is_logged_without_content(answering, log):
    hub = Hub(Scheduler(answering, SchedulerConfig()))
    gate = Gate(tokens=Tokens([TOKEN]))
    middleware = [Middleware(logs.RequestLog), *protection(gate)]
    with running(hub, middleware=middleware) as server:
        logs.set_up(log)  # Once more, since uvicorn sets up its own.
        with Client(
            f"{server.realtime}?api_key={TOKEN}", additional_headers={"X-Request-Id": "mine"}
        ) as client:
            session = client.negotiate()
            client.show(GREY)
            client.ask("Is there a cat?")
            client.until("response.done")
            client.send("secret.words", text="unspeakable")
            client.until("error")
            client.send("moss.finish")
            client.until("moss.end")
        refused = httpx.get(f"{server.url}/v1/models?api_key={TOKEN}")
        httpx.get(f"{server.url}/healthz")
        wait_for(lambda: sum(entry["message"] == "request" for entry in entries(log)) == 2)
    found = entries(log)
    text = log.getvalue()
    for word in (TOKEN, session["moss"]["token"], "cat", "unspeakable", "base64"):
        assert word not in text
    connection = next(entry for entry in found if entry.get("kind") == "websocket")
    assert connection["path"] == "/v1/realtime"
    assert connection["request"] == "mine"
    ended = next(entry for entry in found if entry["message"] == "a stream ended")
    assert (ended["session"], ended["request"], ended["reason"]) == (session["id"], "mine", "finished")
    assert ended["counters"]["frames"] == 1
    request = next(entry for entry in found if entry.get("kind") == "http")
    assert (request["status"], request["method"]) == (401, "GET")
    assert refused.headers["x-request-id"] == request["request"]


def test_errors_tell_where_but_not_what_a_client_sent(log):
    logger = logging.getLogger("moss_jax.serving.test")
    try:
        SessionUpdate.model_validate_json('{"type": "private words"}')
    except ValueError:
        logger.exception("it failed")
    try:
        raise OSError(28, "No space left on device")
    except OSError:
        logger.exception("it failed")
    logger.warning("GET /v1/realtime?token=%s&x=1 %s", TOKEN, f"openai-insecure-api-key.{TOKEN}")
    quoting, telling, address = entries(log)
    assert "private words" not in log.getvalue()
    assert quoting["error"]["type"] == "ValidationError"
    assert "test_logs.py" in quoting["error"]["stack"][0]
    assert "No space left" in telling["error"]["message"]
    assert address["message"] == "GET /v1/realtime?token=...&x=1 openai-insecure-api-key...."
