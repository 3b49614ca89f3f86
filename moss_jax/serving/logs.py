"""Logs as one JSON object a line: what happened to which request and session, without content or secrets."""

import contextvars
import json
import logging
import re
import secrets
import sys
import time
import traceback
from typing import Any, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moss_jax.config import ConfigError
from moss_jax.serving.security import QUERY, SUBPROTOCOL, address_of

_logger = logging.getLogger(__name__)

# Ids of the current request or connection, and of its session.
request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)
session_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("session_id", default=None)

# Errors whose messages are logged; others may quote what a client sent.
TOLD = (OSError, RuntimeError, ConfigError)
_SECRETS = re.compile(
    rf"(?P<before>[?&](?:token|{QUERY})=|{re.escape(SUBPROTOCOL)}|Bearer\s+)[^\s&\"',]+", re.IGNORECASE
)
# Standard attributes of a record; the rest was given as `extra`.
_USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


def without_secrets(text: str) -> str:
    """Redacts tokens in a text."""
    return _SECRETS.sub(r"\g<before>...", text)


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Formats the record as one line."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "time": f"{at}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": without_secrets(record.getMessage()),
            "request": request_id.get(),
            "session": session_id.get(),
            **{name: value for name, value in vars(record).items() if name not in _USUAL},
        }
        if record.exc_info and record.exc_info[1] is not None:
            entry["error"] = _described(record.exc_info[1])
        return json.dumps({k: v for k, v in entry.items() if v is not None}, default=str, ensure_ascii=False)


def _described(error: BaseException) -> dict[str, Any]:
    """Describes an error and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    described: dict[str, Any] = {
        "type": type(error).__name__,
        "stack": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }
    if isinstance(error, TOLD):
        described["message"] = without_secrets(str(error))
    return described


def set_up(file: TextIO = sys.stderr, level: int = logging.INFO) -> logging.Handler:
    """Configures the package and uvicorn to log JSON to a file; returns the handler, for removal."""
    handler = logging.StreamHandler(file)
    handler.setFormatter(JsonFormatter())
    for name in ("moss_jax", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        # uvicorn logs each connection's URL with its query; the middleware logs it without.
        logger.setLevel(level if name == "moss_jax" else logging.WARNING)
    return handler


class RequestLog:
    """Middleware that gives each request and connection an id, and logs its end.

    An id set by a proxy (`x-request-id`) is kept. The response carries it as well.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request or a connection, and logs it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request = given if re.fullmatch(r"[\w.:-]{1,64}", given) else f"req_{secrets.token_hex(8)}"
        request_id.set(request)
        begin, status = time.monotonic(), None

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request.encode())]}
            elif message["type"] in ("websocket.close", "websocket.accept"):
                status = message.get("code", 101)
            await send(message)

        try:
            await self._app(scope, receive, sent)
        finally:
            details = {
                "kind": scope["type"],
                "method": scope.get("method"),
                # The path is chosen by the client, so it is truncated.
                "path": scope["path"][:256],
                "status": status,
                "seconds": round(time.monotonic() - begin, 3),
                "address": address_of(scope),
            }
            # These are polled every few seconds.
            quiet = scope["path"] in ("/healthz", "/readyz", "/metrics") and status in (200, 503)
            _logger.log(logging.DEBUG if quiet else logging.INFO, "request", extra=details)
