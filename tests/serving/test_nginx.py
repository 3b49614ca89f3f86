"""`deploy/nginx.conf` in a real nginx, in front of a server: TLS, streams, limits, lost connections."""

import contextlib
import dataclasses
import hashlib
import http.client
import io
import os
import re
import shutil
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from servers import Client, png, running, wait_for
from starlette.middleware import Middleware
from websockets.exceptions import InvalidStatus

from moss_jax.config import MemoryConfig, SchedulerConfig, SecurityConfig, ServerConfig
from moss_jax.serving import chat, logs
from moss_jax.serving.hub import Hub
from moss_jax.serving.metrics import Metrics
from moss_jax.serving.security import Gate, Tokens, protection
from moss_jax.stream import Scheduler

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
SITE = (Path(__file__).parents[2] / "deploy" / "nginx.conf").read_text()
GREY = np.full((24, 32, 3), 128, np.uint8)
TOKEN = "a-token-that-is-long-enough"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
CONFIG = ServerConfig(grace_seconds=30.0, save_seconds=3600)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="there is no nginx: apt-get install nginx-light"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl to make a certificate"),
]

MAIN = """
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log;
{user}
events {{}}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""


@dataclasses.dataclass(frozen=True)
class Proxy:
    """An nginx that serves `host` over https and forwards to `upstream`, a port of this machine."""

    folder: Path
    host: str
    plain: str
    upstream: int

    @property
    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder / "fullchain.pem"))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def request(self, method: str, path: str, *, source: str | None = None, **options: Any) -> httpx.Response:
        """Sends a request, by default with the token; `source` is the client's own address."""
        with self.http(source) as client:
            options = {"headers": BEARER} | options
            return client.request(method, path, **options)

    def http(self, source: str | None = None) -> httpx.Client:
        transport = httpx.HTTPTransport(verify=self.trust, local_address=source)
        return httpx.Client(transport=transport, base_url=f"https://{self.host}", timeout=60)

    def watch(self, query: str = "", **options) -> Client:
        """A client of the live protocol that sends the token as browsers do."""
        browser = {
            "subprotocols": ["realtime", f"openai-insecure-api-key.{TOKEN}"],
            "origin": f"https://{self.host}",
        }
        trust = self.trust
        # The client reads and writes in two threads, which OpenSSL does not allow for. In TLS 1.3 the request
        # gets lost if it is written while a session ticket is read; in TLS 1.2 nothing is read before it.
        trust.maximum_version = ssl.TLSVersion.TLSv1_2
        return Client(f"wss://{self.host}/v1/realtime{query}", ssl=trust, **browser | options)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def proxy(tmp_path_factory) -> Iterator[Proxy]:
    """nginx with the shipped file, in which only name, ports and paths are others."""
    folder = tmp_path_factory.mktemp("nginx")
    port, plain, upstream = free_port(), free_port(), free_port()
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", folder / "privkey.pem", "-out", folder / "fullchain.pem"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *files, *names]
    subprocess.run(command, check=True, capture_output=True)
    site = SITE
    for shipped, here in (
        ("watch.example;", "localhost;"),
        ("/etc/letsencrypt/live/watch.example", folder),
        ("/var/log/nginx", folder),
        ("127.0.0.1:8765", f"127.0.0.1:{upstream}"),
        ("listen [::]:443", f"listen [::1]:{port}"),
        ("listen [::]:80", f"listen [::1]:{plain}"),
        ("listen 443", f"listen 127.0.0.1:{port}"),
        ("listen 80", f"listen 127.0.0.1:{plain}"),
    ):
        assert shipped in site
        site = site.replace(shipped, str(here))
    if not has_ipv6():
        site = re.sub(r"listen \[::1\].*", "", site)
    (folder / "site.conf").write_text(site)
    # Workers of root are another user by default, for whom the test's folder is closed.
    user = "user root root;" if os.getuid() == 0 else ""
    (folder / "nginx.conf").write_text(MAIN.format(folder=folder, user=user))
    assert NGINX is not None
    command = [NGINX, "-p", folder, "-c", folder / "nginx.conf"]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    with (folder / "stderr").open("w") as file:
        process = subprocess.Popen(command, stderr=file)
    try:
        wait_for(lambda: process.poll() is not None or is_open(port))
        assert process.poll() is None, (folder / "stderr").read_text()
        yield Proxy(folder, f"localhost:{port}", f"localhost:{plain}", upstream)
    finally:
        process.terminate()
        process.wait(60)


def is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


@pytest.fixture
def serve(proxy, make_engine, tmp_path) -> Callable:
    """Runs servers of the small model behind the proxy, one after the other, over one folder of streams."""

    @contextlib.contextmanager
    def serve(engine=None, security: SecurityConfig | None = None) -> Iterator:
        if engine is None:
            engine = make_engine(slots=2, memory=MemoryConfig(policy="window", text="window"))
        hub = Hub(
            Scheduler(engine, SchedulerConfig()), CONFIG, model="moss-test", state_folder=tmp_path / "state"
        )
        gate = Gate(security, tokens=Tokens([TOKEN]))
        middleware = [Middleware(logs.RequestLog), *protection(gate)]
        routes = [Metrics(hub, gate).route(), *chat.routes(hub)]
        with running(hub, proxy.upstream, middleware=middleware, routes=routes) as server:
            yield server

    return serve


def directive(name: str, unit: str) -> int:
    """The number that the file sets a directive to."""
    (value,) = re.findall(rf"^ *{name} (\d+){unit};", SITE, re.M)
    return int(value)


def test_the_page_over_https(serve, proxy):
    with serve():
        page = proxy.get("/", headers={})
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert "max-age" in page.headers["strict-transport-security"]
        scripts = re.findall(r'src="([^":]+\.js)"', page.text)
        assert scripts
        for path in (*scripts, "style.css", "icon.svg"):
            file = proxy.get(f"/{path}", headers={})
            assert file.status_code == 200
            assert proxy.get(f"/{path}", headers={"If-None-Match": file.headers["etag"]}).status_code == 304
        redirected = httpx.get(f"http://{proxy.plain}/style.css?x=1")
        assert redirected.status_code == 301
        assert redirected.headers["location"] == "https://localhost/style.css?x=1"
        trust = proxy.trust
        trust.set_alpn_protocols(["h2", "http/1.1"])
        name, port = proxy.host.split(":")
        with (
            socket.create_connection((name, int(port))) as plain,
            trust.wrap_socket(plain, server_hostname=name) as secure,
        ):
            assert secure.selected_alpn_protocol() == "h2"


def test_health_is_public_and_metrics_are_local(serve, proxy):
    with serve() as server:
        assert proxy.get("/healthz", headers={}).json() == {"status": "ok"}
        assert proxy.get("/readyz", headers={}).json() == {"ready": True, "free_streams": 2}
        assert httpx.get(f"{server.url}/metrics", headers=BEARER).status_code == 200
        for path in ("/metrics", "/metrics?x=1", "//metrics", "/%6detrics", "/x/../metrics", "/metrics/"):
            # Clients of a higher level would normalise the path.
            connection = http.client.HTTPSConnection(proxy.host, context=proxy.trust)
            with contextlib.closing(connection):
                connection.request("GET", path, headers=BEARER)
                assert connection.getresponse().status == 404
        assert proxy.get("/v1/models", headers={}).status_code == 401
        assert proxy.get("/v1/models").json()["data"][0]["id"] == "moss-test"


def test_binary_frames_and_a_lost_connection(serve, proxy):
    with serve():
        with proxy.watch() as client:
            session = client.negotiate(frames="binary")
            noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
            for frame in (png(GREY), png(noise)):
                client.socket.send(struct.pack(">d", float("nan")) + frame)
                client.until("conversation.item.done")
            seen = client.events[-1]["event_id"]
            client.lose()
        where = f"?session={session['id']}&token={session['moss']['token']}&after={seen}"
        with proxy.watch(where) as client:
            created = client.receive()
            assert created["session"]["id"] == session["id"]
            assert created["session"]["moss"]["resumed"]["saved"] is False
            client.socket.send(struct.pack(">d", float("nan")) + png(GREY))
            assert client.until("conversation.item.added")["moss"]["frame"]["index"] == 2
            client.send("moss.finish")
            assert client.until("moss.end")["counters"]["frames"] == 3
        for options, status in (({"origin": "https://evil.example"}, 403), ({"subprotocols": None}, 401)):
            with pytest.raises(InvalidStatus) as refused, proxy.watch(**options):
                pass
            assert refused.value.response.status_code == status


def test_a_stream_goes_on_after_a_restart_of_the_server(serve, proxy):
    with serve() as server, proxy.watch() as client:
        session = client.negotiate()
        client.show(GREY)
        client.until("conversation.item.done")
        server.server.should_exit = True
        end = client.until("moss.end")
        assert (end["reason"], end["saved"]) == ("shutdown", True)
        assert client.until_closed() == 1012
    where = f"?session={session['id']}&token={session['moss']['token']}"
    with pytest.raises(InvalidStatus) as refused, proxy.watch(f"{where}&api_key={TOKEN}"):
        pass
    assert refused.value.response.status_code == 502
    with serve(), proxy.watch(where) as client:
        assert client.receive()["session"]["moss"]["resumed"]["saved"] is True
        client.show(GREY)
        assert client.until("conversation.item.added")["moss"]["frame"]["index"] == 1
    written = [(proxy.folder / name).read_text() for name in ("moss.log", "moss-error.log", "error.log")]
    assert '"GET /v1/realtime" 502' in written[0]
    # Neither the session's token nor the client's, which were in the addresses of requests.
    assert not any(secret in log for log in written for secret in (session["moss"]["token"], TOKEN))


def test_an_answer_streams_through(serve, proxy, answering):
    """The engine stops after a few tokens until the first one has come through the proxy."""
    steps, go_on = [], threading.Event()

    def pause():
        steps.append(None)
        assert len(steps) < 8 or go_on.wait(60)

    answering.before_step = pause
    question = {"model": "moss-test", "stream": True, "messages": [{"role": "user", "content": "A story?"}]}
    try:
        with (
            serve(answering) as server,
            proxy.http() as client,
            client.stream("POST", "/v1/chat/completions", json=question, headers=BEARER) as answer,
        ):
            lines = (line for line in answer.iter_lines() if line)
            first = next(line for line in lines if '"content":"' in line)
            assert not go_on.is_set()
            assert server.hub.scheduler.streams
            go_on.set()
            rest = list(lines)
    finally:
        go_on.set()
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert first.startswith("data: ")
    assert len(rest) > 200
    assert rest[-1] == "data: [DONE]"


def test_a_large_upload(serve, proxy):
    content = np.random.default_rng(0).bytes(3 * 2**20)
    with serve():
        files = {"file": ("clip.mp4", content)}
        uploaded = proxy.request("POST", "/v1/files", files=files, data={"purpose": "user_data"})
        assert uploaded.status_code == 200
        stored = proxy.get(f"/v1/files/{uploaded.json()['id']}/content").content
        assert hashlib.sha256(stored).digest() == hashlib.sha256(content).digest()
    assert directive("client_max_body_size", "m") * 2**20 == SecurityConfig().max_body_bytes


@pytest.mark.skipif(not os.path.exists("/proc"), reason="needs Linux, where all of 127.0.0.0/8 is local")
def test_limits_and_logs_know_the_clients_address(serve, proxy):
    limits = SecurityConfig(connection_burst=3, connections_per_second=0.001)
    forged = {"X-Forwarded-For": "192.0.2.1", "X-Request-Id": "forged"}
    with serve(security=limits):
        log = io.StringIO()
        handler = logs.set_up(log)
        try:
            statuses = [
                proxy.get("/style.css", source="127.0.0.2", headers=forged).status_code for _ in range(5)
            ]
            other = proxy.get("/style.css", source="127.0.0.3")
        finally:
            handler.close()
    assert statuses == [200, 200, 200, 429, 429]
    assert other.status_code == 200
    assert '"address": "127.0.0.2"' in log.getvalue()
    assert '"address": "127.0.0.3"' in log.getvalue()
    assert other.headers["x-request-id"] in log.getvalue()
    assert "forged" not in log.getvalue()
    assert "192.0.2.1" not in log.getvalue()


def test_quiet_connections_stay_open(serve):
    with serve() as server:
        config = server.server.config
        # The server pings often enough for the proxy, which closes idle connections before the server does.
        assert 2 * config.ws_ping_interval < directive("proxy_read_timeout", "s")
        assert directive("keepalive_timeout", "s") < config.timeout_keep_alive
