"""The jitted steps: they are the model, whatever the rows; slots are alone; few programs serve all."""

import itertools
from unittest import mock

import jax
import numpy as np
import pytest

from moss_jax.stream import PENDING, Engine, Row
from moss_jax.stream import engine as engine_module
from moss_jax.stream.engine import ENCODE_BUCKETS, FRAME_BUCKETS, TOKEN_BUCKETS
from moss_jax.text import Tokenizer

IMAGE = 1024


def test_a_row_of_any_make_up_gives_the_logits_of_one_pass(make_engine, one_pass, frames):
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
    pool = engine.encode(frames)
    state, context, pending, seen = engine.start(), [], None, []
    for row in rows:
        state, drawn = engine.step(state, [row], pool if row.frames else None)
        context += [pending if token == PENDING else token for token in row.tokens]
        seen += [frames[i] for i in row.frames]
        pending = int(drawn.tokens[0])
        assert pending == int(
            np.argmax(np.where(np.asarray(engine._rules.allowed), drawn.logits[0], -np.inf))
        )
        if seen:
            expected = one_pass(context, seen)[-1]
            np.testing.assert_allclose(drawn.logits[0], expected, atol=1e-3)


def test_arranged_for_decoding_it_says_the_same(make_engine, one_pass, frames):
    """As on a GPU, where some weights are laid otherwise."""
    text, pool_of = [1015, 5, 6, 7], frames[:1]
    with (
        mock.patch("moss_jax.ops.contiguous.pays", return_value=True),
        mock.patch("moss_jax.nn.contiguous.pays", return_value=True),
    ):
        engine = make_engine()
        state, drawn = engine.step(engine.start(), [Row([*text, IMAGE], [0])], engine.encode(pool_of))
        context = [*text, IMAGE]
        for _ in range(3):
            context.append(int(drawn.tokens[0]))
            state, drawn = engine.step(state, [Row([PENDING])])
            np.testing.assert_allclose(drawn.logits[0], one_pass(context, pool_of)[-1], atol=1e-3)


def test_a_frame_changes_the_next_token_and_nothing_before_it(make_engine, one_pass, frames):
    engine = make_engine()
    pool = engine.encode(frames[:2])
    prompt = [1015, 5, 6, 7, IMAGE]

    def talk(arrival: int | None) -> list[np.ndarray]:
        """Logits of six tokens in mid-answer; a second frame may arrive before one of them."""
        state, drawn = engine.step(engine.start(), [Row(prompt, [0])], pool)
        logits = [np.asarray(drawn.logits[0])]
        for i in range(5):
            row = Row([PENDING, IMAGE], [1]) if i == arrival else Row([PENDING])
            state, drawn = engine.step(state, [row], pool if i == arrival else None)
            logits.append(np.asarray(drawn.logits[0]))
        return logits

    without, with_frame = talk(None), talk(2)
    for i in range(3):
        np.testing.assert_array_equal(without[i], with_frame[i])
    assert np.abs(without[3] - with_frame[3]).max() > 0.1
    # And what it sees is that frame: another picture gives other logits, this one those of one pass.
    said = [int(np.argmax(np.where(np.asarray(engine._rules.allowed), x, -np.inf))) for x in with_frame]
    sequence = [*prompt, *said[:3], IMAGE]
    np.testing.assert_allclose(with_frame[3], one_pass(sequence, frames[:2])[-1], atol=1e-3)
    other = one_pass(sequence, [frames[0], frames[5]])[-1]
    assert np.abs(with_frame[3] - other).max() > 0.1


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_k": 50, "repetition_penalty": 1.3}])
def test_a_slot_gets_what_it_gets_alone(make_engine, frames, sampling):
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
    pool = pair.encode(frames[:3])
    state = pair.start()
    together: dict[int, list] = {0: [], 1: []}
    for step in zip(rows[0], rows[1], strict=True):
        state, drawn = pair.step(state, step, pool if any(row and row.frames for row in step) else None)
        for slot, row in enumerate(step):
            if row is not None:
                together[slot].append((int(drawn.tokens[slot]), np.asarray(drawn.logits[slot])))
    single = make_engine(**sampling)
    for slot, script in rows.items():
        state = single.start()
        for row, (token, logits) in zip(filter(None, script), together[slot], strict=True):
            state, drawn = single.step(state, [row], pool if row.frames else None)
            np.testing.assert_allclose(drawn.logits[0], logits, atol=1e-3)
            assert int(drawn.tokens[0]) == token


def test_slots_of_unequal_pieces_all_draw_from_their_last_token(make_engine):
    pair, single = make_engine(slots=2), make_engine()
    long, short = Row([1015, *range(300)]), Row([1015, 7, 8])
    _, drawn = pair.step(pair.start(), [short, long])
    for slot, row in enumerate([short, long]):
        _, alone = single.step(single.start(), [row])
        np.testing.assert_allclose(drawn.logits[slot], alone.logits[0], atol=1e-3)


def test_few_programs_serve_every_row(model, tokenizer, frames):
    engine = Engine(model, tokenizer)
    state = engine.start()
    pool = engine.encode(frames[:8])
    for length in itertools.chain(range(1, 40), (100, 319, 320, 321, 700)):
        state, _ = engine.step(state, [Row([1015] * length)])
    for count in (1, 2, 5, 8, 11, 16, 17, 30):
        pool = engine.encode((frames * 2)[:count])
        state, _ = engine.step(state, [Row([PENDING] + [IMAGE] * count, range(count))], pool)
        state, _ = engine.step(state, [Row([1015] * 9 + [IMAGE] * count, range(count))], pool)
    engine.encode(frames * 5)
    # A row of one token comes in two forms: the pending one, and others.
    assert engine._step._cache_size() <= len(TOKEN_BUCKETS) + 1 + len(FRAME_BUCKETS)
    assert engine._pixels._cache_size() == engine._encode._cache_size() == len(ENCODE_BUCKETS)


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (5, [5]), (20, [8, 8, 4]), (75, [8, 32, 32, 3])])
def test_batches_are_sent_before_the_one_ahead_of_them_is_encoded(make_engine, frames, count, sizes):
    engine, seen = make_engine(), []
    send, encode = engine._send, engine._encode_sent

    def watched_send(batch):
        seen.append(("send", len(batch)))
        return send(batch)

    def watched_encode(sent):
        seen.append(("encode", None))
        return encode(sent)

    frames = (frames * 5)[:count]
    with mock.patch.multiple(engine, _send=watched_send, _encode_sent=watched_encode):
        pool = engine.encode(frames)
    assert [size for what, size in seen if what == "send"] == sizes
    what = [what for what, _ in seen]
    for i in range(1, len(sizes)):
        encodings = [k for k, x in enumerate(what) if x == "encode"]
        assert what[: encodings[i]].count("send") == min(i + 2, len(sizes))
    assert what[:2] == ["send", "encode"]
    for i in (0, count // 2, count - 1):
        np.testing.assert_allclose(pool[i], engine.encode(frames[i : i + 1])[0], atol=1e-5)


def test_the_batches_of_a_clip():
    """All frames in order, the small batches first, and one of these at least before a large one."""
    for count in (1, 2, 8, 9, 32, 39, 40, 41, 72, 130, 256):
        batches = list(engine_module._batches(list(range(count))))
        assert [frame for batch in batches for frame in batch] == list(range(count))
        sizes = [len(batch) for batch in batches]
        assert sizes[0] <= 8
        assert sizes.count(32) == max(count - 8, 0) // 32
        *whole, last = sizes
        assert set(whole) <= {8, 32}
        assert whole == sorted(whole)
        assert last in (count % 8 or 8, 32)


@pytest.mark.parametrize("lead", [[], [PENDING], [PENDING, 7]], ids=str)
def test_more_frames_than_fit_come_in_pieces(lead):
    row = Row([*lead, *[IMAGE] * 600, 7, 8], range(600))
    pieces = list(engine_module._pieces(row, IMAGE))
    assert [token for piece in pieces for token in piece.tokens] == row.tokens
    assert [frame for piece in pieces for frame in piece.frames] == list(row.frames)
    for piece in pieces:
        assert len(piece.tokens) <= TOKEN_BUCKETS[-1]
        assert piece.tokens.count(IMAGE) == len(piece.frames) <= FRAME_BUCKETS[-1]
    assert len(pieces) == 3


@pytest.mark.parametrize(
    ("runs", "pieces"),
    [
        ([(1, 0), (0, 1)], [2]),
        ([(2, 0), (0, 1)], [2, 1]),
        ([(0, 1), (3, 0)], [1, 3]),
        ([(13, 0), (0, 3)], [16]),
        ([(14, 0), (0, 3)], [14, 3]),
        ([(5, 0), (0, 3), (4, 0), (0, 4)], [16]),
        ([(5, 0), (0, 3), (4, 0), (0, 5), (60, 0)], [12, 5, 60]),
        ([(5, 0), (0, 256), (40, 0)], [301]),
        ([(5, 0), (0, 256), (60, 0)], [261, 60]),
        ([(400, 0)], [320, 80]),
        ([(321, 0)], [319, 2]),
        ([(0, 257)], [256, 1]),
    ],
    ids=str,
)
def test_what_stays_together(runs, pieces):
    """Runs of (text, frames); what is next to frames goes with them as far as their program has room."""
    tokens = [token for text, count in runs for token in [7] * text + [IMAGE] * count]
    row = Row(tokens, range(tokens.count(IMAGE)), new_turn=True)
    found = list(engine_module._pieces(row, IMAGE))
    assert [len(piece.tokens) for piece in found] == pieces
    assert [piece.new_turn for piece in found] == [True] + [False] * (len(pieces) - 1)


def test_warm_up_leaves_nothing_to_compile_for_a_session(model, tokenizer, frames):
    engine = Engine(model, tokenizer)
    engine.warm_up(frames[0].shape)
    programs = engine._step, engine._pixels, engine._encode, engine_module._take
    compiled = [program._cache_size() for program in programs]
    state, _ = engine.step(engine.start(), [Row([1015] * 321)])
    for i in range(3):
        state, _ = engine.step(state, [Row([PENDING, IMAGE], [0])], engine.encode(frames[i : i + 1]))
        state, _ = engine.step(state, [Row([PENDING])])
    for count, words in ((3, 12), (1, 64), (9, 3), (16, 1), (24, 1), (40, 2)):
        row = Row([PENDING, *[5] * words, *[IMAGE] * count], range(count), new_turn=True)
        state, _ = engine.step(state, [row], engine.encode((frames * 3)[:count]))
    assert [program._cache_size() for program in programs] == compiled


def test_the_state_is_donated(make_engine):
    engine = make_engine()
    before = engine.start()
    engine.step(before, [Row([1015])])
    assert all(x.is_deleted() for x in jax.tree.leaves(before))


def test_the_token_program_has_no_loop(make_engine):
    engine = make_engine()
    arguments = (np.full((1, 1), PENDING, np.int32), np.ones(1, np.int32), np.zeros(1, bool), None)
    lowered = engine._step.lower(engine._decoder, engine._rules, engine.start(), *arguments)
    assert "stablehlo.while" not in lowered.as_text()


def test_frames_of_different_sizes_keep_their_order(make_engine, frames):
    engine = make_engine()
    small = np.ascontiguousarray(frames[1][:12, :20])
    mixed = engine.encode([frames[0], small, frames[2]])
    for i, frame in enumerate([frames[0], small, frames[2]]):
        np.testing.assert_allclose(mixed[i], engine.encode([frame])[0], atol=1e-5)
    assert len(mixed) == 4


def test_structure_tokens_are_never_drawn(make_engine, tokenizer):
    engine = make_engine(temperature=100.0)
    state, drawn = engine.step(engine.start(), [Row([1015])])
    allowed = {tokenizer.special.silence, tokenizer.special.eot}
    said = set()
    for _ in range(300):
        state, drawn = engine.step(state, [Row([PENDING])])
        said.add(int(drawn.tokens[0]))
    assert len(said) > 100
    assert not said & (tokenizer.control_ids - allowed)


def test_penalty_holds_within_a_turn_and_spares_punctuation(make_engine, tokenizer):
    engine = make_engine(repetition_penalty=1000.0)
    state, drawn = engine.step(engine.start(), [Row([1015, 3, 4])])
    said = []
    for _ in range(40):
        said.append(int(drawn.tokens[0]))
        state, drawn = engine.step(state, [Row([PENDING])])
    exempt = tokenizer.penalty_exempt()
    words = [token for token in said if not exempt[token]]
    assert len(words) == len(set(words)) > 10
    assert np.asarray(state.said)[0, words].all()
    assert not (np.asarray(state.said)[0] & exempt).any()
    state, _ = engine.step(state, [Row([PENDING, 1020, 5], new_turn=True)])
    assert not np.asarray(state.said).any()


def test_a_tokenizer_of_another_vocabulary_is_refused(model, monkeypatch):
    other = Tokenizer.moss_tiny()
    monkeypatch.setattr(other, "vocab_size", 999)
    with pytest.raises(ValueError, match="999 tokens, the model 1024"):
        Engine(model, other)


def test_start_gives_buffers_of_their_own(make_engine):
    leaves = jax.tree.leaves(make_engine().start())
    pointers = [x.unsafe_buffer_pointer() for x in leaves if x.nbytes > 64]
    assert len(pointers) == len(set(pointers))
