"""Size-limited request bodies, and work that is cancelled when the client disconnects."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from moss_jax.serving.chat.errors import busy, too_large

# Total bytes of all requests in preparation, as a multiple of the limit of one.
_BODIES = 4


class Bodies:
    """Memory limit on the bodies of all requests in preparation.

    Args:
      most: maximum bytes of one request.
    """

    def __init__(self, most: int):
        self._most, self._used = most, 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Yields the body of a request; its bytes count until the context exits.

        Raises:
          ApiError: the body, or all bodies together, exceed the limit.
        """
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                self._used += len(chunk)
                if len(body) > self._most:
                    raise too_large(self._most)
                if self._used > _BODIES * self._most:
                    raise busy("too many large requests at once", status=429, code="queue_full")
            yield bytes(body)
        finally:
            self._used -= len(body)


def limited(receive: Receive, most: int) -> Receive:
    """Wraps `receive` to limit a request body to a number of bytes."""
    received = 0

    async def limited_receive() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > most:
            raise too_large(most)
        return message

    return limited_receive


async def while_connected[Result](request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Awaits work for a client, and cancels it if the client disconnects.

    Raises:
      ClientDisconnect: the client has disconnected.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await working
