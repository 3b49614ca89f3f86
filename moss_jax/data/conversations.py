"""Batches of conversations about videos.

B sequences, S tokens, F frames
"""

import sys
from typing import NamedTuple

import numpy as np

from moss_jax.config import ConfigError, ConversationConfig, FrameSampling
from moss_jax.data.batch import Batch
from moss_jax.data.pipeline import LoadedBatch
from moss_jax.data.rows import DropReport, Medium, Row, read_rows
from moss_jax.text import Tokenizer
from moss_jax.text.labels import IGNORED
from moss_jax.video import VideoError, clip_times, fit_frame, sample_at


class ConversationBatches:
    """The batches of all epochs, in order; see `ConversationConfig` for what they are made of.

    In an epoch every row comes once, in a new order. Rows of a batch have about the same length, so that
    there are few shapes; what is left of several lengths shares batches at the end, and the last one is
    filled up with rows that come again.

    Attributes:
      report: which rows can be used and why the others can't. Without any there are no batches.
      batches_per_epoch: the same in every epoch.
    """

    report: DropReport
    batches_per_epoch: int

    def __init__(
        self,
        config: ConversationConfig,
        sampling: FrameSampling,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Reads all rows and the headers of their media, but decodes nothing.

        Args:
          image_size: side of the tile that frames are fitted into.
          batch_size: rows of a batch over all processes; each loads its share.

        Raises:
          ConfigError: a file is not there or is no list of rows in JSON, or the settings cannot work.
        """
        if not config.files:
            raise ConfigError("there are no rows to train on; set conversations.files to their JSON files")
        if batch_size % process_count:
            raise ConfigError(f"batch_size {batch_size} must be a multiple of the {process_count} processes")
        rows, self.report = read_rows(config, sampling, tokenizer)
        self._rows = rows
        self._config = config
        self._sampling = sampling
        self._image_id = tokenizer.special.image
        self._image_size = image_size
        self._batch_size = batch_size
        self._seed = seed
        share = batch_size // process_count
        self._share = slice(process_index * share, (process_index + 1) * share)
        # The bucket of each row: index of its number of tokens, and of frames.
        self._buckets = np.stack(
            [
                np.searchsorted(config.token_buckets, [row.max_tokens for row in rows]),
                np.searchsorted(config.frame_buckets, [row.max_frames for row in rows]),
            ],
            axis=1,
        )
        self.batches_per_epoch = -(-len(rows) // batch_size)
        self._planned: tuple[int, list[np.ndarray]] = (-1, [])

    def __len__(self) -> int:
        """As good as endless: epoch follows epoch."""
        return sys.maxsize if self._rows else 0

    def __getitem__(self, step: int) -> LoadedBatch:
        epoch, index = divmod(step, self.batches_per_epoch)
        if self._planned[0] != epoch:
            self._planned = (epoch, self._plan(epoch))
        members = self._planned[1][index]
        token_bucket, frame_bucket = self._buckets[members].max(axis=0)
        length = self._config.token_buckets[token_bucket]
        capacity = self._config.frame_buckets[frame_bucket]
        return self._load(epoch, members[self._share], length, capacity)

    def _plan(self, epoch: int) -> list[np.ndarray]:
        """The rows of each batch of an epoch."""
        rng = np.random.default_rng([self._seed, epoch, 0])
        order = rng.permutation(len(self._rows))
        full, left = [], []
        for bucket in np.unique(self._buckets, axis=0):
            members = order[(self._buckets[order] == bucket).all(axis=1)]
            whole = len(members) // self._batch_size * self._batch_size
            full += np.split(members[:whole], whole // self._batch_size) if whole else []
            left.append(members[whole:])
        # Buckets ascend, so that what is left of one goes up with the next.
        left = np.concatenate(left)
        rest = [left[i : i + self._batch_size] for i in range(0, len(left), self._batch_size)]
        if rest:
            rest[-1] = self._fill(rest[-1], order)
        batches = full + rest
        return [batches[i] for i in rng.permutation(len(batches))]

    def _fill(self, members: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Fills a batch up with rows from the epoch's beginning that fit its shape."""
        fitting = (self._buckets[order] <= self._buckets[members].max(axis=0)).all(axis=1)
        others = order[fitting & ~np.isin(order, members)]
        again = np.resize(np.concatenate([others, members]), self._batch_size - len(members))
        return np.concatenate([members, again])

    def _load(self, epoch: int, members: np.ndarray, length: int, capacity: int) -> LoadedBatch:
        rows, size = len(members), self._image_size
        tokens = np.zeros((rows, length), np.int32)
        labels = np.full((rows, length), IGNORED, np.int32)
        frames = np.zeros((rows, capacity, size, size, 3), np.uint8)
        positions = np.full((rows, capacity), length, np.int32)
        dropped = []
        for b, member in enumerate(members.tolist()):
            row = self._rows[member]
            # The plan of the epoch has 0.
            rng = np.random.default_rng([self._seed, epoch, 1 + member])
            try:
                sequence = self._load_row(row, rng)
            except (VideoError, OSError) as error:
                dropped.append(f"{row.name}: {error}")
                continue
            used = len(sequence.tokens)
            tokens[b, :used] = sequence.tokens
            labels[b, :used] = np.where(sequence.learnt, sequence.tokens, IGNORED)
            (at,) = np.nonzero(sequence.tokens == self._image_id)
            positions[b, : len(at)] = at
            for f, frame in enumerate(sequence.frames):
                frames[b, f] = frame
        return LoadedBatch(Batch(tokens, labels, frames, positions), tuple(dropped))

    def _load_row(self, row: Row, rng: np.random.Generator) -> "_Sequence":
        """A row with its frames.

        Raises:
          VideoError: a medium cannot be read, or has more frames than its header lets expect.
        """
        frames, counts = [], []
        for medium in row.media:
            fitted = self._fitted_frames(medium)
            frames += fitted
            counts.append(len(fitted))
        if len(frames) > row.max_frames:
            raise VideoError(f"it has {len(frames)} frames, but its headers let expect {row.max_frames}")

        tokens, learnt = row.tokens, row.learnt
        if row.realtime:
            tokens, learnt = tokens.copy(), learnt.copy()
            moved = row.movable[rng.random(len(row.movable)) < self._config.swap_probability]
            for values in (tokens, learnt):
                values[moved - 1], values[moved] = values[moved], values[moved - 1]
        else:
            repeats = np.ones(len(tokens), int)
            repeats[tokens == self._image_id] = counts
            tokens, learnt = np.repeat(tokens, repeats), np.repeat(learnt, repeats)
        return _Sequence(tokens, learnt, frames)

    def _fitted_frames(self, medium: Medium) -> list[np.ndarray]:
        times = clip_times(medium.path, self._sampling) if medium.times is None else medium.times
        fitted, rgb = [], None
        for frame in sample_at(medium.path, times):
            # A frame that stands for several times is one array.
            fitted.append(fitted[-1] if frame.rgb is rgb else fit_frame(frame.rgb, self._image_size))
            rgb = frame.rgb
        return fitted


class _Sequence(NamedTuple):
    """Tokens of a row with an `<|image|>` for each frame, which of them are learnt, and the frames."""

    tokens: np.ndarray
    learnt: np.ndarray
    frames: list[np.ndarray]
