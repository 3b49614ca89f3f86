"""OpenAI-compatible chat completions, models and files endpoints over the streams of a hub."""

import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from moss_jax.config import ChatConfig, FrameSampling
from moss_jax.serving.chat.completions import Completions
from moss_jax.serving.chat.errors import ApiError
from moss_jax.serving.chat.turns import TurnReader
from moss_jax.serving.chat.uploads import Uploads
from moss_jax.serving.files import FileStore
from moss_jax.serving.hub import Hub

__all__ = ["routes"]

type Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]


def routes(hub: Hub, config: ChatConfig | None = None, sampling: FrameSampling | None = None) -> list[Route]:
    """Routes of chat completions, models and files, for `make_app`.

    Args:
      config: limits of the endpoints.
      sampling: frame sampling of videos; one frame a second by default.
    """
    config = config or ChatConfig()
    files = FileStore(max_bytes=config.file_bytes, max_files=config.files, keep_seconds=config.keep_seconds)
    completions = Completions(hub, config, TurnReader(hub, config, sampling or FrameSampling(), files))
    uploads = Uploads(files, max_bytes=config.max_video_bytes)
    endpoints: list[tuple[str, str, Endpoint]] = [
        ("POST", "/v1/chat/completions", completions.complete),
        ("GET", "/v1/models", completions.list_models),
        ("GET", "/v1/models/{model:path}", completions.get_model),
        ("POST", "/v1/files", uploads.upload),
        ("GET", "/v1/files", uploads.list_files),
        ("GET", "/v1/files/{file}", uploads.get_file),
        ("DELETE", "/v1/files/{file}", uploads.delete_file),
        ("GET", "/v1/files/{file}/content", uploads.get_content),
    ]
    return [Route(path, _guarded(hub, endpoint), methods=[method]) for method, path, endpoint in endpoints]


def _guarded(hub: Hub, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """Wraps an endpoint so that errors have OpenAI's format; a client that disconnects gets none."""

    @functools.wraps(endpoint)
    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except (ApiError, HTTPException) as error:
            if isinstance(error, HTTPException):
                # An invalid form, or a body beyond the server's own limits.
                error = ApiError(error.detail, status=error.status_code, code="invalid_body")
            hub.counters.errors_by_code[error.code or "invalid_request"] += 1
            return JSONResponse(error.body, status_code=error.status, headers=error.headers)
        except ClientDisconnect:
            # The client is gone, so nobody receives this.
            return Response(status_code=499)

    return guarded
