"""The engine: steps give the logits of one pass, slots are independent, and programs are few."""

import itertools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.config import ConfigError, EngineConfig, TokenSampling, moss_tiny
from moss_jax.stream import PENDING, Engine, Row
from moss_jax.stream.engine import gather, pick_frame
from moss_jax.stream.perception import ENCODE_BUCKETS
from moss_jax.stream.rows import FRAME_BUCKETS, TOKEN_BUCKETS, Shape, empty_arguments, pack, shapes
from moss_jax.stream.sampling import SamplingKind
from moss_jax.text import Tokenizer

IMAGE = 1024


def test_rows_of_any_mix_give_the_logits_of_one_pass(make_engine, one_pass, frames):
    engine = make_engine()
    rng = np.random.default_rng(0)
    text = lambda n: rng.integers(0, 1000, n).tolist()  # noqa: E731
    rows = [
        Row(text(70)),
        Row([PENDING, IMAGE], [0]),
        Row([PENDING]),
        Row([PENDING, *text(3), IMAGE, IMAGE, *text(2), IMAGE], [1, 2, 3]),
        Row([IMAGE] * 10, range(4, 14)),
        Row([PENDING, *text(300)]),
    ]
    features = engine.encode(frames)
    state, context, pending, seen = engine.start(), [], None, []
    for row in rows:
        state, sampled = engine.step(state, [row], features if row.frames else None)
        context += [pending if token == PENDING else token for token in row.tokens]
        seen += [frames[i] for i in row.frames]
        pending = int(sampled.tokens[0])
        assert pending == likeliest(engine, sampled.logits[0])
        if seen:
            expected = one_pass(context, seen)[-1]
            np.testing.assert_allclose(sampled.logits[0], expected, atol=1e-3)


def test_the_weight_layout_for_decoding_gives_the_same_logits(model, tokenizer, one_pass, frames):
    """As on a GPU, where attention projections are laid out output-major."""
    text, shown = [1015, 5, 6, 7], frames[:1]
    with mock.patch("moss_jax.nn.quantize.decode_layout", return_value="outputs_first"):
        engine = Engine(model, tokenizer, EngineConfig(text_capacity=64, bank_capacity=4))
        state, sampled = engine.step(engine.start(), [Row([*text, IMAGE], [0])], engine.encode(shown))
        context = [*text, IMAGE]
        for _ in range(3):
            context.append(int(sampled.tokens[0]))
            state, sampled = engine.step(state, [Row([PENDING])])
            np.testing.assert_allclose(sampled.logits[0], one_pass(context, shown)[-1], atol=1e-3)


def likeliest(engine, logits) -> int:
    """The token that greedy sampling takes."""
    return int(np.argmax(np.where(np.asarray(engine.allowed), logits, -np.inf)))


def test_a_frame_changes_the_next_token_and_nothing_before_it(make_engine, one_pass, frames):
    engine = make_engine()
    features = engine.encode(frames[:2])
    prompt = [1015, 5, 6, 7, IMAGE]

    def decode(arrival: int | None) -> list[np.ndarray]:
        """Logits of six tokens of an answer; a second frame may arrive before one of them."""
        state, sampled = engine.step(engine.start(), [Row(prompt, [0])], features)
        logits = [np.asarray(sampled.logits[0])]
        for i in range(5):
            row = Row([PENDING, IMAGE], [1]) if i == arrival else Row([PENDING])
            state, sampled = engine.step(state, [row], features if i == arrival else None)
            logits.append(np.asarray(sampled.logits[0]))
        return logits

    without, with_frame = decode(None), decode(2)
    for i in range(3):
        np.testing.assert_array_equal(without[i], with_frame[i])
    assert np.abs(without[3] - with_frame[3]).max() > 0.1
    # The frame itself matters: this one gives the logits of one pass, another picture gives others.
    said = [likeliest(engine, x) for x in with_frame]
    sequence = [*prompt, *said[:3], IMAGE]
    np.testing.assert_allclose(with_frame[3], one_pass(sequence, frames[:2])[-1], atol=1e-3)
    other = one_pass(sequence, [frames[0], frames[5]])[-1]
    assert np.abs(with_frame[3] - other).max() > 0.1


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_k": 50, "repetition_penalty": 1.3}])
def test_slots_are_independent(make_engine, frames, sampling):
    rows = {
        0: [Row([1015, *range(40)]), None, Row([PENDING, IMAGE], [0]), Row([PENDING]), Row([PENDING]), None],
        1: [
            None,
            Row([1015, *range(50, 55)]),
            Row([PENDING]),
            Row([PENDING, *range(9)], new_turn=True),
            Row([PENDING, IMAGE, IMAGE], [1, 2]),
            Row([PENDING]),
        ],
    }
    pair = make_engine(slots=2, **sampling)
    features = pair.encode(frames[:3])
    state = pair.start()
    together: dict[int, list] = {0: [], 1: []}
    for step in zip(rows[0], rows[1], strict=True):
        state, sampled = pair.step(state, step, features if any(row and row.frames for row in step) else None)
        for slot, row in enumerate(step):
            if row is not None:
                together[slot].append((int(sampled.tokens[slot]), np.asarray(sampled.logits[slot])))
    single = make_engine(**sampling)
    for slot, script in rows.items():
        state = single.start()
        for row, (token, logits) in zip(filter(None, script), together[slot], strict=True):
            state, sampled = single.step(state, [row], features if row.frames else None)
            np.testing.assert_allclose(sampled.logits[0], logits, atol=1e-3)
            assert int(sampled.tokens[0]) == token


def test_where_few_of_many_slots_decode_each_says_what_it_says_alone(make_engine, frames):
    many, single = make_engine(slots=40), make_engine()
    features = many.encode(frames[:2])
    prompts = {slot: Row([1015, *range(slot, 40)]) for slot in (3, 17, 39)}
    # With a frame among the rows of pending tokens, and without.
    decode = dict.fromkeys(prompts, Row([PENDING]))
    steps = [decode | {3: Row([PENDING, IMAGE], [1])}, decode]
    state, found = many.start(), []
    for rows in (prompts, *steps, *steps):
        state, sampled = many.step(state, [rows.get(slot) for slot in range(40)], features)
        found.append(np.asarray(sampled.logits))
    for slot in prompts:
        state = single.start()
        for rows, logits in zip((prompts, *steps, *steps), found, strict=True):
            state, alone = single.step(state, [rows[slot]], features)
            np.testing.assert_allclose(logits[slot], alone.logits[0], atol=1e-3)


def test_rows_cut_into_unequal_pieces_all_sample_from_their_last_token(make_engine):
    pair, single = make_engine(slots=2), make_engine()
    long, short = Row([1015, *range(300)]), Row([1015, 7, 8])
    _, sampled = pair.step(pair.start(), [short, long])
    for slot, row in enumerate([short, long]):
        _, alone = single.step(single.start(), [row])
        np.testing.assert_allclose(sampled.logits[slot], alone.logits[0], atol=1e-3)


def test_a_few_tokens_without_a_frame(make_engine):
    """They go to the programs for single frames."""
    several, single = make_engine(slots=3), make_engine()
    rows = {0: [Row([1015, 7]), Row([PENDING, IMAGE], [None])], 2: [Row([1015]), Row([4])]}
    state, found = several.start(), []
    for first, last in zip(rows[0], rows[2], strict=True):
        state, sampled = several.step(state, [first, None, last])
        found.append(np.asarray(sampled.logits))
    for slot, script in rows.items():
        state = single.start()
        for row, logits in zip(script, found, strict=True):
            state, alone = single.step(state, [row])
            np.testing.assert_allclose(logits[slot], alone.logits[0], atol=1e-3)


def test_rows_and_batches_of_all_sizes_share_few_programs(model, tokenizer, frames):
    engine = Engine(model, tokenizer)
    state = engine.start()
    features = engine.encode(frames[:8])
    for length in itertools.chain(range(1, 40), (100, 319, 320, 321, 700)):
        state, _ = engine.step(state, [Row([1015] * length)])
    for count in (1, 2, 5, 8, 11, 16, 17, 30):
        features = engine.encode((frames * 2)[:count])
        state, _ = engine.step(state, [Row([PENDING] + [IMAGE] * count, range(count))], features)
        state, _ = engine.step(state, [Row([1015] * 9 + [IMAGE] * count, range(count))], features)
    engine.encode(frames * 5)
    # A row of one token comes in two forms: pending tokens, whose arguments stay on the device, and others.
    compiled = {name: program._cache_size() for name, program in engine.programs.items()}
    assert compiled["step"] <= len(TOKEN_BUCKETS) + 1 + len(FRAME_BUCKETS)
    assert compiled["pixels"] == compiled["encode"] == len(ENCODE_BUCKETS)


def test_warm_up_compiles_all_programs_of_a_session(model, tokenizer, frames):
    engine = Engine(model, tokenizer)
    engine.warm_up(frames[0].shape)
    programs = *engine.programs.values(), gather, pick_frame
    compiled = [program._cache_size() for program in programs]
    state, _ = engine.step(engine.start(), [Row([1015] * 321)])
    for i in range(3):
        state, _ = engine.step(state, [Row([PENDING, IMAGE], [0])], engine.encode(frames[i : i + 1]))
        state, _ = engine.step(state, [Row([PENDING])])
    for count, words in ((3, 12), (1, 64), (9, 3), (16, 1), (24, 1), (40, 2)):
        row = Row([PENDING, *[5] * words, *[IMAGE] * count], range(count), new_turn=True)
        state, _ = engine.step(state, [row], engine.encode((frames * 3)[:count]))
    # Tokens without frames are text.
    for row in (Row([IMAGE], [None]), Row([PENDING, IMAGE], [None]), Row([IMAGE] * 300, [None] * 300)):
        state, _ = engine.step(state, [row])
    alone = engine.encode(frames[:1])
    state, _ = engine.step(state, [Row([PENDING, *[IMAGE] * 40], [None] * 39 + [0])], alone)
    saved = np.zeros(alone.shape[1:], alone.dtype)
    engine.distance(jnp.asarray(saved)[None], 0, alone, 0)
    for count in (1, 3, 9, 16, 30, 40):
        engine.distance(alone, 0, engine.encode((frames * 3)[:count]), count - 1)
    engine.load_slot(state, 0, engine.upload_slot(engine.save_slot(engine.copy_slot(state, 0))))
    assert [program._cache_size() for program in programs] == compiled


@pytest.mark.parametrize("slots", [1, 3])
def test_features_of_one_batch_enter_a_step_as_they_are(make_engine, frames, slots):
    """Without a program that gathers them first, whose launch would delay the step."""
    engine = make_engine(slots=slots)
    features = engine.encode(frames[:3])
    gather.clear_cache()
    others = [None] * (slots - 1)
    _, one = engine.step(engine.start(), [Row([1015, IMAGE, IMAGE], [2, 1]), *others], features)
    assert gather._cache_size() == 0
    row = Row([1015, IMAGE, IMAGE], [len(features) + 2, 1])
    _, two = engine.step(engine.start(), [row, *others], [features, features])
    assert gather._cache_size() == 1
    np.testing.assert_array_equal(one.logits[0], two.logits[0])


def test_frames_without_features(make_engine):
    engine = make_engine()
    with pytest.raises(ValueError, match="`features` must be given"):
        engine.step(engine.start(), [Row([1015, IMAGE], [0])])


def test_the_state_is_donated(make_engine):
    engine = make_engine()
    before = engine.start()
    engine.step(before, [Row([1015])])
    assert all(x.is_deleted() for x in jax.tree.leaves(before))


@pytest.mark.parametrize("slots", [1, 3])
def test_a_token_takes_no_loop_and_no_branch(make_engine, slots):
    engine = make_engine(slots=slots)
    state, shape = engine.start(), Shape(slots)
    packed = pack(empty_arguments(shape, slots), slots)
    step = engine.programs["step"].lower(engine.parameters, engine.rules, state, packed, None, shape)
    sampling = state.pending, engine.rules, state.logits, state.said, state.sampling
    positions = state.stream.text.position
    greedy = engine.programs["sample.greedy"].lower(*sampling, positions, packed)
    for program in (step, greedy):
        # A GPU would have the host wait for what a loop or a branch depends on.
        assert not re.search(r"stablehlo\.(while|case|if)\b", program.as_text())
    filtered = engine.programs["sample.filtered"].lower(*sampling, positions, packed)
    assert "stablehlo.while" in filtered.as_text()


def test_control_tokens_are_never_sampled(make_engine, tokenizer):
    engine = make_engine(temperature=100.0)
    state, sampled = engine.step(engine.start(), [Row([1015])])
    allowed = {tokenizer.special.silence, tokenizer.special.eot}
    said = set()
    for _ in range(300):
        state, sampled = engine.step(state, [Row([PENDING])])
        said.add(int(sampled.tokens[0]))
    assert len(said) > 100
    assert not said & (tokenizer.control_ids - allowed)
    assert np.asarray(engine.allowed)[list(allowed)].all()


def test_the_repetition_penalty_holds_within_a_turn_and_spares_punctuation(make_engine, tokenizer):
    engine = make_engine(repetition_penalty=1000.0)
    state, sampled = engine.step(engine.start(), [Row([1015, 3, 4])])
    said = []
    for _ in range(40):
        said.append(int(sampled.tokens[0]))
        state, sampled = engine.step(state, [Row([PENDING])])
    exempt = tokenizer.penalty_exempt()
    words = [token for token in said if not exempt[token]]
    assert len(words) == len(set(words)) > 10
    assert np.asarray(state.said)[0, words].all()
    assert not (np.asarray(state.said)[0] & exempt).any()
    state, _ = engine.step(state, [Row([PENDING], new_turn=True)])
    assert not np.asarray(state.said).any()
    state, _ = engine.step(state, [Row([PENDING])])
    assert np.asarray(state.said).any()
    state, _ = engine.step(state, [Row([PENDING, 1020, 5], new_turn=True)])
    assert not np.asarray(state.said).any()


def spoken(engine, state, count=12) -> list[list[int]]:
    """What each slot says after the same opening."""
    state, sampled = engine.step(state, [Row([1015, 3, 4])] * engine.config.slots)
    tokens = [sampled.tokens.tolist()]
    for _ in range(count):
        state, sampled = engine.step(state, [Row([PENDING])] * engine.config.slots)
        tokens.append(sampled.tokens.tolist())
    return np.transpose(tokens).tolist()


def test_a_slot_samples_as_it_is_set_to(make_engine):
    """As an engine whose slots all sample like that; so do those that are left as they were."""
    settings = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 5}
    engine, like = make_engine(slots=3), make_engine(slots=3, **settings)
    before = engine.start()
    state = engine.set_sampling(before, 1, TokenSampling(**settings))
    assert all(x.is_deleted() for x in jax.tree.leaves(before))
    greedy, sampled = spoken(engine, engine.start())[0], spoken(like, like.start())[1]
    assert greedy != sampled
    assert spoken(engine, state) == [greedy, sampled, greedy]
    steps = engine.programs["step"]._cache_size()
    state = engine.set_sampling(engine.start(), 0, TokenSampling(**settings))
    state = engine.set_sampling(state, 2, TokenSampling(temperature=2.0, seed=2**40))
    state = engine.set_sampling(state, 0, TokenSampling())
    assert spoken(engine, state)[:2] == [greedy, greedy]
    assert engine.programs["set_sampling"]._cache_size() == 1
    assert engine.programs["step"]._cache_size() == steps


def test_how_a_slot_samples_belongs_to_its_state(make_engine):
    """What is set in one state is not set in others of the engine, which go on by turns."""
    engine = make_engine(temperature=1.0, top_k=40)
    drawn = spoken(engine, engine.start())
    greedy, other = engine.set_sampling(engine.start(), 0, TokenSampling()), engine.start()
    said = {"greedy": [], "other": []}
    row = Row([1015, 3, 4])
    for _ in range(13):
        greedy, sampled = engine.step(greedy, [row])
        said["greedy"] += sampled.tokens.tolist()
        other, sampled = engine.step(other, [row])
        said["other"] += sampled.tokens.tolist()
        row = Row([PENDING])
    assert said == {"greedy": spoken(make_engine(), make_engine().start())[0], "other": drawn[0]}


def test_a_step_samples_by_the_kind_of_the_slots_that_take_part(make_engine):
    """Also where a slot was loaded: by how the saved stream samples."""
    engine = make_engine(slots=3)
    state = engine.set_sampling(engine.start(), 1, TokenSampling(temperature=1.0))
    state = engine.set_sampling(state, 2, TokenSampling(temperature=1.0, top_p=0.5))
    ran = []

    def watched(kind):
        return lambda *arguments: (
            ran.append(kind) or engine.programs[f"sample.{kind.name.lower()}"](*arguments)
        )

    def kinds(state, *slots):
        ran.clear()
        state, _ = engine.step(state, [Row([1015, 5, 6]) if slot in slots else None for slot in range(3)])
        return state, list(ran)

    with mock.patch.object(engine, "_sample", {kind: watched(kind) for kind in SamplingKind}):
        for slots in ((0,), (1,), (0, 1), (2,), (0, 2), (0, 1, 2)):
            state, found = kinds(state, *slots)
            assert found == [SamplingKind(max(slots))]
        for slot in (2, 0, 1):
            saved = engine.upload_slot(engine.save_slot(engine.copy_slot(state, slot)))
            state, found = kinds(engine.load_slot(state, 0, saved), 0)
            assert found == [SamplingKind(slot if slot else 2)]
        state = engine.reset_slot(state, 2)
        assert kinds(state, 2)[1] == [SamplingKind.FILTERED]


@pytest.mark.parametrize("slot", [-1, 3])
def test_there_is_no_slot_of_another_number_to_set(make_engine, slot):
    engine = make_engine(slots=3)
    with pytest.raises(ValueError, match=f"there is no slot {slot}; the engine has 3, counted from 0"):
        engine.set_sampling(engine.start(), slot, TokenSampling())


def test_a_tokenizer_of_another_vocabulary_is_refused(model, monkeypatch):
    other = Tokenizer.moss_tiny()
    monkeypatch.setattr(other, "vocab_size", 999)
    with pytest.raises(ValueError, match="999 tokens, the model 1024"):
        Engine(model, other)


def test_more_text_than_the_model_has_positions_for_is_refused(model, tokenizer):
    message = (
        "engine.text_capacity can be at most 4096, the number of positions that the model has, not 100000"
    )
    with pytest.raises(ConfigError, match=message):
        Engine(model, tokenizer, EngineConfig(text_capacity=100_000))
    Engine(model, tokenizer, EngineConfig(text_capacity=4096))


def test_no_two_arrays_of_a_state_share_a_buffer(make_engine):
    # Enough slots that the smallest arrays have buffers of their own as well.
    leaves = jax.tree.leaves(make_engine(slots=32, text_capacity=8, bank_capacity=1).start())
    pointers = [x.unsafe_buffer_pointer() for x in leaves if x.nbytes > 64]
    assert len(pointers) == len(set(pointers))


@pytest.mark.gpu
def test_no_step_copies_a_cache(random_model, tokenizer):
    """Of no shape: the decode rows and the chunks of a step both append to each layer's cache.

    The eviction of tokens does not copy one either.
    """
    model = random_model(moss_tiny(), dtype="bfloat16")
    engine = Engine(model, tokenizer, EngineConfig(8, text_capacity=8192, bank_capacity=128))
    shape = str(engine.start().stream.text.keys[0].shape).replace(" ", "")
    cache = re.compile(rf"bf16\[{re.escape(shape[1:-1])}\]\S* copy(-start)?\(")
    kept = np.zeros(8192, np.int32)
    evict = engine.programs["compact_text"].lower(engine.start().stream.text, np.int32(0), kept, np.int32(0))
    for program in (evict, *engine._lower(shapes(8))):
        assert not cache.search(program.compile().as_text())
