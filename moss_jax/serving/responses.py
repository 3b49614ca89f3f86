"""The responses of one session, of which one at a time is in progress."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from moss_jax.serving import protocol
from moss_jax.serving.hub import Hub
from moss_jax.serving.items import Items
from moss_jax.serving.session import Session
from moss_jax.serving.settings import Settings


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


class Responses:
    """The response in progress, and the events that tell of it.

    Args:
      session: gets the events.

    Attributes:
      current: the response in progress; None if there is none.
      context: tokens that have entered the stream's context, counted from its events.
    """

    def __init__(self, hub: Hub, session: Session, settings: Settings, items: Items):
        self._hub, self._session, self._settings, self._items = hub, session, settings, items
        self._corrections = Corrections(hub.config.correction)
        self.current: Response | None = None
        self.context = 0

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a text."""
        return len(self._hub.scheduler.engine.tokenizer.encode(text))

    def begin(self, at: float, asked: Asked | None = None) -> Response:
        """Begins a response.

        Args:
          at: stream time.
          asked: what it answers; None if the model speaks unasked.
        """
        response = Response(
            self._items.next_id("resp"),
            asked=asked is not None,
            metadata=asked.metadata if asked else None,
            input_tokens=self.context,
            asked_at=asked.at if asked else None,
        )
        self.current = response
        self._hub.counters.responses += 1
        self._corrections.held = ""
        moss = protocol.MossResponse(asked=response.asked, time=at) if self._settings.moss else None
        self._session.send(
            protocol.ResponseCreated(response=self._describe(response, "in_progress"), moss=moss)
        )
        return response

    def say(self, text: str, at: float) -> None:
        """Sends a piece of the answer; begins a response if none is in progress."""
        response = self.current or self.begin(at)
        if response.cancelled and self._session.stream is not None:
            # Cancelled before it spoke.
            self._session.stream.interrupt()
        if response.asked_at is not None:
            self._hub.counters.observe("ttft", time.monotonic() - response.asked_at)
            response.asked_at = None
        if self._settings.moss is None:
            self._say(response, text, at)
            return
        for piece, takes_back in self._corrections.feed(text):
            self._say(response, piece, at, takes_back=takes_back)

    def _say(self, response: Response, text: str, at: float, *, takes_back: bool = False) -> None:
        """Sends a piece of the answer, preceded by the new item if it is the first."""
        if response.item_id is None:
            response.item_id = self._items.next_id("item")
            item = protocol.ItemObject(id=response.item_id, status="in_progress", role="assistant")
            self._session.send(protocol.OutputItemAdded(response_id=response.id, item=item))
            self._items.announce(item)
            part = protocol.ContentPart(text="")
            self._session.send(
                protocol.PartAdded(response_id=response.id, item_id=response.item_id, part=part)
            )
        moss = None
        if self._settings.moss is not None:
            start = sentence_start(response.text, self._corrections.words) if takes_back else None
            moss = protocol.MossDelta(time=at, takes_back=takes_back or None, start=start)
        response.text += text
        self._session.send(
            protocol.TextDelta(response_id=response.id, item_id=response.item_id, delta=text, moss=moss)
        )

    def finish(
        self,
        at: float,
        status: protocol.ResponseStatus,
        reason: protocol.Reason | None = None,
        *,
        error: str | None = None,
    ) -> None:
        """Ends the response in progress, if any."""
        response = self.current
        if response is None:
            return
        if held := self._corrections.flush():
            self._say(response, held, at)
        self.current = None
        self.context += self.count_tokens(response.text)
        if response.item_id is not None:
            item = self._output(response, "completed" if status == "completed" else "incomplete")
            part = protocol.ContentPart(text=response.text)
            self._session.send(
                protocol.TextDone(response_id=response.id, item_id=item.id, text=response.text)
            )
            self._session.send(protocol.PartDone(response_id=response.id, item_id=item.id, part=part))
            self._session.send(protocol.OutputItemDone(response_id=response.id, item=item))
            self._items.remember(item)
            self._session.send(protocol.ItemDone(item=item))
        self._session.send(protocol.ResponseDone(response=self._describe(response, status, reason, error)))

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
        said = self.count_tokens(response.text)
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

    def state(self) -> dict[str, Any]:
        """JSON-ready state."""
        return {
            "response": dataclasses.asdict(self.current) if self.current else None,
            "corrections": self._corrections.held,
            "context": self.context,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        if state["response"]:
            self.current = Response(**state["response"] | {"asked_at": None})
        self._corrections.held = state["corrections"]
        self.context = state["context"]
