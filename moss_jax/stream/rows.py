"""The rows that a step appends, split and packed to the bucketed shapes that programs are compiled for.

B slots, C chunks of W tokens, R rows of F frames, P encoded frames, N vectors a frame, D width
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moss_jax.config import MemoryConfig

# Placeholder in a row for the token that the previous step sampled.
PENDING = -1

# Sizes that the rows of a single slot are padded to, one compiled program for each. Longer rows are split.
# The largest token bucket holds the largest frame bucket with 64 other tokens.
TOKEN_BUCKETS = (2, 4, 16, 64, 320)
FRAME_BUCKETS = (1, 8, 32, 256)
# Tokens per chunk of a prompt, and numbers of frames of a step without prompts, if there are several slots.
WIDTH = 16
FRAME_COUNTS = (1, 8, 16, 32)
# Number of slots from which on there are also programs that decode a quarter of them: with fewer, reading
# the weights takes most of a step, however many rows there are.
MANY_SLOTS = 32


@dataclasses.dataclass(frozen=True)
class Compaction:
    """A compaction of a slot's bank, by the settings of its stream.

    Attributes:
      memory: the policy and its settings.
      frames: whole frames that the stream may have in the bank; at most the capacity of the slot.
    """

    memory: MemoryConfig
    frames: int


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Features of one frame: a batch of features and an index into it."""

    features: Float[Array, "P N D"]
    index: int


@dataclasses.dataclass(frozen=True)
class Row[Frame]:
    """Tokens and frames that one step appends to a slot.

    Attributes:
      tokens: may begin with PENDING.
      frames: for each `<|image|>` among the tokens, in order, its frame, or None for a token without one;
        empty if none has one. A step takes the index of each among the encoded features.
      new_turn: whether the repetition penalty is reset.
      compact: compaction of the slot's bank before the row; None for none.
      kept: indices of the tokens that stay in the slot's text cache, ascending; None for all.
    """

    tokens: Sequence[int]
    frames: Sequence[Frame | None] = ()
    new_turn: bool = False
    compact: Compaction | None = None
    kept: Sequence[int] | None = None

    def placed(self, image: int) -> dict[int, Frame]:
        """The frames, keyed by the offsets of their tokens in the row."""
        if not self.frames:
            return {}
        offsets = [i for i, token in enumerate(self.tokens) if token == image]
        pairs = zip(offsets, self.frames, strict=True)
        return {offset: frame for offset, frame in pairs if frame is not None}

    @property
    def is_decode(self) -> bool:
        """Whether it appends only the pending token."""
        return len(self.tokens) == 1 and self.tokens[0] == PENDING and not self.frames

    def cut(self, length: int, image: int) -> "tuple[Row[Frame], Row[Frame]]":
        """Splits the row after `length` tokens; the first part keeps the compactions."""
        if length >= len(self.tokens):
            return self, Row([])
        first, rest = self.tokens[:length], self.tokens[length:]
        frames = sum(token == image for token in first) if self.frames else 0
        return (
            dataclasses.replace(self, tokens=first, frames=_any_frame(self.frames[:frames])),
            Row(rest, _any_frame(self.frames[frames:])),
        )


def _any_frame[Frame](frames: Sequence[Frame | None]) -> Sequence[Frame | None]:
    return frames if any(frame is not None for frame in frames) else ()


class Shape(NamedTuple):
    """The shape that the program of a step is compiled for.

    With one slot, a row is a chunk, and a pending token alone is a decode row. With more, every step has
    decode rows, and chunks belong to whichever slots have more to append; a slot may have several.

    Attributes:
      decode: number of decode rows, each of one pending token: one per slot, or fewer.
      chunks, width: number of rows of prompt and frame tokens, and tokens per row.
      frames: number of frames over all chunks.
    """

    decode: int = 0
    chunks: int = 0
    width: int = 0
    frames: int = 0


def decode_counts(slots: int) -> tuple[int, ...]:
    """Bucket sizes for decode rows; of many slots, only a few may be talking."""
    return (slots // 4, slots) if slots >= MANY_SLOTS else (slots,)


@functools.cache
def shapes(slots: int) -> tuple[Shape, ...]:
    """Shapes of the steps over this number of slots, one compiled program each; smaller ones first."""
    if slots == 1:
        text = [Shape(0, 1, width) for width in TOKEN_BUCKETS]
        framed = [Shape(0, 1, _token_room(frames), frames) for frames in FRAME_BUCKETS]
        return (Shape(1), *text, *framed)
    # One frame per slot with the token before it; then chunks of prompts. Few programs, since each takes
    # seconds to compile, and a larger one hardly takes longer to run than a smaller one: padding is cheap.
    most = 1 << (slots - 1).bit_length()
    short = [(count, 2, count) for count in sorted({min(count, most) for count in FRAME_COUNTS})]
    long = [(4, WIDTH, 0), (4, WIDTH, 4), (8, WIDTH, 8)]
    if slots < MANY_SLOTS:
        # Beside the rows of many slots, 16 chunks take more than twice as long as 8.
        long.append((16, WIDTH, 16))
    return tuple(
        Shape(decode, *chunks) for chunks in ((0, 0, 0), *short, *long) for decode in decode_counts(slots)
    )


def first_step[Frame](
    rows: Mapping[int, Row[Frame]], slots: int, image: int
) -> tuple[dict[int, Row[Frame]], dict[int, Row[Frame]]]:
    """Splits rows into what the next step appends, with priority in the order given, and the remainder.

    With several slots, a step has chunks of one width, that of the first row of more than a pending token:
    among the chunks of a prompt, each frame would take one of these, mostly padding.

    Args:
      rows: by slot.
      image: id of the `<|image|>` token.
    """
    now, later = {}, {}
    if slots == 1:
        ((slot, row),) = rows.items()
        first = next(split_row(row, image))
        now[slot], rest = row.cut(len(first.tokens), image)
        return now, {slot: rest} if rest.tokens else {}
    width = next((_width([row]) for row in rows.values() if not row.is_decode), 0)
    most = [shape for shape in shapes(slots) if shape.width == width][-1]
    chunks, frames = most.chunks, most.frames
    for slot, row in rows.items():
        if row.is_decode:
            now[slot] = row
            continue
        if _width([row]) != width:
            later[slot] = row
            continue
        placed = list(row.placed(image))
        # Up to the first frame that does not fit.
        fitting = placed[frames] if len(placed) > frames else len(row.tokens)
        length = min(fitting, chunks * width)
        piece, rest = row.cut(length, image)
        if length:
            now[slot] = piece
        if rest.tokens:
            later[slot] = rest if length else row
        chunks -= -(-length // width)
        frames -= len(piece.placed(image))
    return now, later


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepFrames:
    """The frames of one step, in rows that match those of its tokens.

    Attributes:
      index: of each frame among the encoded ones.
      features: None until they are gathered from the encoded frames, inside the program.
      offset: of each frame's `<|image|>` token among the tokens that the step appends to its slot.
      count: number of frames in each row.
      slots, before: as in `memory.remember_frames`.
    """

    index: Int[Array, "R F"] | Int[np.ndarray, "R F"]
    features: Float[Array, "R F N D"] | None
    offset: Int[Array, "R F"] | Int[np.ndarray, "R F"]
    count: Int[Array, " R"] | Int[np.ndarray, " R"]
    slots: Int[Array, " R"] | Int[np.ndarray, " R"] | None
    before: Int[Array, " R"] | Int[np.ndarray, " R"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunks:
    """Rows of tokens of one step, all of the same length; see `nn.decoder.Rows`."""

    tokens: Int[Array, "C W"] | Int[np.ndarray, "C W"]
    count: Int[Array, " C"] | Int[np.ndarray, " C"]
    slots: Int[Array, " C"] | Int[np.ndarray, " C"] | None
    before: Int[Array, " C"] | Int[np.ndarray, " C"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepArguments:
    """Arguments of a step.

    Attributes:
      takes: mask of the slots that take part.
      decode: rows of one pending token; None if there are none.
      chunks: rows of prompt and frame tokens; None if there are none.
      frames: None if the shape has no room for any.
      speaks: mask of the slots whose pending token is appended.
      new_turn: mask of the slots whose repetition penalty is reset.
      last: index of each slot's last token among all tokens of the step, decode rows first.
    """

    takes: Bool[Array, " B"] | Bool[np.ndarray, " B"]
    decode: Chunks | None
    chunks: Chunks | None
    frames: StepFrames | None
    speaks: Bool[Array, " B"] | Bool[np.ndarray, " B"]
    new_turn: Bool[Array, " B"] | Bool[np.ndarray, " B"]
    last: Int[Array, " B"] | Int[np.ndarray, " B"]

    @property
    def shape(self) -> Shape:
        """The shape of the step."""
        chunks, width = self.chunks.tokens.shape if self.chunks else (0, 0)
        frames = self.frames.offset.size if self.frames else 0
        return Shape(len(self.decode.tokens) if self.decode else 0, chunks, width, frames)


def empty_arguments(shape: Shape, slots: int) -> StepArguments:
    """Arguments of a step in which no slot takes part; see `step_arguments`."""
    decode = chunks = frames = None
    several = slots > 1

    def zeros(*size: int) -> np.ndarray:
        return np.zeros(size, np.int32)

    if shape.decode:
        tokens = np.full((shape.decode, 1), PENDING, np.int32)
        decode = Chunks(
            tokens, zeros(shape.decode), zeros(shape.decode) if shape.decode < slots else None, None
        )
    if shape.chunks:
        C = shape.chunks
        chunks = Chunks(
            zeros(C, shape.width), zeros(C), zeros(C) if several else None, zeros(C) if several else None
        )
    if shape.frames:
        rows, width = (shape.frames, 1) if several else (1, shape.frames)
        frames = StepFrames(
            zeros(rows, width),
            None,
            zeros(rows, width),
            zeros(rows),
            zeros(rows) if several else None,
            zeros(rows) if several else None,
        )
    takes, speaks, new_turn = (np.zeros(slots, bool) for _ in range(3))
    return StepArguments(takes, decode, chunks, frames, speaks, new_turn, zeros(slots))


def step_arguments(rows: Mapping[int, Row[int]], slots: int, image: int) -> StepArguments:
    """Packs rows into the arguments of one step of the smallest shape that fits.

    Args:
      rows: by slot, from `first_step`.
      image: id of the `<|image|>` token.
    """
    shape = _smallest(rows, slots, image)
    a = empty_arguments(shape, slots)
    decoding = chunk = frame = 0
    for slot, row in rows.items():
        a.takes[slot], a.new_turn[slot] = True, row.new_turn
        a.speaks[slot] = row.tokens[0] == PENDING
        if shape.decode and row.is_decode:
            assert a.decode is not None
            place = slot
            if a.decode.slots is not None:
                a.decode.slots[place := decoding] = slot
            a.decode.count[place], a.last[slot] = 1, place
            decoding += 1
            continue
        assert a.chunks is not None
        for start in range(0, len(row.tokens), shape.width):
            tokens = row.tokens[start : start + shape.width]
            a.chunks.tokens[chunk, : len(tokens)] = tokens
            a.chunks.count[chunk] = len(tokens)
            if a.chunks.slots is not None and a.chunks.before is not None:
                a.chunks.slots[chunk], a.chunks.before[chunk] = slot, start
            a.last[slot] = shape.decode + chunk * shape.width + len(tokens) - 1
            chunk += 1
        for number, (offset, of_frame) in enumerate(row.placed(image).items()):
            assert a.frames is not None
            place = (frame, 0) if slots > 1 else (0, frame)
            a.frames.index[place], a.frames.offset[place] = of_frame, offset
            a.frames.count[place[0]] += 1
            if a.frames.slots is not None and a.frames.before is not None:
                a.frames.slots[place[0]], a.frames.before[place[0]] = slot, number
            frame += 1
    return a


def pack(arguments: StepArguments, slots: int) -> Int[np.ndarray, " n"]:
    """Packs a step's arguments into one integer array, the slots that take part first.

    The array has the same length for all shapes. Passing separate arrays would cost the host more time than
    the step takes on the device.
    """
    packed, end = np.zeros(_room(slots), np.int32), 0
    for x in jax.tree.leaves(arguments):
        packed[end : end + x.size] = x.ravel()
        end += x.size
    return packed


def unpack(
    packed: Int[Array, " n"], features: Float[Array, "P N D"] | None, shape: Shape, slots: int
) -> StepArguments:
    """Reverses `pack` inside a program, and gathers the features of the step's frames."""
    leaves, structure = jax.tree.flatten(empty_arguments(shape, slots))
    end, found = 0, []
    for x in leaves:
        found.append(packed[end : end + x.size].reshape(x.shape).astype(x.dtype))
        end += x.size
    arguments = jax.tree.unflatten(structure, found)
    if (frames := arguments.frames) is None:
        return arguments
    assert features is not None, "a shape with room for frames takes features"
    return dataclasses.replace(arguments, frames=dataclasses.replace(frames, features=features[frames.index]))


@functools.cache
def _room(slots: int) -> int:
    """Length of the packed arguments of the largest shape."""
    return max(sum(x.size for x in jax.tree.leaves(empty_arguments(shape, slots))) for shape in shapes(slots))


def _width(rows: Iterable[Row]) -> int:
    """Tokens per chunk if there are several slots."""
    # Each chunk reads the keys and values of its slot, so long rows are split into few chunks.
    return 2 if all(len(row.tokens) <= 2 for row in rows) else WIDTH


def _smallest(rows: Mapping[int, Row], slots: int, image: int) -> Shape:
    """The smallest shape that fits these rows."""
    longer = [row for row in rows.values() if not row.is_decode]
    decoding, width = len(rows) - len(longer), _width(longer)
    frames = sum(len(row.placed(image)) for row in longer)
    for shape in shapes(slots):
        if slots > 1 and shape.width not in (0, width):
            continue
        chunks = sum(-(-len(row.tokens) // shape.width) for row in longer) if shape.width else len(longer)
        if decoding <= shape.decode and chunks <= shape.chunks and frames <= shape.frames:
            return shape
    raise ValueError(f"no step has room for rows of {[len(row.tokens) for row in rows.values()]} tokens")


def split_row[Frame](row: Row[Frame], image: int) -> Iterator[Row[Frame]]:
    """Splits a row into pieces that fit the buckets.

    There is one program for each token bucket and one for each frame bucket, not for their product. So a run
    of frames shares a piece with as many of the tokens around it as the program of the frames has room for.
    An `<|image|>` token without a frame counts as an ordinary token.
    """
    start = end = frames = 0
    placed = row.placed(image)

    def piece() -> Row[Frame]:
        offsets = [i for i in range(start, end) if row.tokens[i] == image] if frames else []
        return Row(row.tokens[start:end], [placed.get(i) for i in offsets], row.new_turn and start == 0)

    for is_frame, run in itertools.groupby(range(len(row.tokens)), placed.__contains__):
        left = len(list(run))
        while left:
            count = min(left, (FRAME_BUCKETS if is_frame else TOKEN_BUCKETS)[-1])
            if left == count + 1 and not is_frame:
                count -= 1  # A remainder of one token would need another program than a single pending token.
            if end > start and end - start + count > _token_room(frames + count * is_frame):
                yield piece()
                start, frames = end, 0
            end, frames, left = end + count, frames + count * is_frame, left - count
    yield piece()


def features_of(rows: Mapping[int, Row[Encoded]]) -> tuple[list[Float[Array, "P N D"]], dict[int, Row[int]]]:
    """Collects the feature batches of some rows' frames; the returned rows index their concatenation."""
    begin: dict[int, int] = {}
    batches, length = [], 0
    for frame in (frame for row in rows.values() for frame in row.frames if frame is not None):
        if id(frame.features) not in begin:
            begin[id(frame.features)] = length
            batches.append(frame.features)
            length += len(frame.features)

    def index(frame: Encoded | None) -> int | None:
        return None if frame is None else begin[id(frame.features)] + frame.index

    indexed: dict[int, Any] = {
        slot: dataclasses.replace(row, frames=[*map(index, row.frames)]) if row.frames else row
        for slot, row in rows.items()
    }
    return batches, indexed


def bucket(size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `size`, or the largest bucket."""
    return buckets[min(bisect.bisect_left(buckets, size), len(buckets) - 1)]


def _token_room(frames: int) -> int:
    """Row length, including `<|image|>` tokens, of the program for this many frames; 0 if there is none.

    At least one more than the frame bucket, since a pending token may precede the frames.
    """
    if frames > FRAME_BUCKETS[-1]:
        return 0
    return bucket(bucket(frames, FRAME_BUCKETS) + 1, TOKEN_BUCKETS) if frames else TOKEN_BUCKETS[-1]
