"""KV-cache eviction: the opening is pinned, the first and the newest tokens are kept, answers go last."""

import enum
import itertools
from collections.abc import Iterator, Sequence

from moss_jax.config import MemoryConfig


class Kind(enum.Enum):
    """Kind of a token in the text cache, which decides its eviction order.

    `PINNED` tokens belong to the opening, `USER` to a user turn with its headers, `ASSISTANT` to an answer;
    `UNKNOWN` is a token that was appended before the host received it.
    """

    PINNED = enum.auto()
    FRAME = enum.auto()
    SILENCE = enum.auto()
    USER = enum.auto()
    ASSISTANT = enum.auto()
    UNKNOWN = enum.auto()


def tokens_to_keep(kinds: Sequence[Kind], room: int, memory: MemoryConfig, capacity: int) -> list[int]:
    """Indices of the tokens to keep, ascending; at most `room`, unless the opening alone is longer.

    Evicts the oldest first: silences and frames, then answers beyond their budget, then user turns, then the
    other answers. Turns and answers are evicted whole. The first tokens after the opening and the recent
    window go only if that is not enough.

    Args:
      kinds: of the tokens in the cache.
      room: number of tokens that may stay; negative if not even the opening may.
      capacity: of the cache.
    """
    newest = max(min(int(memory.text_recent * capacity), room), 0)
    recent = max(len(kinds) - newest, 0)
    first = min(kinds.count(Kind.PINNED) + int(memory.text_first * capacity), recent)
    excess = len(kinds) - room
    dropped: set[int] = set()
    runs = list(_runs(kinds))

    def drop(candidates: Iterator[range]) -> None:
        for run in candidates:
            if len(dropped) >= excess:
                return
            dropped.update(run)

    old = [run for kind, run in runs if run.start < recent and kind in (Kind.FRAME, Kind.SILENCE)]
    drop(range(i, i + 1) for run in old for i in run if first <= i < recent)
    user, assistant = (
        [run for kind, run in runs if kind is of and first <= run.start and run.stop <= recent]
        for of in (Kind.USER, Kind.ASSISTANT)
    )
    # The oldest answers beyond the budget.
    lengths = list(itertools.accumulate(map(len, reversed(assistant))))
    within = sum(length <= int(memory.text_assistant * capacity) for length in lengths)
    drop(iter(assistant[: len(assistant) - within]))
    drop(iter(user))
    drop(iter(assistant))
    remaining = (*range(first, recent), *range(first), *range(recent, len(kinds)))
    drop(range(i, i + 1) for i in remaining if kinds[i] is not Kind.PINNED and i not in dropped)
    return [i for i in range(len(kinds)) if i not in dropped]


def _runs(kinds: Sequence[Kind]) -> Iterator[tuple[Kind, range]]:
    """Yields runs of tokens of one kind."""
    start = 0
    for kind, run in itertools.groupby(kinds):
        length = len(list(run))
        yield kind, range(start, start + length)
        start += length
