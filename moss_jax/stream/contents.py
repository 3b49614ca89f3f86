"""Host-side accounting of a slot: when to compact its bank and text cache, and what to keep."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from moss_jax.config import EngineConfig
from moss_jax.memory.eviction import Kind, tokens_to_keep
from moss_jax.stream.rows import Compaction

if TYPE_CHECKING:
    from moss_jax.stream.conversation import Plan

# Whether tokens can join a row: "next_row" if they must wait for the one after it; otherwise the name of the
# capacity that is exhausted and cannot be compacted.
Fit = Literal["fits", "next_row", "bank_capacity", "text_capacity"]


class SlotContents:
    """Tracks the tokens in the text cache of a slot and the free room in its bank.

    Args:
      capacity: of the stream, with its memory policy; see `stream_config`.

    Attributes:
      kinds: of the tokens in the text cache.
      frame_room: frames that may be appended before the bank is compacted.
      position: of the next token.
    """

    def __init__(self, capacity: EngineConfig):
        self.kinds: list[Kind] = []
        self.frame_room = capacity.bank_capacity
        self.position = 0
        self._capacity = capacity

    def append(self, kinds: Sequence[Kind], *, frames: int = 0) -> None:
        """Records the tokens and frames that a row appends."""
        self.kinds += kinds
        self.position += len(kinds)
        self.frame_room -= frames

    def make_room(self, plan: "Plan", tokens: int, *, is_frame: bool = False) -> Fit:
        """Checks that tokens fit in a row, and adds the compactions that must run first to its plan.

        Args:
          plan: of the row so far; its frames have been counted, its tokens not yet.
          tokens: number of tokens of the row.
          is_frame: whether they add one more frame that is shown to the model.
        """
        capacity, memory = self._capacity, self._capacity.memory
        if is_frame and not self.frame_room:
            if memory.policy == "full":
                return "bank_capacity"
            if plan.seen:
                return "next_row"
            plan.compact = Compaction(memory, capacity.bank_capacity)
            self.frame_room = capacity.bank_capacity - memory.low_mark(capacity.bank_capacity)
        if len(self.kinds) + tokens <= capacity.text_capacity:
            return "fits"
        # The next row begins with pending tokens, too: it helps a row that frames or a turn have joined, but
        # one of pending tokens alone has to evict more now, if evicting for these has not been enough.
        has_joined = bool(plan.frames or plan.new_turn)
        if memory.text == "window" and (plan.kept is None or not has_joined):
            room = min(memory.low_mark(capacity.text_capacity), capacity.text_capacity - tokens)
            kept = tokens_to_keep(self.kinds, room, memory, capacity.text_capacity)
            self.kinds = [self.kinds[i] for i in kept]
            # The device evicts once, so the plan's indices are those before either eviction.
            plan.kept = kept if plan.kept is None else [plan.kept[i] for i in kept]
        if len(self.kinds) + tokens <= capacity.text_capacity:
            return "fits"
        return "next_row" if memory.text == "window" and has_joined else "text_capacity"
