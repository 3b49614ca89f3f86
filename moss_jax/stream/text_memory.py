"""What stays in the text cache: the opening, the newest tokens, and of the others first what was said."""

import enum
import itertools
from collections.abc import Iterator, Sequence

from moss_jax.config import MemoryConfig


class Kind(enum.Enum):
    """What a token of the text cache is.

    `SAID` is of an answer, `ASKED` of a user turn with its headers, `PINNED` of the opening; `UNKNOWN` is a
    token that has been appended before the host has it.
    """

    PINNED = enum.auto()
    FRAME = enum.auto()
    SILENCE = enum.auto()
    ASKED = enum.auto()
    SAID = enum.auto()
    UNKNOWN = enum.auto()


def tokens_to_keep(kinds: Sequence[Kind], room: int, memory: MemoryConfig, capacity: int) -> list[int]:
    """Indices of the tokens that stay, ascending; at most `room`, unless the opening alone is more.

    Turns and answers go as a whole, the oldest first: silences and frames, then answers beyond the budget for
    them, then what was asked, then the other answers. The newest tokens go only if all that is not enough.

    Args:
      kinds: of the tokens in the cache.
      room: tokens that may stay.
      capacity: of the cache.
    """
    recent = len(kinds) - min(int(memory.text_recent * capacity), room)
    excess = len(kinds) - room
    dropped: set[int] = set()

    def drop(runs: Iterator[range]) -> None:
        for run in runs:
            if len(dropped) >= excess:
                return
            dropped.update(run)

    old = [run for kind, run in _runs(kinds) if run.start < recent and kind in (Kind.FRAME, Kind.SILENCE)]
    drop(range(i, i + 1) for run in old for i in run if i < recent)
    asked, said = (
        [run for kind, run in _runs(kinds) if kind is of and run.stop <= recent]
        for of in (Kind.ASKED, Kind.SAID)
    )
    # The oldest answers beyond the budget.
    lengths = list(itertools.accumulate(map(len, reversed(said))))
    within = sum(length <= int(memory.text_said * capacity) for length in lengths)
    drop(iter(said[: len(said) - within]))
    drop(iter(asked))
    drop(iter(said))
    drop(range(i, i + 1) for i, kind in enumerate(kinds) if kind is not Kind.PINNED and i not in dropped)
    return [i for i in range(len(kinds)) if i not in dropped]


def _runs(kinds: Sequence[Kind]) -> Iterator[tuple[Kind, range]]:
    """Runs of tokens of one kind."""
    start = 0
    for kind, run in itertools.groupby(kinds):
        length = len(list(run))
        yield kind, range(start, start + length)
        start += length
