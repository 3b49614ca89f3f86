"""Batches of segments of long tabletop streams, each of which starts where the previous one ended.

B sequences, K segments, S tokens, F frames
"""

import bisect
import copy
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Self

import numpy as np

from moss_jax.config import MemoryConfig, SegmentsConfig, TabletopConfig
from moss_jax.data.batch import Batch, Segments
from moss_jax.data.pipeline import LoadedBatch
from moss_jax.data.worlds import NO_SYSTEM, SPEEDS, TabletopSource
from moss_jax.memory.eviction import Kind, tokens_to_keep
from moss_jax.text import Tokenizer, chat
from moss_jax.text.labels import IGNORED
from moss_jax.worlds.tabletop.dialogue import Dialogue, converse, converse_offline
from moss_jax.worlds.tabletop.requests import draw_question
from moss_jax.worlds.tabletop.stream import TRAINING, TabletopStream, draw_stream

# Maximum length of a short stream, in seconds, whose requests are the usual ones.
SHORT = 80
# Longest times without a frame in streams whose frames are selected, in seconds.
MAX_GAPS = (2, 3, 5, 10, 30)


@dataclasses.dataclass(frozen=True)
class CutStream:
    """A stream cut into segments, with the changes to the memory before each.

    Attributes:
      shown: for each second, whether the model is shown its frame.
      bounds: index of the first token of each segment, and the end of the last one.
      skipped: positions that are left out before each segment.
      kept: for each segment, the tokens that stay in the text cache before it.
    """

    stream: TabletopStream
    dialogue: Dialogue
    shown: list[bool]
    bounds: list[int]
    skipped: list[int]
    kept: list[list[int]]


class TabletopSegments(TabletopSource):
    """Random access to batches of segments, by step: each row continues the same row of the previous batch.

    Args:
      config: settings of the streams; their lengths and the warm-up are ignored.
      segments: lengths of streams and segments, and what is drawn for each.
      tokenizer, source: as for `TabletopSource`.
    """

    def __init__(self, config: TabletopConfig, segments: SegmentsConfig, tokenizer: Tokenizer, **source: int):
        super().__init__(config, tokenizer, **source)
        self.segments = segments
        # The current stream of each row, with its number: drawn once for all its segments.
        self._streams: dict[int, tuple[int, CutStream]] = {}

    def __getstate__(self):
        return super().__getstate__() | {"_streams": {}}

    def split(self, most: int) -> list[Self]:
        """Splits the rows evenly among as many sources as possible, at most `most`."""
        count = max(count for count in range(1, most + 1) if self._rows % count == 0)
        parts = [copy.copy(self) for _ in range(count)]
        for index, part in enumerate(parts):
            part._rows, part._process = self._rows // count, self._process * count + index
            part._streams = {}
        return parts

    def __getitem__(self, step: int) -> LoadedBatch:
        config, rows, K = self.segments, self._rows, self.segments.per_step
        S, F, size = K * config.tokens, K * config.frames, self.config.image_size
        batch = Batch(
            tokens=np.zeros((rows, S), np.int32),
            labels=np.full((rows, S), IGNORED, np.int32),
            frames=np.zeros((rows, F, size, size, 3), np.uint8),
            frame_positions=np.full((rows, F), S, np.int32),
            segments=Segments(
                begins=np.zeros((rows, K), bool),
                lengths=np.zeros((rows, K), np.int32),
                skipped=np.zeros((rows, K), np.int32),
                kept=np.zeros((rows, K, max(config.text_capacities)), np.int32),
                kept_length=np.zeros((rows, K), np.int32),
            ),
        )
        for row in range(rows):
            for k in range(K):
                self._fill(batch, row, k, step * K + k)
        return LoadedBatch(batch)

    def _fill(self, batch: Batch, row: int, k: int, place: int) -> None:
        """Fills in segment `k` of a row, number `place` of all segments of that row."""
        config, segments = self.segments, batch.segments
        assert segments is not None
        number = self._process * self._rows + row
        group = number // len(config.memories)
        length = config.streams[group % len(config.streams)]
        # The first stream of a row is shorter, so that not all rows of one length begin at the same step.
        missing = number * config.per_step % length
        index, segment = divmod(place + missing, length)
        segment -= missing if index == 0 else 0
        cut = self._stream(number, index, length)
        dialogue, (begin, end) = cut.dialogue, cut.bounds[segment : segment + 2]
        at = k * config.tokens
        batch.tokens[row, at : at + end - begin] = dialogue.tokens[begin:end]
        batch.labels[row, at : at + end - begin] = dialogue.labels[begin:end]
        seconds = range(*(bisect.bisect_left(dialogue.frame_positions, bound) for bound in (begin, end)))
        shown = [second for second in seconds if cut.shown[second]]
        frames = slice(k * config.frames, k * config.frames + len(shown))
        batch.frame_positions[row, frames] = [dialogue.frame_positions[s] - begin + at for s in shown]
        size = self.config.image_size
        if len(shown) == len(seconds) > 0:
            batch.frames[row, frames] = cut.stream.frames(size, seconds.start, seconds.stop)
        elif shown:
            batch.frames[row, frames] = np.concatenate([cut.stream.frames(size, s, s + 1) for s in shown])
        kept = cut.kept[segment]
        segments.begins[row, k] = segment == 0
        segments.lengths[row, k] = end - begin
        segments.skipped[row, k] = cut.skipped[segment]
        segments.kept[row, k, : len(kept)] = kept
        segments.kept_length[row, k] = len(kept)

    def _stream(self, number: int, index: int, length: int) -> CutStream:
        """Stream `index` of a row, of `length` segments."""
        if number not in self._streams or self._streams[number][0] != index:
            rng = np.random.default_rng([TRAINING, self.seed, number, index])
            self._streams[number] = index, self._draw(rng, length)
        return self._streams[number][1]

    def _draw(self, rng: np.random.Generator, length: int) -> CutStream:
        config = self.segments
        seconds = length * config.frames
        is_short = seconds <= SHORT
        narrated = bool(config.narrated) and rng.random() < config.narrated
        is_usual = is_short or (config.usual and rng.random() < config.usual)
        is_late = not is_usual and config.late and rng.random() < config.late
        stream = draw_stream(
            rng,
            seconds,
            past=None if is_usual else config.past,
            paces=config.paces,
            old=0.0 if is_usual else config.old,
            quiet=rng.uniform() if is_late or narrated else 0.0,
            narrated=narrated,
        )
        if is_short and rng.random() < self.config.offline_share:
            question = draw_question(rng, stream.world)
            dialogue = converse_offline(stream.world, question, self._tokenizer, rng=rng)
        else:
            dialogue = converse(
                stream.world,
                stream.requests,
                self._tokenizer,
                tokens_per_second=int(rng.choice(SPEEDS)),
                rng=rng,
                system=None if rng.random() < NO_SYSTEM else chat.SYSTEM_PROMPT,
            )
        bounds = list(segment_bounds(dialogue, config.tokens, config.frames, length))
        skips = np.zeros(length, int)
        if rng.random() < 0.5:
            gaps = np.exp(rng.uniform(np.log(config.frames), np.log(config.max_skip), length))
            skips = np.where(rng.random(length) < config.skips, gaps, 0).astype(int)
        capacity = int(rng.choice(config.text_capacities))
        kept = list(kept_tokens(dialogue, bounds, capacity, self._tokenizer.special.silence))
        gap = int(rng.choice(MAX_GAPS)) if rng.random() < self.segments.selected else 1
        return CutStream(stream, dialogue, shown_seconds(stream, gap), bounds, skips.tolist(), kept)


def segment_bounds(dialogue: Dialogue, tokens: int, frames: int, count: int) -> Iterator[int]:
    """Yields the start of each of `count` segments, then the end of the last one.

    Each segment is as long as possible and ends before a frame, whose token is never a target. Tokens after
    the last segment are dropped; if the tokens run out earlier, the remaining segments are empty.
    """
    ends = [*dialogue.frame_positions, len(dialogue.tokens)]
    at = 0
    yield at
    for _ in range(count):
        most = min(bisect.bisect_left(dialogue.frame_positions, at) + frames, len(ends) - 1)
        fitting = [end for end in ends[max(most - frames, 0) : most + 1] if at < end <= at + tokens]
        # A run of tokens between two frames that is too long for one segment is split.
        at = fitting[-1] if fitting else min(at + tokens, len(dialogue.tokens))
        yield at


def shown_seconds(stream: TabletopStream, max_gap: int) -> list[bool]:
    """For each second, whether its frame is shown: where something changed, or after `max_gap` seconds.

    Frames are selected as in a live session, but by the ground truth instead of the pixels.
    """
    world = stream.world
    shown = [0]
    for second in range(1, world.seconds):
        views = [(world.tables[s], world.impairment(s)) for s in (shown[-1], second)]
        if views[0] != views[1] or second - shown[-1] >= max_gap:
            shown.append(second)
    chosen = set(shown)
    return [second in chosen for second in range(world.seconds)]


def kept_tokens(dialogue: Dialogue, bounds: list[int], capacity: int, silence: int) -> Iterator[list[int]]:
    """Yields the tokens that stay in a text cache before each segment, by the rules of a live stream."""
    kinds: list[Kind] = []
    memory, all_kinds = MemoryConfig(), kinds_of(dialogue, silence)
    for begin, end in itertools.pairwise(bounds):
        kept = list(range(len(kinds)))
        if len(kinds) + end - begin > capacity:
            room = min(memory.low_mark(capacity), capacity - (end - begin))
            kept = tokens_to_keep(kinds, room, memory, capacity)
        yield kept
        kinds = [kinds[i] for i in kept] + all_kinds[begin:end]


def kinds_of(dialogue: Dialogue, silence: int) -> list[Kind]:
    """Kind of each token, for the eviction from the text cache."""
    image = set(dialogue.frame_positions)
    opening = next((i for i, label in enumerate(dialogue.labels) if label != IGNORED), len(dialogue.labels))
    return [
        Kind.FRAME
        if i in image
        else Kind.PINNED
        if i < opening
        else Kind.SILENCE
        if token == silence
        else Kind.USER
        if label == IGNORED
        else Kind.ASSISTANT
        for i, (token, label) in enumerate(zip(dialogue.tokens, dialogue.labels, strict=True))
    ]
