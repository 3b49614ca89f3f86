"""The conversation items of one session."""

import collections
from typing import Any, Literal

from moss_jax.serving import protocol
from moss_jax.serving.protocol import MossFrames
from moss_jax.serving.session import Session
from moss_jax.serving.settings import Settings


class Items:
    """Ids, order and recent history of the items, and the events that tell of them.

    Args:
      session: gets the events.
      kept: number of items that can be retrieved.

    Attributes:
      last: id of the last item; None if there is none.
    """

    def __init__(self, session: Session, settings: Settings, kept: int):
        self._session, self._settings, self._kept = session, settings, kept
        self._numbers: collections.Counter[str] = collections.Counter()
        self._history: collections.OrderedDict[str, protocol.ItemObject] = collections.OrderedDict()
        self.last: str | None = None

    def next_number(self, kind: str) -> int:
        """Counts an item, a response or a frame; returns how many there were before."""
        self._numbers[kind] += 1
        return self._numbers[kind] - 1

    def next_id(self, kind: str) -> str:
        """An id of an item or a response that is unique across sessions."""
        return f"{kind}_{self._session.id[5:17]}_{self.next_number(kind) + 1}"

    def get(self, item_id: str) -> protocol.ItemObject | None:
        """An item of the recent history."""
        return self._history.get(item_id)

    def add(
        self,
        item_id: str,
        parts: tuple[protocol.Part, ...],
        *,
        role: Literal["user", "system"] = "user",
        moss: MossFrames | None = None,
    ) -> None:
        """Adds an item of the client."""
        item = protocol.ItemObject(id=item_id, status="completed", role=role, content=parts)
        self.remember(item)
        self.announce(item, moss)

    def announce(self, item: protocol.ItemObject, moss: MossFrames | None = None) -> None:
        """Tells the client of a new item."""
        self._session.send(
            protocol.ItemAdded(
                previous_item_id=self.last, item=item, moss=moss if self._settings.moss else None
            )
        )
        self.last = item.id

    def remember(self, item: protocol.ItemObject) -> None:
        """Keeps an item for later retrieval."""
        self._history[item.id] = item
        while len(self._history) > self._kept:
            self._history.popitem(last=False)

    def finish(
        self, item_id: str, moss: MossFrames | None = None, status: protocol.Status = "completed"
    ) -> None:
        """Tells the client that an item of its own is done."""
        item = self._history.get(item_id)
        if item is None:  # No longer kept in the history.
            item = protocol.ItemObject(id=item_id, status="completed", role="user")
        self._session.send(
            protocol.ItemDone(
                item=item.model_copy(update={"status": status}), moss=moss if self._settings.moss else None
            )
        )

    def state(self) -> dict[str, Any]:
        """JSON-ready state."""
        return {
            "numbers": dict(self._numbers),
            "last_item": self.last,
            "history": [item.model_dump(exclude_none=True) for item in self._history.values()],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self._numbers, self.last = collections.Counter(state["numbers"]), state["last_item"]
        items = map(protocol.ItemObject.model_validate, state["history"])
        self._history = collections.OrderedDict((item.id, item) for item in items)
