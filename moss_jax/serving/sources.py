"""Sources of a request's media: data URLs, files in allowed folders, URLs on allowed hosts."""

import contextlib
import http.client
import ipaddress
import os
import socket
import ssl
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from moss_jax.serving.media import MediaError

_CHUNK = 64 * 2**10


def local_path(url: str, roots: Sequence[str | os.PathLike]) -> Path:
    """Resolves a `file://` URL to a file below one of the folders, after following all links.

    Raises:
      MediaError: the file is outside the folders, missing or not regular.
    """
    rest = url[len("file://") :].removeprefix("localhost")
    folders = [Path(root).resolve() for root in roots]
    if not folders:
        raise MediaError("file:// URLs are not allowed by this server")
    if not rest.startswith("/") or "\0" in unquote(rest):
        raise MediaError("a file:// URL has the form file:///folder/clip.mp4")
    # Some clients percent-encode the path, others do not.
    for text in dict.fromkeys((unquote(rest), rest)):
        try:
            path = Path(text).resolve()
            # Reveals nothing about paths outside the folders, not even whether they exist.
            if not any(path.is_relative_to(folder) for folder in folders):
                continue
            if stat.S_ISREG(path.stat().st_mode):
                return path
        except (OSError, RuntimeError, ValueError):
            continue
    raise MediaError("the file:// URL names no file below the folders that this server allows")


def fetch(url: str, *, hosts: Sequence[str], max_bytes: int, seconds: float) -> bytes:
    """Downloads from an allowed host; follows no redirects and connects only to public addresses.

    Args:
      hosts: allow-list of names, each with `:port` unless it is the scheme's default.
      seconds: timeout of the whole download.

    Raises:
      MediaError: the URL is not allowed, the content is too large, or the download times out or fails.
    """
    if not hosts:
        raise MediaError("this server fetches nothing; send a data URL, or upload the file")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise MediaError("the URL is not valid") from None
    is_secure = parts.scheme == "https"
    port = port or (443 if is_secure else 80)
    host = (parts.hostname or "").rstrip(".").lower()
    name = host if port == (443 if is_secure else 80) else f"{host}:{port}"
    if name not in [allowed.lower() for allowed in hosts] or parts.username or parts.password:
        raise MediaError("the host of the URL is not among those that this server fetches from")
    if not url.isascii() or any(c <= " " for c in url):
        raise MediaError("the URL is not valid")
    end = time.monotonic() + seconds
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    with _errors(), contextlib.closing(_connect(host, port, end)) as plain:
        connected = (
            ssl.create_default_context().wrap_socket(plain, server_hostname=host) if is_secure else plain
        )
        connection = http.client.HTTPConnection(host, port)
        # Reuses the connection to the address that was checked, so that the name is not resolved again.
        connection.sock = connected
        with contextlib.closing(connection):
            connection.request("GET", target, headers={"Accept": "image/*, video/*", "Connection": "close"})
            response = connection.getresponse()
            if response.status != 200:
                raise MediaError(f"the host answered with status {response.status}")
            if int(response.headers.get("Content-Length") or 0) > max_bytes:
                raise MediaError(f"what the URL names has more than {max_bytes} bytes")
            content = bytearray()
            while chunk := response.read1(_CHUNK):
                content += chunk
                if len(content) > max_bytes:
                    raise MediaError(f"what the URL names has more than {max_bytes} bytes")
                if time.monotonic() > end:
                    raise TimeoutError
                connected.settimeout(max(0.01, end - time.monotonic()))
            return bytes(content)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise MediaError("fetching the URL takes too long") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError("the URL cannot be fetched") from None


def _connect(host: str, port: int, end: float) -> socket.socket:
    """Connects to the first address of a host that answers, if all of its addresses are public."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise MediaError("the host of the URL has an address that is not public")
    failures = []
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout=max(0.01, end - time.monotonic()))
        except OSError as error:
            failures.append(error)
    raise failures[0]


def is_public(address: str) -> bool:
    """Whether an address is on the public internet: not private, local, reserved or multicast."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(parsed, "ipv4_mapped", None) or getattr(parsed, "sixtofour", None) or parsed
    return inner.is_global and not inner.is_multicast and parsed.is_global
