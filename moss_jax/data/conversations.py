"""Batches of conversations about videos, bucketed by length.

B sequences, S tokens, F frames
"""

import hashlib
import os
import sys
from typing import NamedTuple

import numpy as np

from moss_jax.config import ConfigError, ConversationConfig, FrameSampling
from moss_jax.data.batch import Batch
from moss_jax.data.pipeline import LoadedBatch
from moss_jax.data.rows import DropReport, TrainingRow, read_rows
from moss_jax.text import Tokenizer
from moss_jax.text.labels import IGNORED
from moss_jax.video import VideoError, fit_frames, sample_at


class ConversationBatches:
    """The batches of all epochs: a `BatchSource` over the rows of a `ConversationConfig`.

    Each epoch visits every row once, in a new order. Rows are batched by length bucket, so that there are few
    shapes; the remainders of the buckets share batches, and the last one is filled up with repeated rows.

    Attributes:
      report: numbers of usable and dropped rows. Without usable rows there are no batches.
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
        """Reads all rows, and demuxes their media once for the frame times; see `read_rows`.

        Args:
          config: files and sizes.
          sampling: frame sampling of offline clips.
          tokenizer: the model's tokenizer.
          image_size: side of the tile that frames are resized and padded to.
          batch_size: rows of a batch over all processes; each loads its share.
          seed: for the order of the rows and the choice of swapped frames.
          process_index: index of this process.
          process_count: number of processes.

        Raises:
          ConfigError: a file cannot be read or holds no rows, or the settings are invalid.
        """
        if not config.files:
            raise ConfigError(
                "there are no rows to train on; set conversations.files to JSON files with rows"
            )
        if batch_size % process_count:
            raise ConfigError(f"batch_size {batch_size} must be a multiple of the {process_count} processes")
        rows, self.report = read_rows(config, sampling, tokenizer)
        self._rows = rows
        self._config = config
        self._image_id = tokenizer.special.image
        self._image_size = image_size
        self._batch_size = batch_size
        self._seed = seed
        share = batch_size // process_count
        self._share = slice(process_index * share, (process_index + 1) * share)
        # Bucket indices of each row, for its tokens and its frames: [rows, 2].
        self._buckets = np.stack(
            [
                np.searchsorted(config.token_buckets, [row.num_tokens for row in rows]),
                np.searchsorted(config.frame_buckets, [row.num_frames for row in rows]),
            ],
            axis=1,
        )
        self.batches_per_epoch = -(-len(rows) // batch_size)
        self._epoch_plan: tuple[int, list[np.ndarray]] = (-1, [])

    @property
    def fingerprint(self) -> str:
        """Hash of the rows in their order, with the times and relative paths of their media."""
        digest = hashlib.sha256()
        for row in self._rows:
            media = [(os.path.relpath(m.path, self._config.media_root), m.times) for m in row.media]
            digest.update(repr((len(row.tokens), media)).encode())
            for array in (row.tokens, row.is_target, row.swappable):
                digest.update(array.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        """Number of batches: practically unlimited, since epochs repeat."""
        return sys.maxsize if self._rows else 0

    def __getitem__(self, step: int) -> LoadedBatch:
        epoch, index = divmod(step, self.batches_per_epoch)
        if self._epoch_plan[0] != epoch:
            self._epoch_plan = (epoch, self._plan(epoch))
        members = self._epoch_plan[1][index]
        token_bucket, frame_bucket = self._buckets[members].max(axis=0)
        length = self._config.token_buckets[token_bucket]
        capacity = self._config.frame_buckets[frame_bucket]
        return self._load(epoch, members[self._share], length, capacity)

    def _plan(self, epoch: int) -> list[np.ndarray]:
        """Returns the row indices of each batch of an epoch."""
        rng = np.random.default_rng([self._seed, epoch, 0])
        order = rng.permutation(len(self._rows))
        full, remainders = [], []
        for bucket in np.unique(self._buckets, axis=0):
            members = order[(self._buckets[order] == bucket).all(axis=1)]
            whole = len(members) // self._batch_size * self._batch_size
            full += np.split(members[:whole], whole // self._batch_size) if whole else []
            remainders.append(members[whole:])
        # Buckets ascend, so that the remainder of one is padded to the next larger ones.
        left = np.concatenate(remainders)
        rest = [left[i : i + self._batch_size] for i in range(0, len(left), self._batch_size)]
        if rest:
            rest[-1] = self._fill(rest[-1], order)
        batches = full + rest
        return [batches[i] for i in rng.permutation(len(batches))]

    def _fill(self, members: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Fills a batch with the first rows of the epoch that fit its shape."""
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
            # The plan of the epoch uses 0 as the third number of its seed.
            rng = np.random.default_rng([self._seed, epoch, 1 + member])
            try:
                sequence = self._load_row(row, rng)
            except (VideoError, OSError) as error:
                dropped.append(f"{row.name}: {error}")
                continue
            used = len(sequence.tokens)
            tokens[b, :used] = sequence.tokens
            labels[b, :used] = np.where(sequence.is_target, sequence.tokens, IGNORED)
            (at,) = np.nonzero(sequence.tokens == self._image_id)
            positions[b, : len(at)] = at
            for f, frame in enumerate(sequence.frames):
                frames[b, f] = frame
        return LoadedBatch(Batch(tokens, labels, frames, positions), tuple(dropped))

    def _load_row(self, row: TrainingRow, rng: np.random.Generator) -> "_Sequence":
        """Decodes the frames of a row and places their tokens.

        Raises:
          VideoError: a medium cannot be read.
        """
        frames = [
            frame.rgb
            for medium in row.media
            for frame in fit_frames(sample_at(medium.path, medium.times), self._image_size)
        ]
        tokens, is_target = row.tokens, row.is_target
        if row.realtime:
            tokens, is_target = tokens.copy(), is_target.copy()
            swapped = row.swappable[rng.random(len(row.swappable)) < self._config.swap_probability]
            for values in (tokens, is_target):
                values[swapped - 1], values[swapped] = values[swapped], values[swapped - 1]
        else:
            repeats = np.ones(len(tokens), int)
            repeats[tokens == self._image_id] = [len(medium.times) for medium in row.media]
            tokens, is_target = np.repeat(tokens, repeats), np.repeat(is_target, repeats)
        return _Sequence(tokens, is_target, frames)


class _Sequence(NamedTuple):
    """Tokens of a row with an `<|image|>` per frame, the mask of targets, and the frames."""

    tokens: np.ndarray
    is_target: np.ndarray
    frames: list[np.ndarray]
