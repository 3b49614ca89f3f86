"""The application: its routes, its life, and the server that runs it."""

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

from moss_jax.serving.hub import Hub
from moss_jax.serving.realtime import realtime

_logger = logging.getLogger(__name__)

WEB = Path(__file__).parent / "web"
# Seconds after which a connection is cut whose client does not take the rest of what was sent.
ABORT_SECONDS = 10.0
# Seconds after which a connection is cut whose client takes nothing of a long response.
STALL_SECONDS = 60.0
# Seconds in which a client has to send the head of its first request.
REQUEST_SECONDS = 10.0


def make_app(
    hub: Hub,
    *,
    middleware: Sequence[Middleware] = (),
    routes: Sequence[BaseRoute] = (),
    warm_up: bool = True,
    on_ready: Callable[[], object] = lambda: None,
) -> Starlette:
    """The application over a hub, which it starts and closes.

    Args:
      middleware: goes around all routes, the first outermost.
      routes: beside those of the live protocol and the page.
      warm_up: whether the programs are compiled before the server is ready.
      on_ready: is called then.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        # The server answers meanwhile, and says that it is not ready.
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
    """The page's files, which browsers ask about each time, so that they never mix those of two versions."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        """Answers with a file, or that it has not changed."""
        response = super().file_response(*args, **options)
        response.headers["Cache-Control"] = "no-cache"
        response.headers["Content-Security-Policy"] = "frame-ancestors 'none'"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response


async def health(_: Request) -> Response:
    """Whether the process answers."""
    return JSONResponse({"status": "ok"})


async def readiness(request: Request) -> Response:
    """Whether streams can be opened: programs are compiled, and the server does not end."""
    hub: Hub = request.app.state.hub
    content = {"ready": hub.is_ready, "free_streams": hub.free_slots}
    return JSONResponse(content, status_code=200 if hub.is_ready else 503)


class HttpProtocol(H11Protocol):
    """Cuts a connection over which no request comes, or no response goes, which would stay open else."""

    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begins with a connection."""
        super().connection_made(transport)
        self.loop.call_later(REQUEST_SECONDS, self._cut)

    def pause_writing(self) -> None:
        """Waits for the client to take what was written."""
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Goes on, as the client has taken most of it."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def _cut(self) -> None:
        # Neither has a request come, nor has it become a WebSocket.
        if self.cycle is None and self in self.connections:
            self.transport.abort()


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """Cuts a connection whose client does not take the rest of what was sent, which would stay open else."""

    async def run_asgi(self) -> None:
        """Runs the application for the connection."""
        await super().run_asgi()
        self.loop.call_later(ABORT_SECONDS, self.transport.abort)

    def keepalive_timeout(self) -> None:
        """Gives up a client that does not answer."""
        super().keepalive_timeout()
        self.loop.call_later(ABORT_SECONDS, self.transport.abort)


class Server(uvicorn.Server):
    """A uvicorn server that tells and saves the running streams before it closes their connections.

    Attributes:
      stopped_by: number of the signal that has ended it, if one has.
    """

    def __init__(self, config: uvicorn.Config, hub: Hub):
        super().__init__(config)
        self.stopped_by: int | None = None
        self._hub = hub

    def handle_exit(self, sig: int, frame) -> None:
        """Ends the server at the first signal, at once at the second."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self.stopped_by = sig

    async def shutdown(self, sockets=None) -> None:
        """Ends the server."""
        for server in self.servers:
            server.close()
        await self._hub.close()
        await super().shutdown(sockets)


def make_server(app: Starlette, hub: Hub, *, host: str = "127.0.0.1", port: int = 8765, **options) -> Server:
    """A server that runs an application.

    Args:
      port: 0 for any that is free.
      options: of `uvicorn.Config`.
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
