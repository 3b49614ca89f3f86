"""The answer of one stream, as one object or as server-sent events."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from moss_jax.serving.chat.errors import RETRY_AFTER, ApiError
from moss_jax.serving.hub import Hub, events_of
from moss_jax.stream import End, FrameSeen, Stream, Text

type FinishReason = Literal["stop", "length"]


class Stops:
    """Finds stop sequences in streamed text, even across pieces.

    Attributes:
      found: whether a stop sequence was found.
    """

    def __init__(self, stops: list[str]):
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Adds a piece of the answer; returns the text that can be emitted."""
        if self.found:
            return ""
        self._held += text
        places = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        # The suffix may be the beginning of a stop sequence.
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


class Answer:
    """The answer of one stream, and its response objects.

    Attributes:
      id: id of the completion.
      created: seconds since the epoch.
      prompt_tokens: tokens of the dialogue; each frame counts as one.
      completion_tokens: tokens of the answer, known at its end.
      finish_reason: known at its end.
    """

    def __init__(self, hub: Hub, stream: Stream, prompt_tokens: int, stops: list[str]):
        self._hub, self._stream, self._stops = hub, stream, Stops(stops)
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self.finish_reason: FinishReason = "stop"

    async def texts(self) -> AsyncIterator[str]:
        """Yields the pieces of the answer.

        Raises:
          ApiError: the stream failed.
        """
        counters, started, is_first = self._hub.counters, time.monotonic(), True
        try:
            async for event in events_of(self._stream, self._hub.relay):
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
            # Also when the caller stops reading early.
            self._stream.stop()

    def _end(self, end: End) -> None:
        counters = self._hub.counters
        counters.streams_by_end[end.reason] += 1
        counters.tokens += end.counters.tokens
        self.completion_tokens = end.counters.tokens
        if end.reason in ("token_limit", "text_capacity", "bank_capacity"):
            self.finish_reason = "length"
        elif end.reason == "stopped" and not self._stops.found:
            raise ApiError(
                "the server is shutting down", status=503, code="server_ends", retry_after=RETRY_AFTER
            )
        elif end.reason not in ("finished", "stopped"):
            raise ApiError("an error in the server ended the answer", status=500, code=end.reason)
        if self._stops.found:
            self.finish_reason = "stop"

    def stop(self) -> None:
        """Ends the answer and frees its slot."""
        self._stream.stop()

    @property
    def usage(self) -> dict[str, int]:
        """Token usage, known when the answer is complete."""
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    async def whole(self) -> dict[str, Any]:
        """The complete answer as one object."""
        text = "".join([text async for text in self.texts()])
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish_reason}
        return self._object("chat.completion", [choice]) | {"usage": self.usage}

    async def chunks(self, *, include_usage: bool) -> AsyncIterator[str]:
        """Yields the answer as server-sent events."""
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
    """SSE response with an answer, which is stopped when the client disconnects."""

    def __init__(self, answer: Answer, *, include_usage: bool):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        chunks = answer.chunks(include_usage=include_usage)
        super().__init__(chunks, headers=headers, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response."""
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self._answer.stop()
