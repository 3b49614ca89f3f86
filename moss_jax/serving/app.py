"""The ASGI application: routes, lifespan, and the server that runs it."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import State

from moss_jax.serving.hub import Hub
from moss_jax.serving.realtime import WRITE_NOW, realtime

_logger = logging.getLogger(__name__)

WEB = Path(__file__).parent / "web"
# Seconds until a closing WebSocket is aborted if its client does not read the remaining data.
ABORT_SECONDS = 10.0
# Seconds until a connection is aborted if its client stops reading a long response.
STALL_SECONDS = 60.0
# Seconds for a client to send the head of its first request.
REQUEST_SECONDS = 10.0


def make_app(
    hub: Hub,
    *,
    middleware: Sequence[Middleware] = (),
    routes: Sequence[BaseRoute] = (),
    warm_up: bool = True,
    on_ready: Callable[[], object] = lambda: None,
) -> Starlette:
    """Builds the application over a hub, which it starts and closes.

    Args:
      middleware: wraps all routes, the first one outermost.
      routes: routes in addition to those of the live protocol and the page.
      warm_up: whether the programs are compiled before the server is ready.
      on_ready: called when the server is ready.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        # Meanwhile the server answers requests and reports that it is not ready.
        starting = asyncio.create_task(_start(hub, on_ready, warm_up=warm_up))
        try:
            yield
        finally:
            await hub.close()
            starting.cancel()

    own = [
        Route("/healthz", health),
        Route("/readyz", readiness),
        WebSocketRoute("/v1/realtime", realtime),
    ]
    page = Mount("/", Page(directory=WEB, html=True), name="page")
    app = Starlette(routes=[*own, *routes, page], middleware=list(middleware), lifespan=lifespan)
    app.state.hub = hub
    return app


async def _start(hub: Hub, on_ready: Callable[[], object], *, warm_up: bool) -> None:
    try:
        await hub.start(warm_up=warm_up)
        on_ready()
    except Exception:
        _logger.exception("the streams cannot be started")


class Page(StaticFiles):
    """Static files of the page, revalidated on each request so that browsers never mix two versions."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        """Responds with a file, or 304 if it has not changed."""
        response = super().file_response(*args, **options)
        response.headers["Cache-Control"] = "no-cache"
        response.headers["Content-Security-Policy"] = "frame-ancestors 'none'"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response


async def health(_: Request) -> Response:
    """Liveness: whether the process responds."""
    return JSONResponse({"status": "ok"})


async def readiness(request: Request) -> Response:
    """Readiness: whether streams can be opened, with programs compiled and no shutdown in progress."""
    hub: Hub = request.app.state.hub
    content = {"ready": hub.is_ready, "free_streams": hub.free_slots}
    return JSONResponse(content, status_code=200 if hub.is_ready else 503)


class HttpProtocol(H11Protocol):
    """HTTP protocol that aborts idle and stalled connections, which would stay open otherwise."""

    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Starts the timeout of the first request."""
        super().connection_made(transport)
        self.loop.call_later(REQUEST_SECONDS, self._cut)

    def pause_writing(self) -> None:
        """Starts the timeout of a stalled client."""
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Cancels the timeout, as the client has read most of the data."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def _cut(self) -> None:
        # No request has arrived, and the connection has not become a WebSocket.
        if self.cycle is None and self in self.connections:
            self.transport.abort()


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """WebSocket protocol that sends texts without a task, and aborts stalled connections that are closing."""

    async def run_asgi(self) -> None:
        """Runs the application for the connection."""
        extensions: dict[str, Any] = {**(self.scope.get("extensions") or {}), WRITE_NOW: self.write_now}
        self.scope["extensions"] = extensions
        await super().run_asgi()
        self.loop.call_later(ABORT_SECONDS, self.transport.abort)

    def write_now(self, text: str) -> bool:
        """Sends a text at once; returns False if that is impossible, or others must be sent first."""
        is_open = self.handshake_complete and not (self.disconnected or self.close_sent)
        if not is_open or not self.writable.is_set() or self.conn.state is not State.OPEN:
            return False
        self.conn.send_text(text.encode())
        self.transport.write(b"".join(self.conn.data_to_send()))
        return True

    def keepalive_timeout(self) -> None:
        """Aborts a connection whose client does not answer keep-alive pings."""
        super().keepalive_timeout()
        self.loop.call_later(ABORT_SECONDS, self.transport.abort)


class Server(uvicorn.Server):
    """uvicorn server that notifies and saves the running streams before it closes their connections.

    Attributes:
      stopped_by: number of the signal that stopped it, if any.
    """

    def __init__(self, config: uvicorn.Config, hub: Hub):
        super().__init__(config)
        self.stopped_by: int | None = None
        self._hub = hub

    def handle_exit(self, sig: int, frame) -> None:
        """Shuts down gracefully at the first signal, immediately at the second."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self.stopped_by = sig

    async def shutdown(self, sockets=None) -> None:
        """Shuts the server down."""
        for server in self.servers:
            server.close()
        await self._hub.close()
        await super().shutdown(sockets)


def make_server(app: Starlette, hub: Hub, *, host: str = "127.0.0.1", port: int = 8765, **options) -> Server:
    """Creates a server that runs an application.

    Args:
      port: TCP port; 0 for any free one.
      options: options of `uvicorn.Config`.
    """
    settings = {
        "http": HttpProtocol,
        "ws": WebSocketProtocol,
        "ws_max_size": hub.config.max_message_bytes,
        "ws_per_message_deflate": False,
        "log_level": "warning",
        "timeout_graceful_shutdown": 5,
        "server_header": False,
    }
    return Server(uvicorn.Config(app, host=host, port=port, **settings | options), hub)
