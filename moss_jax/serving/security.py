"""Authentication, origin checks and rate limits as ASGI middleware."""

import asyncio
import collections
import hashlib
import hmac
import ipaddress
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moss_jax.config import ConfigError, SecurityConfig

# Environment variable with tokens, separated by whitespace.
TOKENS_VARIABLE = "MOSS_TOKENS"
# Browsers cannot set WebSocket headers, so OpenAI's clients send the token as a subprotocol.
SUBPROTOCOL = "openai-insecure-api-key."
QUERY = "api_key"
SHORTEST_TOKEN = 16
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
# Paths that require a token; the others are health checks and the static page.
PROTECTED = ("/v1/", "/metrics")
# Key of an admitted request's scope with the client's name, which `owner_of` reads.
_OWNER = "moss_jax.owner"
# Maximum number of addresses whose rates are tracked.
MOST_ADDRESSES = 65536

Refusal = tuple[int, str, str]


class Tokens:
    """Accepted client tokens, stored as hashes.

    Args:
      tokens: at least one, each of at least `SHORTEST_TOKEN` characters.

    Raises:
      ConfigError: there is no token, or one is too short.
    """

    def __init__(self, tokens: Iterable[str]):
        given = list(tokens)
        self._hashes = [_hashed(token) for token in given]
        if not given or any(len(token) < SHORTEST_TOKEN for token in given):
            raise ConfigError(
                f"a token has at least {SHORTEST_TOKEN} characters; make one with "
                "`python -c 'import secrets; print(secrets.token_urlsafe(32))'`"
            )

    def __contains__(self, token: str) -> bool:
        """Whether a token is accepted, compared in constant time."""
        hashed = _hashed(token)
        return sum([hmac.compare_digest(hashed, known) for known in self._hashes]) > 0


def _hashed(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def read_tokens(path: Path | None, environment: Mapping[str, str]) -> Tokens | None:
    """Reads tokens from a file, one a line, and from `MOSS_TOKENS`; returns None if neither is given.

    Raises:
      ConfigError: the file cannot be read, or contains no token.
    """
    found = environment.get(TOKENS_VARIABLE, "").split()
    if path is not None:
        try:
            own = path.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--token-file {path} cannot be read: {error}") from error
        if not own:
            raise ConfigError(f"--token-file {path} has no token: write one a line")
        found += own
    return Tokens(found) if found else None


def is_loopback(host: str) -> bool:
    """Whether an address is reachable only from this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_host(host: str, tokens: Tokens | None) -> None:
    """Refuses to serve other machines without authentication.

    Raises:
      ConfigError: no tokens are configured; the message says what to do.
    """
    if tokens is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines, so clients need a token: give --token-file, "
            f"a file with one token a line, or set {TOKENS_VARIABLE}"
        )


class Bucket:
    """Token bucket for rate limits with bursts, initially full.

    Args:
      rate: tokens per second.
      size: capacity in tokens.
    """

    def __init__(self, rate: float, size: float):
        self._rate, self._size = rate, size
        self._level, self._at = size, time.monotonic()

    def wait(self) -> float:
        """Seconds until a token is available."""
        now = time.monotonic()
        self._level = min(self._size, self._level + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, (1 - self._level) / self._rate)

    def take(self) -> float:
        """Takes a token, possibly in advance; returns the seconds until it is available."""
        seconds = self.wait()
        self._level -= 1
        return seconds


class Gate:
    """Admission control: authentication, origin checks, and connection and rate limits.

    Args:
      config: the limits.
      tokens: accepted tokens; None to disable authentication.
      host: address that the server listens on.
      origins: allow-list of further origins, such as "https://example.org".

    Attributes:
      open: number of open connections and requests, by address.
      refused: number of refusals, by reason.
    """

    def __init__(
        self,
        config: SecurityConfig | None = None,
        *,
        tokens: Tokens | None = None,
        host: str = "127.0.0.1",
        origins: Iterable[str] = (),
    ):
        self.config = config or SecurityConfig()
        self.open: collections.Counter[str] = collections.Counter()
        self.refused: collections.Counter[str] = collections.Counter()
        self._tokens = tokens
        self._origins = {_origin(origin) for origin in origins}
        # DNS rebinding: without tokens, a page whose name resolves to this machine must not get in.
        self._hosts = None
        if tokens is None:
            self._hosts = LOOPBACK_NAMES | {host.strip("[]")} | {urlsplit(o).hostname for o in self._origins}
        self._rates: collections.OrderedDict[str, Bucket] = collections.OrderedDict()

    def refusal(self, scope: Scope) -> Refusal | None:
        """Returns status, code and message of a refusal, or None if the request is admitted."""
        headers = _headers(scope)
        found = self._crowded(scope) or self._foreign(headers) or self._unknown(scope, headers)
        if found:
            self.refused[found[1]] += 1
        return found

    def owner(self, scope: Scope) -> str:
        """Names the client of an admitted request: the hash of its token, or "" if none is needed."""
        if self._tokens is None:
            return ""
        given = _given(scope, _headers(scope))
        return next((_hashed(token).hex() for token in given if token in self._tokens), "")

    def _crowded(self, scope: Scope) -> Refusal | None:
        config, address = self.config, address_of(scope)
        if self.open.total() >= config.max_connections:
            return 503, "too_many_connections", "the server has too many connections; try again later"
        if self.open[address] >= config.max_connections_per_address:
            return 429, "too_many_connections", "there are too many connections from your address"
        bucket = self._rates.pop(address, None) or Bucket(
            config.connections_per_second, config.connection_burst
        )
        self._rates[address] = bucket
        if len(self._rates) > MOST_ADDRESSES:
            self._rates.popitem(last=False)
        # A refused attempt takes no token, so a client that keeps retrying is admitted at the rate.
        if bucket.wait():
            return 429, "rate_limit_exceeded", "there are too many new connections from your address; wait"
        bucket.take()
        return None

    def _foreign(self, headers: Mapping[str, str]) -> Refusal | None:
        host = headers.get("host", "")
        if self._hosts is not None and urlsplit(f"//{host}").hostname not in self._hosts:
            return 403, "host_not_allowed", "the server is not known by this name; it answers to localhost"
        origin = headers.get("origin")
        if origin is None or _origin(origin) in self._origins or urlsplit(origin).netloc == host != "":
            return None
        return 403, "origin_not_allowed", "pages of this origin may not connect; the server allows its own"

    def _unknown(self, scope: Scope, headers: Mapping[str, str]) -> Refusal | None:
        public = scope["type"] == "http" and not scope["path"].startswith(PROTECTED)
        if self._tokens is None or public or any(token in self._tokens for token in _given(scope, headers)):
            return None
        return 401, "invalid_api_key", "a valid token is needed: Authorization: Bearer ..."


def address_of(scope: Scope) -> str:
    """The key of rate limits: the client's IPv4 address, or its IPv6 /64 network."""
    client = scope.get("client")
    if not client:
        return "unknown"
    try:
        address = ipaddress.ip_address(client[0])
    except ValueError:
        return client[0]
    if address.version == 6:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def owner_of(scope: Scope) -> str:
    """Names the client that a request is from, as `Gate.owner` does; "" if no gate protects the server."""
    return scope.get(_OWNER, "")


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _origin(origin: str) -> str:
    return origin.rstrip("/").lower()


def _given(scope: Scope, headers: Mapping[str, str]) -> list[str]:
    """Tokens presented by a client; query parameter and subprotocol count only for a WebSocket."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    found = [token.strip()] if scheme.lower() == "bearer" else []
    if scope["type"] == "websocket":
        found += [p.removeprefix(SUBPROTOCOL) for p in scope["subprotocols"] if p.startswith(SUBPROTOCOL)]
        found += parse_qs(scope["query_string"].decode("latin-1")).get(QUERY, [])
    return found


class Guard:
    """Middleware that admits requests through a gate, and bounds the size and rate of what clients send.

    Args:
      gate: gate shared by all requests.
    """

    def __init__(self, app: ASGIApp, gate: Gate):
        self._app, self._gate = app, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves or refuses a request or connection."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        gate, address = self._gate, address_of(scope)
        if refusal := gate.refusal(scope):
            await refuse(scope, receive, send, refusal)
            return
        scope = {**scope, _OWNER: gate.owner(scope)}
        if scope["type"] == "websocket":
            # The endpoint must neither see the token nor select it as the subprotocol.
            shown = [p for p in scope["subprotocols"] if not p.startswith(SUBPROTOCOL)]
            scope = {**scope, "subprotocols": shown}
            receive = self._paced(receive)
        else:
            receive = self._bounded(scope, receive)
        gate.open[address] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            gate.open[address] -= 1
            if not gate.open[address]:
                del gate.open[address]

    def _paced(self, receive: Receive) -> Receive:
        """Applies backpressure to a client that exceeds the message rate."""
        config = self._gate.config
        bucket = Bucket(config.messages_per_second, config.message_burst)

        async def paced() -> Message:
            message = await receive()
            if message["type"] == "websocket.receive" and (seconds := bucket.take()):
                await asyncio.sleep(seconds)
            return message

        return paced

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Rejects an oversized body as early as possible."""
        most = self._gate.config.max_body_bytes
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        left = most - int(declared if declared.isdigit() else 0)
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive() if left >= 0 else {"type": "http.request"}
            size += len(message.get("body", b""))
            if size > most or left < 0:
                self._gate.refused["body_too_large"] += 1
                raise HTTPException(413, f"the body is larger than {most} bytes")
            return message

        return bounded


async def refuse(scope: Scope, receive: Receive, send: Send, refusal: Refusal) -> None:
    """Answers a request or a WebSocket handshake with an error in OpenAI's format."""
    status, code, message = refusal
    kind = "server_error" if status >= 500 else "invalid_request_error"
    content = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status in (429, 503):
        headers.append((b"retry-after", b"1"))
    prefix = "http"
    if scope["type"] == "websocket":
        await receive()
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008, "reason": message[:120]})
            return
        prefix = "websocket.http"
    await send({"type": f"{prefix}.response.start", "status": status, "headers": headers})
    await send({"type": f"{prefix}.response.body", "body": content})


def protection(gate: Gate, origins: Sequence[str] = ()) -> list[Middleware]:
    """The middleware of a gate, with CORS headers for the allowed origins."""
    cross = Middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["authorization", "content-type"],
    )
    return [*([cross] if origins else []), Middleware(Guard, gate=gate)]
