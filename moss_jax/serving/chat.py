"""OpenAI's chat completions, models and files, over the streams of a hub."""

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import secrets
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message as AsgiMessage
from starlette.types import Receive, Scope, Send

from moss_jax.api import frames_that_fit
from moss_jax.config import ChatConfig, ConfigError, FrameSampling, TokenSampling
from moss_jax.serving.files import FileStore, StoredFile, StoreFull
from moss_jax.serving.hub import Hub, Reservation, events_of
from moss_jax.serving.media import (
    MediaError,
    MediaLimits,
    decode_clip,
    decode_image,
    is_image,
    parse_data_url,
)
from moss_jax.serving.sources import fetch, local_path
from moss_jax.stream import DialogueTurn, End, Engine, FrameSeen, Refused, SessionError, Stream, Text
from moss_jax.stream.completion import Completion
from moss_jax.video import Frame, fit_frame

_logger = logging.getLogger(__name__)

# Seconds between two looks for a free stream.
_POLL = 0.02
# Seconds after which a client that was turned away may ask again.
_RETRY_AFTER = 2
_PURPOSES = ("user_data", "vision")
# Bytes of a multipart form around a file.
_FORM_BYTES = 2**20
# Uploads at once, each of which takes room on the disk before it is known whether there is some.
_UPLOADS = 8
# Bytes of all requests that are being prepared, as a multiple of those that one may have.
_BODIES = 4
# Of the longest tokens, such as runs of spaces.
_CHARACTERS_PER_TOKEN = 128

type FinishReason = Literal["stop", "length"]


class ApiError(Exception):
    """A request that is not answered, as OpenAI's API tells it.

    Attributes:
      status: of HTTP.
      body: JSON-ready.
      headers: beside the usual ones.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        kind = "rate_limit_error" if status == 429 else kind
        self.status, self.code = status, code
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}


# ------------------------------------------------------------------------------------- requests


class _Object(pydantic.BaseModel):
    """Base of what clients send; unknown fields are ignored, as OpenAI's own servers ignore new ones."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True)


class TextPart(_Object):
    """A text."""

    type: Literal["text"]
    text: str


class Url(_Object):
    """A data URL, a `file://` or `https://` URL that is allowed, or the id of an uploaded file."""

    url: str


class ImagePart(_Object):
    """An image."""

    type: Literal["image_url"]
    image_url: Url | str


class VideoPart(_Object):
    """A video."""

    type: Literal["video_url"]
    video_url: Url | str


class FileReference(_Object):
    """An uploaded file, or one within the request."""

    file_id: str | None = None
    file_data: str | None = None


class FilePart(_Object):
    """An image or a video."""

    type: Literal["file"]
    file: FileReference


type Part = Annotated[TextPart | ImagePart | VideoPart | FilePart, pydantic.Field(discriminator="type")]


class Message(_Object):
    """A turn of the dialogue."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None


class StreamOptions(_Object):
    """Options of a streamed answer."""

    include_usage: bool = False


class VideoOptions(_Object):
    """How videos are sampled; a name that vLLM's clients use."""

    num_frames: int | None = pydantic.Field(None, ge=1)
    fps: float | None = pydantic.Field(None, gt=0, allow_inf_nan=False)


class MediaOptions(_Object):
    """How media are read."""

    video: VideoOptions = pydantic.Field(default_factory=lambda: VideoOptions.model_validate({}))


class ChatRequest(_Object):
    """The body of `POST /v1/chat/completions`."""

    model: str
    messages: list[Message] = pydantic.Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = pydantic.Field(None, ge=1)
    max_completion_tokens: int | None = pydantic.Field(None, ge=1)
    temperature: float | None = pydantic.Field(None, ge=0, le=2)
    top_p: float | None = pydantic.Field(None, gt=0, le=1)
    top_k: int | None = pydantic.Field(None, ge=0)
    repetition_penalty: float | None = pydantic.Field(None, ge=0.1, le=10)
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    media_io_kwargs: MediaOptions = MediaOptions()
    # What would change the answer and is not implemented.
    tools: list | None = None
    functions: list | None = None
    logprobs: bool | None = None
    logit_bias: dict | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_format: dict | None = None
    modalities: list[str] | None = None

    @property
    def stops(self) -> list[str]:
        """Texts before which the answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def check(self) -> None:
        """Refuses what is not implemented.

        Raises:
          ApiError: naming the field.
        """
        if self.n not in (None, 1):
            raise ApiError("n must be 1: a request has one answer", param="n", code="unsupported_value")
        if not all(self.stops) or len(self.stops) > 16:
            raise ApiError("stop is up to 16 texts that are not empty", param="stop", code="invalid_value")
        kind = (self.response_format or {}).get("type", "text")
        given = {
            "tools": self.tools,
            "functions": self.functions,
            "logprobs": self.logprobs,
            "logit_bias": self.logit_bias,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "response_format": None if kind == "text" else kind,
            "modalities": None if self.modalities in (None, ["text"]) else self.modalities,
        }
        for name, value in given.items():
            if value:
                raise ApiError(f"{name} is not supported", param=name, code="unsupported_parameter")


@dataclasses.dataclass(frozen=True)
class Medium:
    """An image or a video of a request: its content or its file.

    Attributes:
      param: where it stands in the request.
      is_temporary: whether the file goes with the request.
    """

    param: str
    content: bytes | None = None
    path: Path | None = None
    is_temporary: bool = False

    def head(self) -> bytes:
        """Its first bytes."""
        if self.content is not None:
            return self.content[:16]
        assert self.path is not None
        with open(self.path, "rb") as file:
            return file.read(16)


class Stops:
    """Finds the texts that end an answer, also where they come in pieces.

    Attributes:
      found: whether one has come.
    """

    def __init__(self, stops: list[str]):
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Takes a piece of the answer; what of it, and of those before, may be told."""
        if self.found:
            return ""
        self._held += text
        places = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        # The end may be the beginning of one.
        most = max(map(len, self._stops), default=1) - 1
        for length in range(min(most, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return self._release(len(self._held) - length)
        return self._release(len(self._held))

    def flush(self) -> str:
        """Flushes the text that was held back for a stop sequence, at the end of the answer."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, length: int) -> str:
        told, self._held = self._held[:length], self._held[length:]
        return told


# ------------------------------------------------------------------------------------ the answer


class Answer:
    """The answer of one stream, and what is told of it.

    Attributes:
      id: of the completion.
      created: seconds since the epoch.
      prompt_tokens: of the dialogue, one for each frame among them.
      completion_tokens: of the answer, known at its end.
      finish_reason: known at its end.
    """

    def __init__(self, hub: Hub, stream: Stream, prompt_tokens: int, stops: list[str]):
        self._hub, self._stream, self._stops = hub, stream, Stops(stops)
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self.finish_reason: FinishReason = "stop"

    async def texts(self) -> AsyncIterator[str]:
        """The pieces of the answer.

        Raises:
          ApiError: the stream failed.
        """
        counters, started, is_first = self._hub.counters, time.monotonic(), True
        try:
            async for event in events_of(self._stream):
                if isinstance(event, FrameSeen):
                    counters.frames_by_fate["seen"] += 1
                elif isinstance(event, Text) and not self._stops.found:
                    if is_first:
                        counters.observe("ttft", time.monotonic() - started)
                        is_first = False
                    if text := self._stops.feed(event.text):
                        yield text
                    if self._stops.found:
                        self._stream.stop()
                elif isinstance(event, End):
                    if text := self._stops.flush():
                        yield text
                    self._end(event)
        finally:
            # Also if nobody wants the rest.
            self._stream.stop()

    def _end(self, end: End) -> None:
        counters = self._hub.counters
        counters.streams_by_end[end.reason] += 1
        counters.tokens += end.counters.tokens
        self.completion_tokens = end.counters.tokens
        if end.reason in ("token_limit", "text_capacity", "bank_capacity"):
            self.finish_reason = "length"
        elif end.reason == "stopped" and not self._stops.found:
            raise ApiError("the server ends", status=503, code="server_ends", retry_after=_RETRY_AFTER)
        elif end.reason not in ("finished", "stopped"):
            raise ApiError("an error in the server ended the answer", status=500, code=end.reason)
        if self._stops.found:
            self.finish_reason = "stop"

    def stop(self) -> None:
        """Ends the answer and frees its slot."""
        self._stream.stop()

    @property
    def usage(self) -> dict[str, int]:
        """Tokens, once the answer is over."""
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer in one object."""
        text = "".join([text async for text in self.texts()])
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish_reason}
        return self._object("chat.completion", [choice]) | {"usage": self.usage}

    async def chunks(self, *, include_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        usage = {"usage": None} if include_usage else {}

        def chunk(delta: dict[str, str], reason: FinishReason | None = None) -> str:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            return _sse(self._object("chat.completion.chunk", [choice]) | usage)

        try:
            yield chunk({"role": "assistant", "content": ""})
            async for text in self.texts():
                yield chunk({"content": text})
            yield chunk({}, self.finish_reason)
            if include_usage:
                yield _sse(self._object("chat.completion.chunk", []) | {"usage": self.usage})
        except ApiError as error:
            self._hub.counters.errors_by_code[error.code or "unknown"] += 1
            yield _sse(error.body)
        yield "data: [DONE]\n\n"

    def _object(self, kind: str, choices: list[dict]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self._hub.model,
            "choices": choices,
            "system_fingerprint": None,
        }


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


class AnswerStream(StreamingResponse):
    """An answer as server-sent events; it ends with its connection."""

    def __init__(self, answer: Answer, *, include_usage: bool):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        chunks = answer.chunks(include_usage=include_usage)
        super().__init__(chunks, headers=headers, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self._answer.stop()


# -------------------------------------------------------------------------------------- the API


class Bodies:
    """The bytes of all requests that are being prepared, which are bounded.

    Args:
      most: of one request.
    """

    def __init__(self, most: int):
        self._most, self._used = most, 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request; its bytes count until the context is left.

        Raises:
          ApiError: it is larger than it may be, or all together are.
        """
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                self._used += len(chunk)
                if len(body) > self._most:
                    raise _too_large(self._most)
                if self._used > _BODIES * self._most:
                    raise _busy("too many large requests at once", status=429, code="queue_full")
            yield bytes(body)
        finally:
            self._used -= len(body)


class Chat:
    """The endpoints.

    Args:
      hub: whose streams answer.
      config: limits.
      sampling: of videos.
    """

    def __init__(self, hub: Hub, config: ChatConfig, sampling: FrameSampling):
        self._hub, self._config, self._sampling = hub, config, sampling
        self._limits = MediaLimits(
            max_bytes=config.max_image_bytes,
            max_pixels=hub.config.max_image_pixels,
            max_seconds=config.max_video_seconds,
            decode_seconds=config.decode_seconds,
        )
        self.files = FileStore(
            max_bytes=config.file_bytes, max_files=config.files, keep_seconds=config.keep_seconds
        )
        self._decoders = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="clips")
        self._started = int(time.time())
        self._bodies = Bodies(config.max_body_bytes)
        # Few have their media decoded at once, since frames take memory until there is a free stream.
        self._places, self._waiting = asyncio.Semaphore(2 * config.decode_threads), 0
        self._turn = asyncio.Lock()
        # Slots that are reserved for completions, until their streams are open.
        self._reserved = 0
        self._uploads = 0

    def routes(self) -> list[Route]:
        """All of them."""
        return [
            Route("/v1/chat/completions", self._guarded(self.complete), methods=["POST"]),
            Route("/v1/models", self._guarded(self.list_models), methods=["GET"]),
            Route("/v1/models/{model:path}", self._guarded(self.get_model), methods=["GET"]),
            Route("/v1/files", self._guarded(self.upload), methods=["POST"]),
            Route("/v1/files", self._guarded(self.list_files), methods=["GET"]),
            Route("/v1/files/{file}", self._guarded(self.get_file), methods=["GET"]),
            Route("/v1/files/{file}", self._guarded(self.delete_file), methods=["DELETE"]),
            Route("/v1/files/{file}/content", self._guarded(self.get_content), methods=["GET"]),
        ]

    def _guarded(
        self, endpoint: Callable[[Request], Coroutine[Any, Any, Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint whose errors are told in OpenAI's form, and which ends with its connection."""

        @functools.wraps(endpoint)
        async def guarded(request: Request) -> Response:
            try:
                return await endpoint(request)
            except (ApiError, HTTPException) as error:
                if isinstance(error, HTTPException):
                    # Of a form that is not valid, or a body that the server's own limits refuse.
                    error = ApiError(error.detail, status=error.status_code, code="invalid_body")
                self._hub.counters.errors_by_code[error.code or "invalid_request"] += 1
                return JSONResponse(error.body, status_code=error.status, headers=error.headers)
            except ClientDisconnect:
                # Nobody is told.
                return Response(status_code=499)

        return guarded

    # ------------------------------------------------------------------------- completions

    async def complete(self, request: Request) -> Response:
        """Answers a dialogue."""
        async with self._bodies.read(request) as body:
            parsed = parse_request(body)
            if parsed.model != self._hub.model:
                raise ApiError(
                    f"there is no model {parsed.model[:64]!r}; it is {self._hub.model!r}",
                    status=404,
                    code="model_not_found",
                    param="model",
                )
            parsed.check()
            answer = await while_connected(request, self._begin(parsed))
        if parsed.stream:
            options = parsed.stream_options or StreamOptions()
            return AnswerStream(answer, include_usage=options.include_usage)
        return JSONResponse(await while_connected(request, answer.whole()))

    async def _begin(self, request: ChatRequest) -> Answer:
        """Waits in line, decodes the media of a request and opens its stream, once there is a free slot."""
        sampling = self._token_sampling(request)
        # Before so long a text is tokenized.
        most = self._hub.scheduler.engine.config.text_capacity * _CHARACTERS_PER_TOKEN
        if (length := sum(map(text_length, request.messages))) > most:
            raise ApiError(
                f"the messages have {length} characters, more than the model has room for",
                code="context_length_exceeded",
                param="messages",
            )
        async with self._place():
            turns = await self._turns(request)
            return await self._open(request, turns, sampling, await self._reserve())

    async def _open(
        self,
        request: ChatRequest,
        turns: list[DialogueTurn],
        sampling: TokenSampling | None,
        reservation: Reservation,
    ) -> Answer:
        """Opens a stream in a reserved slot."""
        limit = request.max_completion_tokens or request.max_tokens or self._config.max_tokens
        # In a thread, since a long text takes a while to tokenize.
        opening = asyncio.ensure_future(
            asyncio.to_thread(self._hub.scheduler.complete, turns, max_tokens=limit, sampling=sampling)
        )
        opening.add_done_callback(lambda _: self._release(reservation))
        try:
            stream = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_stop_opened)
            raise
        except Refused as error:
            raise _busy(str(error)) from None
        except (SessionError, ConfigError) as error:
            too_long = "capacity" in str(error) or "room" in str(error)
            code = "context_length_exceeded" if too_long else "invalid_value"
            raise ApiError(str(error), code=code, param="messages") from None
        counters = self._hub.counters
        counters.prompts += 1
        counters.responses += 1
        frames = sum(isinstance(part, Frame) for turn in turns for part in turn.content)
        counters.frames_by_fate["received"] += frames
        assert isinstance(stream.conversation, Completion)
        return Answer(self._hub, stream, stream.conversation.prompt_tokens, request.stops)

    def _token_sampling(self, request: ChatRequest) -> TokenSampling | None:
        """How tokens are sampled; None for the engine's own way."""
        engine = self._hub.scheduler.engine
        own = engine.sampling if isinstance(engine, Engine) else TokenSampling()
        names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
        given = {name: value for name in names if (value := getattr(request, name)) is not None}
        # In single precision, lower ones would be 0, and 0 of a share would be no token.
        if 0 < given.get("temperature", 0) < 1e-4:
            given["temperature"] = 0.0
        if "top_p" in given:
            given["top_p"] = max(given["top_p"], 1e-4)
        if request.seed is None and request.temperature:
            given["seed"] = secrets.randbelow(2**31)
        try:
            sampling = dataclasses.replace(own, **given)
        except ConfigError as error:
            raise ApiError(str(error), code="invalid_value") from None
        return None if sampling == own else sampling

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """Waits in line until the media of a request may be decoded.

        Raises:
          ApiError: too many wait, it takes too long, or the server is not ready.
        """
        if not self._hub.is_ready:
            raise _busy("the server is not ready", code="not_ready")
        if self._places.locked() and self._waiting >= self._config.queue:
            raise _busy("too many requests wait for a free stream", status=429, code="queue_full")
        self._waiting += 1
        try:
            async with asyncio.timeout(self._config.queue_seconds):
                await self._places.acquire()
        except TimeoutError:
            raise _busy("no stream became free in time") from None
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._places.release()

    async def _reserve(self) -> Reservation:
        """Waits for a free slot.

        Raises:
          ApiError: it takes too long, or the server is not ready.
        """
        try:
            async with asyncio.timeout(self._config.queue_seconds), self._turn:
                while True:
                    if self._may_begin():
                        with contextlib.suppress(Refused):
                            reservation = self._hub.reserve()
                            self._reserved += 1
                            return reservation
                    if not self._hub.is_ready:
                        raise _busy("the server ends", code="server_ends")
                    await asyncio.sleep(_POLL)
        except TimeoutError:
            raise _busy("no stream became free in time") from None

    def _release(self, reservation: Reservation) -> None:
        self._reserved -= 1
        reservation.release()

    def _may_begin(self) -> bool:
        """Whether there may be another completion."""
        if not self._config.max_streams:
            return True
        streams = self._hub.scheduler.streams
        under_way = sum(isinstance(stream.conversation, Completion) for stream in streams)
        return self._reserved + under_way < self._config.max_streams

    # ------------------------------------------------------------------------------- media

    async def _turns(self, request: ChatRequest) -> list[DialogueTurn]:
        """The turns of a dialogue with the frames of its media."""
        media: list[Medium] = []
        try:
            for number, message in enumerate(request.messages):
                for place, part in enumerate(message.content if isinstance(message.content, list) else ()):
                    if not isinstance(part, TextPart):
                        param = f"messages.{number}.content.{place}"
                        if message.role != "user":
                            raise ApiError("only the user shows images and videos", param=param)
                        if len(media) == self._config.max_frames:
                            raise ApiError(
                                f"a request has at most {self._config.max_frames} images", param=param
                            )
                        media.append(await self._medium(part, param))
            frames = await self._decode(media, request.media_io_kwargs.video)
        finally:
            for medium in media:
                if medium.is_temporary and medium.path:
                    medium.path.unlink(missing_ok=True)
        clips = iter(frames)
        turns = []
        for message in request.messages:
            content: list[str | Frame] = []
            parts = message.content if isinstance(message.content, list) else [message.content or ""]
            for part in parts:
                text = part.text if isinstance(part, TextPart) else part if isinstance(part, str) else None
                if text is None:
                    content += next(clips)
                elif content and isinstance(content[-1], str):
                    content[-1] += f"\n{text}"
                else:
                    content.append(text)
            turns.append(DialogueTurn("system" if message.role == "developer" else message.role, content))
        return turns

    async def _medium(self, part: ImagePart | VideoPart | FilePart, param: str) -> Medium:
        """Finds the content of a part."""
        limit = self._config.max_image_bytes if isinstance(part, ImagePart) else self._config.max_video_bytes
        try:
            if isinstance(part, FilePart):
                if (part.file.file_id is None) == (part.file.file_data is None):
                    raise MediaError("a file has either a file_id or file_data")
                url = part.file.file_id or part.file.file_data or ""
            else:
                given = part.image_url if isinstance(part, ImagePart) else part.video_url
                url = given if isinstance(given, str) else given.url
            scheme = url[:8].partition(":")[0].lower()
            if scheme == "data":
                content = (await asyncio.to_thread(parse_data_url, url, max_bytes=limit))[1]
            elif scheme == "file":
                path = await asyncio.to_thread(local_path, url, self._config.file_roots)
                return Medium(param, path=path)
            elif scheme in ("http", "https"):
                load = functools.partial(
                    fetch,
                    url,
                    hosts=self._config.fetch_hosts,
                    max_bytes=limit,
                    seconds=self._config.fetch_seconds,
                )
                content = await asyncio.to_thread(load)
            elif url.startswith("file-"):
                stored = self._find(url)
                return Medium(param, path=stored.path)
            else:
                raise MediaError(
                    "a URL is a data: URL, one that this server allows, or an uploaded file's id"
                )
        except MediaError as error:
            raise ApiError(str(error), code="invalid_media", param=param) from None
        if is_image(content[:16]):
            return Medium(param, content=content)
        # Videos are read from a file.
        path = self.files.new_path()
        medium = Medium(param, path=path, is_temporary=True)
        try:
            await asyncio.to_thread(path.write_bytes, content)
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise ApiError("the disk is full", status=507, code="storage_full") from None
            raise
        return medium

    def _clip_sampling(self, options: VideoOptions, images: int, videos: int) -> FrameSampling:
        """How each of some videos is sampled, so that there is room for all media of a request."""
        own, most = (
            frames_that_fit(self._sampling, self._hub.scheduler.engine.config),
            self._config.max_frames,
        )
        share = max(1, (min(most, own.max_frames or most) - images) // max(1, videos))
        return FrameSampling(
            fps=options.fps or own.fps,
            min_frames=min(share, options.num_frames or own.min_frames),
            max_frames=min(share, options.num_frames or share),
        )

    async def _decode(self, media: list[Medium], options: VideoOptions) -> list[list[Frame]]:
        """Decodes all media in threads; the frames of each."""
        stopped = threading.Event()
        loop = asyncio.get_running_loop()
        pending: list[asyncio.Future[list[Frame]]] = []
        try:
            heads = await asyncio.gather(*(asyncio.to_thread(medium.head) for medium in media))
        except OSError:
            raise ApiError("a file is gone or cannot be read", code="invalid_media") from None
        images = sum(map(is_image, heads))
        sampling = self._clip_sampling(options, images, len(media) - images)

        def on_frame() -> None:
            if stopped.is_set() or self._hub.is_closing:
                raise MediaError("the request is over")

        def decode(medium: Medium, head: bytes) -> list[Frame]:
            on_frame()
            size = self._hub.image_size
            if is_image(head):
                return [Frame(fit_frame(self._image(medium), size), 0.0)]
            assert medium.path is not None
            if medium.path.stat().st_size > self._config.max_video_bytes:
                raise MediaError(f"the video has more than {self._config.max_video_bytes} bytes")
            return decode_clip(medium.path, sampling, size, limits=self._limits, on_frame=on_frame)

        try:
            for medium, head in zip(media, heads, strict=True):
                pending.append(loop.run_in_executor(self._decoders, decode, medium, head))
            frames = []
            for medium, future in zip(media, pending, strict=True):
                try:
                    frames.append(await future)
                except (MediaError, OSError) as error:
                    message = str(error) if isinstance(error, MediaError) else "the file cannot be read"
                    raise ApiError(message, code="invalid_media", param=medium.param) from None
            return frames
        finally:
            stopped.set()
            for future in pending:
                future.cancel()
            # The threads may still read files that are about to go.
            await asyncio.gather(*pending, return_exceptions=True)

    def _image(self, medium: Medium) -> np.ndarray:
        content = medium.content
        if content is None:
            assert medium.path is not None
            if medium.path.stat().st_size > self._limits.max_bytes:
                raise MediaError(f"the image has more than {self._limits.max_bytes} bytes")
            content = medium.path.read_bytes()
        return decode_image(content, limits=self._limits)

    # ------------------------------------------------------------------------------ models

    async def list_models(self, _: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def get_model(self, request: Request) -> Response:
        """The model of a name."""
        if request.path_params["model"] != self._hub.model:
            raise ApiError("there is no such model", status=404, code="model_not_found", param="model")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self._hub.model, "object": "model", "created": self._started, "owned_by": "moss_jax"}

    # ------------------------------------------------------------------------------- files

    async def upload(self, request: Request) -> Response:
        """Stores a file."""
        if self._uploads >= _UPLOADS:
            raise _busy(f"{_UPLOADS} uploads are under way", status=429, code="queue_full")
        self._uploads += 1
        try:
            return await self._upload(request)
        finally:
            self._uploads -= 1

    async def _upload(self, request: Request) -> Response:
        limited = Request(
            request.scope, _limited(request.receive, self._config.max_video_bytes + _FORM_BYTES)
        )
        try:
            async with limited.form(max_files=1, max_fields=16, max_part_size=2**16) as form:
                file, purpose = form.get("file"), form.get("purpose")
                if not isinstance(file, UploadFile):
                    raise ApiError("the form has no file", param="file", code="missing_required_parameter")
                if purpose not in _PURPOSES:
                    names = " or ".join(_PURPOSES)
                    raise ApiError(f"purpose must be {names}", param="purpose", code="invalid_value")
                keep = form.get("expires_after[seconds]")
                try:
                    keep_seconds = None if keep is None else max(1.0, float(str(keep)))
                except ValueError:
                    raise ApiError("expires_after.seconds must be a number", param="expires_after") from None
                name = Path((file.filename or "file").replace("\\", "/")).name[:255] or "file"
                stored = await self.files.add(
                    _chunks(file), name=name, purpose=str(purpose), keep_seconds=keep_seconds
                )
        except StoreFull as error:
            raise ApiError(str(error), status=413, code="storage_full", param="file") from None
        except OSError:
            raise ApiError("the file cannot be stored", status=507, code="storage_full") from None
        return JSONResponse(stored.describe())

    async def list_files(self, request: Request) -> Response:
        """The files, by page."""
        query = request.query_params
        try:
            limit = int(query.get("limit", 10_000))
        except ValueError:
            limit = 0
        if not 1 <= limit <= 10_000:
            raise ApiError("limit is a number from 1 to 10000", param="limit", code="invalid_value")
        files = [f for f in self.files.all() if query.get("purpose") in (None, f.purpose)]
        if query.get("order", "desc") == "desc":
            files.reverse()
        if "after" in query:
            ids = [stored.id for stored in files]
            if query["after"] not in ids:
                raise _no_file("after")
            files = files[ids.index(query["after"]) + 1 :]
        page = [stored.describe() for stored in files[:limit]]
        return JSONResponse(
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
                "has_more": len(files) > limit,
            }
        )

    async def get_file(self, request: Request) -> Response:
        """Metadata of an uploaded file."""
        return JSONResponse(self._find(request.path_params["file"]).describe())

    async def get_content(self, request: Request) -> Response:
        """The content of a file."""
        stored = self._find(request.path_params["file"])
        name = urllib.parse.quote(stored.name)
        headers = {
            "Content-Disposition": f"attachment; filename*=utf-8''{name}",
            "X-Content-Type-Options": "nosniff",
        }
        return FileResponse(stored.path, media_type="application/octet-stream", headers=headers)

    async def delete_file(self, request: Request) -> Response:
        """Deletes a file."""
        stored = self._find(request.path_params["file"])
        self.files.delete(stored.id)
        return JSONResponse({"id": stored.id, "object": "file", "deleted": True})

    def _find(self, file_id: str) -> StoredFile:
        if (stored := self.files.get(file_id)) is None:
            raise _no_file("file_id")
        return stored


def routes(hub: Hub, config: ChatConfig | None = None, sampling: FrameSampling | None = None) -> list[Route]:
    """Routes of chat completions, models and files, for `make_app`.

    Args:
      config: limits.
      sampling: of videos; one frame a second by default.
    """
    return Chat(hub, config or ChatConfig(), sampling or FrameSampling()).routes()


# ------------------------------------------------------------------------------------- plumbing


def parse_request(body: bytes) -> ChatRequest:
    """Parses the body of a request.

    Raises:
      ApiError: naming the field that is at fault.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except pydantic.ValidationError as error:
        # Of a union, the deepest is of the kind that was meant.
        found = error.errors(include_url=False, include_context=False, include_input=False)
        deepest = max(found, key=lambda each: len(each["loc"]))
        # Without the names of types; a part's type and its field have one name.
        names = [str(part) for part in deepest["loc"] if str(part).isidentifier() or isinstance(part, int)]
        place = ".".join(name for name, _ in itertools.groupby(names) if name not in ("str", "Url"))
        where = f"{place}: " if place else ""
        raise ApiError(f"{where}{deepest['msg']}", param=place or None, code=deepest["type"]) from None


def text_length(message: Message) -> int:
    """Characters of its texts."""
    if isinstance(message.content, list):
        return sum(len(part.text) for part in message.content if isinstance(part, TextPart))
    return len(message.content or "")


def _limited(receive: Receive, most: int) -> Receive:
    """Reads a request body up to a limit in bytes."""
    received = 0

    async def limited() -> AsgiMessage:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > most:
            raise _too_large(most)
        return message

    return limited


async def while_connected[Result](request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Awaits something for a client, and cancels it when the client is gone.

    Raises:
      ClientDisconnect: the client is gone.
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


async def _chunks(file: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await file.read(2**20):
        yield chunk


def _stop_opened(opening: "asyncio.Future[Stream]") -> None:
    """Stops a stream that nobody waits for any more."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().stop()


def _busy(message: str, *, status: int = 503, code: str = "no_free_stream") -> ApiError:
    return ApiError(message, status=status, code=code, retry_after=_RETRY_AFTER)


def _too_large(most: int) -> ApiError:
    return ApiError(f"the request has more than {most} bytes", status=413, code="request_too_large")


def _no_file(param: str) -> ApiError:
    return ApiError("there is no such file", status=404, code="file_not_found", param=param)
