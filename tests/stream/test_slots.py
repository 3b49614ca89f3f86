"""Several slots in one engine: each is as if it were alone, whatever the others append in the same step."""

import jax
import numpy as np
import pytest

from moss_jax.config import EngineConfig, MemoryConfig, TokenSampling
from moss_jax.stream import PENDING, Compaction, Engine, Row
from moss_jax.stream.engine import gather, pick_frame

IMAGE = 1024
SLOTS = 4
FULL = MemoryConfig("full", text="full")
MEMORIES = {
    "full": FULL,
    "int8": MemoryConfig("full", text="full", bank_dtype="int8", text_dtype="int8"),
    "pyramid": MemoryConfig("pyramid", low_water=0.75, pyramid_shares=(0.5, 0.25, 0.25)),
    "merge": MemoryConfig("merge", low_water=0.75, bank_dtype="fp8"),
}

# Each has programs of its own, which take long to compile.
SOME_SLOW = [
    pytest.param(name, marks=[] if name == "pyramid" else [pytest.mark.slow], id=name) for name in MEMORIES
]


def random_row(rng, frames: int, begins: bool) -> Row:
    """Text and up to a number of frames, in any order."""
    kind = rng.choice(["decode", "frame", "words", "mixed", "prompt"])
    if kind == "decode" and not begins:
        return Row([PENDING], new_turn=rng.random() < 0.2)
    length = {"decode": 1, "frame": 0, "words": 2, "mixed": 30, "prompt": 90}[kind]
    count = {"frame": 1, "mixed": int(rng.integers(0, 5))}.get(kind, 0)
    shown = rng.permutation(16)[: min(count, frames)].tolist()
    tokens = [*rng.integers(0, 1000, length).tolist(), *[IMAGE] * len(shown)]
    rng.shuffle(tokens)
    return Row([1015 if begins else PENDING, *tokens], shown, new_turn=bool(rng.integers(2)))


def random_script(rng, steps=14, most_tokens=480, most_frames=16) -> list[Row | None]:
    """Rows of a slot that now and then stands still; a prompt of several steps is one of them."""
    script, tokens, frames = [], 0, 0
    for _ in range(steps):
        row = random_row(rng, most_frames - frames, not tokens) if rng.random() < 0.75 else None
        if tokens == 0 and row is not None and rng.random() < 0.5:
            row = Row([*row.tokens, *rng.integers(0, 1000, 200).tolist()], row.frames)
        if row is not None and tokens + len(row.tokens) > most_tokens:
            row = Row([PENDING])
        if row is not None:
            tokens, frames = tokens + len(row.tokens), frames + len(row.frames)
        script.append(row)
    return script


def played(engine, features, scripts: list[list[Row | None]]) -> list[list[tuple[int, np.ndarray]]]:
    """Token and logits after each row of each slot; those of slots that stand still stay what they were."""
    state, found = engine.start(), [[] for _ in scripts]
    before = np.asarray(state.logits)
    for rows in zip(*scripts, strict=True):
        if not any(rows):
            continue
        state, sampled = engine.step(state, rows, features)
        logits, tokens = np.array(sampled.logits), sampled.tokens.tolist()
        for slot, row in enumerate(rows):
            if row is None:
                np.testing.assert_array_equal(logits[slot], before[slot])
            else:
                found[slot].append((tokens[slot], logits[slot]))
        before = logits
    return found


@pytest.mark.parametrize("seed", range(3))
def test_packed_rows_give_the_logits_of_one_pass(make_engine, one_pass, frames, seed):
    engine, rng = make_engine(slots=SLOTS), np.random.default_rng(seed)
    scripts = [random_script(rng) for _ in range(SLOTS)]
    features = engine.encode(frames)
    # As of frames that were encoded in two batches.
    found = played(engine, [features[:3], features[3:]], scripts)
    for script, of_slot in zip(scripts, found, strict=True):
        context, seen, pending = [], [], None
        for row, (token, logits) in zip(filter(None, script), of_slot, strict=True):
            context += [pending if t == PENDING else t for t in row.tokens]
            seen += [frames[i] for i in row.frames]
            pending = token
            expected = (
                one_pass(context, seen or frames[:0] or [np.zeros_like(frames[0])])[-1] if seen else None
            )
            if seen:
                np.testing.assert_allclose(logits, expected, atol=1e-3)


@pytest.mark.parametrize("name", SOME_SLOW)
def test_slots_say_what_each_says_alone(make_engine, frames, name):
    """Also through compactions, and where the bank is stored in 8 bits."""
    memory, rng = MEMORIES[name], np.random.default_rng(7)
    sampling = {"temperature": 1.0, "top_k": 40, "repetition_penalty": 1.2}
    packed, single = (
        make_engine(slots=SLOTS, memory=memory, **sampling),
        make_engine(memory=memory, **sampling),
    )
    features = packed.encode(frames)
    scripts = [random_script(rng) for _ in range(SLOTS)]
    if memory.policy != "full":
        scripts = [compacting(script, memory) for script in scripts]
    together = played(packed, features, scripts)
    # In 8 bits, a sum in another order may be rounded to a neighbour.
    tolerance = 2e-2 if memory.bank_dtype else 1e-3
    for script, found in zip(scripts, together, strict=True):
        (alone,) = played(single, features, [script])
        assert [token for token, _ in found] == [token for token, _ in alone]
        for (_, logits), (_, expected) in zip(found, alone, strict=True):
            np.testing.assert_allclose(logits, expected, atol=tolerance)


def compacting(script, memory) -> list[Row | None]:
    """The script with compactions of the bank, and of the text to its first and last tokens."""
    changed, tokens = [], 0
    for number, row in enumerate(script):
        if row is not None and tokens > 40 and number % 3 == 0:
            kept = [*range(8), *range(20, tokens)]
            row = Row(row.tokens, row.frames, row.new_turn, Compaction(memory, 4), kept)
            tokens = len(kept)
        tokens += len(row.tokens) if row is not None else 0
        changed.append(row)
    return changed


@pytest.mark.parametrize(
    "name", ["full", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8", "merge"))]
)
def test_a_slot_that_was_reset_is_as_good_as_new(make_engine, frames, name):
    """A stream of NaN leaves nothing behind, and touches no other slot while it lasts."""
    engine = make_engine(slots=3, memory=MEMORIES[name])
    features, rng = engine.encode(frames), np.random.default_rng(1)
    spoilt = features.at[:4].set(np.nan)
    neighbours = [random_script(rng) for _ in range(2)]
    prompt, frame, decode = Row([1015, *range(40)]), Row([PENDING, IMAGE, IMAGE], [0, 3]), Row([PENDING])
    scripts = [neighbours[0], [prompt, frame, frame, *[decode] * 11], neighbours[1]]

    def run(state, features, script):
        logits = []
        for rows in script:
            state, sampled = engine.step(state, rows, features)
            logits.append(np.array(sampled.logits))
        return state, logits

    def without(slot, logits):
        return [np.delete(x, slot, axis=0) for x in logits]

    # The neighbours see later frames alone.
    steps = [
        tuple(later(row) if i != 1 else row for i, row in enumerate(rows))
        for rows in zip(*scripts, strict=True)
    ]
    _, clean = run(engine.start(), features, steps)
    state, poisoned = run(engine.start(), spoilt, steps)
    assert np.isnan(poisoned[-1][1]).all()
    np.testing.assert_array_equal(without(1, clean), without(1, poisoned))

    again = [(None, row, None) for row in (prompt, frame, decode, Row([PENDING, *range(60)]), frame, decode)]
    _, fresh = run(engine.start(), features, again)
    state, after = run(engine.reset_slot(state, 1), features, again)
    assert np.isfinite(fresh).all()
    np.testing.assert_array_equal([x[1] for x in after], [x[1] for x in fresh])
    np.testing.assert_array_equal(state.logits[::2], poisoned[-1][::2])


def later(row: Row | None) -> Row | None:
    """The row with none of the first four frames."""
    return row and Row(row.tokens, [4 + frame % 12 for frame in row.frames], row.new_turn)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 3])
def test_nothing_compiles_after_warm_up(model, tokenizer, frames, slots):
    config = EngineConfig(slots, 256, 64, MemoryConfig("window"), policies=("merge", "pyramid"))
    engine = Engine(model, tokenizer, config)
    engine.warm_up(frames[0].shape)
    programs = {**engine.programs, "gather": gather, "pick_frame": pick_frame}
    compiled = {name: program._cache_size() for name, program in programs.items()}
    rng, lowered = np.random.default_rng(0), []

    def listen(event, _, **about):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            lowered.append(about)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        wander(engine, frames, rng)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert {name: program._cache_size() for name, program in programs.items()} == compiled
    assert not lowered


SAMPLINGS = [
    TokenSampling(),
    TokenSampling(temperature=1.0, seed=3),
    TokenSampling(temperature=1.0, top_k=5, repetition_penalty=1.2),
]


def wander(engine, frames, rng, steps=100):
    """A random mix of all that an engine is asked for."""
    slots, memories = engine.config.slots, [MemoryConfig(x) for x in ("window", "merge", "pyramid")]
    state, held, begins = engine.start(), [0] * slots, [True] * slots
    before = engine.encode(frames[:1])
    for _ in range(steps):
        slot, frames_now = (
            int(rng.integers(slots)),
            int(rng.choice([1, 2, 3, 5, 8, 9, 12, 16, 17, 21, 35, 40])),
        )
        if rng.random() < 0.1:
            state = engine.reset_slot(state, slot)
            held[slot], begins[slot] = 0, True
        if rng.random() < 0.2:
            state = engine.set_sampling(state, slot, SAMPLINGS[rng.integers(3)])
        features = engine.encode([frames[i % len(frames)] for i in range(frames_now)])
        engine.distance(before, 0, features, frames_now - 1)
        rows: list[Row | None] = [None] * slots
        for slot in rng.permutation(slots)[: rng.integers(1, slots + 1)].tolist():
            row = random_row(rng, min(frames_now, 4), begins[slot])
            row = Row(row.tokens, [frame % frames_now for frame in row.frames], row.new_turn)
            if held[slot] + len(row.tokens) > 200:
                memory = memories[rng.integers(3)]
                row = Row(row.tokens, row.frames, row.new_turn, Compaction(memory, 16), range(20))
                held[slot] = 20
            rows[slot], begins[slot] = row, False
            held[slot] += len(row.tokens)
        state, sampled = engine.step(
            state, rows, features if rng.random() < 0.5 or has_frames(rows) else None
        )
        assert min(sampled.tokens.tolist()) >= 0
        before = features


def has_frames(rows) -> bool:
    return any(row and row.frames for row in rows)
