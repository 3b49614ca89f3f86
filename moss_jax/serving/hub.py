"""asyncio front end of the scheduler: the open sessions, their slots, and server-wide counters.

Everything runs in one event loop, except the scheduler and threads that do file I/O.
"""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import hmac
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moss_jax import command
from moss_jax.config import ServerConfig, SessionConfig
from moss_jax.serving.protocol import ProtocolError
from moss_jax.serving.saved import SavedSession, prepare_folder, read_session, remove_session, token_hash
from moss_jax.serving.session import Session
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

_logger = logging.getLogger(__name__)
_ID = re.compile(r"sess_[0-9a-f]{24}")
# Seconds between two clean-ups of expired files.
CLEAN_SECONDS = 600.0


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


def warm_up_all(engine: Engine, image_size: int) -> None:
    """Compiles the programs that streams run, and the one that copies the banks of all."""
    engine.warm_up((image_size, image_size, 3))
    engine.bank_vectors(engine.start())
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
      copying: held while a session is copied to the host.
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
        self.copying = asyncio.Lock()
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

    def find_saved(self, session_id: str, token: str) -> SavedSession:
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
