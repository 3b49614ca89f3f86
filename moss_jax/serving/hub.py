"""asyncio front end of the scheduler: sessions that outlive their connections, and saved streams.

Everything runs in one event loop, except the scheduler and threads that do file I/O.
"""

import asyncio
import collections
import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from moss_jax import command
from moss_jax.config import ServerConfig, SessionConfig
from moss_jax.serving import protocol
from moss_jax.serving.protocol import ProtocolError
from moss_jax.stream import (
    End,
    Engine,
    Event,
    Refused,
    Reservation,
    Scheduler,
    SessionError,
    Stream,
)
from moss_jax.stream.moments import BankView
from moss_jax.stream.saved import SavedStream, write_stream

_logger = logging.getLogger(__name__)
_ID = re.compile(r"sess_[0-9a-f]{24}")
# What an encoded event begins with before it has an id.
_NO_ID = '{"event_id":""'

# Seconds to wait for the last events of a stream that accepts no more input.
END_SECONDS = 1.0
# Seconds between two clean-ups of expired files.
CLEAN_SECONDS = 600.0

# WebSocket close codes: standard ones, and 4001 for a session resumed by another connection.
CLOSE_NORMAL, CLOSE_SLOW, CLOSE_RESTART, CLOSE_LATER, CLOSE_TAKEN_OVER = 1000, 1008, 1012, 1013, 4001


@dataclasses.dataclass
class ServerCounters:
    """Server-wide counters for metrics; only the event loop changes them.

    Attributes:
      connections: number of open connections.
      connections_total, sessions_total, resumed_total: connections and sessions opened, and sessions resumed.
      streams_by_end: streams that have ended, by reason.
      frames_by_fate: frames by outcome; "received" counts all accepted frames.
      prompts, tokens, responses, interruptions: totals over all streams.
      errors_by_code: errors sent to clients.
      slow_clients: connections closed because the client did not read fast enough.
      saves, failed_saves: saves of streams.
      restarts: restarts of the scheduler after a failed step.
      observers: called with the name of a duration and its seconds: "ttft" from a prompt to the first text,
        "frame" from a frame's arrival to its step, "extend" to the token after it, "save" of a stream.
    """

    connections: int = 0
    connections_total: int = 0
    sessions_total: int = 0
    resumed_total: int = 0
    streams_by_end: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    frames_by_fate: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    prompts: int = 0
    tokens: int = 0
    responses: int = 0
    interruptions: int = 0
    errors_by_code: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    slow_clients: int = 0
    saves: int = 0
    failed_saves: int = 0
    restarts: int = 0
    observers: list[Callable[[str, float], None]] = dataclasses.field(default_factory=list)

    def observe(self, name: str, seconds: float) -> None:
        """Reports a duration to the observers."""
        for observer in self.observers:
            observer(name, seconds)


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
        if self.stream is None or self.is_over or self.owner is None:
            raise SessionError("there is no stream to save")
        started, stream, owner = time.monotonic(), self.stream, self.owner
        future = stream.copy_while_running()
        # When the copy comes out of the inbox, the dialogue has seen exactly the events before the copy.
        state: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._marks[future] = lambda: state.set_result(owner.state() | {"sequence": self.sequence})
        future.add_done_callback(stream.inbox.put)
        try:
            saved = await asyncio.wrap_future(future)
            # Input that arrived after the copy was made is not part of it.
            dialogue = await state | {"inbox": saved.dialogue["inbox"]}
        finally:
            self._marks.pop(future, None)
        try:
            await asyncio.to_thread(self._write, folder, saved, dialogue)
        except OSError:
            self._hub.counters.failed_saves += 1
            raise
        self._hub.counters.saves += 1
        self._hub.counters.observe("save", time.monotonic() - started)
        return saved.dialogue["start_time"]

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


def warm_up_all(engine: Engine, image_size: int) -> None:
    """Compiles the programs that streams run, and the one that copies a stream to the host."""
    engine.warm_up((image_size, image_size, 3))
    state = engine.start()
    engine.save_slot(state, 0)
    engine.bank_vectors(state)
    command.freeze_heap()


async def in_thread(function: Callable[[], object]) -> None:
    """Runs a slow function in a daemon thread, which does not delay the exit of the process."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish(error: BaseException | None) -> None:
        if not done.done():
            done.set_exception(error) if error else done.set_result(None)

    def run() -> None:
        error = None
        try:
            function()
        except Exception as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # The event loop is closed.
            loop.call_soon_threadsafe(finish, error)

    threading.Thread(target=run, name="start", daemon=True).start()
    await done


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


class Relay:
    """Passes items from threads to functions in an event loop, any number with one wake-up of the loop.

    A wake-up takes a system call and a switch of threads, and a step has an event for every stream.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._items: collections.deque[tuple[Callable[[Any], object], Any]] = collections.deque()
        self._is_scheduled = False

    def put(self, take: Callable[[Any], object], item: Any) -> None:
        """Has the loop call a function, which raises nothing, with an item; from any thread."""
        self._items.append((take, item))
        if not self._is_scheduled:
            self._is_scheduled = True
            # The event loop may be closed if the process is about to exit.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # First, so that whoever finds it set has appended an item that is still to be taken.
        self._is_scheduled = False
        while self._items:
            take, item = self._items.popleft()
            take(item)


async def events_of(stream: Stream, relay: Relay) -> AsyncIterator[Event]:
    """Yields in the event loop the events of a stream up to `End`."""
    queue: asyncio.Queue[Event] = asyncio.Queue()
    stream.inbox.redirect(functools.partial(relay.put, queue.put_nowait))
    while True:
        event = await queue.get()
        yield event
        if isinstance(event, End):
            return


class Hub:
    """Manages the slots, sessions and saved streams of one engine for the server.

    Args:
      scheduler: scheduler that the hub starts and closes.
      config: server settings.
      session: default limits of the streams, some of which a session may override.
      model: name of the model.
      state_folder: where streams are saved; None to disable saving.
      id_prefix: up to 8 hexadecimal digits that session ids begin with, if ids are to identify their server.

    Attributes:
      is_warm: whether the programs are compiled.
      was_ready: whether the hub has ever been ready.
      sessions: by id.
      counters: server-wide counters.
      decoders: thread pool for decoding images.
      relay: passes the events of all streams to the event loop, once it is started.
      image_size: side in pixels of the square to which frames are scaled.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        config: ServerConfig | None = None,
        *,
        session: SessionConfig | None = None,
        model: str = "moss",
        state_folder: str | os.PathLike | None = None,
        id_prefix: str = "",
    ):
        self._id_prefix = id_prefix
        self.scheduler = scheduler
        self.config = config or ServerConfig()
        self.session_config = dataclasses.replace(session or SessionConfig(), clock=scheduler.config.clock)
        self.model = model
        self.state_folder = None if state_folder is None else Path(state_folder)
        self.is_warm = self.was_ready = False
        self.is_closing = False
        self.sessions: dict[str, Session] = {}
        self.counters = ServerCounters()
        self.decoders = ThreadPoolExecutor(self.config.decode_threads, thread_name_prefix="decode")
        self._watching: asyncio.Task | None = None
        # The last snapshot of all banks, and when it was requested.
        self._banks: asyncio.Future[dict[Stream, BankView]] | None = None
        self._looked = 0.0
        engine = scheduler.engine
        self.image_size = engine.model_config.vision.image_size if isinstance(engine, Engine) else 112

    async def start(self, *, warm_up: bool = True) -> None:
        """Compiles the programs and starts the scheduler."""
        if self.state_folder is not None:
            await asyncio.to_thread(prepare_folder, self.state_folder, self.config.keep_seconds)
        self.relay = Relay(asyncio.get_running_loop())
        engine = self.scheduler.engine
        if warm_up and isinstance(engine, Engine):
            await in_thread(lambda: warm_up_all(engine, self.image_size))
        if not self.is_closing:
            self.scheduler.start()
            self.is_warm = self.was_ready = True
            self._watching = asyncio.create_task(self._watch())

    @property
    def is_ready(self) -> bool:
        """Whether streams can be opened: programs are compiled, steps succeed, no shutdown is in progress."""
        return self.is_warm and not self.is_closing and self.scheduler.is_started

    async def _watch(self) -> None:
        """Restarts the scheduler after a failed step, and removes expired saves."""
        cleaned = time.monotonic()
        while True:
            await asyncio.sleep(self.config.restart_seconds)
            if not self.is_closing and not self.scheduler.is_started:
                self.scheduler.start()
                self.counters.restarts += 1
                _logger.warning("the scheduler has been restarted")
            if self.state_folder is not None and time.monotonic() - cleaned > CLEAN_SECONDS:
                cleaned = time.monotonic()
                await asyncio.to_thread(prepare_folder, self.state_folder, self.config.keep_seconds)

    async def close(self) -> None:
        """Accepts no more streams, notifies and saves the running ones if possible, and ends them."""
        if self.is_closing:
            return
        self.is_closing = True
        if self._watching is not None:
            self._watching.cancel()
        await asyncio.gather(*(session.shut_down() for session in list(self.sessions.values())))
        await asyncio.to_thread(self.scheduler.close)
        self.decoders.shutdown(wait=False)

    @property
    def free_slots(self) -> int:
        """Number of streams that can be opened now."""
        return self.scheduler.free_slots if self.is_ready else 0

    def reserve(self) -> Reservation:
        """Reserves a free slot.

        Raises:
          Refused: no slot is free.
        """
        self._check_ready()
        try:
            return self.scheduler.reserve()
        except Refused as error:
            slots = self.scheduler.engine.config.slots
            raise Refused(f"all {slots} streams are taken; try again later") from error

    def _check_ready(self) -> None:
        """Raises `Refused` if streams cannot be opened now."""
        if self.is_closing:
            raise Refused("the server is shutting down")
        if not self.is_warm:
            raise Refused("the server is not ready yet")
        if not self.scheduler.is_started:
            raise Refused("the server recovers from an error; try again in a moment")

    async def open(self, reservation: Reservation | None = None, **options: Any) -> Stream:
        """Opens a stream in a reserved or a free slot; options and errors are those of `Scheduler.open`."""
        reservation = reservation or self.reserve()
        try:
            self._check_ready()
            opening = asyncio.ensure_future(
                asyncio.to_thread(self.scheduler.open, **options, reservation=reservation)
            )
            try:
                return await asyncio.shield(opening)
            except asyncio.CancelledError:
                # The caller was cancelled, but the thread keeps running.
                opening.add_done_callback(_stop_opened)
                raise
        finally:
            reservation.release()

    async def bank_view(self, stream: Stream) -> BankView:
        """Snapshot of a stream's memory bank, at most half of `ServerConfig.counters_seconds` old.

        Raises:
          SessionError: the stream has ended, or the engine is not an `Engine`.
        """
        # The sessions share a snapshot, since each takes time of the scheduler's loop.
        for longest in (self.config.counters_seconds / 2, 0.0):
            if self._banks is None or time.monotonic() - self._looked > longest:
                self._banks = asyncio.wrap_future(self.scheduler.look_at_banks())
                self._looked = time.monotonic()
            if view := (await asyncio.shield(self._banks)).get(stream):
                return view
        raise SessionError("the stream is over")

    def add(self, identity: tuple[str, str] | None = None) -> Session:
        """Creates a session with a reserved slot.

        Raises:
          Refused: no slot is free.
        """
        reservation = self.reserve()
        session = Session(self, identity)
        session.reservation = reservation
        self.sessions[session.id] = session
        self.counters.sessions_total += 1
        return session

    def new_id(self) -> str:
        """A unique session id."""
        return f"sess_{self._id_prefix}{secrets.token_hex(12)[len(self._id_prefix) :]}"

    def find(self, session_id: str, token: str) -> Session | None:
        """Finds a session to resume; returns None if it is not in memory.

        Raises:
          ProtocolError: the token does not match.
        """
        session = self.sessions.get(session_id)
        if session is not None and not hmac.compare_digest(session.token.encode(), token.encode()):
            raise not_resumable()
        return session

    def find_saved(self, session_id: str, token: str) -> "SavedSession":
        """Finds a session in the state folder.

        Raises:
          ProtocolError: there is none, or the token does not match.
        """
        if self.state_folder is None or not _ID.fullmatch(session_id):
            raise not_resumable()
        try:
            saved = read_session(self.state_folder, session_id)
        except (OSError, ValueError, KeyError) as error:
            raise not_resumable() from error
        if not hmac.compare_digest(saved.token_hash, token_hash(token)):
            raise not_resumable()
        return saved

    def forget(self, session: Session, *, keeps_file: bool = False) -> None:
        """Drops a session and its files."""
        if self.sessions.pop(session.id, None) is not None and self.state_folder and not keeps_file:
            session.is_forgotten = True
            remove_session(self.state_folder, session.id)


def _stop_opened(opening: "asyncio.Future[Stream]") -> None:
    """Stops a stream whose opener was cancelled."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().stop()


def not_resumable() -> ProtocolError:
    """The error for an unknown session or a wrong token, without telling which."""
    return ProtocolError(
        "there is no such session, it is over, or the token does not match", code="session_not_found"
    )


# ------------------------------------------------------------------------------------ saved sessions


@dataclasses.dataclass(frozen=True)
class SavedSession:
    """A session in the state folder: its stream's file and its dialogue."""

    stream: Path
    token_hash: str
    dialogue: dict[str, Any]


def token_hash(token: str) -> str:
    """The hash of a token that is stored in a file."""
    return hashlib.sha256(token.encode()).hexdigest()


def prepare_folder(folder: Path, keep_seconds: float) -> None:
    """Creates the state folder and removes expired files from it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in folder.glob("sess_*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > keep_seconds:
                path.unlink()


def write_session(folder: Path, session_id: str, token: str, saved: SavedStream, dialogue: dict) -> None:
    """Writes a session; on failure the files of its previous save stay intact.

    Raises:
      OSError: a file cannot be written.
    """
    stream = folder / f"{session_id}.{secrets.token_hex(4)}.stream"
    description = folder / f"{session_id}.json"
    part = folder / f"{session_id}.json.part"
    try:
        write_stream(stream, saved)
        content = {"stream": stream.name, "token": token_hash(token), "dialogue": dialogue}
        with open(part, "w", encoding="utf-8", opener=_private) as file:
            json.dump(content, file)
        part.replace(description)
    except OSError:
        for path in (stream, part):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    for old in folder.glob(f"{session_id}.*.stream"):
        if old != stream:
            old.unlink(missing_ok=True)


def read_session(folder: Path, session_id: str) -> SavedSession:
    """Reads a session's description; the stream is read by `Scheduler.open`."""
    content = json.loads((folder / f"{session_id}.json").read_text(encoding="utf-8"))
    return SavedSession(folder / content["stream"], content["token"], content["dialogue"])


def remove_session(folder: Path, session_id: str) -> None:
    """Removes the files of a session."""
    for path in folder.glob(f"{session_id}.*"):
        with contextlib.suppress(OSError):
            path.unlink()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
