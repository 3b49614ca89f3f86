"""Batches of tabletop streams, generated on the fly.

B sequences, S tokens, F frames, H W pixels
"""

import numpy as np

from moss_jax.config import ConfigError, TabletopConfig
from moss_jax.data.batch import Batch
from moss_jax.data.pipeline import LoadedBatch
from moss_jax.text import Tokenizer, chat
from moss_jax.text.labels import IGNORED
from moss_jax.worlds.tabletop.dialogue import Dialogue, converse, converse_offline
from moss_jax.worlds.tabletop.requests import draw_question
from moss_jax.worlds.tabletop.stream import TRAINING, TabletopStream, draw_stream

# Speeds of speech, in tokens per second of the stream.
SPEEDS = (3, 4, 5, 6, 8, 8, 12, 16, 32)
# Share of the streams without a system prompt.
NO_SYSTEM = 0.1


class TabletopSource:
    """Base of the tabletop batch sources: the rows of this process, and the tokenizer.

    Args:
      config: settings of the streams.
      tokenizer: the model's tokenizer.
      batch_size: sequences over all processes.
      seed: together with the step, determines each batch.
      process_index: index of this process, which loads its share of the rows.
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
        self._read: Tokenizer | None = None
        self._rows = batch_size // process_count
        self._process = process_index

    def __len__(self) -> int:
        return 2**31 - 1

    def __getstate__(self):
        # Each process parses the tokenizer itself.
        return self.__dict__ | {"_read": None}

    @property
    def _tokenizer(self) -> Tokenizer:
        if self._read is None:
            self._read = Tokenizer(self._content)
        return self._read


class TabletopBatches(TabletopSource):
    """Random access to batches of whole streams, by step; see `pipeline.iterate`."""

    def __getitem__(self, step: int) -> LoadedBatch:
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
