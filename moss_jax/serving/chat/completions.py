"""Endpoints of chat completions and of the model: `/v1/chat/completions`, `/v1/models`."""

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moss_jax.config import ChatConfig, ConfigError, TokenSampling
from moss_jax.serving.chat.answers import Answer, AnswerStream
from moss_jax.serving.chat.bodies import Bodies, while_connected
from moss_jax.serving.chat.errors import ApiError, busy
from moss_jax.serving.chat.requests import ChatRequest, StreamOptions, parse_request, text_length
from moss_jax.serving.chat.turns import TurnReader
from moss_jax.serving.hub import Hub
from moss_jax.serving.security import owner_of
from moss_jax.stream import DialogueTurn, Engine, Refused, Reservation, SessionError, Stream
from moss_jax.stream.completion import Completion
from moss_jax.video import Frame

# Seconds between polls for a free slot.
_POLL = 0.02
# Length of the longest tokens, such as runs of spaces.
_CHARACTERS_PER_TOKEN = 128


class Completions:
    """Endpoints of chat completions and of the model.

    Args:
      hub: hub whose streams answer.
      config: limits of the endpoints.
      turns: decoder of requests' dialogues.
    """

    def __init__(self, hub: Hub, config: ChatConfig, turns: TurnReader):
        self._hub, self._config, self._turns = hub, config, turns
        self._started = int(time.time())
        self._bodies = Bodies(config.max_body_bytes)
        # Limits concurrent decoding, since decoded frames occupy memory until a slot is free.
        self._places, self._waiting = asyncio.Semaphore(2 * config.decode_threads), 0
        self._turn = asyncio.Lock()
        # Slots reserved for completions whose streams are not open yet.
        self._reserved = 0

    async def complete(self, request: Request) -> Response:
        """Completes a chat."""
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
            answer = await while_connected(request, self._begin(parsed, owner_of(request.scope)))
        if parsed.stream:
            options = parsed.stream_options or StreamOptions()
            return AnswerStream(answer, include_usage=options.include_usage)
        return JSONResponse(await while_connected(request, answer.whole()))

    async def _begin(self, request: ChatRequest, owner: str) -> Answer:
        """Queues a request, decodes its media and opens its stream once a slot is free."""
        sampling = self._token_sampling(request)
        # Checked before tokenizing a text that cannot fit.
        most = self._hub.scheduler.engine.config.text_capacity * _CHARACTERS_PER_TOKEN
        if (length := sum(map(text_length, request.messages))) > most:
            raise ApiError(
                f"the messages have {length} characters, more than the model has room for",
                code="context_length_exceeded",
                param="messages",
            )
        async with self._place():
            turns = await self._turns.read(request, owner)
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
        # In a worker thread, since tokenizing a long text is slow.
        opening = asyncio.ensure_future(
            asyncio.to_thread(
                self._hub.scheduler.complete,
                turns,
                max_tokens=limit,
                sampling=sampling,
                reservation=reservation,
            )
        )
        opening.add_done_callback(lambda _: self._release(reservation))
        try:
            stream = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_stop_opened)
            raise
        except Refused as error:
            raise busy(str(error)) from None
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
        """Token sampling of a request; None if it is the engine's default."""
        engine = self._hub.scheduler.engine
        own = engine.sampling if isinstance(engine, Engine) else TokenSampling()
        names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
        given = {name: value for name in names if (value := getattr(request, name)) is not None}
        # Smaller values underflow in float32: the temperature to 0, and top_p to no tokens at all.
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
        """Waits in a bounded queue until a request's media may be decoded.

        Raises:
          ApiError: the queue is full, the wait times out, or the server is not ready.
        """
        if not self._hub.is_ready:
            raise busy("the server is not ready", code="not_ready")
        if self._places.locked() and self._waiting >= self._config.queue:
            raise busy("too many requests wait for a free stream", status=429, code="queue_full")
        self._waiting += 1
        try:
            async with asyncio.timeout(self._config.queue_seconds):
                await self._places.acquire()
        except TimeoutError:
            raise busy("no stream became free in time") from None
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._places.release()

    async def _reserve(self) -> Reservation:
        """Waits for a free slot.

        Raises:
          ApiError: the wait times out, or the server is not ready.
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
                        raise busy("the server is shutting down", code="server_ends")
                    await asyncio.sleep(_POLL)
        except TimeoutError:
            raise busy("no stream became free in time") from None

    def _release(self, reservation: Reservation) -> None:
        self._reserved -= 1
        reservation.release()

    def _may_begin(self) -> bool:
        """Whether the limit on concurrent completions allows another one."""
        if not self._config.max_streams:
            return True
        streams = self._hub.scheduler.streams
        under_way = sum(isinstance(stream.conversation, Completion) for stream in streams)
        return self._reserved + under_way < self._config.max_streams

    async def list_models(self, _: Request) -> Response:
        """Lists the one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def get_model(self, request: Request) -> Response:
        """Returns the model if the name matches."""
        if request.path_params["model"] != self._hub.model:
            raise ApiError("there is no such model", status=404, code="model_not_found", param="model")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self._hub.model, "object": "model", "created": self._started, "owned_by": "moss_jax"}


def _stop_opened(opening: "asyncio.Future[Stream]") -> None:
    """Stops a stream whose opener was cancelled."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().stop()
