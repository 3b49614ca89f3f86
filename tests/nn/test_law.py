"""The law: a sequence fed through the three verbs, in any chunking, gives the logits of the one-pass call."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import moss_jax
from moss_jax.config import moss_tiny
from moss_jax.memory import NO_POSITION, CapacityError, TextCache
from moss_jax.nn import MossVideo, quantize

TOLERANCE = 1e-4

SLOTS, LENGTH, FRAMES = 3, 24, 4
WIDTHS = (1, 5)  # Tokens that a call of `decode` has room for.
GROUP = 2  # Frames that a call of `remember` has room for.


@dataclasses.dataclass(frozen=True)
class Sequences:
    """One sequence a slot.

    Attributes:
      tokens: [B, S], of which the first `lengths[b]` are real.
      pixels: [B, F, H, W, 3].
      positions: [B, F], LENGTH or NO_POSITION for frames that are not there.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    pixels: np.ndarray
    positions: np.ndarray


def make(config, lengths, positions, seed=0, absent=NO_POSITION) -> Sequences:
    """Random tokens and frames, with `<|image|>` at the frames' positions."""
    rng = np.random.default_rng(seed)
    size = config.vision.image_size
    tokens = rng.integers(0, config.decoder.vocab_size, (SLOTS, LENGTH), np.int32)
    places = np.full((SLOTS, FRAMES), absent, np.int32)
    for b, at in enumerate(positions):
        tokens[b, at] = config.decoder.image_token_id
        places[b, : len(at)] = at
    pixels = rng.standard_normal((SLOTS, FRAMES, size, size, 3), np.float32)
    return Sequences(tokens, np.asarray(lengths), pixels, places)


@st.composite
def sequences(draw, config):
    lengths = [draw(st.integers(1, LENGTH)) for _ in range(SLOTS)]
    positions = [
        sorted(draw(st.sets(st.integers(0, length - 1), max_size=min(FRAMES, length)))) for length in lengths
    ]
    seed, absent = draw(st.integers(0, 99)), draw(st.sampled_from([LENGTH, NO_POSITION]))
    return make(config, lengths, positions, seed, absent)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One round of a stream: frames are remembered, then tokens decoded.

    Attributes:
      width: tokens that the call has room for.
      counts: how many each slot decodes.
      ahead: frames that each slot remembers before their chunk, beside those that the chunk needs.
      one_by_one: frames come in calls of their own, not in groups.
      by_mask: slots that stand still are masked rather than given length 0.
    """

    width: int
    counts: tuple[int, ...]
    ahead: tuple[int, ...] = (0,) * SLOTS
    one_by_one: bool = False
    by_mask: bool = True


@st.composite
def chunks(draw):
    width = draw(st.sampled_from(WIDTHS))
    return Chunk(
        width,
        counts=tuple(draw(st.integers(0, width)) for _ in range(SLOTS)),
        ahead=tuple(draw(st.integers(0, GROUP)) for _ in range(SLOTS)),
        one_by_one=draw(st.booleans()),
        by_mask=draw(st.booleans()),
    )


def unchanged(before, after, slots):
    """These slots of a state are what they were, bit for bit."""
    for old, new in zip(held(before), held(after), strict=True):
        np.testing.assert_array_equal(np.asarray(old)[slots], np.asarray(new)[slots])


def held(state):
    """The arrays of a state, without the rows of the text cache that are never read."""

    def cut(part):
        return [x[:, :, : part.capacity] for x in (*part.keys, *part.values)] if is_text(part) else [part]

    def is_text(part):
        return isinstance(part, TextCache)

    return jax.tree.leaves([cut(part) for part in jax.tree.leaves(state, is_leaf=is_text)])


def unchanged_rows(before, after, lengths):
    """The first keys and values of each slot are what they were, bit for bit."""
    for old, new in zip(before.keys + before.values, after.keys + after.values, strict=True):
        for b, length in enumerate(lengths):
            np.testing.assert_array_equal(old[b, :, :length], new[b, :, :length])


def stream(model, these: Sequences, plan, begin=0):
    """Feeds the sequences by the plan, the last chunk over and over; returns the logits and the state.

    Args:
      begin: position of the first token.
    """
    features = np.asarray(model.encode(these.pixels.reshape(-1, *these.pixels.shape[2:])))
    features = features.reshape(SLOTS, FRAMES, *features.shape[1:])
    frames = (these.positions < LENGTH).sum(axis=1)
    state = model.init_state(SLOTS, text_capacity=LENGTH, bank_capacity=FRAMES)
    text = dataclasses.replace(state.text, position=state.text.position + begin)
    state = dataclasses.replace(state, text=text)
    at, seen = np.zeros(SLOTS, int), np.zeros(SLOTS, int)
    logits = np.zeros((*these.tokens.shape, model.config.decoder.vocab_size), np.float32)
    rounds = iter(plan)
    whole = Chunk(WIDTHS[-1], (WIDTHS[-1],) * SLOTS)
    while (at < these.lengths).any():
        chunk = next(rounds, whole)
        counts = np.minimum(chunk.counts, these.lengths - at)
        due = (these.positions < (at + counts)[:, None]).sum(axis=1)
        state, seen = remember(model, state, these, features, seen, due, frames, chunk, begin)

        tokens = np.zeros((SLOTS, chunk.width), np.int32)
        for b, n in enumerate(counts):
            tokens[b, :n] = these.tokens[b, at[b] : at[b] + n]
        before, still = state, counts == 0
        if chunk.by_mask:
            lengths = np.where(still, chunk.width, counts)
            out, state = model.decode(before, tokens, lengths=lengths, mask=~still)
        else:
            out, state = model.decode(before, tokens, lengths=counts, mask=np.ones(SLOTS, bool))
        unchanged(before, state, still)
        for b, n in enumerate(counts):
            logits[b, at[b] : at[b] + n] = out[b, :n]
        at += counts
    np.testing.assert_array_equal(state.text.length, these.lengths)
    return logits, state


def remember(model, state, these, features, seen, due, frames, chunk, begin):
    """Remembers the frames that are due and some ahead of time; frames that are masked are NaN."""
    target = np.maximum(seen, np.minimum(due + chunk.ahead, frames))
    while (seen < target).any():
        count = np.minimum(target - seen, 1 if chunk.one_by_one else GROUP)
        group = np.full((SLOTS, GROUP, *features.shape[2:]), np.nan, np.float32)
        positions = np.zeros((SLOTS, GROUP), np.int32)
        for b, n in enumerate(count):
            group[b, :n] = features[b, seen[b] : seen[b] + n]
            positions[b, :n] = begin + these.positions[b, seen[b] : seen[b] + n]
        mask = np.arange(GROUP) < count[:, None]
        before = state
        if chunk.one_by_one:
            state = model.remember(before, group[:, 0], positions[:, 0], mask=mask[:, 0])
        else:
            state = model.remember(before, group, positions, mask=mask)
        unchanged(before, state, count == 0)
        seen = seen + count
    return state, seen


def hold(model, these: Sequences, plan, tolerance=TOLERANCE):
    """Asserts the law."""
    expected = np.asarray(model(these.tokens, these.pixels, these.positions))
    logits, _ = stream(model, these, plan)
    real = np.arange(LENGTH) < these.lengths[:, None]
    assert np.isfinite(logits).all()
    assert np.abs(logits - expected)[real].max() <= tolerance


# Slots start together, then one stands still, then another runs ahead.
FIXED_PLAN = [
    Chunk(5, (5, 3, 0), one_by_one=True),
    Chunk(1, (1, 0, 1)),
    Chunk(5, (0, 5, 5), ahead=(2, 0, 0), by_mask=False),
    Chunk(5, (2, 0, 4)),
    Chunk(1, (0, 1, 0), by_mask=False),
]
FIXED_LENGTHS = (24, 22, 9)
FIXED_POSITIONS = ([0, 6, 7, 20], [4, 9, 16], [])


@pytest.mark.parametrize("with_golden", [True, False])
def test_any_chunking(golden, compiled, small_config, random_model, with_golden):
    model = compiled(golden.model if with_golden else random_model(small_config()))

    @settings(max_examples=40)
    @given(these=sequences(model.config), plan=st.lists(chunks(), max_size=12))
    def check(these, plan):
        hold(model, these, plan)

    check()


def test_on_each_platform(golden, compiled, platform):
    hold(compiled(golden.model), make(golden.model.config, FIXED_LENGTHS, FIXED_POSITIONS), FIXED_PLAN)


# Across the border of two blocks of angles; after a year at three positions a second; up to the last of all.
@pytest.mark.parametrize("begin", [2**17 - 10, 10**8, NO_POSITION - LENGTH])
def test_far_out(compiled, small_config, random_model, begin):
    """Distances are what counts, so a stream that begins anywhere gives the logits of the one-pass call."""
    model = random_model(small_config())
    for i in model.config.decoder.cross_attention_layers:
        # Keys of frames have their norm after their rotation, so with weights that differ within a pair of
        # channels the position itself counts a little.
        model.decoder.layers[i].attention.k_norm.weight[...] = np.ones(8, np.float32)
    model = compiled(model)
    these = make(model.config, FIXED_LENGTHS, FIXED_POSITIONS)
    expected = np.asarray(model(these.tokens, these.pixels, these.positions))
    real = np.arange(LENGTH) < these.lengths[:, None]
    off = np.abs(stream(model, these, FIXED_PLAN, begin)[0] - expected)[real]
    # Angles are off by up to 2^-7, and the logits are of order one.
    assert off.max() < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["xla", "mosaic_gpu", None])
def test_in_bfloat16(compiled, random_model, attention):
    """In one pass and streamed, the logits are no farther from the exact ones than bfloat16 has to be.

    Exact are those of the same weights in float32, which the golden vectors hold to 1e-5. Each figure is the
    root mean square of the difference over the logits' standard deviation; plain XLA in one pass sets the
    measure: 0.027 on a CPU. A kernel that is forced has to take every attention of the model.
    """
    config = moss_tiny()
    half = random_model(config, dtype="bfloat16")
    graph, params = nnx.split(half)
    exact = compiled(nnx.merge(graph, jax.tree.map(lambda x: x.astype("float32"), params)))
    these = make(config, FIXED_LENGTHS, FIXED_POSITIONS)
    real = np.arange(LENGTH) < these.lengths[:, None]
    expected = np.asarray(exact(these.tokens, these.pixels, these.positions))[real]

    def off(logits):
        return np.sqrt(np.mean((np.asarray(logits)[real] - expected) ** 2)) / expected.std()

    def of(name):
        named = dataclasses.replace(config, attention=name)
        graph, _ = nnx.split(nnx.eval_shape(lambda: MossVideo(named, rngs=nnx.Rngs(0), dtype="bfloat16")))
        return compiled(nnx.merge(graph, params))

    measure = off(of("xla")(these.tokens, these.pixels, these.positions))
    assert measure < 0.05
    model = of(attention)
    assert off(model(these.tokens, these.pixels, these.positions)) < 1.25 * measure
    assert off(stream(model, these, FIXED_PLAN)[0]) < 1.25 * measure


@pytest.mark.parametrize("mode", ["max", "bilinear", "channelFusion"])
def test_every_compressor(compiled, small_config, random_model, mode):
    config = small_config(mode)
    model = compiled(random_model(config))
    hold(model, make(config, FIXED_LENGTHS, FIXED_POSITIONS), [Chunk(5, (5, 3, 0)), Chunk(5, (1, 5, 4))])


def test_in_8_bits(compiled, small_config, random_model):
    """Where activations are rounded too, float32's last bit can decide between two numbers in 8 bits."""
    for parts, tolerance in (({"decoder": "int8"}, TOLERANCE), ({"decoder": "fp8", "encoder": "fp8"}, 0.1)):
        model = quantize(random_model(small_config()), **parts)
        hold(compiled(model), make(model.config, FIXED_LENGTHS, FIXED_POSITIONS), FIXED_PLAN, tolerance)


def test_after_saving_and_loading(compiled, small_config, random_model, tmp_path):
    model = random_model(small_config())
    these = make(model.config, FIXED_LENGTHS, FIXED_POSITIONS)
    again = compiled(moss_jax.load(moss_jax.save(tmp_path / "saved", model)))
    np.testing.assert_array_equal(
        again(these.tokens, these.pixels, these.positions),
        compiled(model)(these.tokens, these.pixels, these.positions),
    )
    hold(again, these, FIXED_PLAN)


def test_logits_are_of_order_one_and_see_the_frames(compiled, small_config, random_model):
    """Else the tolerance of the law would say nothing about the random model."""
    model = compiled(random_model(small_config()))
    these = make(model.config, FIXED_LENGTHS, FIXED_POSITIONS)
    logits = model(these.tokens, these.pixels, these.positions)
    assert 0.3 < np.std(logits) < 3
    blind = model(these.tokens, np.zeros_like(these.pixels), these.positions)
    assert np.abs(logits - blind)[0].max() > 0.1


def test_a_frame_tells_from_its_position_on(compiled, small_config, random_model):
    config = small_config()
    model = compiled(random_model(config))
    these = make(config, FIXED_LENGTHS, FIXED_POSITIONS)
    logits = np.asarray(model(these.tokens, these.pixels, these.positions))
    for frame, position in enumerate(FIXED_POSITIONS[0]):
        pixels = these.pixels.copy()
        pixels[0, frame] *= -1
        other = np.asarray(model(these.tokens, pixels, these.positions))
        np.testing.assert_array_equal(other[0, :position], logits[0, :position])
        np.testing.assert_array_equal(other[1:], logits[1:])
        assert (np.abs(other - logits)[0, position:].max(axis=-1) > 1e-3).all()


def test_rows_before_the_first_frame_attend_if_told_to(compiled, small_config, random_model):
    config = small_config(rows_before_first_frame="attend")
    model = compiled(random_model(config))
    these = make(config, FIXED_LENGTHS, ([7], [3], []))
    pixels = these.pixels.copy()
    pixels[:, 0] *= -1
    logits = np.asarray(model(these.tokens, these.pixels, these.positions))
    other = np.asarray(model(these.tokens, pixels, these.positions))
    assert (np.abs(other - logits)[0, :7].max(axis=-1) > 1e-3).all()
    np.testing.assert_array_equal(other[2], logits[2])


@pytest.mark.parametrize("absent", [LENGTH, LENGTH + 7, NO_POSITION])
def test_absent_frames_have_no_influence(compiled, small_config, random_model, absent):
    config = small_config()
    model = compiled(random_model(config))
    these = make(config, FIXED_LENGTHS, FIXED_POSITIONS, absent=absent)
    pixels = these.pixels.copy()
    pixels[these.positions == absent] = np.nan
    np.testing.assert_array_equal(
        model(these.tokens, pixels, these.positions),
        model(these.tokens, these.pixels, these.positions),
    )


def test_a_sequence_without_frames(compiled, small_config, random_model):
    config = small_config()
    model = compiled(random_model(config))
    these = make(config, FIXED_LENGTHS, ([], [], []))
    np.testing.assert_allclose(
        model(these.tokens, these.pixels[:, :0], these.positions[:, :0]),
        model(these.tokens, these.pixels, these.positions),
        rtol=0,
        atol=TOLERANCE,
    )


def streamed(model, config):
    """A state whose slot 0 is full of text and of frames, and slot 1 nearly so."""
    _, state = stream(model, make(config, FIXED_LENGTHS, FIXED_POSITIONS), FIXED_PLAN)
    np.testing.assert_array_equal(state.bank.length, np.array([4, 3, 0]) * config.vectors_per_frame)
    return state


def test_full_slots_are_refused_eagerly(compiled, small_config, random_model):
    eager = random_model(small_config())
    state = streamed(compiled(eager), eager.config)
    frame = np.zeros((SLOTS, eager.config.vectors_per_frame, eager.config.decoder.hidden_size), np.float32)
    with pytest.raises(CapacityError, match=r"cache has room for 24: slot 0 holds 24 and would get 1 more;"):
        eager.decode(state, np.zeros((SLOTS, 1), np.int32))
    with pytest.raises(CapacityError, match="slot 0 holds 24 and would get 3 more, slot 1 holds 22 and"):
        eager.decode(state, np.zeros((SLOTS, 3), np.int32))
    # In vectors, two a frame.
    with pytest.raises(CapacityError, match=r"bank has room for 8: slot 0 holds 8 and would get 2 more;"):
        eager.remember(state, frame, np.full(SLOTS, 24))
    frames, mask = frame[:, None].repeat(2, axis=1), np.array([[False], [True], [True]]).repeat(2, axis=1)
    with pytest.raises(CapacityError, match="slot 1 holds 6 and would get 4 more"):
        eager.remember(state, frames, np.full((SLOTS, 2), 24), mask=mask)


def test_overflow_inside_jit_spoils_nothing(compiled, small_config, random_model):
    """Rows that fit are written, others are dropped, and neither changes the rows before."""
    config = small_config()
    model = compiled(random_model(config))
    state = streamed(model, config)
    rng = np.random.default_rng(5)
    every = np.ones(SLOTS, bool)

    tokens = rng.integers(0, config.decoder.vocab_size, (SLOTS, 5), np.int32)
    out, after = model.decode(state, tokens, lengths=np.array([5, 5, 5]), mask=every)
    np.testing.assert_array_equal(after.text.length, [24, 24, 14])
    unchanged(state, after, [0])
    unchanged(state.bank, after.bank, slice(None))
    unchanged_rows(state.text, after.text, FIXED_LENGTHS)
    fitting, fitted = model.decode(state, tokens, lengths=np.array([0, 2, 5]), mask=every)
    unchanged(fitted, after, slice(None))
    np.testing.assert_array_equal(out[1, :2], fitting[1, :2])
    np.testing.assert_array_equal(out[2], fitting[2])

    vectors = config.vectors_per_frame
    features = rng.standard_normal((SLOTS, GROUP, vectors, config.decoder.hidden_size), np.float32)
    positions = np.tile([24, 25], (SLOTS, 1))
    after = model.remember(state, features, positions, mask=np.ones((SLOTS, GROUP), bool))
    np.testing.assert_array_equal(after.bank.length, np.array([4, 4, 2]) * vectors)
    np.testing.assert_array_equal(after.bank.positions[1], np.repeat([4, 9, 16, 24], vectors))
    unchanged(state, after, [0])
    unchanged(state.text, after.text, slice(None))
    unchanged_rows(state.bank, after.bank, [4 * vectors, 3 * vectors, 0])
    fitted = model.remember(state, features, positions, mask=np.arange(GROUP) < [[0], [1], [2]])
    unchanged(fitted, after, slice(None))


def test_what_a_state_holds_besides_its_range_has_no_influence(compiled, small_config, random_model):
    """Room that is not in use may hold anything: a state is handed on without being wiped."""
    config = small_config()
    model = compiled(random_model(config))
    these = make(config, FIXED_LENGTHS, FIXED_POSITIONS)
    clean = model.init_state(SLOTS, text_capacity=LENGTH, bank_capacity=FRAMES)
    dirty = jax.tree.map(lambda x: x if x.dtype == np.int32 else x + np.nan, clean)
    features = np.asarray(model.encode(these.pixels.reshape(-1, *these.pixels.shape[2:])))[::FRAMES]
    lengths, outs = np.array([5, 4, 3]), []
    for state in (clean, dirty):
        state = model.remember(state, features, np.zeros(SLOTS, np.int32), mask=np.array([1, 1, 0], bool))
        outs.append(model.decode(state, these.tokens[:, :5], lengths=lengths, mask=np.ones(SLOTS, bool))[0])
    for b, length in enumerate(lengths):
        np.testing.assert_array_equal(outs[0][b, :length], outs[1][b, :length])
