"""Batches of tabletop streams, generated on the fly.

B sequences, S tokens, F frames, H W pixels
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from moss_jax.config import ConfigError, MemoryConfig, SegmentsConfig, TabletopConfig
from moss_jax.data.batch import Batch, Segments
from moss_jax.data.pipeline import LoadedBatch
from moss_jax.memory.eviction import Kind, tokens_to_keep
from moss_jax.text import Tokenizer, chat
from moss_jax.text.labels import IGNORED
from moss_jax.worlds.tabletop.dialogue import Dialogue, converse, converse_offline, draw_question
from moss_jax.worlds.tabletop.stream import TRAINING, TabletopStream, draw_stream

# Speeds of speech, in tokens per second of the stream.
SPEEDS = (3, 4, 5, 6, 8, 8, 12, 16, 32)
# Share of the streams without a system prompt.
NO_SYSTEM = 0.1
# Seconds up to which a stream is a short one, and the share of questions about the past in longer ones.
SHORT = 32
PAST_SHARE = 0.5


class TabletopBatches:
    """Random access to the batches of a training run, by step; see `pipeline.iterate`.

    Args:
      config: of the streams.
      tokenizer: of the model.
      batch_size: sequences over all processes.
      seed: determines the batches, each together with its step.
      process_index: of this process, which loads its share of the rows.
      process_count: number of processes.

    Raises:
      ConfigError: the processes can't share a batch evenly.
    """

    def __init__(
        self,
        config: TabletopConfig,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if batch_size % process_count:
            raise ConfigError(f"batch_size {batch_size} must be a multiple of the {process_count} processes")
        self.config, self.seed = config, seed
        self._content = tokenizer.content
        self._tokenizer: Tokenizer | None = None
        self._rows = batch_size // process_count
        self._process = process_index

    def __len__(self) -> int:
        return 2**31 - 1

    def __getstate__(self):
        # Each process reads its own tokenizer.
        return self.__dict__ | {"_tokenizer": None}

    def __getitem__(self, step: int) -> LoadedBatch:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self._content)
        config = self.config
        short = step < config.warmup_batches
        rows = self._rows * (config.warmup_factor if short else 1)
        tokens = config.warmup_tokens if short else config.max_tokens
        seconds = config.warmup_seconds if short else config.max_seconds
        size = config.image_size
        batch = Batch(
            tokens=np.zeros((rows, tokens), np.int32),
            labels=np.full((rows, tokens), IGNORED, np.int32),
            frames=np.zeros((rows, seconds, size, size, 3), np.uint8),
            frame_positions=np.full((rows, seconds), tokens, np.int32),
        )
        for row in range(rows):
            rng = np.random.default_rng([TRAINING, self.seed, step, self._process * rows + row])
            stream, dialogue = self._sample(rng, short, self._tokenizer)
            length = min(len(dialogue.tokens), tokens)
            batch.tokens[row, :length] = dialogue.tokens[:length]
            batch.labels[row, :length] = dialogue.labels[:length]
            positions = [p for p in dialogue.frame_positions if p < length]
            batch.frame_positions[row, : len(positions)] = positions
            batch.frames[row, : len(positions)] = stream.frames(size)[: len(positions)]
        return LoadedBatch(batch)

    def _sample(
        self, rng: np.random.Generator, short: bool, tokenizer: Tokenizer
    ) -> tuple[TabletopStream, Dialogue]:
        config = self.config
        if short:
            stream = draw_stream(rng, config.warmup_seconds, dense=True)
        else:
            seconds = int(rng.integers(config.min_seconds, config.max_seconds + 1))
            stream = draw_stream(rng, seconds)
        if not short and rng.random() < config.offline_share:
            question = draw_question(rng, stream.world)
            return stream, converse_offline(stream.world, question, tokenizer, rng=rng)
        speed = 32 if short else int(rng.choice(SPEEDS))
        system = None if short or rng.random() < NO_SYSTEM else chat.SYSTEM_PROMPT
        return stream, converse(
            stream.world, stream.requests, tokenizer, tokens_per_second=speed, rng=rng, system=system
        )


@dataclasses.dataclass(frozen=True)
class CutStream:
    """A stream cut into segments, each with what happens to the memory before it.

    Attributes:
      bounds: index of the token at which each segment begins, and of the end of the last.
      skipped: positions that are left out before each segment.
      kept: of each segment, the tokens that stay in the text cache before it.
    """

    stream: TabletopStream
    dialogue: Dialogue
    bounds: list[int]
    skipped: list[int]
    kept: list[list[int]]


class TabletopSegments:
    """Random access to batches of segments: row `b` of each continues that of the batch before.

    Args:
      config: of the streams; of its lengths and the warm-up, nothing is used.
      segments: lengths of streams and segments, and what is drawn for each.
      tokenizer, batch_size, seed, process_index, process_count: as for `TabletopBatches`.
    """

    def __init__(
        self,
        config: TabletopConfig,
        segments: SegmentsConfig,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if batch_size % process_count:
            raise ConfigError(f"batch_size {batch_size} must be a multiple of the {process_count} processes")
        self.config, self.segments, self.seed = config, segments, seed
        self._content = tokenizer.content
        self._tokenizer: Tokenizer | None = None
        self._rows = batch_size // process_count
        self._process = process_index
        # The stream that each row is in, with its number: drawn once for all its segments.
        self._streams: dict[int, tuple[int, CutStream]] = {}

    def __len__(self) -> int:
        return 2**31 - 1

    def __getstate__(self):
        # Each process reads its own tokenizer and draws its own streams.
        return self.__dict__ | {"_tokenizer": None, "_streams": {}}

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
        first, last = (bisect.bisect_left(dialogue.frame_positions, bound) for bound in (begin, end))
        frames = slice(k * config.frames, k * config.frames + last - first)
        batch.frame_positions[row, frames] = [p - begin + at for p in dialogue.frame_positions[first:last]]
        if last > first:
            batch.frames[row, frames] = cut.stream.frames(self.config.image_size, first, last)
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
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self._content)
        seconds = length * config.frames
        is_short = seconds <= SHORT
        stream = draw_stream(rng, seconds, past=None if is_short else PAST_SHARE)
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
        return CutStream(stream, dialogue, bounds, skips.tolist(), kept)


def segment_bounds(dialogue: Dialogue, tokens: int, frames: int, count: int) -> Iterator[int]:
    """Where each of `count` segments begins, and the end of the last.

    A segment is as long as it can be and ends before a frame, whose token is never a target. What is left
    behind the last is dropped; if nothing is left before, segments are empty.
    """
    ends = [*dialogue.frame_positions, len(dialogue.tokens)]
    at = 0
    yield at
    for _ in range(count):
        most = min(bisect.bisect_left(dialogue.frame_positions, at) + frames, len(ends) - 1)
        fitting = [end for end in ends[max(most - frames, 0) : most + 1] if at < end <= at + tokens]
        # More tokens between two frames than fit are cut where they are.
        at = fitting[-1] if fitting else min(at + tokens, len(dialogue.tokens))
        yield at


def kept_tokens(dialogue: Dialogue, bounds: list[int], capacity: int, silence: int) -> Iterator[list[int]]:
    """Tokens that stay in a text cache before each segment, by the rules of a live stream."""
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
