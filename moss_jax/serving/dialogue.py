"""Protocol state machine of one session: translates Realtime events to a stream, and stream events back."""

import asyncio
import collections
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from moss_jax.config import ConfigError, MemoryConfig, SessionConfig, TokenSampling
from moss_jax.serving import protocol
from moss_jax.serving.hub import CLOSE_NORMAL, Hub, SavedSession, Session
from moss_jax.serving.media import MediaError, MediaLimits, decode_image, parse_data_url
from moss_jax.serving.protocol import FrameInfo, MossFrames, ProtocolError
from moss_jax.stream import (
    End,
    Engine,
    Event,
    Failed,
    FrameDropped,
    FrameSeen,
    FrameUnseen,
    Interrupted,
    NotAsked,
    Refused,
    SavedStreamError,
    SessionError,
    Silence,
    Stream,
    Text,
    Turn,
    TurnLimit,
)
from moss_jax.stream.events import Counters
from moss_jax.stream.moments import BankView
from moss_jax.text import Tokenizer, chat
from moss_jax.video import fit_frame

# Number of recent frame arrivals kept for the rate and latency.
RECENT = 32
# Queued frames of a lockstep stream at which reading from the client pauses.
READ_AHEAD = 64
COUNTERS = tuple(field.name for field in dataclasses.fields(Counters))


@dataclasses.dataclass
class Frame:
    """A frame whose fate is still unknown."""

    item_id: str
    index: int
    time: float
    arrived: float


@dataclasses.dataclass
class Asked:
    """Texts asked together, until the model has processed them."""

    text: str
    items: list[str]
    metadata: dict[str, str] | None
    at: float


@dataclasses.dataclass
class Response:
    """The response in progress.

    Attributes:
      item_id: id of the answer's item; None until there is text.
      cancelled: whether the client has cancelled it.
      asked_at: monotonic time at which it was requested, until its first text.
    """

    id: str
    asked: bool
    metadata: dict[str, str] | None = None
    item_id: str | None = None
    text: str = ""
    cancelled: bool = False
    input_tokens: int = 0
    asked_at: float | None = None


class Corrections:
    """Finds in streamed text the words with which the model retracts what it said.

    Args:
      words: text that begins a correction; empty for none.
    """

    def __init__(self, words: str):
        self.words = words
        self.held = ""

    def feed(self, piece: str) -> Iterator[tuple[str, bool]]:
        """Yields (text, begins a correction) pieces; a suffix that may begin a correction is buffered."""
        text, self.held = self.held + piece, ""
        while self.words and (start := text.find(self.words)) >= 0:
            if start:
                yield text[:start], False
            yield self.words, True
            text = text[start + len(self.words) :]
        longest = min(len(text), len(self.words) - 1)
        held = next((n for n in range(longest, 0, -1) if self.words.startswith(text[-n:])), 0)
        cut = len(text) - held
        self.held = text[cut:]
        if text[:cut]:
            yield text[:cut], False

    def flush(self) -> str:
        """Returns the buffered text, when no more follows."""
        held, self.held = self.held, ""
        return held


def sentence_start(said: str, words: str) -> int:
    """Start of the sentence in progress: after the previous sentence, or after a correction of it."""
    ends = [said.rfind(mark) + len(mark) for mark in (". ", "! ", "? ", "\n") if mark in said]
    if words and words in said:
        ends.append(said.rfind(words) + len(words))
    return max(ends, default=0)


class Dialogue:
    """Protocol state of one session.

    Args:
      session: session whose stream is opened with the first item or question.

    Attributes:
      session: the session.
      moss: the negotiated extension; None without it.
    """

    def __init__(self, hub: Hub, session: Session):
        self._hub, self.session = hub, session
        session.owner = self
        self.moss: protocol.MossSettings | None = None
        self._instructions: str = chat.SYSTEM_PROMPT
        self._max_output_tokens: int | None = None
        self._system: list[str] = []
        self._numbers = {"item": 0, "resp": 0, "frame": 0}
        self._last_item: str | None = None
        self._history: collections.OrderedDict[str, protocol.ItemObject] = collections.OrderedDict()
        self._frames: list[Frame] = []
        # Items some of whose frames have an unknown fate.
        self._fates: dict[str, dict[int, FrameInfo | None]] = {}
        self._held: list[tuple[str, str]] = []
        self._asked: collections.deque[Asked] = collections.deque()
        self._response: Response | None = None
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._corrections = Corrections(hub.config.correction)
        self._arrivals: collections.deque[float] = collections.deque(maxlen=RECENT)
        self._latencies: collections.deque[float] = collections.deque(maxlen=RECENT)
        # Arrival times of the frames that precede the next token.
        self._seen: list[float] = []
        self._counters_task: asyncio.Task | None = None
        self._time = 0.0
        self._room = asyncio.Event()
        # Tokens that entered the context, counted from the stream's events.
        self._context = 0
        self._limits = MediaLimits(
            max_pixels=hub.config.max_image_pixels, max_bytes=hub.config.max_message_bytes
        )

    # -------------------------------------------------------------------------------- settings

    def describe(self, resumed: protocol.Resumed | None = None) -> protocol.SessionObject:
        """The session settings in force."""
        moss = None
        if self.moss is not None:
            stream, memory = self._session_config(), self._memory() or self._engine_memory()
            limits = ("tokens_per_second", "tail_seconds", "max_tokens_per_second", "max_fps")
            moss = protocol.MossSession(
                version=protocol.VERSION,
                clock=stream.clock,
                frames=self.moss.frames or "items",
                token=self.session.token,
                grace_seconds=self._hub.config.grace_seconds,
                sampling=dataclasses.asdict(self._sampling() or self._engine_sampling()),
                memory=dataclasses.asdict(memory) | self._capacities(),
                selection=dataclasses.asdict(stream.selection),
                limits={name: getattr(stream, name) for name in limits},
                correction=self._hub.config.correction,
                image_size=self._hub.image_size,
                resumed=resumed,
            )
        return protocol.SessionObject(
            id=self.session.id,
            model=self._hub.model,
            instructions=self._system_prompt(),
            max_output_tokens=self._max_output_tokens or self._hub.session_config.max_tokens_per_turn,
            moss=moss,
        )

    @property
    def _tokenizer(self) -> Tokenizer:
        return self._hub.scheduler.engine.tokenizer

    def _system_prompt(self) -> str:
        return "\n".join(part for part in (self._instructions, *self._system) if part)

    def _session_config(self) -> SessionConfig:
        config, moss = self._hub.session_config, self.moss
        if moss and moss.selection:
            config = changed(config, selection=changed(config.selection, **given(moss.selection)))
        if moss and moss.limits:
            config = changed(config, **given(moss.limits))
        if self._max_output_tokens:
            most = min(self._max_output_tokens, config.max_tokens_per_turn)
            config = changed(config, max_tokens_per_turn=most)
        return config

    def _engine_memory(self) -> MemoryConfig:
        return self._hub.scheduler.engine.config.memory

    def _engine_sampling(self) -> TokenSampling:
        engine = self._hub.scheduler.engine
        return engine.sampling if isinstance(engine, Engine) else TokenSampling()

    def _memory(self) -> MemoryConfig | None:
        """The stream's memory settings if they differ from the engine's."""
        settings = given(self.moss.memory) if self.moss and self.moss.memory else {}
        settings = {n: x for n, x in settings.items() if n not in ("bank_capacity", "text_capacity")}
        return changed(self._engine_memory(), **settings) if settings else None

    def _capacities(self) -> dict[str, int]:
        engine = self._hub.scheduler.engine.config
        asked = given(self.moss.memory) if self.moss and self.moss.memory else {}
        return {n: asked.get(n, getattr(engine, n)) for n in ("bank_capacity", "text_capacity")}

    def _sampling(self) -> TokenSampling | None:
        settings = given(self.moss.sampling) if self.moss and self.moss.sampling else {}
        return changed(self._engine_sampling(), **settings) if settings else None

    def _update(self, settings: protocol.SessionSettings) -> None:
        """Changes the settings that can still change, all or none."""
        before = self._instructions, self._max_output_tokens, self.moss
        fixed = self._fixed()
        if settings.instructions is not None:
            self._instructions = settings.instructions
        if settings.max_output_tokens is not None:
            most = settings.max_output_tokens
            self._max_output_tokens = None if most == "inf" else most
        if settings.moss is not None:
            old = self.moss.model_dump(exclude_none=True) if self.moss else {}
            new = settings.moss.model_dump(exclude_none=True, exclude={"resume", "token", "after"})
            self.moss = protocol.MossSettings.model_validate(old | new)
        try:
            wrong = [name for name, value in self._fixed().items() if value != fixed[name]]
            if wrong and self.session.stream is not None:
                raise ProtocolError(
                    f"{wrong[0]} is fixed once the stream is open; open another session",
                    code="stream_is_open",
                    param=f"session.{wrong[0]}",
                )
        except (ProtocolError, ConfigError):
            self._instructions, self._max_output_tokens, self.moss = before
            raise
        if self.moss is not None:
            self.session.is_resumable = True
            if self._counters_task is None:
                self._counters_task = asyncio.create_task(self._tell_counters())

    def _fixed(self) -> dict[str, Any]:
        """Validates and returns the settings that are fixed once the stream is open, by name."""
        return {
            "instructions": self._instructions,
            "max_output_tokens": self._session_config().max_tokens_per_turn,
            "moss.limits": dataclasses.replace(self._session_config(), selection=SessionConfig().selection),
            "moss.selection": self._session_config().selection,
            "moss.memory": (self._memory() or self._engine_memory(), self._capacities()),
            "moss.sampling": self._sampling() or self._engine_sampling(),
        }

    # ------------------------------------------------------------------------ client events

    async def handle(self, event: protocol.ClientEvent) -> None:
        """Handles a client event.

        Raises:
          ProtocolError: the event is refused.
        """
        match event:
            case protocol.SessionUpdate():
                try:
                    self._update(event.session)
                except ConfigError as error:
                    raise ProtocolError(str(error), code="invalid_setting", param="session") from error
                self.session.send(protocol.SessionUpdated(session=self.describe()))
            case protocol.ItemCreate():
                await self._create_item(event.item, event.moss.time if event.moss else None)
            case protocol.ItemRetrieve():
                item = self._history.get(event.item_id)
                if item is None:
                    raise ProtocolError(
                        f"there is no item {event.item_id[:64]!r}, or it is no longer kept",
                        code="item_not_found",
                        param="item_id",
                    )
                self.session.send(protocol.ItemRetrieved(item=item))
            case protocol.ResponseCreate():
                await self._ask(event.response, event.moss.time if event.moss else None)
            case protocol.ResponseCancel():
                self._cancel(event.response_id)
            case protocol.ItemDelete() | protocol.ItemTruncate():
                raise ProtocolError(
                    "what a stream has seen and said cannot be removed; open another session to start over",
                    code="unsupported",
                    param="type",
                )
            case protocol.MossFinish():
                stream = await self._open()
                stream.finish(time=event.moss.time if event.moss else None)
            case protocol.MossSave():
                try:
                    at = await self.session.save()
                except (OSError, SessionError) as error:
                    code = "save_failed" if isinstance(error, OSError) else "cannot_save"
                    reason = error.strerror if isinstance(error, OSError) else str(error)
                    raise ProtocolError(
                        f"the stream was not saved: {reason}", code=code, type="server_error"
                    ) from error
                self.session.send(protocol.SavedEvent(time=at))
            case _:
                raise ProtocolError("audio is not supported", code="unsupported", param="type")

    async def handle_frame(self, message: bytes) -> None:
        """Shows the model the frame of a binary message.

        Raises:
          ProtocolError: binary messages were not negotiated, or the message is not a valid frame.
        """
        if self.moss is None or self.moss.frames != "binary":
            raise ProtocolError(
                'binary messages must be negotiated: session.update with moss {version: 1, frames: "binary"}',
                code="binary_not_negotiated",
            )
        at, image = protocol.frame_time(message)
        frame = await self._decode(image)
        stream = await self._open()
        await self._wait_for_room(stream)
        self._show(stream, self._next_id("item"), [frame], at, (protocol.Part(type="input_image"),))

    async def _create_item(self, item: protocol.Item, at: float | None) -> None:
        if item.type != "message":
            raise ProtocolError(
                f"items of the type {item.type[:64]!r} are not supported, only messages",
                code="unsupported",
                param="item.type",
            )
        if item.id is not None and (item.id in self._history or item.id in self._fates):
            raise ProtocolError(f"there is an item {item.id!r} already", code="item_exists", param="item.id")
        if not item.content:
            raise ProtocolError("the item has no content", code="invalid_item", param="item.content")
        if item.role == "system":
            self._add_system(item)
            return
        if item.role != "user":
            raise ProtocolError(
                f"items of the role {str(item.role)[:64]!r} are not supported, only of user and system",
                code="unsupported",
                param="item.role",
            )
        # Everything is checked before anything is shown.
        frames, texts, parts = [], [], []
        for index, part in enumerate(item.content):
            where = f"item.content[{index}]"
            if part.type == "input_image":
                frames.append(await self._decode(part.image_url or "", f"{where}.image_url"))
                parts.append(protocol.Part(type="input_image"))
            elif part.type == "input_text" and part.text is not None:
                texts.append(part.text)
                parts.append(protocol.Part(type="input_text", text=part.text))
            else:
                what = "audio is" if "audio" in part.type else f"content of the type {part.type[:64]!r} is"
                raise ProtocolError(f"{what} not supported", code="unsupported", param=where)
        item_id = item.id or self._next_id("item")
        if texts:
            self._held.append((item_id, "\n".join(texts)))
        if frames:
            stream = await self._open()
            await self._wait_for_room(stream)
            self._show(stream, item_id, frames, at, tuple(parts))
        else:
            self._add_item(item_id, tuple(parts))

    def _add_system(self, item: protocol.Item) -> None:
        """Appends a system item to the instructions."""
        if self.session.stream is not None:
            raise ProtocolError(
                "instructions are fixed once the stream is open; open another session",
                code="stream_is_open",
                param="item.role",
            )
        texts = [part.text for part in item.content if part.type == "input_text" and part.text]
        if len(texts) != len(item.content):
            raise ProtocolError(
                "an item of the role 'system' holds text alone", code="unsupported", param="item.content"
            )
        self._system += texts
        parts = tuple(protocol.Part(type="input_text", text=text) for text in texts)
        item_id = item.id or self._next_id("item")
        self._add_item(item_id, parts, role="system")
        self._finish_item(item_id)

    async def _decode(self, image: str | bytes, param: str | None = None) -> UInt8[np.ndarray, "S S 3"]:
        """Decodes a frame from a data URL or a file, scaled to the model's image size."""

        def decode() -> UInt8[np.ndarray, "S S 3"]:
            content = parse_data_url(image)[1] if isinstance(image, str) else image
            return fit_frame(decode_image(content, limits=self._limits), self._hub.image_size)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._hub.decoders, decode)
        except MediaError as error:
            raise ProtocolError(str(error), code="invalid_image", param=param) from error

    async def _wait_for_room(self, stream: Stream) -> None:
        """Applies backpressure to a lockstep client while many frames are queued; none may be dropped."""
        while stream.config.clock == "lockstep" and len(self._frames) >= READ_AHEAD:
            if self.session.is_over:
                raise over()
            self._room.clear()
            await self._room.wait()

    def _show(
        self,
        stream: Stream,
        item_id: str,
        frames: Sequence[UInt8[np.ndarray, "S S 3"]],
        at: float | None,
        parts: tuple[protocol.Part, ...],
    ) -> None:
        """Pushes the frames of an item and acknowledges it."""
        if at is None and stream.config.clock == "realtime":
            at = stream.clock.now()
        # Frames that must be in order, selected or lockstep, fail at the first one, before any is accepted.
        infos: dict[int, FrameInfo | None] = {}
        first = None
        for rgb in frames:
            try:
                is_live = stream.push_frame(rgb, at)
            except SessionError as error:
                raise ProtocolError(str(error), code="invalid_time", param="moss.time") from error
            if not is_live or at is None:
                raise over()
            index = self._numbers["frame"]
            self._numbers["frame"] += 1
            arrived = time.monotonic()
            self._arrivals.append(arrived)
            self._frames.append(Frame(item_id, index, at, arrived))
            self._hub.counters.frames_by_fate["received"] += 1
            infos[index] = None
            first = first or FrameInfo(index=index, time=at, queued=len(self._frames))
        self._fates[item_id] = infos
        assert first is not None
        self._add_item(item_id, parts, moss=MossFrames(frame=first))

    def _add_item(
        self,
        item_id: str,
        parts: tuple[protocol.Part, ...],
        *,
        role: Literal["user", "system"] = "user",
        moss: MossFrames | None = None,
    ) -> None:
        item = protocol.ItemObject(id=item_id, status="completed", role=role, content=parts)
        self._remember(item)
        self.session.send(
            protocol.ItemAdded(previous_item_id=self._last_item, item=item, moss=moss if self.moss else None)
        )
        self._last_item = item_id

    def _remember(self, item: protocol.ItemObject) -> None:
        """Keeps an item for later retrieval."""
        self._history[item.id] = item
        while len(self._history) > self._hub.config.history_items:
            self._history.popitem(last=False)

    def _finish_item(
        self, item_id: str, moss: MossFrames | None = None, status: protocol.Status = "completed"
    ) -> None:
        item = self._history.get(item_id)
        if item is None:  # No longer kept in the history.
            item = protocol.ItemObject(id=item_id, status="completed", role="user")
        self.session.send(
            protocol.ItemDone(
                item=item.model_copy(update={"status": status}), moss=moss if self.moss else None
            )
        )

    async def _ask(self, settings: protocol.ResponseSettings, at: float | None) -> None:
        texts = [text for _, text in self._held]
        if settings.instructions:
            # Some clients repeat the session's instructions before the response's own.
            own = settings.instructions.removeprefix(self._instructions).strip()
            texts += [own] * bool(own)
        if not texts:
            if self._response is not None or self._asked:
                raise ProtocolError(
                    "a response is in progress; wait for response.done, or ask something to cut it",
                    code="conversation_already_has_active_response",
                )
            raise ProtocolError(
                "there is nothing to answer: send an item with input_text first, or instructions with "
                "response.create; the model speaks of what it sees by itself",
                code="nothing_to_answer",
            )
        stream = await self._open()
        items, self._held = [item_id for item_id, _ in self._held], []
        text = "\n".join(texts)
        asked = Asked(text, items, settings.metadata, time.monotonic())
        try:
            if at is None and stream.config.clock == "realtime":
                at = stream.clock.now()
            if not stream.push_prompt(text, at):
                raise over()
        except SessionError as error:
            for item_id in items:
                self._finish_item(item_id, status="incomplete")
            raise ProtocolError(str(error), code="refused_prompt") from error
        self._asked.append(asked)

    def _cancel(self, response_id: str | None) -> None:
        response = self._response
        if response is None or response_id not in (None, response.id):
            raise ProtocolError(
                "there is no such response in progress",
                code="response_cancel_not_active",
                param="response_id",
            )
        response.cancelled = True
        assert self.session.stream is not None
        self.session.stream.interrupt()

    async def _open(self, resume: Path | None = None) -> Stream:
        """Returns the stream, opening it if necessary."""
        if self.session.is_over:
            raise over()
        if self.session.stream is not None:
            return self.session.stream
        try:
            return await self.session.open(
                config=self._session_config(),
                system=self._system_prompt() or None,
                sampling=self._sampling(),
                memory=self._memory(),
                **(self._capacities() if self.moss and self.moss.memory else {}),
                resume=resume,
            )
        except Refused as error:
            raise ProtocolError(str(error), code="no_free_stream", type="server_error") from error
        except SavedStreamError as error:
            raise ProtocolError(str(error), code="session_not_found", type="server_error") from error
        except (ConfigError, SessionError) as error:
            # The slot was released, so reserve one for another try with other settings.
            self.session.reservation = self.session.reservation or self._hub.reserve()
            raise ProtocolError(str(error), code="invalid_setting", param="session") from error

    # ------------------------------------------------------------------------ events of the stream

    def on_event(self, event: Event) -> None:
        """Notifies the client of a stream event."""
        self._time = event.stream_time
        if isinstance(event, Text | Silence):
            for arrived in self._seen:
                self._hub.counters.observe("extend", time.monotonic() - arrived)
            self._seen.clear()
        match event:
            case FrameSeen() | FrameUnseen() | FrameDropped():
                self._on_frame(event)
            case Turn() if event.prompt:
                self._on_turn(event)
            case Text():
                self._on_text(event)
            case Silence():
                self._counts["silences"] += 1
                self._context += 1
                if self._response is not None:
                    self._finish_response("completed")
                self._send_moss(protocol.SilenceEvent(time=event.stream_time))
            case Interrupted():
                self._counts["interruptions"] += 1
                self._hub.counters.interruptions += 1
                if self._response is not None:
                    reason = "client_cancelled" if self._response.cancelled else "turn_detected"
                    self._finish_response("cancelled", reason)
            case TurnLimit():
                self._finish_response("incomplete", "max_output_tokens")
            case NotAsked():
                self._on_turn(event)
                self._finish_response("failed", error="not_asked")
            case Failed():
                if self._response is not None:
                    self._finish_response("failed", error="stream_failed")
                is_kept = self._hub.state_folder is not None and self.session.is_resumable
                resume = ", or resume this one from its last save" if is_kept else ""
                error = ProtocolError(
                    f"an error in the server has ended the stream; open another session{resume}",
                    code="stream_failed",
                    type="server_error",
                )
                self.session.send(protocol.error_event(error))
            case End():
                self._on_end(event)

    def _on_frame(self, event: FrameSeen | FrameUnseen | FrameDropped) -> None:
        fate: protocol.Fate = "seen"
        if isinstance(event, FrameUnseen):
            fate = event.reason
        elif isinstance(event, FrameDropped):
            fate = "dropped"
        self._counts["frames" if fate == "seen" else f"frames_{fate}"] += 1
        self._hub.counters.frames_by_fate[fate] += 1
        # Frames with equal times are processed in order of arrival.
        frame = next((f for f in self._frames if f.time == event.time), None)
        if frame is None:
            return
        self._frames.remove(frame)
        self._room.set()
        seconds = time.monotonic() - frame.arrived
        if fate not in ("dropped", "rate"):
            self._context += 1  # Its `<|image|>` token.
        if fate == "seen":
            self._latencies.append(seconds)
            self._hub.counters.observe("frame", seconds)
            self._seen.append(frame.arrived)
        fates = self._fates[frame.item_id]
        fates[frame.index] = FrameInfo(
            index=frame.index, time=frame.time, fate=fate, queued=len(self._frames)
        )
        if all(fates.values()):
            infos = tuple(info for info in fates.values() if info)
            del self._fates[frame.item_id]
            item = self._history.get(frame.item_id)
            has_text = item is not None and any(part.type == "input_text" for part in item.content)
            frames = MossFrames(frame=infos[0], frames=infos if len(infos) > 1 else None)
            if not has_text:  # An item with text is done when its text is asked.
                self._finish_item(frame.item_id, frames)

    def _on_turn(self, event: Turn | NotAsked) -> None:
        """Begins the response to a question."""
        self._counts["prompts"] += 1
        self._hub.counters.prompts += 1
        self._context += len(self._tokenizer.encode(event.prompt))
        if self._response is not None:
            self._finish_response("cancelled", "turn_detected")
        asked = self._asked.popleft() if self._asked else Asked(event.prompt, [], None, time.monotonic())
        for item_id in asked.items:
            self._finish_item(item_id)
        self._begin_response(event, asked)

    def _begin_response(self, event: Event, asked: Asked | None = None) -> Response:
        response = Response(
            self._next_id("resp"),
            asked=asked is not None,
            metadata=asked.metadata if asked else None,
            input_tokens=self._context,
            asked_at=asked.at if asked else None,
        )
        self._response = response
        self._hub.counters.responses += 1
        self._corrections.held = ""
        moss = protocol.MossResponse(asked=response.asked, time=event.stream_time) if self.moss else None
        self.session.send(
            protocol.ResponseCreated(response=self._describe(response, "in_progress"), moss=moss)
        )
        return response

    def _on_text(self, event: Text) -> None:
        self._counts["tokens"] += 1
        self._hub.counters.tokens += 1
        response = self._response or self._begin_response(event)
        if response.cancelled and self.session.stream is not None:
            # Cancelled before it spoke.
            self.session.stream.interrupt()
        if response.asked_at is not None:
            self._hub.counters.observe("ttft", time.monotonic() - response.asked_at)
            response.asked_at = None
        if self.moss is None:
            self._say(response, event.text, event.stream_time)
            return
        for piece, takes_back in self._corrections.feed(event.text):
            self._say(response, piece, event.stream_time, takes_back=takes_back)

    def _say(self, response: Response, text: str, at: float, *, takes_back: bool = False) -> None:
        """Sends a piece of the answer, preceded by the new item if it is the first."""
        if response.item_id is None:
            response.item_id = self._next_id("item")
            item = protocol.ItemObject(id=response.item_id, status="in_progress", role="assistant")
            self.session.send(protocol.OutputItemAdded(response_id=response.id, item=item))
            self.session.send(protocol.ItemAdded(previous_item_id=self._last_item, item=item))
            self._last_item = response.item_id
            part = protocol.ContentPart(text="")
            self.session.send(
                protocol.PartAdded(response_id=response.id, item_id=response.item_id, part=part)
            )
        moss = None
        if self.moss is not None:
            start = sentence_start(response.text, self._corrections.words) if takes_back else None
            moss = protocol.MossDelta(time=at, takes_back=takes_back or None, start=start)
        response.text += text
        self.session.send(
            protocol.TextDelta(response_id=response.id, item_id=response.item_id, delta=text, moss=moss)
        )

    def _finish_response(
        self,
        status: protocol.ResponseStatus,
        reason: protocol.Reason | None = None,
        *,
        error: str | None = None,
    ) -> None:
        response = self._response
        if response is None:
            return
        if held := self._corrections.flush():
            self._say(response, held, self._time)
        self._response = None
        self._context += len(self._tokenizer.encode(response.text))
        if response.item_id is not None:
            item = self._output(response, "completed" if status == "completed" else "incomplete")
            part = protocol.ContentPart(text=response.text)
            self.session.send(protocol.TextDone(response_id=response.id, item_id=item.id, text=response.text))
            self.session.send(protocol.PartDone(response_id=response.id, item_id=item.id, part=part))
            self.session.send(protocol.OutputItemDone(response_id=response.id, item=item))
            self._remember(item)
            self.session.send(protocol.ItemDone(item=item))
        self.session.send(protocol.ResponseDone(response=self._describe(response, status, reason, error)))

    def _output(self, response: Response, status: protocol.Status) -> protocol.ItemObject:
        assert response.item_id is not None
        content = (protocol.Part(type="output_text", text=response.text),)
        return protocol.ItemObject(id=response.item_id, status=status, role="assistant", content=content)

    def _describe(
        self,
        response: Response,
        status: protocol.ResponseStatus,
        reason: protocol.Reason | None = None,
        error: str | None = None,
    ) -> protocol.ResponseObject:
        if status == "in_progress":
            return protocol.ResponseObject(id=response.id, status=status, metadata=response.metadata)
        failure = protocol.StatusError(type="server_error", code=error) if error else None
        said = len(self._tokenizer.encode(response.text))
        output = ()
        if response.item_id is not None:
            output = (self._output(response, "completed" if status == "completed" else "incomplete"),)
        return protocol.ResponseObject(
            id=response.id,
            status=status,
            status_details=protocol.StatusDetails(type=status, reason=reason, error=failure),
            output=output,
            metadata=response.metadata,
            usage=protocol.Usage(
                total_tokens=response.input_tokens + said,
                input_tokens=response.input_tokens,
                output_tokens=said,
            ),
        )

    def _on_end(self, event: End) -> None:
        if self._response is not None:
            status = "completed" if event.reason == "finished" else "incomplete"
            self._finish_response(status)
        self._stop_counters()
        self._room.set()
        counters = dataclasses.asdict(event.counters)
        self._counts = counters
        if self.moss is not None:
            figures = dataclasses.asdict(event.figures) if event.figures else None
            self.session.send(
                protocol.EndEvent(
                    time=event.stream_time, reason=event.reason, counters=counters, figures=figures
                )
            )
        elif event.reason not in ("finished", "stopped", "failed"):
            error = ProtocolError(
                f"the stream is over: {event.reason}", code="session_expired", type="server_error"
            )
            self.session.send(protocol.error_event(error))
        self.session.close(CLOSE_NORMAL, f"the stream is over: {event.reason}")

    def on_shutdown(self, *, saved: bool) -> None:
        """Notifies the client that the server shuts down."""
        self._stop_counters()
        if self.moss is not None:
            end = protocol.EndEvent(time=self._time, reason="shutdown", counters=self._counts, saved=saved)
            self.session.send(end)
        else:
            error = ProtocolError("the server is shutting down", code="server_shutdown", type="server_error")
            self.session.send(protocol.error_event(error))

    def _send_moss(self, event: protocol.Event) -> None:
        """Sends an extension event, if the extension was negotiated."""
        if self.moss is not None:
            self.session.send(event)

    # ---------------------------------------------------------------------------------- counters

    async def _tell_counters(self) -> None:
        """Sends stream statistics periodically while a client is connected."""
        while not self.session.is_over:
            await asyncio.sleep(self._hub.config.counters_seconds)
            stream = self.session.stream
            if stream is None or not self.session.is_connected or self.session.is_over:
                continue
            memory = None
            if isinstance(self._hub.scheduler.engine, Engine):
                try:
                    view = await asyncio.wrap_future(stream.look_at_bank())
                    memory = await asyncio.to_thread(memory_items, view)
                except SessionError:
                    continue  # The stream has ended.
            if self.session.is_connected and not self.session.is_over:
                self.session.send(self._counters(stream, memory))

    def _stop_counters(self) -> None:
        if self._counters_task is not None:
            self._counters_task.cancel()
            self._counters_task = None

    def _counters(
        self, stream: Stream, memory: tuple[protocol.MemoryItem, ...] | None
    ) -> protocol.CountersEvent:
        now = time.monotonic()
        recent = [at for at in self._arrivals if now - at <= 10]
        span = now - recent[0] if recent else 0.0
        return protocol.CountersEvent(
            time=stream.clock.now() if stream.config.clock == "realtime" else self._time,
            counters=self._counts,
            fps=round(len(recent) / max(span, 1.0), 2),
            latency=sum(self._latencies) / len(self._latencies) if self._latencies else None,
            queue=len(self._frames),
            text_tokens=stream.conversation.text_length,
            text_capacity=stream.conversation.capacity.text_capacity,
            memory=memory,
        )

    # --------------------------------------------------------------------------------- resuming

    def resumed(self, replayed: int, missed: int, *, saved: bool) -> protocol.Resumed:
        """Describes a resumed session."""
        response, opened = self._response, None
        if response is not None and response.item_id is not None:
            opened = response.id, response.item_id
        return protocol.Resumed(time=self._time, replayed=replayed, missed=missed, saved=saved, open=opened)

    def state(self) -> dict[str, Any]:
        """JSON-ready state from which the dialogue resumes in another process."""
        return {
            "moss": self.moss.model_dump(exclude_none=True) if self.moss else None,
            "instructions": self._instructions,
            "max_output_tokens": self._max_output_tokens,
            "system": list(self._system),
            "numbers": dict(self._numbers),
            "last_item": self._last_item,
            "history": [item.model_dump(exclude_none=True) for item in self._history.values()],
            "frames": [dataclasses.asdict(frame) for frame in self._frames],
            "held": [list(held) for held in self._held],
            "asked": [dataclasses.asdict(asked) for asked in self._asked],
            "response": dataclasses.asdict(self._response) if self._response else None,
            "corrections": self._corrections.held,
            "counts": dict(self._counts),
            "time": self._time,
            "context": self._context,
        }

    async def restore(self, saved: SavedSession) -> None:
        """Restores a saved session and opens its stream.

        Raises:
          ProtocolError: the stream cannot be opened.
        """
        state = saved.dialogue
        self.session.sequence = state["sequence"]
        self.moss = protocol.MossSettings.model_validate(state["moss"]) if state["moss"] else None
        self._instructions, self._system = state["instructions"], state["system"]
        self._max_output_tokens = state["max_output_tokens"]
        self._numbers, self._last_item = state["numbers"], state["last_item"]
        items = map(protocol.ItemObject.model_validate, state["history"])
        self._history = collections.OrderedDict((item.id, item) for item in items)
        now = time.monotonic()
        waiting = collections.Counter(at for at, prompt, _ in state["inbox"] if prompt is None)
        for fields in state["frames"]:
            if waiting[fields["time"]] > 0:
                waiting[fields["time"]] -= 1
                self._frames.append(Frame(**fields | {"arrived": now}))
        for frame in self._frames:
            self._fates.setdefault(frame.item_id, {})[frame.index] = None
        self._held = [(item_id, text) for item_id, text in state["held"]]
        prompts = sum(prompt is not None for _, prompt, _ in state["inbox"])
        self._asked.extend(Asked(**asked | {"at": now}) for asked in state["asked"][:prompts])
        if state["response"]:
            self._response = Response(**state["response"] | {"asked_at": None})
        self._corrections.held = state["corrections"]
        self._counts, self._time, self._context = state["counts"], state["time"], state["context"]
        await self._open(saved.stream)
        self.session.is_resumable = True
        self._counters_task = asyncio.create_task(self._tell_counters())

    def _next_id(self, kind: str) -> str:
        """An id that is unique across sessions."""
        self._numbers[kind] += 1
        return f"{kind}_{self.session.id[5:17]}_{self._numbers[kind]}"


def memory_items(view: BankView) -> tuple[protocol.MemoryItem, ...]:
    """Contents of a memory bank, as reported to clients."""

    def detail(vectors: int) -> Literal["whole", "quarter", "sixteenth", "one"]:
        share = vectors / view.vectors_per_frame
        if share == 1:
            return "whole"
        if vectors == 1:
            return "one"
        # Pyramid levels are slightly above a quarter and a sixteenth, because of the class token's vector.
        return "quarter" if share > 1 / 8 else "sixteenth"

    return tuple(
        protocol.MemoryItem(
            time=moment.time, detail=detail(moment.vectors), vectors=moment.vectors, frames=moment.frames
        )
        for moment in view.moments()
    )


def over() -> ProtocolError:
    """The error for input after the end of a stream."""
    return ProtocolError("the stream is over; open another session", code="stream_is_over")


def given(settings: protocol.Strict) -> dict[str, Any]:
    """The settings that a client has set."""
    return settings.model_dump(exclude_none=True)


def changed[Config](config: Config, **changes: Any) -> Config:
    """Returns a copy of a config with changed values.

    Raises:
      ConfigError: a value is invalid.
    """
    return dataclasses.replace(config, **changes)  # pyright: ignore[reportArgumentType]
