"""Tokens, origins and limits, over real connections."""

import asyncio
import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from servers import Client, running, wait_for
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from moss_jax import serve
from moss_jax.config import ConfigError, SecurityConfig
from moss_jax.serving import app
from moss_jax.serving.hub import Hub
from moss_jax.serving.security import Bucket, Gate, Guard, Tokens, check_host, read_tokens
from moss_jax.stream import Scheduler

TOKEN = "a-token-that-is-long-enough"


async def page(request):
    return PlainTextResponse("page")


async def size(request):
    return PlainTextResponse(str(len(await request.body())))


async def echo(websocket):
    await websocket.accept(subprotocol=next(iter(websocket.scope["subprotocols"]), None))
    async for text in websocket.iter_text():
        await websocket.send_text(text)


@contextlib.contextmanager
def guarded(gate: Gate) -> Iterator[str]:
    """Runs an application behind a gate; gives its host and port."""
    routes = [
        Route("/", page),
        Route("/healthz", page),
        Route("/metrics", page),
        Route("/v1/size", size, methods=["POST"]),
        WebSocketRoute("/v1/echo", echo),
    ]
    guarded = Starlette(routes=routes, middleware=[Middleware(Guard, gate=gate)])
    server = uvicorn.Server(uvicorn.Config(guarded, port=0, log_level="warning", ws="websockets-sansio"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
    assert not gate.open


def status_of(url: str, **options) -> int:
    """The status that a WebSocket is refused with; 101 if it works."""
    try:
        with connect(url, **options) as client:
            client.send("hello")
            assert client.recv(10) == "hello"
            return 101
    except InvalidStatus as error:
        return error.response.status_code


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_a_token_opens_what_is_protected():
    gate = Gate(tokens=Tokens([TOKEN, "another-token-of-somebody"]))
    with guarded(gate) as host:
        for path in ("/", "/healthz"):
            assert httpx.get(f"http://{host}{path}").status_code == 200
        for path in ("/metrics", "/v1/size", "/v1/whatever"):
            for headers in ({}, bearer("wrong"), bearer(TOKEN + "x"), {"Authorization": TOKEN}):
                refused = httpx.request("GET", f"http://{host}{path}", headers=headers)
                assert refused.status_code == 401
                assert refused.json()["error"]["code"] == "invalid_api_key"
                assert refused.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"http://{host}/metrics", headers=bearer(TOKEN)).status_code == 200
        # A token in the address would be in the logs of proxies, so it opens nothing but a WebSocket.
        assert httpx.get(f"http://{host}/metrics?api_key={TOKEN}").status_code == 401
        url = f"ws://{host}/v1/echo"
        assert status_of(url) == 401
        assert status_of(url, additional_headers=bearer("wrong")) == 401
        assert status_of(f"{url}?api_key=wrong") == 401
        assert status_of(url, subprotocols=["realtime", "openai-insecure-api-key.wrong"]) == 401
        assert status_of(url, additional_headers=bearer("another-token-of-somebody")) == 101
        assert status_of(f"{url}?api_key={TOKEN}") == 101
        with connect(url, subprotocols=[f"openai-insecure-api-key.{TOKEN}", "realtime"]) as client:
            assert client.subprotocol == "realtime"
        assert gate.refused["invalid_api_key"] == 17


def test_pages_of_other_origins_are_refused():
    with guarded(Gate(origins=["https://Friend.example/"])) as host:
        url = f"ws://{host}/v1/echo"
        port = host.partition(":")[2]
        for origin, status in (
            (f"http://{host}", 101),
            ("https://friend.example", 101),
            ("https://friend.example.evil.example", 403),
            ("https://evil.example", 403),
            (f"http://localhost:{port}", 403),
            ("null", 403),
        ):
            assert status_of(url, origin=origin) == status, origin
            expected = 200 if status == 101 else status
            assert httpx.get(f"http://{host}/", headers={"Origin": origin}).status_code == expected
        # A name that was made to mean this machine is of the same origin as itself.
        rebound = {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"}
        assert httpx.get(f"http://{host}/", headers=rebound).status_code == 403
        assert httpx.get(f"http://localhost:{port}/").status_code == 200


def test_a_server_with_tokens_answers_to_any_name():
    with guarded(Gate(tokens=Tokens([TOKEN]))) as host:
        headers = {"Host": "watch.example", "Origin": "https://watch.example", **bearer(TOKEN)}
        assert httpx.get(f"http://{host}/metrics", headers=headers).status_code == 200


def test_connections_are_limited():
    gate = Gate(
        SecurityConfig(max_connections_per_address=2, connection_burst=5, connections_per_second=0.01)
    )
    with guarded(gate) as host, contextlib.ExitStack() as stack:
        url = f"ws://{host}/v1/echo"
        for _ in range(2):
            stack.enter_context(connect(url))
        assert status_of(url) == 429
        assert gate.refused["too_many_connections"] == 1
        stack.close()
        wait_for(lambda: not gate.open)
        for _ in range(3):
            assert status_of(url) == 101
        assert status_of(url) == 429
        assert httpx.get(f"http://{host}/").json()["error"]["code"] == "rate_limit_exceeded"
    gate = Gate(SecurityConfig(max_connections=1))
    with guarded(gate) as host, connect(f"ws://{host}/v1/echo"):
        refused = httpx.get(f"http://{host}/")
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"


def test_messages_are_paced_and_none_is_lost(monkeypatch):
    waits = []
    take = Bucket.take
    monkeypatch.setattr(Bucket, "take", lambda bucket: waits.append(take(bucket)) or waits[-1])
    gate = Gate(SecurityConfig(messages_per_second=5, message_burst=10))
    with guarded(gate) as host, connect(f"ws://{host}/v1/echo") as client:
        waits.clear()
        for number in range(12):
            client.send(str(number))
        assert [client.recv(10) for _ in range(12)] == [str(number) for number in range(12)]
    assert not any(waits[:10])
    assert len(waits) == 12
    assert sum(waits[10:]) > 0


def test_bodies_are_bounded():
    gate = Gate(SecurityConfig(max_body_bytes=1000))
    with guarded(gate) as host:
        url = f"http://{host}/v1/size"
        assert httpx.post(url, content=b"x" * 1000).text == "1000"
        assert httpx.post(url, content=b"x" * 1001).status_code == 413
        # Without a declared length.
        assert httpx.post(url, content=iter([b"x" * 600] * 2)).status_code == 413
        assert httpx.post(url, content=iter([b"x" * 500] * 2)).text == "1000"
        # A body that is declared is refused before it comes.
        name, port = host.split(":")
        with socket.create_connection((name, int(port))) as client:
            client.sendall(b"POST /v1/size HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n")
            assert b" 413 " in client.recv(1000)
        assert gate.refused["body_too_large"] == 3


def test_tokens_come_from_a_file_and_the_environment(tmp_path):
    path = tmp_path / "tokens"
    assert read_tokens(None, {}) is None
    path.write_text(f"{TOKEN}\nanother-token-of-somebody\n")
    tokens = read_tokens(path, {"MOSS_TOKENS": "a-token-of-the-environment"})
    assert tokens is not None
    assert TOKEN in tokens
    assert "a-token-of-the-environment" in tokens
    assert "" not in tokens
    assert TOKEN not in repr(vars(tokens))
    path.write_text("short")
    with pytest.raises(ConfigError, match="at least 16 characters"):
        read_tokens(path, {})
    path.write_text("\n")
    for environment in ({}, {"MOSS_TOKENS": TOKEN}):
        with pytest.raises(ConfigError, match="has no token"):
            read_tokens(path, environment)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_tokens(tmp_path / "missing", {})


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_loopback_needs_no_token(host):
    check_host(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "watch.example"])
def test_other_hosts_need_a_token(host):
    with pytest.raises(ConfigError, match="--token-file"):
        check_host(host, None)
    check_host(host, Tokens([TOKEN]))


def test_a_bucket_fills_again(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bucket = Bucket(rate=2, size=3)
    assert [bucket.take() for _ in range(5)] == [0, 0, 0, 0.5, 1.0]
    now = 1.5
    assert bucket.wait() == 0
    now = 100.0
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, 0.5]


def test_connections_without_a_request_are_cut(answering, monkeypatch):
    monkeypatch.setattr(app, "REQUEST_SECONDS", 0.2)
    with running(Hub(Scheduler(answering))) as server:
        address = ("127.0.0.1", server.port)
        with socket.create_connection(address) as silent, socket.create_connection(address) as slow:
            slow.sendall(b"GET / HTTP/1.1\r\nHost: local")
            for client in (silent, slow):
                client.settimeout(20)
                with contextlib.suppress(ConnectionResetError):
                    assert client.recv(1000) == b""
        # Neither a WebSocket nor a connection that is used again is cut.
        with Client(server.realtime) as client, httpx.Client() as other:
            other.get(f"{server.url}/healthz")
            time.sleep(0.4)
            assert other.get(f"{server.url}/healthz").status_code == 200
            client.ask("Is there a cat?")
            client.until("response.done")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from other machines, so clients need a token"),
        (["--token-file", "/nowhere/tokens"], "--token-file /nowhere/tokens cannot be read"),
        (["--mesh", "tensor"], "--mesh names axes (data, fsdp, tensor) and devices, as tensor=2"),
        (["--mesh", "pipeline=2"], "--mesh names axes"),
        (["--mesh", "tensor=4096"], "--mesh tensor=4096 needs 4096 devices; there are"),
        (["--video", "clip.mp4", "--mesh", "tensor=2"], "are for the live server; leave out --video"),
    ],
)
def test_the_command_refuses(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve.py", *flags])
    monkeypatch.delenv("MOSS_TOKENS", raising=False)
    assert serve.main() == 2
    assert message in capsys.readouterr().err
