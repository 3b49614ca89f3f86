"""Types of the Realtime protocol as it is spoken on `/v1/realtime`, and of its extension, `moss`.

The names are those of OpenAI's Realtime API (GA). Of what clients send, fields that have no meaning here,
such as those of audio and tools, are ignored; what the server does not do is refused by an `error` event.
"""

import json
import math
import struct
from typing import Annotated, Any, Literal

import pydantic

from moss_jax.config import Clock
from moss_jax.stream.events import EndReason

# Of the object `moss`.
VERSION = 1

Status = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "cancelled", "incomplete", "failed"]
Fate = Literal["seen", "still", "alike", "rate", "dropped"]
Reason = Literal["turn_detected", "client_cancelled", "max_output_tokens"]
ErrorType = Literal["invalid_request_error", "server_error"]
# Seconds of a stream.
Time = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


class ProtocolError(Exception):
    """What a client asked for and does not get; the session goes on.

    Attributes:
      code: for programs.
      param: the field that is at fault.
      type: whose fault it is.
    """

    def __init__(
        self, message: str, *, code: str, param: str | None = None, type: ErrorType = "invalid_request_error"
    ):
        super().__init__(message)
        self.message, self.code, self.param = message, code, param
        self.type: ErrorType = type


class Message(pydantic.BaseModel):
    """Base of all types; unknown fields are ignored."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True)


class Strict(Message):
    """Base of the extension's types that a client sends; unknown fields are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


# ------------------------------------------------------------------------------------ what clients send


class SamplingSettings(Strict):
    """How tokens are sampled; what is left out is the engine's own."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None


class MemorySettings(Strict):
    """What the stream keeps when it is out of room; what is left out is the engine's own."""

    policy: str | None = None
    low_water: float | None = None
    pyramid_shares: tuple[float, ...] | None = None
    text: Literal["full", "window"] | None = None
    text_recent: float | None = None
    text_assistant: float | None = None
    bank_capacity: int | None = None
    text_capacity: int | None = None


class SelectionSettings(Strict):
    """Which frames are shown to the model; see `SelectionConfig`."""

    enabled: bool | None = None
    min_change: float | None = None
    max_gap: float | None = None
    min_distance: float | None = None
    fps: float | None = None
    max_fps: float | None = None


class LimitSettings(Strict):
    """Bounds of the stream; see `SessionConfig`."""

    tokens_per_second: int | None = None
    tail_seconds: float | None = None
    max_tokens_per_second: float | None = None
    max_fps: float | None = None


class MossSettings(Strict):
    """Negotiates the extension; the settings are fixed once the stream is open.

    Attributes:
      version: of the extension.
      frames: "binary" where frames come as binary messages as well: a float64 in network byte order, the
        frame's time in seconds (NaN for now), then a JPEG, PNG or WebP file.
      resume, token, after: the session that this connection goes on with, its token, and the id of the last
        event that the client has had.
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
    """Settings of a session; what is left out stays."""

    type: Literal["realtime"] = "realtime"
    instructions: str | None = None
    max_output_tokens: Annotated[int, pydantic.Field(ge=1)] | Literal["inf"] | None = None
    moss: MossSettings | None = None


class Content(Message):
    """A part of an item."""

    type: str
    text: str | None = None
    image_url: str | None = None


class Item(Message):
    """An item of the conversation, as a client sends it."""

    id: Annotated[str, pydantic.Field(min_length=1, max_length=64)] | None = None
    type: str
    role: str | None = None
    content: tuple[Content, ...] = ()


class MossItem(Strict):
    """Of an item: `time`, in seconds of the stream, at which its frames were taken or its text was said."""

    time: Time | None = None


class Request(Message):
    """Base of what clients send; `event_id` comes back with an error."""

    event_id: Annotated[str, pydantic.Field(max_length=512)] | None = None


class SessionUpdate(Request):
    """Changes settings; answered by `session.updated`, which says what is in force."""

    type: Literal["session.update"]
    session: SessionSettings


class ItemCreate(Request):
    """Shows the model a frame (`input_image`), or holds a text (`input_text`) until `response.create`."""

    type: Literal["conversation.item.create"]
    item: Item
    moss: MossItem | None = None


class ItemRetrieve(Request):
    """Asks for an item; answered by `conversation.item.retrieved`."""

    type: Literal["conversation.item.retrieve"]
    item_id: str


class ItemDelete(Request):
    """Refused: what a stream has seen stays."""

    type: Literal["conversation.item.delete"]


class ItemTruncate(Request):
    """Refused: what a stream has said stays."""

    type: Literal["conversation.item.truncate"]


class ResponseSettings(Message):
    """Settings of one response: `instructions` are asked after the texts that are held."""

    instructions: str | None = None
    metadata: dict[str, str] | None = None


class ResponseCreate(Request):
    """Asks the model the texts that are held, now; cuts its answer, if any."""

    type: Literal["response.create"]
    response: ResponseSettings = ResponseSettings()
    moss: MossItem | None = None


class ResponseCancel(Request):
    """Cuts the answer in progress."""

    type: Literal["response.cancel"]
    response_id: str | None = None


class AudioAppend(Request):
    """Refused: there is no audio."""

    type: Literal["input_audio_buffer.append"]


class AudioCommit(Request):
    """Refused: there is no audio."""

    type: Literal["input_audio_buffer.commit"]


class AudioClear(Request):
    """Refused: there is no audio."""

    type: Literal["input_audio_buffer.clear"]


class OutputAudioClear(Request):
    """Refused: there is no audio."""

    type: Literal["output_audio_buffer.clear"]


class MossFinish(Request):
    """The input is over: what waits is still seen, the answer is finished, then comes `moss.end`."""

    type: Literal["moss.finish"]
    moss: MossItem | None = None


class MossSave(Request):
    """Saves the stream in the server's folder; answered by `moss.saved`."""

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
    """Parses an event of a client.

    Raises:
      ProtocolError: it is no JSON, of no known type, or a field is missing or wrong.
    """
    try:
        return _CLIENT_EVENT.validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        code = {"json_invalid": "invalid_json", "union_tag_invalid": "unknown_event"}.get(
            first["type"], "invalid_event"
        )
        # The path begins with the type of the event.
        param = ".".join(map(str, first["loc"][1:])) or None
        where = f"{param}: " if param else ""
        raise ProtocolError(f"{where}{first['msg']}"[:500], code=code, param=param) from None


def event_id_of(text: str | bytes) -> str | None:
    """The id that a client gave an event which cannot be parsed; None if it has none."""
    try:
        event = json.loads(text)
        found = event.get("event_id") if isinstance(event, dict) else None
        # It may hold half of a surrogate pair, which cannot be encoded, and so not be sent back.
        return found if isinstance(found, str) and len(found) <= 512 and found.encode() else None
    except (ValueError, RecursionError):
        return None


# ----------------------------------------------------------------------------------- what the server sends


class Resumed(Message):
    """How a session goes on.

    Attributes:
      time: seconds of the stream now.
      replayed: events that follow again.
      missed: events after the client's last that are gone.
      saved: whether the stream goes on as of its last save; what came later is lost.
      open: the ids of the response in progress and of its item, if there is one.
    """

    time: float
    replayed: int
    missed: int
    saved: bool
    open: tuple[str, str] | None = None


class MossSession(Message):
    """The extension as it is in force.

    Attributes:
      version: of the extension.
      clock: of all streams of the server.
      frames: how frames may come: "binary" as well as "items", or as items alone.
      token: with the session's id, resumes the session after the connection was lost; keep it secret.
      grace_seconds: how long a lost connection may be resumed.
      sampling, memory, selection, limits: of the stream.
      correction: the words by which the model begins to take back what it was saying.
      image_size: side in pixels of the square that frames are scaled to fit.
      resumed: on the first event after a connection was resumed.
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
    """A session as it is in force."""

    type: Literal["realtime"] = "realtime"
    object: Literal["realtime.session"] = "realtime.session"
    id: str
    model: str
    instructions: str
    output_modalities: tuple[Literal["text"], ...] = ("text",)
    max_output_tokens: int | Literal["inf"]
    moss: MossSession | None = None


class Part(Message):
    """A part of an item; images are not sent back."""

    type: Literal["input_text", "input_image", "output_text"]
    text: str | None = None


class ItemObject(Message):
    """An item of the conversation."""

    id: str
    object: Literal["realtime.item"] = "realtime.item"
    type: Literal["message"] = "message"
    status: Status
    role: Literal["user", "assistant", "system"]
    content: tuple[Part, ...] = ()


class Usage(Message):
    """Tokens: those of texts, frames and answers before the answer, and those of the answer.

    A frame counts as one token. Those before count also where the stream has forgotten them.
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
    """A frame of the stream.

    Attributes:
      index: its number in the session, from 0 on.
      time: seconds of the stream at which it was taken.
      queued: frames that wait to be seen now.
      fate: once it is known: "seen" by the model; not shown to it since it looks like the one before
        ("still"), has features like the one before ("alike") or came too soon ("rate"); "dropped" out of a
        full queue.
    """

    index: int
    time: float
    queued: int
    fate: Fate | None = None


class MossFrames(Message):
    """Of an item with frames: what became of each; `frame` is the first."""

    frame: FrameInfo
    frames: tuple[FrameInfo, ...] | None = None


class MossResponse(Message):
    """Of a response: whether a client asked for it, and when it begins, in seconds of the stream."""

    asked: bool
    time: float


class MossDelta(Message):
    """Of a piece of text.

    Attributes:
      time: seconds of the stream at which it was said.
      takes_back: this text corrects what the response has said from the character number `from` on.
    """

    time: float
    takes_back: bool | None = None
    start: Annotated[int | None, pydantic.Field(alias="from")] = None

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True, populate_by_name=True)


class MemoryItem(Message):
    """What the memory bank holds of one moment.

    Attributes:
      time: seconds of the stream at which the frame was taken.
      detail: how much of it is left: all vectors, about a quarter of them, a sixteenth, or one.
      vectors: that it takes.
      frames: that it stands for.
    """

    time: float
    detail: Literal["whole", "quarter", "sixteenth", "one"]
    vectors: int
    frames: int = 1


class Event(Message):
    """Base of what the server sends; ids of events ascend within a session."""

    event_id: str = ""
    type: str


class SessionCreated(Event):
    """The connection is ready, and a stream is reserved for it."""

    type: Literal["session.created"] = "session.created"
    session: SessionObject


class SessionUpdated(Event):
    """What is in force from now on."""

    type: Literal["session.updated"] = "session.updated"
    session: SessionObject


class ItemAdded(Event):
    """An item was accepted, or an answer begins."""

    type: Literal["conversation.item.added"] = "conversation.item.added"
    previous_item_id: str | None = None
    item: ItemObject
    moss: MossFrames | None = None


class ItemDone(Event):
    """A frame was seen or passed over, a text was asked, an answer is over."""

    type: Literal["conversation.item.done"] = "conversation.item.done"
    previous_item_id: str | None = None
    item: ItemObject
    moss: MossFrames | None = None


class ItemRetrieved(Event):
    """An item that was asked for."""

    type: Literal["conversation.item.retrieved"] = "conversation.item.retrieved"
    item: ItemObject


class ResponseCreated(Event):
    """The model begins to answer, or to speak unasked."""

    type: Literal["response.created"] = "response.created"
    response: ResponseObject
    moss: MossResponse | None = None


class OutputItemAdded(Event):
    """The first text of an answer comes."""

    type: Literal["response.output_item.added"] = "response.output_item.added"
    response_id: str
    output_index: int = 0
    item: ItemObject


class PartAdded(Event):
    """The first text of an answer comes."""

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
    """The whole answer."""

    type: Literal["response.output_item.done"] = "response.output_item.done"
    response_id: str
    output_index: int = 0
    item: ItemObject


class ResponseDone(Event):
    """The answer is over; a question that the model answers with silence has no output."""

    type: Literal["response.done"] = "response.done"
    response: ResponseObject


class ErrorDetails(Message):
    """What went wrong; `event_id` is that of the client's event."""

    type: ErrorType
    code: str
    message: str
    param: str | None = None
    event_id: str | None = None


class Error(Event):
    """Something was refused, or went wrong; where nothing else is said, the session goes on."""

    type: Literal["error"] = "error"
    error: ErrorDetails


class SilenceEvent(Event):
    """The model has nothing (more) to say until something happens; `time` is in seconds of the stream."""

    type: Literal["moss.silence"] = "moss.silence"
    time: float


class CountersEvent(Event):
    """How the stream goes; at most once a second.

    Attributes:
      time: seconds of the stream.
      counters: its totals, as in `Counters`.
      fps: frames a second that came, lately.
      latency: seconds from the arrival of a frame until the model had seen it, lately; None without any.
      queue: frames that wait.
      text_tokens, text_capacity: in the context, and room for.
      memory: what the bank holds, the oldest first; None where it is not known.
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
    """The stream was saved, and can go on from `time`, in seconds of the stream."""

    type: Literal["moss.saved"] = "moss.saved"
    time: float


class EndEvent(Event):
    """The stream is over; the connection is closed after it.

    Attributes:
      time: seconds of the stream.
      reason: as in `End`, or "shutdown" of the server.
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
    """Parses an event of a server; None if its type is of a later version.

    Raises:
      ValueError: it is no such event.
    """
    try:
        return _SERVER_EVENT.validate_json(text)
    except pydantic.ValidationError as error:
        if error.errors()[0]["type"] == "union_tag_invalid":
            return None
        raise


def error_event(error: ProtocolError, event_id: str | None = None) -> Error:
    """The event of an error.

    Args:
      event_id: of the client's event.
    """
    return Error(
        error=ErrorDetails(
            type=error.type, code=error.code, message=error.message, param=error.param, event_id=event_id
        )
    )


def frame_time(message: bytes) -> tuple[float | None, bytes]:
    """Cuts a binary message into the time of its frame, None for now, and the image.

    Raises:
      ProtocolError: it is too short, or the time is no number of seconds from 0 on.
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
