"""A client's stream, which outlives its connections, and its events on the wire."""

import asyncio
import collections
import contextlib
import contextvars
import dataclasses
import functools
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moss_jax.serving import protocol
from moss_jax.serving.protocol import ProtocolError
from moss_jax.serving.saved import remove_session, write_session
from moss_jax.stream import End, Event, Reservation, SessionError, Stream
from moss_jax.stream.saved import SavedStream

if TYPE_CHECKING:
    from moss_jax.serving.hub import Hub

_logger = logging.getLogger(__name__)
# What an encoded event begins with before it has an id.
_NO_ID = '{"event_id":""'

# Seconds to wait for the last events of a stream that accepts no more input.
END_SECONDS = 1.0

# WebSocket close codes: standard ones, and 4001 for a session resumed by another connection.
CLOSE_NORMAL, CLOSE_SLOW, CLOSE_RESTART, CLOSE_LATER, CLOSE_TAKEN_OVER = 1000, 1008, 1012, 1013, 4001


class Connection(Protocol):
    """A client connection, as a session sees it."""

    @property
    def unsent(self) -> int:
        """Number of queued events."""
        ...

    def put(self, text: str) -> bool:
        """Queues an event; returns False when the queue is full."""
        ...

    def close(self, code: int, reason: str) -> None:
        """Closes the connection after flushing its queue, or at once if the client is too slow."""
        ...


class Owner(Protocol):
    """Consumer of a session's events: the protocol's dialogue."""

    def on_event(self, event: Event) -> None:
        """Handles an event of the stream."""
        ...

    def on_shutdown(self, *, saved: bool) -> None:
        """Notifies the client that the server shuts down."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON-ready state from which a dialogue resumes in another process."""
        ...


class Session:
    """One client's stream, from the first connection to its end, with a replay buffer of recent events.

    Args:
      identity: id and token of a saved session; None for a new one.

    Attributes:
      id, token: credentials for resuming the session.
      stream: the stream; None until it is opened.
      owner: consumer of the stream's events.
      is_resumable: whether the client can resume the session.
      is_over: whether the stream has ended or will never be opened.
      is_forgotten: whether the hub has dropped the session, so that no file of it may remain.
      reservation: reserved slot, until the stream is opened.
      sequence: number of the last event.
    """

    def __init__(self, hub: "Hub", identity: tuple[str, str] | None = None):
        self.id, self.token = identity or (hub.new_id(), secrets.token_urlsafe(24))
        self.stream: Stream | None = None
        self.owner: Owner | None = None
        self.is_resumable = self.is_over = False
        self.reservation: Reservation | None = None
        self.sequence = 0
        self._hub = hub
        self._connection: Connection | None = None
        # Replay buffer of consecutive events, with None for counters that newer ones have superseded: they
        # describe the whole bank every second.
        self._sent: collections.deque[tuple[int, str | None]] = collections.deque(
            maxlen=hub.config.replay_events
        )
        self._last_counters = 0
        self._timer: asyncio.TimerHandle | None = None
        self._saving: asyncio.Task | None = None
        # Set when the client has been told of the end of the stream.
        self._ended = asyncio.Event()
        self._keeps_file = self.is_forgotten = False
        # Saves are serialized, since each removes the previous save's file.
        self._writing = threading.Lock()
        # Callbacks for when a copy of the stream comes out of its inbox.
        self._marks: dict[Future, Callable[[], object]] = {}

    # ---------------------------------------------------------------------------- connection

    @property
    def is_connected(self) -> bool:
        """Whether a client is connected."""
        return self._connection is not None

    @property
    def unsent(self) -> int:
        """Number of events that the client has not taken yet."""
        return 0 if self._connection is None else self._connection.unsent

    def send(self, event: protocol.Event) -> None:
        """Sends an event, and keeps it in the replay buffer."""
        self.sequence += 1
        text = encoded(event, self.sequence)
        if isinstance(event, protocol.Error):
            self._hub.counters.errors_by_code[event.error.code] += 1
        self._sent.append((self.sequence, text))
        if isinstance(event, protocol.CountersEvent):
            superseded = self._last_counters - self._sent[0][0]
            if superseded >= 0:
                self._sent[superseded] = self._last_counters, None
            self._last_counters = self.sequence
        if self._connection is not None and not self._connection.put(text):
            self._hub.counters.slow_clients += 1
            self._connection.close(CLOSE_SLOW, "too many events wait: the client reads too slowly")
            self.detach(self._connection)

    def attach(self, connection: Connection) -> None:
        """Attaches a connection to the session, closing the previous one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._connection is not None:
            self._connection.close(CLOSE_TAKEN_OVER, "another connection has resumed the session")
        self._connection = connection

    def missed(self, after: int) -> tuple[list[str], int]:
        """Returns the events after number `after`, encoded, and how many have left the replay buffer."""
        kept = [text for number, text in self._sent if number > after and text is not None]
        oldest = self._sent[0][0] if self._sent else self.sequence + 1
        return kept, max(0, oldest - 1 - after)

    def detach(self, connection: Connection, *, is_final: bool = False) -> None:
        """Handles a lost connection: the stream waits for a reconnect, or ends.

        Args:
          is_final: whether the client does not intend to reconnect.
        """
        if self._connection is not connection:
            return
        self._connection = None
        is_gone = self.is_over and (self.stream is None or self._keeps_file)
        if is_final or not self.is_resumable or is_gone:
            self.end()
        else:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._hub.config.grace_seconds, self.end)

    def close(self, code: int, reason: str) -> None:
        """Closes the connection, if any."""
        if self._connection is not None:
            self._connection.close(code, reason)

    def end(self) -> None:
        """Ends the session and its stream."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.stream is not None and not self.is_over:
            self.stream.stop()
        self.is_over = True
        self.release()
        self._hub.forget(self, keeps_file=self._keeps_file)

    def drop(self) -> None:
        """Ends a session without a stream whose connection has moved to another session."""
        self._connection = None
        self.end()

    def release(self) -> None:
        """Releases the reserved slot, if any."""
        if self.reservation is not None:
            self.reservation.release()
            self.reservation = None

    # -------------------------------------------------------------------------------- stream

    async def open(self, **options: Any) -> Stream:
        """Opens the stream; options and errors are those of `Scheduler.open`."""
        reservation, self.reservation = self.reservation, None
        self.stream = await self._hub.open(reservation, **options)
        if self._hub.state_folder:
            self._saving = asyncio.create_task(self._save_often())
        # In the context of the connection, of which the logs tell. Called for every token of every stream, so
        # there is no task and no queue in between.
        take = functools.partial(contextvars.copy_context().run, self._take)
        self.stream.inbox.redirect(functools.partial(self._hub.relay.put, take))
        return self.stream

    def _take(self, event: Event | Future) -> None:
        """Forwards an event of the stream to the owner, or passes a mark."""
        try:
            if isinstance(event, Future):
                self._marks.get(event, lambda: None)()
                return
            assert self.owner is not None
            self.owner.on_event(event)
        except Exception:
            _logger.exception("an event of session %s was lost", self.id)
        if isinstance(event, End):
            self._on_end(event)

    def _on_end(self, event: End) -> None:
        self._hub.counters.streams_by_end[event.reason] += 1
        # It can be resumed from its last save, if there is one.
        self._keeps_file = event.reason == "failed"
        details = {"reason": event.reason, "counters": dataclasses.asdict(event.counters)}
        _logger.info("a stream ended", extra=details)
        self.is_over = True
        self._ended.set()
        # The scheduler keeps the streams of its last step, but must not keep their sessions.
        if self.stream is not None:
            self.stream.inbox.redirect(lambda _: None)
        if self._saving is not None:
            self._saving.cancel()
        if self._connection is None and self._timer is None:
            self.end()

    async def told_of_end(self) -> None:
        """Waits until the client has been notified why a stream that accepts no more input has ended."""
        if self.stream is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), END_SECONDS)

    async def save(self) -> float:
        """Saves the stream and the dialogue to the state folder, consistently between two steps.

        Returns:
          Stream time in seconds at which the save resumes.

        Raises:
          SessionError: there is no state folder, or no stream to save.
          OSError: a file cannot be written.
        """
        folder = self._hub.state_folder
        if folder is None:
            raise SessionError("the server keeps no streams: it was started without --state-dir")
        started = time.monotonic()
        # One session at a time, or their copies could fill the device.
        async with self._hub.copying:
            saved, dialogue = await self._copy()
        try:
            await asyncio.to_thread(self._write, folder, saved, dialogue)
        except OSError:
            self._hub.counters.failed_saves += 1
            raise
        self._hub.counters.saves += 1
        self._hub.counters.observe("save", time.monotonic() - started)
        return saved.dialogue["start_time"]

    async def _copy(self) -> tuple[SavedStream, dict[str, Any]]:
        """Copies the stream and the dialogue, which has seen exactly the events before the copy."""
        if self.stream is None or self.is_over or self.owner is None:
            raise SessionError("there is no stream to save")
        stream, owner = self.stream, self.owner
        future = stream.copy_while_running()
        state: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

        def mark() -> None:
            """Called when the copy comes out of the inbox."""
            try:
                state.set_result(owner.state() | {"sequence": self.sequence})
            except Exception as error:
                # Or whoever waits to save would wait for ever.
                state.set_exception(error)

        self._marks[future] = mark
        future.add_done_callback(stream.inbox.put)
        try:
            copied = await asyncio.wrap_future(future)
            dialogue = await state
        finally:
            self._marks.pop(future, None)
        # Input that arrived after the copy was made is not part of it.
        dialogue |= {"inbox": copied.dialogue["inbox"]}
        return await asyncio.to_thread(copied.fetch), dialogue

    def _write(self, folder: Path, saved: SavedStream, dialogue: dict[str, Any]) -> None:
        """Writes the session to the folder, in a worker thread that outlives a cancelled caller."""
        with self._writing:
            write_session(folder, self.id, self.token, saved, dialogue)
        if self.is_forgotten:
            remove_session(folder, self.id)

    async def _save_often(self) -> None:
        """Saves the stream periodically while the client can resume it."""
        while True:
            await asyncio.sleep(self._hub.config.save_seconds)
            if not self.is_resumable:
                continue
            try:
                await self.save()
            except (OSError, SessionError) as error:
                _logger.warning("session %s was not saved: %s", self.id, error)

    async def shut_down(self) -> None:
        """Saves the stream if possible, notifies the client of the shutdown, and ends the session."""
        saved = False
        if self._hub.state_folder and self.is_resumable and self.stream is not None and not self.is_over:
            try:
                await asyncio.wait_for(self.save(), self._hub.config.drain_seconds)
                saved = self._keeps_file = True
            except (OSError, SessionError, TimeoutError) as error:
                _logger.warning("session %s was not saved: %s", self.id, error)
        if self.owner is not None and not self.is_over:
            self.owner.on_shutdown(saved=saved)
        self.close(CLOSE_RESTART, "the server is shutting down")
        self.end()


def encoded(event: protocol.Event, number: int) -> str:
    """Encodes an event of the server with its number as its id."""
    # Spliced, since there is an event for each token, and a copy with the id would take as long again.
    content = event.model_dump_json(exclude_none=True, by_alias=True)
    return f'{{"event_id":"event_{number}"{content[len(_NO_ID) :]}'


def event_number(event_id: str | None) -> int:
    """The number in an event id; 0 for None.

    Raises:
      ProtocolError: the id is not an event id.
    """
    if event_id is None:
        return 0
    if not (match := re.fullmatch(r"event_(\d{1,15})", event_id)):
        raise ProtocolError(
            f"{event_id[:64]!r} is not the id of an event", code="invalid_event_id", param="after"
        )
    return int(match[1])
