"""Clients of the live server: `AsyncClient` for asyncio, and `Client` for synchronous code."""

import asyncio
import base64
import contextlib
import io
import json
import struct
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping
from typing import Any, Self

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from moss_jax.serving import protocol
from moss_jax.stream import (
    Counters,
    End,
    Event,
    Figures,
    FrameDropped,
    FrameSeen,
    FrameUnseen,
    Interrupted,
    Silence,
    Text,
    Turn,
    TurnLimit,
)
from moss_jax.video import Frame

# Delay in seconds between reconnect attempts: initial and maximum.
RETRY_SECONDS = 0.1, 5.0


class ServerError(RuntimeError):
    """An error from the server before the session exists, or a connection that cannot be re-established.

    Attributes:
      code: machine-readable error code.
    """

    def __init__(self, message: str, code: str):
        super().__init__(message)
        self.code = code


class AsyncClient:
    """One live stream: a context manager that connects and closes, and an iterator of server events.

    A lost connection is re-established while the events are read, and missed events are replayed; only what
    the client sends in the meantime is lost.

    Args:
      url: server URL, such as http://127.0.0.1:8765.
      instructions: system prompt; None for the server's default.
      settings: fields of the `moss` object: sampling, memory, selection, limits.
      token: bearer token, if the server requires one.
      lossless: whether frames are sent as PNG instead of JPEG.

    Attributes:
      session: session settings in force; None before the connection is open.
    """

    def __init__(
        self,
        url: str,
        *,
        instructions: str | None = None,
        settings: Mapping[str, Any] | None = None,
        token: str | None = None,
        lossless: bool = False,
    ):
        parts = urllib.parse.urlsplit(url)
        scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
        if scheme not in ("ws", "wss") or not parts.netloc:
            raise ValueError(f"the address of a server is like http://127.0.0.1:8765, not {url!r}")
        self._url = f"{scheme}://{parts.netloc}{parts.path.rstrip('/')}/v1/realtime"
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._instructions, self._settings = instructions, dict(settings or {})
        self._format = "PNG" if lossless else "JPEG"
        self.session: protocol.SessionObject | None = None
        self._last: str | None = None
        self._stack = contextlib.AsyncExitStack()
        self._socket: ClientConnection | None = None
        self._is_closed = False

    async def __aenter__(self) -> Self:
        await self._connect(self._url)
        settings = {"version": protocol.VERSION, "frames": "binary", **self._settings}
        session: dict[str, Any] = {"type": "realtime", "moss": settings}
        if self._instructions is not None:
            session["instructions"] = self._instructions
        await self.send("session.update", session=session)
        while not isinstance(event := await self._receive(), protocol.SessionUpdated):
            if isinstance(event, protocol.Error):
                await self.close()
                raise ServerError(event.error.message, event.error.code)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection for good, which ends the stream; after `finish`, read the events first."""
        self._is_closed = True
        await self._stack.aclose()

    async def _connect(self, url: str) -> None:
        await self._stack.aclose()
        opening = connect(url, additional_headers=self._headers, max_size=None)
        self._socket = await self._stack.enter_async_context(opening)
        event = await self._receive()
        if isinstance(event, protocol.Error):
            raise ServerError(event.error.message, event.error.code)

    async def _receive(self) -> protocol.ServerEvent:
        assert self._socket is not None, "use the client as a context manager"
        while (event := protocol.parse_server_event(await self._socket.recv())) is None:
            pass
        self._last = event.event_id
        if isinstance(event, protocol.SessionCreated | protocol.SessionUpdated):
            self.session = event.session
        return event

    async def send(self, event: str, **fields: Any) -> None:
        """Sends a protocol event; it is discarded while the connection is lost."""
        await self._put(json.dumps({"type": event, **fields}))

    async def _put(self, message: str | bytes) -> None:
        assert self._socket is not None, "use the client as a context manager"
        with contextlib.suppress(ConnectionClosed):
            await self._socket.send(message)

    async def show(self, rgb: UInt8[np.ndarray, "H W 3"], time: float | None = None) -> None:
        """Shows the model a frame, taken at `time` seconds of stream time (now if None)."""
        at = float("nan") if time is None else time
        await self._put(struct.pack(">d", at) + await asyncio.to_thread(encode, rgb, self._format))

    async def ask(self, text: str, time: float | None = None) -> None:
        """Asks a question at `time` seconds of stream time (now if None), interrupting any answer."""
        content = [{"type": "input_text", "text": text}]
        await self.send(
            "conversation.item.create", item={"type": "message", "role": "user", "content": content}
        )
        await self.send("response.create", moss={} if time is None else {"time": time})

    async def cancel(self) -> None:
        """Cancels the answer in progress."""
        await self.send("response.cancel")

    async def save(self) -> None:
        """Requests a save of the stream; `moss.saved` confirms it."""
        await self.send("moss.save")

    async def finish(self, time: float | None = None) -> None:
        """Declares the input complete; the remaining events and `moss.end` follow."""
        await self.send("moss.finish", moss={} if time is None else {"time": time})

    async def __aiter__(self) -> AsyncIterator[protocol.ServerEvent]:
        while not self._is_closed:
            try:
                event = await self._receive()
            except ConnectionClosed as closed:
                if self._is_closed or (closed.rcvd and closed.rcvd.code in (1000, 4001)):
                    return
                await self._reconnect()
                continue
            yield event
            if isinstance(event, protocol.EndEvent) and event.reason != "shutdown":
                return

    async def _reconnect(self) -> None:
        """Re-establishes a lost connection within the server's grace period."""
        moss = self.session.moss if self.session else None
        if self.session is None or moss is None:
            raise ServerError("the connection is lost", "connection_lost")
        wait, most = RETRY_SECONDS
        give_up = time.monotonic() + moss.grace_seconds
        while not self._is_closed:
            query = {"session": self.session.id, "token": moss.token, "after": self._last or "event_0"}
            try:
                await self._connect(f"{self._url}?{urllib.parse.urlencode(query)}")
                return
            except (OSError, ConnectionClosed, InvalidStatus, TimeoutError) as error:
                if time.monotonic() > give_up:
                    raise ServerError("the connection is lost", "connection_lost") from error
            await asyncio.sleep(wait)
            wait = min(2 * wait, most)


class Client:
    """Synchronous `AsyncClient`, whose event loop runs in its own thread.

    A context manager that connects and closes, and an iterator of server events. Its methods are thread-safe.

    Args:
      url, options: as for `AsyncClient`.
    """

    def __init__(self, url: str, **options: Any):
        self._client = AsyncClient(url, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="client", daemon=True)

    @property
    def session(self) -> protocol.SessionObject | None:
        """The session settings in force."""
        return self._client.session

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._call(self._client.__aenter__())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._call(self._client.close())
        finally:
            self._stop()

    def send(self, event: str, **fields: Any) -> None:
        """See `AsyncClient.send`."""
        self._call(self._client.send(event, **fields))

    def show(self, rgb: UInt8[np.ndarray, "H W 3"], time: float | None = None) -> None:
        """See `AsyncClient.show`."""
        self._call(self._client.show(rgb, time))

    def ask(self, text: str, time: float | None = None) -> None:
        """See `AsyncClient.ask`."""
        self._call(self._client.ask(text, time))

    def cancel(self) -> None:
        """See `AsyncClient.cancel`."""
        self._call(self._client.cancel())

    def save(self) -> None:
        """See `AsyncClient.save`."""
        self._call(self._client.save())

    def finish(self, time: float | None = None) -> None:
        """See `AsyncClient.finish`."""
        self._call(self._client.finish(time))

    def __iter__(self) -> Iterator[protocol.ServerEvent]:
        events = aiter(self._client)
        while (event := self._call(anext(events, None))) is not None:
            yield event

    def _call[T](self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def encode(rgb: UInt8[np.ndarray, "H W 3"], form: str = "JPEG") -> bytes:
    """Encodes a frame as an image file."""
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, form, quality=90)
    return file.getvalue()


def data_url(rgb: UInt8[np.ndarray, "H W 3"], form: str = "JPEG") -> str:
    """Encodes a frame as a data URL."""
    return f"data:image/{form.lower()};base64,{base64.b64encode(encode(rgb, form)).decode()}"


# ---------------------------------------------------------------------------------------- a whole video


def watch(
    client: Client, frames: Iterable[Frame], prompts: Iterable[tuple[float, str]] = ()
) -> Iterator[Event]:
    """Plays a video to a server and asks the prompts at their times; yields events like a `Session`.

    Args:
      client: connected client.
      frames: frames in order of time; a realtime server gets each one at its time.
      prompts: (seconds since the first frame, text) pairs.

    Raises:
      ServerError: the server refuses a request.
      Exception: any error from reading the frames.
    """
    session = client.session
    is_realtime = session is None or session.moss is None or session.moss.clock == "realtime"
    feeder = _Feeder(client, frames, sorted(prompts), is_realtime)
    feeder.start()
    try:
        asked = feeder.asked
        for event in client:
            if isinstance(event, protocol.Error):
                raise ServerError(event.error.message, event.error.code)
            yield from stream_events(event, asked)
    finally:
        feeder.close()
    if feeder.error:
        raise feeder.error


class _Feeder(threading.Thread):
    """Sends frames and prompts in order of time.

    Attributes:
      asked: texts asked so far, in order, whose answers have not begun.
      error: error from reading the frames, if any.
    """

    def __init__(
        self, client: Client, frames: Iterable[Frame], prompts: list[tuple[float, str]], is_realtime: bool
    ):
        super().__init__(name="feeder", daemon=True)
        self.asked: list[str] = []
        self.error: Exception | None = None
        self._client, self._frames, self._prompts = client, frames, prompts
        self._is_realtime = is_realtime
        self._closed = threading.Event()

    def run(self) -> None:
        end, started = 0.0, time.monotonic()
        try:
            for frame in self._frames:
                self._ask_until(frame.time, started)
                if self._wait(frame.time, started):
                    return
                self._client.show(frame.rgb, None if self._is_realtime else frame.time)
                end = frame.time + (frame.duration or 0.0)
            self._ask_until(end + 1e-3, started)
            if not self._wait(end, started):
                self._client.finish(None if self._is_realtime else end)
        except Exception as error:
            self.error = error
            with contextlib.suppress(RuntimeError):
                self._client.finish()

    def _ask_until(self, end: float, started: float) -> None:
        """Asks the prompts up to and including a time."""
        while self._prompts and self._prompts[0][0] <= end:
            at, text = self._prompts.pop(0)
            if self._wait(at, started):
                return
            self.asked.append(text)
            self._client.ask(text, None if self._is_realtime else at)

    def _wait(self, at: float, started: float) -> bool:
        """Waits until a time of a realtime video; returns whether the feeder was closed in the meantime."""
        ahead = started + at - time.monotonic() if self._is_realtime else 0.0
        return self._closed.wait(max(ahead, 0.0))

    def close(self) -> None:
        """Stops the thread."""
        self._closed.set()
        self.join()


def stream_events(event: protocol.ServerEvent, asked: list[str]) -> Iterator[Event]:
    """Converts a protocol event to the events that a `Session` would yield.

    Args:
      asked: texts whose answers have not begun, in order.
    """

    def stamp(time: float) -> dict[str, Any]:
        return {"stream_time": time, "wall_time": time}

    match event:
        case protocol.ItemDone(moss=protocol.MossFrames() as moss):
            for frame in moss.frames or (moss.frame,):
                known = {**stamp(frame.time), "time": frame.time}
                if frame.fate == "seen":
                    yield FrameSeen(**known, index=frame.index)
                elif frame.fate == "dropped":
                    yield FrameDropped(**known)
                elif frame.fate is not None:
                    yield FrameUnseen(**known, index=frame.index, reason=frame.fate)
        case protocol.ResponseCreated(moss=protocol.MossResponse(asked=True) as moss):
            yield Turn(**stamp(moss.time), prompt=asked.pop(0) if asked else "")
        case protocol.TextDelta(moss=protocol.MossDelta() as moss):
            yield Text(**stamp(moss.time), text=event.delta)
        case protocol.ResponseDone(response=response) if response.status_details:
            said = "".join(part.text or "" for item in response.output for part in item.content)
            if response.status_details.reason == "max_output_tokens":
                tokens = response.usage.output_tokens if response.usage else 0
                yield TurnLimit(**stamp(0.0), tokens=tokens)
            elif response.status == "cancelled":
                yield Interrupted(**stamp(0.0), said=said)
        case protocol.SilenceEvent():
            yield Silence(**stamp(event.time))
        case protocol.EndEvent() if event.reason != "shutdown":
            counters = Counters(**event.counters) if event.counters else Counters()
            figures: dict[str, Any] = dict(event.figures or {})
            yield End(**stamp(event.time), reason=event.reason, counters=counters, figures=Figures(**figures))
