"""The rows that a step appends, cut and padded to the shapes that programs are compiled for.

B slots, T tokens, F frames of a row, P encoded frames, N vectors a frame, D width
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moss_jax.config import MemoryConfig

# Placeholder in a row for the token that the step before has sampled.
PENDING = -1

# Sizes that rows are padded to, one compiled program for each. Longer rows are cut. The largest token bucket
# holds the largest frame bucket with 64 other tokens.
TOKEN_BUCKETS = (1, 2, 4, 16, 64, 320)
FRAME_BUCKETS = (1, 8, 32, 256)


@dataclasses.dataclass(frozen=True)
class Compaction:
    """A compaction of a slot's bank, by the settings of its stream.

    Attributes:
      memory: the policy and its settings.
      frames: whole frames that the stream may have in the bank; at most those that the slot has room for.
    """

    memory: MemoryConfig
    frames: int


@dataclasses.dataclass(frozen=True)
class Row:
    """Tokens and frames that one step appends to a slot.

    Attributes:
      tokens: may begin with PENDING.
      frames: for each `<|image|>` among the tokens, in order, the index of its frame in the encoded features,
        or None for a token without a frame; empty if none has one.
      new_turn: whether the repetition penalty starts afresh.
      compact: of the slot's bank, before the row; None for none.
      kept: indices of the tokens that stay in the slot's text cache, ascending; None for all.
    """

    tokens: Sequence[int]
    frames: Sequence[int | None] = ()
    new_turn: bool = False
    compact: Compaction | None = None
    kept: Sequence[int] | None = None

    def placed(self, image: int) -> dict[int, int]:
        """The index of each frame by the offset of its token in the row."""
        if not self.frames:
            return {}
        offsets = [i for i, token in enumerate(self.tokens) if token == image]
        pairs = zip(offsets, self.frames, strict=True)
        return {offset: frame for offset, frame in pairs if frame is not None}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepFrames:
    """The frames of one step, padded to a bucket.

    Attributes:
      features: None until they are gathered from the encoded frames.
      offset: index of each frame's `<|image|>` token in its row.
      count: frames of each slot; what follows is padding.
    """

    features: Float[Array, "B F N D"] | None
    offset: Int[Array, "B F"] | Int[np.ndarray, "B F"]
    count: Int[Array, " B"] | Int[np.ndarray, " B"]


class StepArguments(NamedTuple):
    """Arguments of a step, padded to buckets.

    Attributes:
      frames: None if no row has any.
      feature_index: of each of the frames among the encoded ones [P, N, D]; None if no row has any.
    """

    tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"]
    lengths: Int[Array, " B"] | Int[np.ndarray, " B"]
    new_turn: Bool[Array, " B"] | Bool[np.ndarray, " B"]
    frames: StepFrames | None
    feature_index: Int[Array, "B F"] | Int[np.ndarray, "B F"] | None


def step_arguments(rows: Sequence[Row | None], image: int, *, least: int = 1) -> StepArguments:
    """Pads rows to the arguments of one step; slots whose row is None get length 0.

    Args:
      rows: one for each slot, each no longer than the largest bucket.
      image: id of the `<|image|>` token.
      least: tokens that rows without frames are padded to at least.
    """
    slots = len(rows)
    length = bucket(max(least, *(len(row.tokens) for row in rows if row)), TOKEN_BUCKETS)
    placed = {slot: row.placed(image) for slot, row in enumerate(rows) if row}
    most_frames = max(map(len, placed.values()))
    lengths = np.zeros(slots, np.int32)
    new_turn = np.zeros(slots, bool)
    frames = index = None
    if most_frames:
        padded = bucket(most_frames, FRAME_BUCKETS)
        length = max(length, _token_room(most_frames))
        index, offset = np.zeros((slots, padded), np.int32), np.zeros((slots, padded), np.int32)
        count = np.zeros(slots, np.int32)
        frames = StepFrames(features=None, offset=offset, count=count)
        for slot, of_slot in placed.items():
            count[slot] = len(of_slot)
            offset[slot, : len(of_slot)] = list(of_slot)
            index[slot, : len(of_slot)] = list(of_slot.values())
    tokens = np.zeros((slots, length), np.int32)
    for slot, row in enumerate(rows):
        if row:
            tokens[slot, : len(row.tokens)] = row.tokens
            lengths[slot] = len(row.tokens)
            new_turn[slot] = row.new_turn
    return StepArguments(tokens, lengths, new_turn, frames, index)


def split_row(row: Row, image: int) -> Iterator[Row]:
    """Cuts a row into pieces that fit the buckets.

    A session runs on one program for each token bucket and one for each frame bucket, not for their product.
    So a run of frames and the tokens around it share a piece as far as the program of the frames has room. A
    token without a frame is a token like others.
    """
    start = end = frames = 0
    placed = row.placed(image)

    def piece() -> Row:
        offsets = [i for i in range(start, end) if row.tokens[i] == image] if frames else []
        return Row(row.tokens[start:end], [placed.get(i) for i in offsets], row.new_turn and start == 0)

    for is_frame, run in itertools.groupby(range(len(row.tokens)), placed.__contains__):
        left = len(list(run))
        while left:
            count = min(left, (FRAME_BUCKETS if is_frame else TOKEN_BUCKETS)[-1])
            if left == count + 1 and not is_frame:
                count -= 1  # A rest of one token would need another program than a single pending token.
            if end > start and end - start + count > _token_room(frames + count * is_frame):
                yield piece()
                start, frames = end, 0
            end, frames, left = end + count, frames + count * is_frame, left - count
    yield piece()


def bucket(size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `size`, or the largest bucket."""
    return buckets[min(bisect.bisect_left(buckets, size), len(buckets) - 1)]


def _token_room(frames: int) -> int:
    """Row length, `<|image|>` tokens included, of the program for this number of frames; 0 if there is none.

    At least one more than the frame bucket, since a pending token may come before the frames.
    """
    if frames > FRAME_BUCKETS[-1]:
        return 0
    return bucket(bucket(frames, FRAME_BUCKETS) + 1, TOKEN_BUCKETS) if frames else TOKEN_BUCKETS[-1]
