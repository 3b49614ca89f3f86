"""Event types of the Realtime protocol on `/v1/realtime` and of its extension, `moss`.

Names follow OpenAI's Realtime API (GA). Fields sent by clients that have no meaning here, such as those for
audio and tools, are ignored; unsupported requests are answered with an `error` event.
"""

import json
import math
import struct
from typing import Annotated, Any, Literal

import pydantic

from moss_jax.config import Clock
from moss_jax.stream.events import EndReason

# Version of the `moss` extension.
VERSION = 1

Status = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "cancelled", "incomplete", "failed"]
Fate = Literal["seen", "still", "alike", "rate", "dropped"]
Reason = Literal["turn_detected", "client_cancelled", "max_output_tokens"]
ErrorType = Literal["invalid_request_error", "server_error"]
# Stream time in seconds.
Time = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


class ProtocolError(Exception):
    """A request that is refused; the session continues.

    Attributes:
      code: machine-readable error code.
      param: the field at fault.
      type: whether the client or the server is at fault.
    """

    def __init__(
        self, message: str, *, code: str, param: str | None = None, type: ErrorType = "invalid_request_error"
    ):
        super().__init__(message)
        self.message, self.code, self.param = message, code, param
        self.type: ErrorType = type


class Message(pydantic.BaseModel):
    """Base of all protocol types; unknown fields are ignored."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True)


class Strict(Message):
    """Base of the extension's types sent by clients; unknown fields are rejected."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


# -------------------------------------------------------------------------------------- client to server


class SamplingSettings(Strict):
    """Token sampling settings; omitted fields use the engine's defaults."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None


class MemorySettings(Strict):
    """Memory capacity and eviction settings of the stream; omitted fields use the engine's defaults."""

    policy: str | None = None
    low_water: float | None = None
    pyramid_shares: tuple[float, ...] | None = None
    text: Literal["full", "window"] | None = None
    text_first: float | None = None
    text_recent: float | None = None
    text_assistant: float | None = None
    bank_capacity: int | None = None
    text_capacity: int | None = None


class SelectionSettings(Strict):
    """Frame selection settings; see `SelectionConfig`."""

    enabled: bool | None = None
    min_change: float | None = None
    max_gap: float | None = None
    min_distance: float | None = None
    fps: float | None = None
    max_fps: float | None = None


class LimitSettings(Strict):
    """Limits of the stream; see `SessionConfig`."""

    tokens_per_second: int | None = None
    tail_seconds: float | None = None
    max_tokens_per_second: float | None = None
    max_fps: float | None = None


class MossSettings(Strict):
    """Negotiates the extension; settings cannot change once the stream is open.

    Attributes:
      version: extension version.
      frames: "binary" to also send frames as binary messages: the frame's time in seconds as a float64 in
        network byte order (NaN for now), then a JPEG, PNG or WebP file.
      resume, token, after: to resume a session: its id, its token, and the id of the last event received.
    """

    version: Literal[1]
    frames: Literal["binary", "items"] | None = None
    sampling: SamplingSettings | None = None
    memory: MemorySettings | None = None
    selection: SelectionSettings | None = None
    limits: LimitSettings | None = None
    resume: str | None = None
    token: str | None = None
    after: str | None = None


class SessionSettings(Message):
    """Session settings; omitted fields keep their values."""

    type: Literal["realtime"] = "realtime"
    instructions: str | None = None
    max_output_tokens: Annotated[int, pydantic.Field(ge=1)] | Literal["inf"] | None = None
    moss: MossSettings | None = None


class Content(Message):
    """A content part of an item."""

    type: str
    text: str | None = None
    image_url: str | None = None


class Item(Message):
    """A conversation item, as sent by a client."""

    id: Annotated[str, pydantic.Field(min_length=1, max_length=64)] | None = None
    type: str
    role: str | None = None
    content: tuple[Content, ...] = ()


class MossItem(Strict):
    """Extension fields of an item: `time`, the stream time of its frames or its text in seconds."""

    time: Time | None = None


class Request(Message):
    """Base of client events; errors echo the `event_id`."""

    event_id: Annotated[str, pydantic.Field(max_length=512)] | None = None


class SessionUpdate(Request):
    """Changes settings; answered by `session.updated` with the settings in force."""

    type: Literal["session.update"]
    session: SessionSettings


class ItemCreate(Request):
    """Shows the model a frame (`input_image`), or queues a text (`input_text`) until `response.create`."""

    type: Literal["conversation.item.create"]
    item: Item
    moss: MossItem | None = None


class ItemRetrieve(Request):
    """Requests an item; answered by `conversation.item.retrieved`."""

    type: Literal["conversation.item.retrieve"]
    item_id: str


class ItemDelete(Request):
    """Refused: items cannot be removed from a stream."""

    type: Literal["conversation.item.delete"]


class ItemTruncate(Request):
    """Refused: answers cannot be truncated afterwards."""

    type: Literal["conversation.item.truncate"]


class ResponseSettings(Message):
    """Settings of one response: `instructions` are asked after the queued texts."""

    instructions: str | None = None
    metadata: dict[str, str] | None = None


class ResponseCreate(Request):
    """Asks the model the queued texts now, interrupting any answer in progress."""

    type: Literal["response.create"]
    response: ResponseSettings = ResponseSettings()
    moss: MossItem | None = None


class ResponseCancel(Request):
    """Cancels the answer in progress."""

    type: Literal["response.cancel"]
    response_id: str | None = None


class AudioAppend(Request):
    """Refused: audio is not supported."""

    type: Literal["input_audio_buffer.append"]


class AudioCommit(Request):
    """Refused: audio is not supported."""

    type: Literal["input_audio_buffer.commit"]


class AudioClear(Request):
    """Refused: audio is not supported."""

    type: Literal["input_audio_buffer.clear"]


class OutputAudioClear(Request):
    """Refused: audio is not supported."""

    type: Literal["output_audio_buffer.clear"]


class MossFinish(Request):
    """Ends the input: queued frames are still processed and the answer completes, then `moss.end` follows."""

    type: Literal["moss.finish"]
    moss: MossItem | None = None


class MossSave(Request):
    """Saves the stream to the server's state folder; answered by `moss.saved`."""

    type: Literal["moss.save"]


ClientEvent = Annotated[
    SessionUpdate
    | ItemCreate
    | ItemRetrieve
    | ItemDelete
    | ItemTruncate
    | ResponseCreate
    | ResponseCancel
    | AudioAppend
    | AudioCommit
    | AudioClear
    | OutputAudioClear
    | MossFinish
    | MossSave,
    pydantic.Field(discriminator="type"),
]
_CLIENT_EVENT: pydantic.TypeAdapter[ClientEvent] = pydantic.TypeAdapter(ClientEvent)


def parse(text: str | bytes) -> ClientEvent:
    """Parses a client event.

    Raises:
      ProtocolError: the text is not JSON, the type is unknown, or a field is missing or invalid.
    """
    try:
        return _CLIENT_EVENT.validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        code = {"json_invalid": "invalid_json", "union_tag_invalid": "unknown_event"}.get(
            first["type"], "invalid_event"
        )
        # The path begins with the event type.
        param = ".".join(map(str, first["loc"][1:])) or None
        where = f"{param}: " if param else ""
        raise ProtocolError(f"{where}{first['msg']}"[:500], code=code, param=param) from None


def event_id_of(text: str | bytes) -> str | None:
    """The `event_id` of a client event that failed to parse; None if it has none."""
    try:
        event = json.loads(text)
        found = event.get("event_id") if isinstance(event, dict) else None
        # A lone surrogate cannot be encoded, so such an id cannot be echoed.
        return found if isinstance(found, str) and len(found) <= 512 and found.encode() else None
    except (ValueError, RecursionError):
        return None


# ---------------------------------------------------------------------------------------- server to client


class Resumed(Message):
    """State of a resumed session.

    Attributes:
      time: current stream time in seconds.
      replayed: number of events that are replayed next.
      missed: number of events after the client's last one that have left the replay buffer.
      saved: whether the stream resumes from its last save; anything later is lost.
      open: ids of the response in progress and of its item, if any.
    """

    time: float
    replayed: int
    missed: int
    saved: bool
    open: tuple[str, str] | None = None


class MossSession(Message):
    """Negotiated state of the extension.

    Attributes:
      version: extension version.
      clock: clock of all streams of the server.
      frames: "binary" if frames may be sent as binary messages and as items, "items" if as items only.
      token: secret that, with the session's id, resumes the session after a lost connection.
      grace_seconds: how long a session can be resumed after its connection is lost.
      sampling, memory, selection, limits: settings of the stream.
      correction: the words with which the model begins to retract what it was saying.
      image_size: side in pixels of the square to which frames are scaled.
      resumed: set on the first event after a resume.
    """

    version: int
    clock: Clock
    frames: Literal["binary", "items"]
    token: str
    grace_seconds: float
    sampling: dict[str, Any]
    memory: dict[str, Any]
    selection: dict[str, Any]
    limits: dict[str, Any]
    correction: str
    image_size: int
    resumed: Resumed | None = None


class SessionObject(Message):
    """Session settings in force."""

    type: Literal["realtime"] = "realtime"
    object: Literal["realtime.session"] = "realtime.session"
    id: str
    model: str
    instructions: str
    output_modalities: tuple[Literal["text"], ...] = ("text",)
    max_output_tokens: int | Literal["inf"]
    moss: MossSession | None = None


class Part(Message):
    """A content part of an item; images are not echoed."""

    type: Literal["input_text", "input_image", "output_text"]
    text: str | None = None


class ItemObject(Message):
    """A conversation item."""

    id: str
    object: Literal["realtime.item"] = "realtime.item"
    type: Literal["message"] = "message"
    status: Status
    role: Literal["user", "assistant", "system"]
    content: tuple[Part, ...] = ()


class Usage(Message):
    """Token usage: the context before the answer (texts, frames and earlier answers), and the answer.

    A frame counts as one token. Input tokens include those already evicted from the stream's memory.
    """

    total_tokens: int
    input_tokens: int
    output_tokens: int


class StatusError(Message):
    """Why a response failed."""

    type: str
    code: str


class StatusDetails(Message):
    """Why a response was not completed."""

    type: Literal["completed", "cancelled", "incomplete", "failed"]
    reason: Reason | None = None
    error: StatusError | None = None


class ResponseObject(Message):
    """A response."""

    id: str
    object: Literal["realtime.response"] = "realtime.response"
    status: ResponseStatus
    status_details: StatusDetails | None = None
    output: tuple[ItemObject, ...] = ()
    output_modalities: tuple[Literal["text"], ...] = ("text",)
    metadata: dict[str, str] | None = None
    usage: Usage | None = None


class ContentPart(Message):
    """The text of an answer."""

    type: Literal["text"] = "text"
    text: str


class FrameInfo(Message):
    """State of one frame.

    Attributes:
      index: frame number in the session, starting at 0.
      time: stream time in seconds at which it was taken.
      queued: frames in the queue now.
      fate: set once known: "seen" by the model; skipped because it looks like the previous frame ("still"),
        has similar features ("alike") or came too soon ("rate"); or "dropped" from a full queue.
    """

    index: int
    time: float
    queued: int
    fate: Fate | None = None


class MossFrames(Message):
    """Extension fields of an item with frames: the state of each; `frame` is the first."""

    frame: FrameInfo
    frames: tuple[FrameInfo, ...] | None = None


class MossResponse(Message):
    """Extension fields of a response: whether a client requested it, and the stream time of its start."""

    asked: bool
    time: float


class MossDelta(Message):
    """Extension fields of a text delta.

    Attributes:
      time: stream time in seconds at which it was said.
      takes_back: whether this text corrects what the response said from character `from` on.
    """

    time: float
    takes_back: bool | None = None
    start: Annotated[int | None, pydantic.Field(alias="from")] = None

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True, populate_by_name=True)


class MemoryItem(Message):
    """Memory bank entry for one moment.

    Attributes:
      time: stream time in seconds at which the frame was taken.
      detail: how much of it is kept: all vectors, about a quarter of them, a sixteenth, or one.
      vectors: number of vectors that it occupies.
      frames: number of frames that it represents.
    """

    time: float
    detail: Literal["whole", "quarter", "sixteenth", "one"]
    vectors: int
    frames: int = 1


class Event(Message):
    """Base of server events; event ids ascend within a session."""

    event_id: str = ""
    type: str


class SessionCreated(Event):
    """The connection is ready and a slot is reserved for its stream."""

    type: Literal["session.created"] = "session.created"
    session: SessionObject


class SessionUpdated(Event):
    """The settings in force from now on."""

    type: Literal["session.updated"] = "session.updated"
    session: SessionObject


class ItemAdded(Event):
    """An item was accepted, or an answer begins."""

    type: Literal["conversation.item.added"] = "conversation.item.added"
    previous_item_id: str | None = None
    item: ItemObject
    moss: MossFrames | None = None


class ItemDone(Event):
    """A frame was seen or skipped, a text was asked, or an answer is complete."""

    type: Literal["conversation.item.done"] = "conversation.item.done"
    previous_item_id: str | None = None
    item: ItemObject
    moss: MossFrames | None = None


class ItemRetrieved(Event):
    """The requested item."""

    type: Literal["conversation.item.retrieved"] = "conversation.item.retrieved"
    item: ItemObject


class ResponseCreated(Event):
    """The model begins to answer, or to speak unprompted."""

    type: Literal["response.created"] = "response.created"
    response: ResponseObject
    moss: MossResponse | None = None


class OutputItemAdded(Event):
    """An answer produces its first text."""

    type: Literal["response.output_item.added"] = "response.output_item.added"
    response_id: str
    output_index: int = 0
    item: ItemObject


class PartAdded(Event):
    """An answer produces its first text."""

    type: Literal["response.content_part.added"] = "response.content_part.added"
    response_id: str
    item_id: str
    output_index: int = 0
    content_index: int = 0
    part: ContentPart


class TextDelta(Event):
    """A piece of an answer."""

    type: Literal["response.output_text.delta"] = "response.output_text.delta"
    response_id: str
    item_id: str
    output_index: int = 0
    content_index: int = 0
    delta: str
    moss: MossDelta | None = None


class TextDone(Event):
    """The whole text of an answer."""

    type: Literal["response.output_text.done"] = "response.output_text.done"
    response_id: str
    item_id: str
    output_index: int = 0
    content_index: int = 0
    text: str


class PartDone(Event):
    """The whole text of an answer."""

    type: Literal["response.content_part.done"] = "response.content_part.done"
    response_id: str
    item_id: str
    output_index: int = 0
    content_index: int = 0
    part: ContentPart


class OutputItemDone(Event):
    """The complete item of an answer."""

    type: Literal["response.output_item.done"] = "response.output_item.done"
    response_id: str
    output_index: int = 0
    item: ItemObject


class ResponseDone(Event):
    """The response is complete; it has no output if the model answers a question with silence."""

    type: Literal["response.done"] = "response.done"
    response: ResponseObject


class ErrorDetails(Message):
    """Error details; `event_id` is that of the client's event."""

    type: ErrorType
    code: str
    message: str
    param: str | None = None
    event_id: str | None = None


class Error(Event):
    """A request was refused or something failed; the session continues unless stated otherwise."""

    type: Literal["error"] = "error"
    error: ErrorDetails


class SilenceEvent(Event):
    """The model stays silent until something happens; `time` is stream time in seconds."""

    type: Literal["moss.silence"] = "moss.silence"
    time: float


class CountersEvent(Event):
    """Stream statistics, sent at most once a second.

    Attributes:
      time: stream time in seconds.
      counters: totals, as in `Counters`.
      fps: recent rate of arriving frames, in frames per second.
      latency: recent seconds from a frame's arrival until the model has processed it; None without frames.
      queue: number of queued frames.
      text_tokens, text_capacity: text tokens in the context, and how many fit.
      memory: contents of the memory bank, oldest first; None if unknown.
    """

    type: Literal["moss.counters"] = "moss.counters"
    time: float
    counters: dict[str, int]
    fps: float
    latency: float | None = None
    queue: int
    text_tokens: int
    text_capacity: int
    memory: tuple[MemoryItem, ...] | None = None


class SavedEvent(Event):
    """The stream was saved and can be resumed from `time`, in seconds of stream time."""

    type: Literal["moss.saved"] = "moss.saved"
    time: float


class EndEvent(Event):
    """The stream has ended; the connection closes after this event.

    Attributes:
      time: stream time in seconds.
      reason: as in `End`, or "shutdown" if the server shuts down.
      counters, figures: as in `Counters` and `Figures`.
      saved: whether the session can be resumed from a file.
    """

    type: Literal["moss.end"] = "moss.end"
    time: float
    reason: EndReason | Literal["shutdown"]
    counters: dict[str, int] | None = None
    figures: dict[str, float | None] | None = None
    saved: bool = False


ServerEvent = Annotated[
    SessionCreated
    | SessionUpdated
    | ItemAdded
    | ItemDone
    | ItemRetrieved
    | ResponseCreated
    | OutputItemAdded
    | PartAdded
    | TextDelta
    | TextDone
    | PartDone
    | OutputItemDone
    | ResponseDone
    | Error
    | SilenceEvent
    | CountersEvent
    | SavedEvent
    | EndEvent,
    pydantic.Field(discriminator="type"),
]


_SERVER_EVENT: pydantic.TypeAdapter[ServerEvent] = pydantic.TypeAdapter(ServerEvent)


def parse_server_event(text: str | bytes) -> ServerEvent | None:
    """Parses a server event; returns None for an unknown type, as later versions may send.

    Raises:
      ValueError: the text is not a valid event.
    """
    try:
        return _SERVER_EVENT.validate_json(text)
    except pydantic.ValidationError as error:
        if error.errors()[0]["type"] == "union_tag_invalid":
            return None
        raise


def error_event(error: ProtocolError, event_id: str | None = None) -> Error:
    """Converts an error to an event.

    Args:
      event_id: id of the client's event.
    """
    return Error(
        error=ErrorDetails(
            type=error.type, code=error.code, message=error.message, param=error.param, event_id=event_id
        )
    )


def frame_time(message: bytes) -> tuple[float | None, bytes]:
    """Splits a binary message into the frame's time, None for now, and its encoded image.

    Raises:
      ProtocolError: the message is too short, or the time is negative or infinite.
    """
    if len(message) <= 8:
        raise ProtocolError(
            f"a binary frame is 8 bytes of time and an image; got {len(message)} bytes", code="invalid_frame"
        )
    (time,) = struct.unpack_from(">d", message)
    if math.isnan(time):
        return None, message[8:]
    if math.isinf(time) or time < 0:
        raise ProtocolError(
            f"the time of a frame must be seconds from 0 on, not {time}", code="invalid_frame"
        )
    return time, message[8:]
