"""Files below allowed folders, and hosts that are allowed."""

import contextlib
import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from moss_jax.serving import sources
from moss_jax.serving.media import MediaError
from moss_jax.serving.sources import fetch, is_public, local_path

OUTSIDE = "names no file below the folders that this server allows"


@pytest.fixture
def root(tmp_path):
    """A folder that is allowed, beside a secret; links lead from one to the other."""
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (tmp_path / "rooted").mkdir()
    (tmp_path / "rooted" / "other.mp4").write_bytes(b"of another folder")
    folder = tmp_path / "root"
    (folder / "below").mkdir(parents=True)
    for name in ("clip.mp4", "a b.mp4", "100%25.mp4", "below/clip.mp4", "a#b?c.mp4"):
        (folder / name).write_bytes(b"clip")
    (folder / "inward.mp4").symlink_to(folder / "below" / "clip.mp4")
    (folder / "outward.mp4").symlink_to(tmp_path / "secret.mp4")
    (folder / "up").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    return folder


def test_files_below_a_folder(root):
    for name in ("clip.mp4", "a b.mp4", "a%20b.mp4", "100%25.mp4", "below/../clip.mp4", "a#b?c.mp4"):
        assert local_path(f"file://{root}/{name}", [root]).read_bytes() == b"clip"
    assert local_path(f"file://localhost{root}/clip.mp4", [root]).name == "clip.mp4"
    assert local_path(f"file://{root}/inward.mp4", [root]).parent.name == "below"
    # A folder that is a link itself.
    assert local_path(f"file://{root}/up/root/clip.mp4", ["/nowhere", root / "up" / "root"])


@pytest.mark.parametrize(
    "name",
    [
        "../secret.mp4",
        "%2e%2e/secret.mp4",
        "..%2fsecret.mp4",
        "below/../../secret.mp4",
        "outward.mp4",
        "up/secret.mp4",
        "up/nothing.mp4",
        "../rooted/other.mp4",
        "loop",
        "below",
        "",
        "nothing.mp4",
        "clip.mp4/x",
        "x" * 5000,
    ],
)
def test_what_is_outside_or_no_file_is_refused_alike(root, name):
    with pytest.raises(MediaError, match=OUTSIDE):
        local_path(f"file://{root}/{name}", [root])


@pytest.mark.parametrize(
    "url", ["file://", "file:///", "file://host/clip.mp4", "file:///etc/passwd", "file:clip"]
)
def test_other_urls_are_refused(root, url):
    with pytest.raises(MediaError):
        local_path(url, [root])


def test_no_file_is_allowed_unless_a_folder_is(root):
    with pytest.raises(MediaError, match="not allowed by this server"):
        local_path(f"file://{root}/clip.mp4", [])


# --------------------------------------------------------------------------------------- hosts


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/slow":
            time.sleep(1.5)
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/clip?a=b")
            self.end_headers()
            return
        body = b"x" * 5000 if self.path == "/large" else f"{self.headers['Host']}{self.path}".encode()
        self.send_response(200 if self.path != "/missing" else 404)
        if self.path != "/large":
            self.send_header("Content-Length", str(len(body) if self.path != "/lying" else 10**12))
        self.end_headers()
        # The client may have had enough.
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def get(url: str, *hosts: str, seconds: float = 5.0) -> bytes:
    return fetch(url, hosts=hosts, max_bytes=1000, seconds=seconds)


def test_a_host_must_be_allowed_and_its_address_public(port, monkeypatch):
    with pytest.raises(MediaError, match="fetches nothing"):
        get(f"http://localhost:{port}/clip")
    host = f"localhost:{port}"
    with pytest.raises(MediaError, match="an address that is not public"):
        get(f"http://{host}/clip", host)
    monkeypatch.setattr(sources, "is_public", lambda address: True)
    assert get(f"http://{host}/clip?a=b", host) == f"{host}/clip?a=b".encode()
    assert get(f"HTTP://LOCALHOST.:{port}/clip", host)
    for url in (
        f"http://localhost.evil.com:{port}/clip",
        f"http://{host}@evil.com/clip",
        f"http://user@{host}/clip",
        f"http://127.0.0.1:{port}/clip",
        "http://localhost/clip",
        f"https://localhost/clip:{port}",
        "http://[::1/clip",
        "http:///clip",
    ):
        with pytest.raises(MediaError, match=r"not among those|not valid"):
            get(url, host)
    with pytest.raises(MediaError, match="not valid"):
        get(f"http://{host}/a\r\nX: y", host)


def test_what_is_fetched_is_bounded(port, monkeypatch):
    monkeypatch.setattr(sources, "is_public", lambda address: True)
    host = f"localhost:{port}"
    for name in ("large", "lying"):
        with pytest.raises(MediaError, match="more than 1000 bytes"):
            get(f"http://{host}/{name}", host)
    with pytest.raises(MediaError, match="too long"):
        get(f"http://{host}/slow", host, seconds=0.2)
    with pytest.raises(MediaError, match="status 302"):
        get(f"http://{host}/moved", host)
    with pytest.raises(MediaError, match="status 404"):
        get(f"http://{host}/missing", host)
    # It speaks no TLS.
    with pytest.raises(MediaError, match="cannot be fetched"):
        get(f"https://{host}/clip", host)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:10.0.0.1",
        "2002:7f00:0001::",
    ],
)
def test_private_addresses(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111"])
def test_public_addresses(address):
    assert is_public(address)
