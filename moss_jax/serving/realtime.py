"""The WebSocket endpoint `/v1/realtime`: connections, and the sessions that they start or resume."""

import asyncio
import collections
import contextlib
import logging

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from moss_jax.serving import protocol
from moss_jax.serving.dialogue import Dialogue
from moss_jax.serving.hub import Hub
from moss_jax.serving.logs import session_id as logged_session
from moss_jax.serving.protocol import ProtocolError
from moss_jax.serving.session import CLOSE_LATER, CLOSE_NORMAL, CLOSE_SLOW, encoded, event_number
from moss_jax.stream import Refused

_logger = logging.getLogger(__name__)

# ASGI extension: a function that sends a text at once, if the connection is open and its transport has room,
# and returns whether it did.
WRITE_NOW = "moss_jax.write_now"
# Seconds to flush a client's queue when its connection is closed.
CLOSING_SECONDS = 5.0


class Client:
    """A connection with a bounded queue of outgoing events, for those that cannot be written at once.

    Args:
      most: maximum number of queued events.
    """

    def __init__(self, websocket: WebSocket, most: int):
        self._websocket, self._most = websocket, most
        self._waiting: collections.deque[str] = collections.deque()
        self._changed = asyncio.Event()
        self._closing: tuple[int, str] | None = None
        # Servers other than the project's own do not have it.
        self._write_now = websocket.scope.get("extensions", {}).get(WRITE_NOW, lambda _: False)
        self._sending = asyncio.create_task(self._send())

    @property
    def unsent(self) -> int:
        """Number of queued events."""
        return len(self._waiting)

    def put(self, text: str) -> bool:
        """Sends or queues an event for the client; returns False when the queue is full."""
        if self._closing is not None:
            return True
        if not self._waiting and self._write_now(text):
            return True
        if len(self._waiting) >= self._most:
            return False
        self._waiting.append(text)
        self._changed.set()
        return True

    def close(self, code: int, reason: str) -> None:
        """Closes the connection after flushing its queue, or at once if the client is too slow."""
        if self._closing is None:
            self._closing = code, reason
            self._changed.set()
            seconds = 0.0 if code == CLOSE_SLOW else CLOSING_SECONDS
            asyncio.get_running_loop().call_later(seconds, self._sending.cancel)

    def give_up(self) -> None:
        """Stops sending; queued events are discarded."""
        self._sending.cancel()

    async def write(self) -> None:
        """Sends queued events until the connection is to be closed, then closes it."""
        try:
            # Done when the connection is lost or closing, or when `close` cancels it.
            await asyncio.wait({self._sending})
        finally:
            self._sending.cancel()
        if not self._sending.cancelled():
            self._sending.result()
        assert self._closing is not None
        code, reason = self._closing
        with contextlib.suppress(TimeoutError):
            # A close reason has at most 123 bytes.
            await asyncio.wait_for(self._websocket.close(code, reason[:120]), CLOSING_SECONDS)

    async def _send(self) -> None:
        while self._waiting or self._closing is None:
            while self._waiting:
                # Removed afterwards, so that none overtakes it.
                await self._websocket.send_text(self._waiting[0])
                self._waiting.popleft()
            if self._closing is None:
                self._changed.clear()
                await self._changed.wait()


async def realtime(websocket: WebSocket) -> None:
    """Serves one connection."""
    hub: Hub = websocket.app.state.hub
    offered = websocket.scope.get("subprotocols") or []
    await websocket.accept(subprotocol="realtime" if "realtime" in offered else None)
    hub.counters.connections += 1
    hub.counters.connections_total += 1
    client = Client(websocket, hub.config.queue_events)
    try:
        await _serve(hub, websocket, client)
    finally:
        hub.counters.connections -= 1


async def _serve(hub: Hub, websocket: WebSocket, client: Client) -> None:
    query = websocket.query_params
    try:
        if "session" in query:
            dialogue = await resume(hub, client, query["session"], query.get("token", ""), query.get("after"))
        else:
            dialogue = begin(hub, client)
    except (ProtocolError, Refused) as error:
        if isinstance(error, Refused):
            error = ProtocolError(str(error), code="no_free_stream", type="server_error")
        hub.counters.errors_by_code[error.code] += 1
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            await websocket.send_text(encoded(protocol.error_event(error), 0))
            code = CLOSE_LATER if error.code == "no_free_stream" else CLOSE_SLOW
            await websocket.close(code, error.message[:120])
        client.give_up()
        return
    logged_session.set(dialogue.session.id)
    _logger.info("session resumed" if "session" in query else "session started")
    reader = Reader(hub, websocket, client, dialogue)
    tasks = {asyncio.create_task(reader.run()), asyncio.create_task(client.write())}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            expected = (asyncio.CancelledError, WebSocketDisconnect, RuntimeError)
            if isinstance(result, BaseException) and not isinstance(result, expected):
                _logger.error("a connection failed", exc_info=result)
        reader.dialogue.session.detach(client, is_final=reader.is_final)


def begin(hub: Hub, client: Client) -> Dialogue:
    """Starts a new session for a connection.

    Raises:
      Refused: no slot is free.
    """
    session = hub.add()
    session.attach(client)
    dialogue = Dialogue(hub, session)
    session.send(protocol.SessionCreated(session=dialogue.describe()))
    return dialogue


async def resume(hub: Hub, client: Client, session_id: str, token: str, after: str | None) -> Dialogue:
    """Resumes a session from memory or from its file.

    Args:
      after: id of the last event that the client received; None to replay all that are kept.

    Raises:
      ProtocolError: there is no such session, or the token does not match.
      Refused: the session is in a file, and no slot is free.
    """
    number = event_number(after)
    session = hub.find(session_id, token)
    is_saved = session is None
    if session is None:
        saved = hub.find_saved(session_id, token)
        session = hub.add((session_id, token))
        dialogue = Dialogue(hub, session)
        try:
            await dialogue.restore(saved)
        except BaseException:
            # The file stays for another attempt.
            session.release()
            hub.sessions.pop(session.id, None)
            raise
        number = min(number, session.sequence)
    else:
        dialogue = session.owner
        assert isinstance(dialogue, Dialogue)
    kept, missed = session.missed(number)
    session.attach(client)
    hub.counters.resumed_total += 1
    resumed = dialogue.resumed(len(kept), missed, saved=is_saved)
    # Reuses the id of the last event that the client received, so that a client that loses the connection
    # again resumes from the right event.
    created = protocol.SessionCreated(session=dialogue.describe(resumed))
    for text in (encoded(created, number), *kept):
        if not client.put(text):
            client.close(CLOSE_SLOW, "too many events were missed")
            break
    if session.is_over:
        client.close(CLOSE_NORMAL, "the stream is over")
    return dialogue


class Reader:
    """Receives and dispatches what a client sends.

    Attributes:
      dialogue: dialogue of the connection; replaced when it resumes a session.
      is_final: whether the client closed the connection and does not intend to reconnect.
    """

    def __init__(self, hub: Hub, websocket: WebSocket, client: Client, dialogue: Dialogue):
        self._hub, self._websocket, self._client, self.dialogue = hub, websocket, client, dialogue
        self.is_final = False

    async def run(self) -> None:
        """Handles messages until the client disconnects."""
        while self._websocket.client_state is not WebSocketState.DISCONNECTED:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                self.is_final = message.get("code") == CLOSE_NORMAL
                return
            await self._handle(message.get("text"), message.get("bytes"))

    async def _handle(self, text: str | None, content: bytes | None) -> None:
        """Handles one message; errors are reported to the client, and the session continues."""
        event_id = None
        try:
            if text is None:
                await self.dialogue.handle_frame(content or b"")
                return
            event = protocol.parse(text)
            event_id = event.event_id
            moss = event.session.moss if isinstance(event, protocol.SessionUpdate) else None
            if moss is not None and moss.resume is not None:
                await self._resume(moss)
            else:
                await self.dialogue.handle(event)
        except ProtocolError as error:
            if event_id is None and text is not None:
                event_id = protocol.event_id_of(text)
            if error.code == "stream_is_over":
                await self.dialogue.session.told_of_end()
            self.dialogue.session.send(protocol.error_event(error, event_id))
        except Refused as error:
            refused = ProtocolError(str(error), code="no_free_stream", type="server_error")
            self.dialogue.session.send(protocol.error_event(refused, event_id))
        except Exception:
            _logger.exception("an event of a client failed")
            error = ProtocolError("an error in the server", code="internal_error", type="server_error")
            self.dialogue.session.send(protocol.error_event(error, event_id))

    async def _resume(self, moss: protocol.MossSettings) -> None:
        """Replaces the session that the connection started with by the one to resume."""
        mine = self.dialogue.session
        if mine.stream is not None:
            raise ProtocolError(
                "a session is resumed before anything is shown or asked",
                code="stream_is_open",
                param="session",
            )
        assert moss.resume is not None
        # A saved session may need the slot that this one reserves.
        mine.release()
        try:
            dialogue = await resume(self._hub, self._client, moss.resume, moss.token or "", moss.after)
        except (ProtocolError, Refused):
            mine.reservation = self._hub.reserve()
            raise
        self.dialogue = dialogue
        mine.drop()
