"""Compactions: what each policy keeps, against plain loops.

S vectors, K kv heads, D head
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from banks import empty_bank

from moss_jax.config import CompressorConfig, ConfigError, MemoryConfig, moss_tiny, moss_video_11b
from moss_jax.memory import remember_frames
from moss_jax.memory.policies import POLICIES, make_policy
from moss_jax.memory.policies.pyramid import coarser_place, divide, make_grids, vectors_of
from moss_jax.ops.qarray import dequantize

FRAMES = 12  # Whole frames of the banks here.


@functools.cache
def model():
    """17 vectors a frame, as in moss_tiny; few and small heads, and one layer of each kind."""
    config = moss_tiny()
    decoder = dataclasses.replace(
        config.decoder, num_layers=2, hidden_size=8, num_heads=2, num_kv_heads=2, cross_attention_layers=(1,)
    )
    return dataclasses.replace(config, decoder=decoder)


VECTORS = model().vectors_per_frame


def empty(memory, slots=1, dtype="float32"):
    return empty_bank(model(), memory, FRAMES, slots=slots, dtype=dtype)


append = jax.jit(remember_frames)


@functools.cache
def policy(memory):
    return jax.jit(make_policy(memory, model(), FRAMES))


def frame(number, slots=1):
    """Keys and values, [slots, K, N, D], that say which frame they are of, and which vector."""
    rng = np.random.default_rng(number)
    x = rng.standard_normal((slots, 2, VECTORS, 4)).astype(np.float32)
    x[..., 0] = number
    x[..., 1] = np.arange(VECTORS)
    return x


class Stream:
    """A bank that is filled frame by frame, and compacted whenever it is full."""

    def __init__(self, memory, dtype="float32"):
        self.memory, self.bank, self.number = memory, empty(memory, dtype=dtype), 0
        self.compactions = 0

    def append(self, frames):
        for _ in range(frames):
            if int(self.bank.length[0]) + VECTORS > self.bank.capacity:
                self.bank = policy(self.memory)(self.bank)
                self.compactions += 1
            x = frame(self.number)
            at = jnp.array([[3 * self.number]])
            self.bank = append(self.bank, (x,), (2 * x,), at, jnp.array([1]))
            self.number += 1

    @property
    def length(self):
        return int(self.bank.length[0])

    def held(self, name):
        return np.asarray(getattr(self.bank, name)[0, : self.length])

    def keys(self):
        return np.asarray(dequantize(self.bank.keys[0]))[0, :, : self.length]


@pytest.mark.parametrize("name", POLICIES)
def test_a_compaction_reaches_the_low_water_mark(name):
    memory = MemoryConfig(name, low_water=0.7)
    stream = Stream(memory)
    for _ in range(40):
        stream.append(5)
        bank = policy(memory)(stream.bank)
        assert int(bank.length[0]) <= memory.low_mark(FRAMES) * VECTORS
        assert not np.isnan(np.asarray(bank.keys[0])).any()


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_empty_may_be_anything(name):
    memory = MemoryConfig(name, low_water=0.7)
    stream = Stream(memory)
    stream.append(FRAMES - 1)
    bank, length = stream.bank, stream.length
    spoilt = dataclasses.replace(
        bank,
        keys=(bank.keys[0].at[:, :, length:].set(jnp.nan),),
        values=(bank.values[0].at[:, :, length:].set(jnp.inf),),
        places=bank.places.at[:, length:].set(7),
    )
    for clean, dirty in zip(*(jax.tree.leaves(policy(memory)(x)) for x in (bank, spoilt)), strict=True):
        np.testing.assert_array_equal(clean, dirty)


@pytest.mark.parametrize("name", POLICIES)
def test_slots_do_not_touch_one_another(name):
    memory = MemoryConfig(name, low_water=0.7)
    streams = [Stream(memory) for _ in range(2)]
    streams[0].append(40)
    streams[1].append(7)
    both = jax.tree.map(lambda *x: jnp.concatenate(x), *(stream.bank for stream in streams))
    together = policy(memory)(both)
    for slot, stream in enumerate(streams):
        alone = policy(memory)(stream.bank)
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(a[0], b[slot], rtol=0, atol=1e-5)


def filled(memory, room, frames, stored):
    """A bank in a buffer with that much room, after a stream that has been compacted to its own size.

    Also the number of compactions.
    """
    memory = dataclasses.replace(memory, bank_dtype=stored)
    bank, compactions = empty_bank(model(), memory, room), 0
    policy = make_policy(memory, model(), frames)
    for number in range(3 * frames):
        if int(bank.length[0]) + VECTORS > frames * VECTORS:
            bank = compact_by_name(memory.policy)(bank, policy.budget)
            compactions += 1
        x = frame(number)
        bank = append(bank, (x,), (2 * x,), jnp.array([[3 * number]]), jnp.array([1]))
    return bank, compactions


@functools.cache
def compact_by_name(name):
    """The one compiled compaction of a policy."""
    return jax.jit(make_policy(MemoryConfig(name), model(), 64).compact)


@pytest.mark.parametrize("stored", [None, "int8"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_bank_in_a_larger_buffer_is_as_in_one_of_its_size(name, stored):
    """Bit for bit, at several budgets, by one program for each size of the buffer."""
    room, sizes = 16, ((9, 0.75), (12, 0.7), (16, 0.8))
    compact_by_name(name).clear_cache()
    for frames, low_water in sizes:
        memory = MemoryConfig(name, low_water=low_water)
        (exact, expected), (bank, compactions) = (filled(memory, x, frames, stored) for x in (frames, room))
        assert compactions == expected > 3
        length = int(exact.length[0])
        assert length == int(bank.length[0]) <= frames * VECTORS
        for small, large in zip(jax.tree.leaves(exact), jax.tree.leaves(bank), strict=True):
            rows = (slice(None),) * (2 if small.ndim > 2 else 1)
            within = (*rows, slice(length)) if small.ndim > 1 else ()
            np.testing.assert_array_equal(np.asarray(small)[within], np.asarray(large)[within])
    assert compact_by_name(name)._cache_size() == len({room, *(frames for frames, _ in sizes)})


@pytest.mark.parametrize("stored", [None, "int8"])
@pytest.mark.parametrize("name", POLICIES)
def test_each_slot_has_a_budget_of_its_own(name, stored):
    """A compaction of several slots with different budgets is that of each alone, bit for bit."""
    budgets, banks = [], []
    for frames, low_water in ((16, 0.8), (9, 0.75), (12, 0.7)):
        memory = MemoryConfig(name, low_water=low_water)
        banks.append(filled(memory, 16, frames, stored)[0])
        budgets.append(make_policy(memory, model(), frames).budget)
    alone = [compact_by_name(name)(*each) for each in zip(banks, budgets, strict=True)]
    together = jax.tree.map(lambda *x: jnp.concatenate(x), *banks)
    together = compact_by_name(name)(together, np.stack(budgets, axis=1)[:, :, None])
    assert len({int(bank.length[0]) for bank in alone}) == 3
    for found, *expected in zip(*map(jax.tree.leaves, (together, *alone)), strict=True):
        np.testing.assert_array_equal(found, jnp.concatenate(expected))


def test_policies_of_one_name_have_one_compaction():
    for name in POLICIES:
        one = make_policy(MemoryConfig(name), model(), 64)
        other = make_policy(MemoryConfig(name, low_water=0.8, pyramid_shares=(0.5, 0.5)), model(), 16)
        assert one.compact is other.compact
        assert one.budget.shape == other.budget.shape
        assert one.budget.dtype == other.budget.dtype == np.int32
        assert (one.budget != other.budget).any()


def test_the_window_keeps_the_newest_frames_bit_for_bit():
    memory = MemoryConfig("window", low_water=0.6)
    stream = Stream(memory)
    stream.append(31)
    kept = np.unique(stream.held("positions")) // 3
    assert kept.tolist() == list(range(kept[0], 31))
    np.testing.assert_array_equal(stream.keys(), np.concatenate([frame(n)[0] for n in kept], axis=1))


def cells(grid, coarser):
    """Which place of the coarser grid each place of a frame belongs to, by hand."""
    if coarser == 0:
        return [0] * (1 + grid**2)
    of = [i * coarser // grid for i in range(grid)]
    return [0] + [1 + of[row] * coarser + of[column] for row in range(grid) for column in range(grid)]


@pytest.mark.parametrize(("grid", "coarser"), [(4, 2), (2, 1), (10, 5), (5, 3), (3, 2), (3, 0)])
def test_places_of_a_coarser_grid(grid, coarser):
    place = jnp.arange(1 + grid**2)[None]
    expected = cells(grid, coarser)
    assert coarser_place(place, grid, coarser)[0].tolist() == expected
    assert sorted(set(expected)) == list(range(1 + coarser**2))


def test_every_level_of_the_pyramid_is_the_mean_of_what_was_seen():
    memory = MemoryConfig("pyramid", low_water=0.7, pyramid_shares=(0.4, 0.25, 0.15, 0.2))
    stream = Stream(memory)
    stream.append(90)
    assert stream.compactions > 10
    positions, keys = stream.held("positions"), stream.keys()
    counts, places = stream.held("counts"), stream.held("places")
    frames = np.split(np.arange(stream.length), np.flatnonzero(np.diff(positions)) + 1)
    sizes = [len(vectors) for vectors in frames]
    assert sizes == sorted(sizes)
    assert set(sizes) == {1, 2, 5, VECTORS}
    levels = {VECTORS: [*range(VECTORS)], 5: cells(4, 2)}
    levels[2] = [cells(2, 1)[place] for place in levels[5]]
    levels[1] = [0] * VECTORS
    first = 0
    for vectors in frames:
        last = positions[vectors[0]] // 3
        whole = np.concatenate([frame(n)[0] for n in range(first, last + 1)], axis=1)
        cell = np.tile(levels[len(vectors)], last + 1 - first)
        assert places[vectors].tolist() == [*range(len(vectors))]
        for vector, place in zip(vectors, places[vectors], strict=True):
            assert counts[vector] == (cell == place).sum()
            # Means of means in float32, weighed by their counts.
            np.testing.assert_allclose(
                keys[:, vector], whole[:, cell == place].mean(axis=1), rtol=1e-5, atol=1e-5
            )
        first = last + 1
    assert first == 90


def test_the_oldest_of_the_pyramid_are_merged_evenly():
    stream = Stream(MemoryConfig("pyramid", low_water=0.7, pyramid_shares=(0.4, 0.25, 0.15, 0.2)))
    stream.append(600)
    counts = stream.held("counts")
    oldest = counts[: int((counts > VECTORS).sum())] / VECTORS
    assert len(oldest) > 10
    assert oldest.max() < 8 * np.median(oldest)


def test_alike_vectors_are_merged_first():
    """The upper half of the picture stands still, the other changes."""
    memory = MemoryConfig("merge", low_water=0.6)
    bank, rng = empty(memory), np.random.default_rng(0)
    still = rng.standard_normal((1, 2, VECTORS, 4)).astype(np.float32)
    moving = range(9, VECTORS)
    for number in range(FRAMES):
        x = still.copy()
        x[:, :, moving] = rng.standard_normal((1, 2, len(moving), 4))
        bank = append(bank, (x,), (x,), jnp.array([[number]]), jnp.array([1]))
    bank = policy(memory)(bank)
    length = int(bank.length[0])
    places, counts = np.asarray(bank.places[0, :length]), np.asarray(bank.counts[0, :length])
    assert (counts[places < 9] == 2).all()
    assert (counts[places >= 9] == 2).sum() == FRAMES * VECTORS - length - (places < 9).sum()
    for place in range(9):
        found = np.asarray(bank.values[0][0, :, :length])[:, places == place]
        np.testing.assert_allclose(
            found, still[0, :, place : place + 1].repeat(FRAMES // 2, axis=1), rtol=1e-6
        )


@pytest.mark.parametrize("stored", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["window", "pyramid"])
def test_banks_in_8_bits(name, stored):
    """Near those in float32, though every compaction rounds again what it merges."""
    memory = MemoryConfig(name, low_water=0.7)
    wide, narrow = Stream(memory), Stream(dataclasses.replace(memory, bank_dtype=stored))
    wide.append(40)
    narrow.append(40)
    np.testing.assert_array_equal(narrow.held("places"), wide.held("places"))
    np.testing.assert_array_equal(narrow.held("positions"), wide.held("positions"))
    keys = wide.keys()
    largest = abs(keys).max(axis=-1, keepdims=True)
    # A vector is rounded when it comes and when it is merged, at most six times here.
    unit = {"int8": 1 / 254, "fp8": 1 / 16}[stored]
    assert (abs(narrow.keys() - keys) <= 6 * unit * np.maximum(largest, 40)).all()


@pytest.mark.parametrize("stored", ["int8", "fp8"])
def test_what_is_not_merged_is_not_rounded_again(stored):
    stream = Stream(MemoryConfig("pyramid", low_water=0.7, bank_dtype=stored))
    stream.append(FRAMES)
    before, after = stream.bank, policy(stream.memory)(stream.bank)
    whole = np.asarray(after.counts[0]) == 1
    length = int(after.length[0])
    newest = np.flatnonzero(whole[:length])[-3 * VECTORS :]
    for old, new in zip((before.keys[0], before.values[0]), (after.keys[0], after.values[0]), strict=True):
        for x, y in ((old.values, new.values), (old.scale, new.scale)):
            np.testing.assert_array_equal(
                np.float32(x)[:, :, FRAMES * VECTORS - 3 * VECTORS : FRAMES * VECTORS],
                np.float32(y)[:, :, newest],
            )


def test_levels_of_the_models():
    for config, sizes in ((moss_tiny(), [17, 5, 2, 1]), (moss_video_11b(), [101, 26, 10, 1])):
        assert [vectors_of(grid) for grid in make_grids(config)] == sizes
    one = dataclasses.replace(moss_tiny(), compressor=CompressorConfig(stride=8))
    assert make_grids(one) == (1, 0)


@pytest.mark.parametrize(
    ("grids", "shares", "budget"),
    [
        ((4, 2, 1, 0), (0.5, 0.25, 0.125, 0.125), [4, 8, 10, 20]),
        ((2, 1, 0), (0.5, 0.25, 0.125, 0.125), [16, 20, 40]),  # The last has the shares that are left.
        ((1, 0), (0.5, 0.25, 0.25), [40, 80]),
        ((4, 2, 1, 0), (0.5, 0.25, 0.25), [4, 8, 10, 20]),  # The last share is divided.
        ((4, 2, 1, 0), (0.25, 0.75), [2, 8, 20, 40]),
    ],
)
def test_shares_of_the_levels(grids, shares, budget):
    assert divide(grids, shares, 160) == budget


def test_an_unknown_policy_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="must be one of 'full', 'window', 'pyramid', 'merge'; got 'ring'"):
        make_policy(MemoryConfig("ring"), model(), FRAMES)


def test_a_bank_too_small_for_a_pyramid_is_refused():
    with pytest.raises(ConfigError, match=r"too small for a pyramid .* raise engine.bank_capacity"):
        make_policy(MemoryConfig("pyramid", low_water=0.6), model(), 2)
