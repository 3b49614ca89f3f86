"""Tabletop batches: shapes, contents, and that step and seed alone determine a batch."""

import contextlib
import dataclasses
import itertools
import pickle

import numpy as np
import pytest

from moss_jax.config import ConfigError, TabletopConfig
from moss_jax.data.batch import Batch
from moss_jax.data.pipeline import iterate
from moss_jax.data.worlds import TabletopBatches
from moss_jax.text import Tokenizer, chat
from moss_jax.text.labels import IGNORED
from moss_jax.worlds.tabletop.language import WAIT, understand

# Batches 0 and 1 are warm-up: short clips with dense questions.
CONFIG = TabletopConfig(
    image_size=32,
    min_seconds=3,
    max_seconds=6,
    max_tokens=320,
    warmup_batches=2,
    warmup_seconds=2,
    warmup_tokens=128,
    warmup_factor=3,
)


@pytest.fixture(scope="module")
def make(tokenizer):
    def make(*, batch_size=4, seed=0, process_index=0, process_count=1, **changes) -> TabletopBatches:
        return TabletopBatches(
            dataclasses.replace(CONFIG, **changes),
            tokenizer,
            batch_size=batch_size,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
        )

    return make


def arrays(batch: Batch) -> dict[str, np.ndarray]:
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    assert fields.pop("segments") is None
    return fields


def equal(a: Batch, b: Batch) -> bool:
    return all(map(np.array_equal, arrays(a).values(), arrays(b).values()))


def lengths(batch: Batch) -> np.ndarray:
    """Number of tokens of each row; id 0 is padding."""
    return np.array([len(np.trim_zeros(row, "b")) for row in batch.tokens])


# -------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("step", "rows", "tokens", "seconds"), [(0, 12, 128, 2), (1, 12, 128, 2), (2, 4, 320, 6), (99, 4, 320, 6)]
)
def test_shapes(make, step, rows, tokens, seconds):
    loaded = make()[step]
    assert loaded.dropped == ()
    batch = loaded.batch
    assert {name: (a.shape, a.dtype) for name, a in arrays(batch).items()} == {
        "tokens": ((rows, tokens), np.int32),
        "labels": ((rows, tokens), np.int32),
        "frames": ((rows, seconds, 32, 32, 3), np.uint8),
        "frame_positions": ((rows, seconds), np.int32),
    }


def test_batches_are_endless(make):
    assert len(make()) > 10**9
    assert make()[10**6].batch.tokens.any()


def test_processes_must_share_a_batch_evenly(make):
    with pytest.raises(ConfigError, match="batch_size 5 must be a multiple of the 2 processes"):
        make(batch_size=5, process_count=2)


# ------------------------------------------------------------------------------------- contents


@pytest.mark.parametrize("changes", [{}, {"max_tokens": 60, "warmup_tokens": 20}])
def test_rows_are_consistent(make, tokenizer, changes):
    """Tokens, labels, frames and frame positions, also where a sequence is truncated."""
    source = make(batch_size=8, **changes)
    full = 0
    for step in range(4):
        batch = source[step].batch
        rows, most = batch.tokens.shape
        for row in range(rows):
            tokens, labels = batch.tokens[row], batch.labels[row]
            length = lengths(batch)[row]
            full += length == most
            assert tokens[0] == tokenizer.special.begin_of_text
            assert (labels[length:] == IGNORED).all()
            assert (tokens[:length] > 0).all()
            learnt = labels != IGNORED
            np.testing.assert_array_equal(labels[learnt], tokens[learnt])

            (images,) = np.nonzero(tokens == tokenizer.special.image)
            positions = batch.frame_positions[row]
            np.testing.assert_array_equal(positions[: len(images)], images)
            assert (positions[len(images) :] == most).all()
            assert batch.frames[row, : len(images)].any(axis=(1, 2, 3)).all()
            assert not batch.frames[row, len(images) :].any()
    assert bool(full) == bool(changes)


def test_streams_have_all_lengths(make):
    source = make(batch_size=16)
    normal = np.concatenate([source[step].batch.frame_positions for step in (2, 3)])
    assert set((normal < 320).sum(axis=1)) == {3, 4, 5, 6}
    assert ((source[0].batch.frame_positions < 128).sum(axis=1) == 2).all()


def test_frames_of_a_row_are_of_one_stream(make):
    """Frames of one row resemble each other more than those of other rows."""
    frames = make()[2].batch.frames[:, :3].astype(float)
    within = np.abs(frames[:, 0] - frames[:, 1]).mean(axis=(1, 2, 3))
    between = [np.abs(a[0] - b[0]).mean() for i, a in enumerate(frames) for b in frames[:i]]
    assert within.mean() < 0.5 * np.mean(between)


def turns(tokenizer: Tokenizer, row: np.ndarray) -> list[str]:
    """The roles of the turns of a sequence."""
    special = tokenizer.special
    (at,) = np.nonzero(row == special.start_header)
    return [tokenizer.decode(row[i + 1 : i + 1 + list(row[i + 1 :]).index(special.end_header)]) for i in at]


def test_labels_are_sentences_of_the_language(make, tokenizer):
    batch = make(batch_size=12, offline_share=0.0)[5].batch
    sentences = 0
    for row in batch.labels:
        learnt = "".join("|" if t in tokenizer.control_ids else tokenizer.decode([t]) for t in row[row > 0])
        for said in learnt.split("|"):
            for part in said.split(WAIT):
                sentences += understand(part, "star") is not None
    assert sentences > 10


def test_offline_rows_see_the_whole_clip_first(make, tokenizer):
    special = tokenizer.special
    for share, expected in ((0.0, [0]), (1.0, [16]), (0.5, range(3, 14))):
        batch = make(batch_size=16, offline_share=share)[2].batch
        # An offline answer ends its turn.
        offline = (batch.labels == special.eot).any(axis=1)
        assert offline.sum() in expected
        for row in np.flatnonzero(offline):
            positions = batch.frame_positions[row]
            positions = positions[positions < batch.tokens.shape[1]]
            assert (np.diff(positions) == 1).all()
            assert turns(tokenizer, batch.tokens[row]) == ["user", "assistant"]
            assert special.silence not in batch.labels[row]
        for row in np.flatnonzero(~offline):
            assert special.silence in batch.labels[row]


def test_most_streams_have_a_system_prompt(make, tokenizer):
    opening = chat.opening(tokenizer, system=chat.SYSTEM_PROMPT)
    system = opening[: opening.index(tokenizer.special.eot)]
    source = make(batch_size=100, offline_share=0.0)
    has = [row[: len(system)].tolist() == system for row in source[2].batch.tokens]
    assert 75 < sum(has) < 100
    assert not any("system" in turns(tokenizer, row) for row in source[0].batch.tokens)


def test_warm_up_clips_are_dense(make, tokenizer):
    source = make(batch_size=8)
    users = [turns(tokenizer, row).count("user") for row in source[0].batch.tokens]
    assert np.mean(users) >= 2.5
    # Speech is fast enough that nearly every answer ends, in a silence.
    silences = (source[0].batch.labels == tokenizer.special.silence).sum(axis=1)
    assert (silences > users).mean() > 0.5


def test_speeds_of_speech_vary(make, tokenizer):
    """Speech that lasts from one frame to the next has about the tokens of one second between them."""
    speeds = set()
    source = make(batch_size=40, offline_share=0.0, min_seconds=6)
    for batch in (source[2].batch, source[3].batch):
        said = (batch.labels != IGNORED) & (batch.labels != tokenizer.special.silence)
        for speaks, positions in zip(said, batch.frame_positions, strict=True):
            for a, b in itertools.pairwise(positions[positions < len(speaks) - 1]):
                if speaks[a + 1 : b].all() and speaks[b + 1]:
                    speeds.add(int(b - a - 1))
    assert {3, 4, 5, 6, 8} <= speeds


# ---------------------------------------------------------------------------------- determinism


def test_step_and_seed_determine_a_batch(make):
    source = make()
    ahead = {step: source[step].batch for step in (5, 0, 3)}
    for step, batch in ahead.items():
        assert equal(make()[step].batch, batch)
    assert not equal(ahead[5], ahead[3])
    assert not equal(make(seed=1)[5].batch, ahead[5])


def test_all_rows_differ(make):
    source = make()
    rows = [row.tobytes() for step in range(5) for row in source[step].batch.frames[:, :2]]
    assert len(set(rows)) == len(rows) == 2 * 12 + 3 * 4


@pytest.mark.parametrize("step", [0, 2])
def test_processes_share_a_batch(make, step):
    whole = arrays(make()[step].batch)
    shares = [arrays(make(process_index=i, process_count=2)[step].batch) for i in range(2)]
    for name, values in whole.items():
        np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), values)


def test_a_source_can_be_pickled(make):
    source = make()
    fresh = pickle.dumps(source)
    batch = source[3].batch
    content = pickle.dumps(source)
    # Without the tokenizer that it has loaded.
    assert content == fresh
    assert len(content) < 2**20
    assert equal(pickle.loads(content)[3].batch, batch)


def test_workers_give_the_same_batches(make):
    source = make(batch_size=2, warmup_factor=1)
    drawn = {}
    for workers in (0, 2):
        with contextlib.closing(iterate(source, start=1, workers=workers, read_ahead=4)) as batches:
            drawn[workers] = [next(batches).batch for _ in range(4)]
    assert all(map(equal, *drawn.values()))
    assert drawn[0][0].tokens.shape == (2, 128)
    assert drawn[0][1].tokens.shape == (2, 320)
