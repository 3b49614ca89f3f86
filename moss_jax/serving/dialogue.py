"""Protocol state machine of one session: translates Realtime events to a stream, and stream events back."""

import asyncio
import collections
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from moss_jax.config import ConfigError
from moss_jax.serving import protocol
from moss_jax.serving.hub import Hub
from moss_jax.serving.items import Items
from moss_jax.serving.media import MediaError, MediaLimits, decode_image, parse_data_url
from moss_jax.serving.protocol import FrameInfo, MossFrames, ProtocolError
from moss_jax.serving.responses import Asked, Responses
from moss_jax.serving.saved import SavedSession
from moss_jax.serving.session import CLOSE_NORMAL, Session
from moss_jax.serving.settings import Settings
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


class Dialogue:
    """Protocol state of one session.

    Args:
      session: session whose stream is opened with the first item or question.

    Attributes:
      session: the session.
      settings: its settings.
    """

    def __init__(self, hub: Hub, session: Session):
        self._hub, self.session = hub, session
        session.owner = self
        self.settings = Settings(hub)
        self._items = Items(session, self.settings, hub.config.history_items)
        self._responses = Responses(hub, session, self.settings, self._items)
        self._frames: list[Frame] = []
        # Items some of whose frames have an unknown fate.
        self._fates: dict[str, dict[int, FrameInfo | None]] = {}
        self._held: list[tuple[str, str]] = []
        self._asked: collections.deque[Asked] = collections.deque()
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._arrivals: collections.deque[float] = collections.deque(maxlen=RECENT)
        self._latencies: collections.deque[float] = collections.deque(maxlen=RECENT)
        # Arrival times of the frames that precede the next token.
        self._seen: list[float] = []
        self._counters_task: asyncio.Task | None = None
        self._time = 0.0
        self._room = asyncio.Event()
        self._limits = MediaLimits(
            max_pixels=hub.config.max_image_pixels, max_bytes=hub.config.max_message_bytes
        )

    # ------------------------------------------------------------------------ client events

    async def handle(self, event: protocol.ClientEvent) -> None:
        """Handles a client event.

        Raises:
          ProtocolError: the event is refused.
        """
        match event:
            case protocol.SessionUpdate():
                self._update(event.session)
                self.session.send(protocol.SessionUpdated(session=self.describe()))
            case protocol.ItemCreate():
                await self._create_item(event.item, event.moss.time if event.moss else None)
            case protocol.ItemRetrieve():
                item = self._items.get(event.item_id)
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

    def describe(self, resumed: protocol.Resumed | None = None) -> protocol.SessionObject:
        """The session settings in force."""
        return self.settings.describe(self.session, resumed)

    def _update(self, settings: protocol.SessionSettings) -> None:
        """Changes settings; with the extension, the session may be resumed and is told of its memory."""
        try:
            self.settings.update(settings, is_open=self.session.stream is not None)
        except ConfigError as error:
            raise ProtocolError(str(error), code="invalid_setting", param="session") from error
        if self.settings.moss is not None:
            self.session.is_resumable = True
            if self._counters_task is None:
                self._counters_task = asyncio.create_task(self._tell_counters())

    async def handle_frame(self, message: bytes) -> None:
        """Shows the model the frame of a binary message.

        Raises:
          ProtocolError: binary messages were not negotiated, or the message is not a valid frame.
        """
        if self.settings.moss is None or self.settings.moss.frames != "binary":
            raise ProtocolError(
                'binary messages must be negotiated: session.update with moss {version: 1, frames: "binary"}',
                code="binary_not_negotiated",
            )
        at, image = protocol.frame_time(message)
        frame = await self._decode(image)
        stream = await self._open()
        await self._wait_for_room(stream)
        self._show(stream, self._items.next_id("item"), [frame], at, (protocol.Part(type="input_image"),))

    async def _create_item(self, item: protocol.Item, at: float | None) -> None:
        if item.type != "message":
            raise ProtocolError(
                f"items of the type {item.type[:64]!r} are not supported, only messages",
                code="unsupported",
                param="item.type",
            )
        if item.id is not None and (self._items.get(item.id) or item.id in self._fates):
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
        item_id = item.id or self._items.next_id("item")
        if texts:
            self._held.append((item_id, "\n".join(texts)))
        if frames:
            stream = await self._open()
            await self._wait_for_room(stream)
            self._show(stream, item_id, frames, at, tuple(parts))
        else:
            self._items.add(item_id, tuple(parts))

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
        self.settings.system += texts
        parts = tuple(protocol.Part(type="input_text", text=text) for text in texts)
        item_id = item.id or self._items.next_id("item")
        self._items.add(item_id, parts, role="system")
        self._items.finish(item_id)

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
                is_live = stream.push_frame(rgb, at, copy=False)
            except SessionError as error:
                raise ProtocolError(str(error), code="invalid_time", param="moss.time") from error
            if not is_live or at is None:
                raise over()
            index = self._items.next_number("frame")
            arrived = time.monotonic()
            self._arrivals.append(arrived)
            self._frames.append(Frame(item_id, index, at, arrived))
            self._hub.counters.frames_by_fate["received"] += 1
            infos[index] = None
            first = first or FrameInfo(index=index, time=at, queued=len(self._frames))
        self._fates[item_id] = infos
        assert first is not None
        self._items.add(item_id, parts, moss=MossFrames(frame=first))

    async def _ask(self, settings: protocol.ResponseSettings, at: float | None) -> None:
        texts = [text for _, text in self._held]
        if settings.instructions:
            # Some clients repeat the session's instructions before the response's own.
            own = settings.instructions.removeprefix(self.settings.instructions).strip()
            texts += [own] * bool(own)
        if not texts:
            if self._responses.current is not None or self._asked:
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
                self._items.finish(item_id, status="incomplete")
            raise ProtocolError(str(error), code="refused_prompt") from error
        self._asked.append(asked)

    def _cancel(self, response_id: str | None) -> None:
        response = self._responses.current
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
            return await self.session.open(**self.settings.of_stream(), resume=resume)
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
                self._counts["tokens"] += 1
                self._hub.counters.tokens += 1
                self._responses.say(event.text, event.stream_time)
            case Silence():
                self._counts["silences"] += 1
                self._responses.context += 1
                self._responses.finish(self._time, "completed")
                self._send_moss(protocol.SilenceEvent(time=event.stream_time))
            case Interrupted():
                self._counts["interruptions"] += 1
                self._hub.counters.interruptions += 1
                if (response := self._responses.current) is not None:
                    reason = "client_cancelled" if response.cancelled else "turn_detected"
                    self._responses.finish(self._time, "cancelled", reason)
            case TurnLimit():
                self._responses.finish(self._time, "incomplete", "max_output_tokens")
            case NotAsked():
                self._on_turn(event)
                self._responses.finish(self._time, "failed", error="not_asked")
            case Failed():
                self._responses.finish(self._time, "failed", error="stream_failed")
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
            self._responses.context += 1  # Its `<|image|>` token.
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
            item = self._items.get(frame.item_id)
            has_text = item is not None and any(part.type == "input_text" for part in item.content)
            frames = MossFrames(frame=infos[0], frames=infos if len(infos) > 1 else None)
            if not has_text:  # An item with text is done when its text is asked.
                self._items.finish(frame.item_id, frames)

    def _on_turn(self, event: Turn | NotAsked) -> None:
        """Begins the response to a question."""
        self._counts["prompts"] += 1
        self._hub.counters.prompts += 1
        self._responses.context += self._responses.count_tokens(event.prompt)
        self._responses.finish(self._time, "cancelled", "turn_detected")
        asked = self._asked.popleft() if self._asked else Asked(event.prompt, [], None, time.monotonic())
        for item_id in asked.items:
            self._items.finish(item_id)
        self._responses.begin(event.stream_time, asked)

    def _on_end(self, event: End) -> None:
        self._responses.finish(self._time, "completed" if event.reason == "finished" else "incomplete")
        self._stop_counters()
        self._room.set()
        counters = dataclasses.asdict(event.counters)
        self._counts = counters
        if self.settings.moss is not None:
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
        if self.settings.moss is not None:
            end = protocol.EndEvent(time=self._time, reason="shutdown", counters=self._counts, saved=saved)
            self.session.send(end)
        else:
            error = ProtocolError("the server is shutting down", code="server_shutdown", type="server_error")
            self.session.send(protocol.error_event(error))

    def _send_moss(self, event: protocol.Event) -> None:
        """Sends an extension event, if the extension was negotiated."""
        if self.settings.moss is not None:
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
                    view = await self._hub.bank_view(stream)
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
        response, opened = self._responses.current, None
        if response is not None and response.item_id is not None:
            opened = response.id, response.item_id
        return protocol.Resumed(time=self._time, replayed=replayed, missed=missed, saved=saved, open=opened)

    def state(self) -> dict[str, Any]:
        """JSON-ready state from which the dialogue resumes in another process."""
        return {
            **self.settings.state(),
            **self._items.state(),
            **self._responses.state(),
            "frames": [dataclasses.asdict(frame) for frame in self._frames],
            "held": [list(held) for held in self._held],
            "asked": [dataclasses.asdict(asked) for asked in self._asked],
            "counts": dict(self._counts),
            "time": self._time,
        }

    async def restore(self, saved: SavedSession) -> None:
        """Restores a saved session and opens its stream.

        Raises:
          ProtocolError: the stream cannot be opened.
        """
        state = saved.dialogue
        self.session.sequence = state["sequence"]
        for part in (self.settings, self._items, self._responses):
            part.restore(state)
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
        self._counts, self._time = state["counts"], state["time"]
        await self._open(saved.stream)
        self.session.is_resumable = True
        self._counters_task = asyncio.create_task(self._tell_counters())


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
