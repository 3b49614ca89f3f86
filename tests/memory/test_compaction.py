"""Banks through any sequence of appends and compactions, and through twelve hours of them.

N vectors of a frame, D head
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from banks import empty_bank
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.config import CompressorConfig, MemoryConfig, moss_tiny
from moss_jax.memory import NO_POSITION, remember_frames, vectors_visible
from moss_jax.memory.policies import POLICIES, make_policy

FRAMES = 12  # Whole frames of the banks here.
GROUP = 3  # Frames of an append, at most.
COMPACT = 0  # In a sequence of appends, a compaction.


@functools.cache
def model():
    """5 vectors a frame; one small layer of each kind."""
    config = moss_tiny()
    decoder = dataclasses.replace(
        config.decoder, num_layers=2, hidden_size=4, num_heads=1, num_kv_heads=1, cross_attention_layers=(1,)
    )
    return dataclasses.replace(config, decoder=decoder, compressor=CompressorConfig(stride=4))


VECTORS = model().vectors_per_frame
HEAD = model().decoder.head_dim


def empty(memory, dtype="float32", frames=FRAMES):
    return empty_bank(model(), memory, frames, dtype=dtype)


append = jax.jit(remember_frames)


@functools.cache
def policy(memory):
    return jax.jit(make_policy(memory, model(), FRAMES))


def appended(bank, first, count):
    """The bank with frames `first`, `first + 1`, … behind what it holds; its number fixes a frame."""
    frames = [np.random.default_rng(first + i).standard_normal((1, 1, VECTORS, HEAD)) for i in range(GROUP)]
    x = np.concatenate(frames, axis=2).astype(np.float32)
    positions = jnp.asarray(3 * (first + np.arange(GROUP)), jnp.int32)[None]
    return append(bank, (x,), (2 * x,), positions, jnp.array([count]))


def played(memory, sequence, check=lambda bank, frames: None):
    """A bank after appends and compactions; where it has no room, it is compacted before."""
    bank, frames = empty(memory), 0
    low = memory.low_mark(FRAMES) * VECTORS
    for count in sequence:
        if count == COMPACT or int(bank.length[0]) + count * VECTORS > bank.capacity:
            bank = policy(memory)(bank)
            assert int(bank.length[0]) <= low
            check(bank, frames)
        if count:
            bank = appended(bank, frames, count)
            frames += count
            check(bank, frames)
    return bank


def in_order(memory, bank, frames):
    """What holds for every bank that has seen so many frames."""
    length, positions = int(bank.length[0]), np.asarray(bank.positions[0])
    assert length <= bank.capacity
    assert (np.diff(positions[:length]) >= 0).all()
    assert (positions[length:] == NO_POSITION).all()
    assert not length or positions[length - 1] == 3 * (frames - 1)  # The newest frame is always there.
    places = np.asarray(bank.places[0, :length])
    for of_frame in np.split(places, np.flatnonzero(np.diff(positions[:length])) + 1):
        assert (np.diff(of_frame) > 0).all()
    assert all(
        np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves((bank.keys, bank.values))
    )
    if memory.merges:
        counts = np.asarray(bank.counts[0])
        assert counts.sum() == counts[:length].sum() == frames * VECTORS
        assert not counts[length:].any()
    else:
        kept = np.unique(positions[:length]) // 3
        assert kept.tolist() == list(range(frames - len(kept), frames))
        assert length == len(kept) * VECTORS
    for token in (0, 3 * frames // 2, 3 * frames):
        visible = int(vectors_visible(bank.positions, jnp.array([[token]]))[0, 0])
        assert (positions[:visible] <= token).all()
        assert (positions[visible:] > token).all()


@pytest.mark.parametrize("stored", [None, "int8", "fp8"])
@pytest.mark.parametrize("name", POLICIES)
def test_any_sequence_of_appends_and_compactions(name, stored):
    memory = MemoryConfig(name, low_water=0.7, bank_dtype=stored)

    @settings(max_examples=10)
    @given(st.lists(st.integers(COMPACT, GROUP), max_size=24))
    def hold(sequence):
        played(memory, sequence, functools.partial(in_order, memory))

    hold()


@pytest.mark.parametrize("stored", [None, "int8", "fp8"])
@pytest.mark.parametrize("name", POLICIES)
def test_between_compactions_frames_may_come_in_any_groups(name, stored):
    memory = MemoryConfig(name, low_water=0.7, bank_dtype=stored)
    room = FRAMES - memory.low_mark(FRAMES)

    @st.composite
    def two_ways(draw):
        """A bank's room of frames again and again, with compactions between; the same in other groups."""
        ways = [], []
        for _ in range(draw(st.integers(1, 6))):
            for way in ways:
                left = room
                while left:
                    way.append(draw(st.integers(1, min(left, GROUP))))
                    left -= way[-1]
                way.append(COMPACT)
        return ways

    @settings(max_examples=10)
    @given(two_ways())
    def hold(ways):
        one, other = (played(memory, way) for way in ways)
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))

    hold()


def spans(positions):
    """First and last of what each frame of a bank stands for, and its vectors."""
    lasts, sizes = np.unique(positions[positions != NO_POSITION], return_counts=True)
    return list(zip([0, *(lasts[:-1] + 1)], lasts, sizes, strict=True))


@pytest.mark.parametrize("stored", [None, "int8", "fp8"])
def test_what_a_compaction_does_not_merge_stays_bit_for_bit(stored):
    """Also where it stands for many."""
    memory = MemoryConfig("pyramid", low_water=0.7, pyramid_shares=(0.4, 0.3, 0.3), bank_dtype=stored)

    def by_frame(bank):
        arrays = [np.asarray(x, np.float32) for x in jax.tree.leaves((bank.keys, bank.values))]
        frames, at = {}, 0
        for span in spans(np.asarray(bank.positions[0])):
            frames[span] = [x[:, :, at : at + span[2]] for x in arrays]
            at += span[2]
        return frames

    bank, compared = empty(memory), 0
    for first in range(0, 300, GROUP):
        if int(bank.length[0]) + GROUP * VECTORS > bank.capacity:
            before = by_frame(bank)
            bank = policy(memory)(bank)
            after = by_frame(bank)
            for span in before.keys() & after.keys():
                compared += span[2] == 1
                for x, y in zip(before[span], after[span], strict=True):
                    np.testing.assert_array_equal(x, y)
        bank = appended(bank, first, GROUP)
    assert compared > 200


# Rounding to nearest: half a unit in the last place, relative to the number.
ROUNDING = {"float32": 2**-24, "bfloat16": 2**-9}
LONG, BANK = 43_200, 64  # Twelve hours of a frame a second, and whole frames in the bank.


@functools.cache
def twelve_hours(dtype):
    """A pyramid at the end of a long stream of numbers that grow from 1 to 3, with noise.

    Returns:
      The frames [LONG, N, D] of the stream; the bank; the positions in it after each append.
    """
    memory = MemoryConfig("pyramid")
    compact = make_policy(memory, model(), BANK)
    arriving = BANK - memory.low_mark(BANK)
    noise = 0.3 * np.random.default_rng(0).standard_normal((LONG, VECTORS, HEAD))
    # Numbers that both dtypes can hold.
    frames = jnp.asarray(np.linspace(1, 3, LONG)[:, None, None] + noise, jnp.bfloat16).astype(jnp.float32)

    @jax.jit
    def play(bank, frames):
        def step(bank, x):
            positions, rows = x
            is_full = bank.length[0] + arriving * VECTORS > bank.capacity
            bank = jax.lax.cond(is_full, compact, lambda bank: bank, bank)
            rows = (rows.reshape(1, 1, arriving * VECTORS, HEAD),)
            bank = remember_frames(bank, rows, rows, positions[None], jnp.array([arriving]))
            return bank, bank.positions[0]

        positions = jnp.arange(LONG, dtype=jnp.int32).reshape(-1, arriving)
        return jax.lax.scan(step, bank, (positions, frames.reshape(-1, arriving, VECTORS, HEAD)))

    bank, positions = play(empty(memory, dtype, BANK), frames)
    return np.asarray(frames), bank, np.asarray(positions)


def roundings(history):
    """How often what each frame of the last bank is made of has been rounded, in the mean over its parts."""
    found = {}
    for positions in history:
        before, found = found, {}
        for first, last, size in spans(positions):
            parts = {(a, b): count for (a, b, _), count in before.items() if first <= a and b <= last}
            now = sum((b + 1 - a) * count for (a, b), count in parts.items()) / (last + 1 - first)
            found[first, last, size] = before.get((first, last, size), 1 + now if parts else 0)
    return found


@pytest.mark.parametrize("dtype", ROUNDING)
def test_merged_vectors_do_not_drift(dtype):
    """Each is the mean of what was appended, up to the roundings of the merges that it went through."""
    frames, bank, history = twelve_hours(dtype)
    keys = np.asarray(bank.keys[0].astype(jnp.float32))[0, 0]
    counts = np.asarray(bank.counts[0])
    assert counts.sum() == LONG * VECTORS
    cells = {VECTORS: np.arange(VECTORS), 2: np.minimum(np.arange(VECTORS), 1), 1: np.zeros(VECTORS)}
    # A mean of parts is off by the mean of what those are off, and by one more rounding to the dtype. Beside
    # it are float32's of a sum of at most 5 products and of the shares in them.
    unit = (ROUNDING[dtype] + 8 * 2**-24) * abs(frames).max()
    at = 0
    for (first, last, size), count in roundings(history).items():
        whole = frames[first : last + 1].astype(np.float64)
        for place in range(size):
            those = cells[size] == place
            assert counts[at] == (last + 1 - first) * those.sum()
            exact = whole[:, those].mean(axis=(0, 1))
            assert (abs(keys[at] - exact) <= count * unit).all()
            at += 1
    assert at == int(bank.length[0])


@pytest.mark.parametrize("name", POLICIES)
def test_gradients_of_a_compaction(name):
    """Gathered by the target of each vector, they are those of the sums as they are written."""
    memory = MemoryConfig(name)
    bank = empty(memory)
    for first in range(0, FRAMES, GROUP):
        bank = appended(bank, first, GROUP)
    weights = np.random.default_rng(0).standard_normal(bank.keys[0].shape).astype(np.float32)

    def loss(keys):
        compacted = policy(memory)(dataclasses.replace(bank, keys=(keys,)))
        return jnp.sum(compacted.keys[0] * weights)

    gradient = np.asarray(jax.grad(loss)(bank.keys[0]))
    # What becomes of keys depends on values and positions alone, so the loss is linear in them.
    for seed in range(4):
        keys = np.random.default_rng(seed).standard_normal(gradient.shape).astype(np.float32)
        products = keys * gradient
        # Two sums of rounded float32 products.
        bound = (products.size + 8) * 2**-23 * np.abs(products).sum()
        np.testing.assert_allclose(loss(jnp.asarray(keys)), products.sum(), rtol=0, atol=bound)
