"""Sessions that outlive their capacities: compactions of the bank and of the text, limits of an answer."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream.test_session import Watcher

from moss_jax.config import MemoryConfig, SessionConfig
from moss_jax.memory.eviction import Kind, tokens_to_keep
from moss_jax.stream import (
    PENDING,
    Compaction,
    End,
    FrameSeen,
    Interrupted,
    NearCapacity,
    NotAsked,
    Row,
    Session,
    SessionError,
    Silence,
    Text,
    Turn,
    TurnLimit,
)
from moss_jax.text import chat

WINDOW = MemoryConfig("window", low_water=0.75, text_recent=0.4)


def play(engine, frames, prompts=(), *, system=None, **settings):
    """All events of a lockstep session."""
    session = Session(engine, SessionConfig(**({"tokens_per_second": 4} | settings)), system=system)
    for at, text in prompts:
        session.push_prompt(text, float(at))
    for second in range(frames):
        session.push_frame(np.full((4, 4, 3), second % 256, np.uint8), float(second))
    session.finish()
    return list(session)


def of(events, kind):
    return [event for event in events if isinstance(event, kind)]


@pytest.mark.parametrize("speech", [0, 2])
def test_a_stream_outlives_its_capacities(scripted, tokenizer, speech):
    """Every frame is seen, in order; the bank is compacted whenever it is full, the text likewise."""
    word = tokenizer.encode(" a")[0]
    script = ([word] * speech + [tokenizer.special.silence]) * 200
    engine = scripted(script, text_capacity=96, bank_capacity=8, memory=WINDOW)
    events = play(engine, 200)
    assert [event.index for event in of(events, FrameSeen)] == list(range(200))
    assert engine.seen == list(range(200))
    (end,) = of(events, End)
    assert end.reason == "finished"
    assert end.counters.frames == 200
    assert engine.compactions == (200 - 8 + 1) // 2  # Each makes room for 2 of 8 frames.
    assert len(engine.state.context[0]) <= 96
    assert len(of(events, Text)) >= 150 * speech


@st.composite
def streams(draw):
    """Frames, prompts and what is said, of any stream."""
    frames = draw(st.integers(1, 60))
    at = sorted(draw(st.sets(st.integers(0, frames - 1))))
    prompts = [(second + 0.5, "And now?" + " now" * draw(st.integers(0, 40))) for second in at]
    return frames, prompts, draw(st.lists(st.booleans(), max_size=300))


def test_what_a_text_cache_holds_is_in_order_whatever_happens(scripted, tokenizer):
    """Of the tokens of the whole stream, by number: the opening, then others in order of position."""
    special, word = tokenizer.special, tokenizer.encode(" a")[0]

    @settings(max_examples=15)
    @given(streams())
    def hold(stream):
        frames, prompts, spoken = stream
        script = [word if speaks else special.silence for speaks in spoken]
        engine = scripted(script, text_capacity=96, bank_capacity=8, memory=WINDOW)
        step, numbers, said = engine.step, [], {"tokens": 0, "frames": 0}
        opening = len(chat.opening(tokenizer, system=None))

        def numbered(state, rows, features=()):
            (row,) = rows
            if row.kept is not None:
                numbers[:] = [numbers[i] for i in row.kept]
            if row.compact:
                said["frames"] = min(said["frames"], WINDOW.low_mark(8))
            numbers.extend(range(said["tokens"], said["tokens"] + len(row.tokens)))
            said["tokens"] += len(row.tokens)
            said["frames"] += len(row.frames)
            assert numbers[:opening] == list(range(opening))
            assert numbers == sorted(set(numbers))
            assert len(numbers) <= 96
            assert said["frames"] <= 8
            state, sampled = step(state, rows, features)
            assert len(state.context[0]) == len(numbers)
            return state, sampled

        engine.step = numbered
        (end,) = of(play(engine, frames, prompts, tokens_per_second=8), End)
        assert (end.reason, end.counters.frames, end.counters.prompts) == ("finished", frames, len(prompts))

    hold()


@pytest.mark.parametrize(("text_capacity", "length"), [(128, 42), (256, 42), (1024, 130)])
def test_a_prompt_after_a_token_that_fills_the_text_cache_is_asked(
    scripted, tokenizer, text_capacity, length
):
    """Longer than what the eviction for that token leaves free, at every fill of the cache."""
    word = tokenizer.encode(" a")[0]
    text = "now"
    while len(chat.interjection(tokenizer, text)) < length:
        text += " now"
    opening = len(chat.opening(tokenizer, system=None))
    for said in range(text_capacity - opening - 3, text_capacity - opening + 3):
        engine = scripted([word] * 3000, text_capacity=text_capacity, memory=MemoryConfig("window"))
        settings = {"tokens_per_second": said, "max_tokens_per_turn": 3000, "tail_seconds": 0.01}
        events = play(engine, 1, [(1.0, text)], **settings)
        assert [turn.prompt for turn in of(events, Turn)] == ["", text]
        assert of(events, End)[0].reason == "finished"


def test_the_opening_and_the_newest_tokens_stay(scripted, tokenizer):
    engine = scripted(text_capacity=96, bank_capacity=8, memory=WINDOW)
    session = Session(engine, SessionConfig(tokens_per_second=4), system="Watch.", prompt="What is there?")
    opening = []
    before = engine.before_step

    def note():
        opening.extend(engine.state.context[0][: session.opening_length] if not opening else [])
        before()

    engine.before_step = note
    for second in range(150):
        session.push_frame(np.zeros((4, 4, 3), np.uint8), float(second))
    session.finish()
    list(session)
    context = engine.state.context[0]
    assert context[: session.opening_length] == opening
    special = tokenizer.special
    assert context[-39:] == ([special.silence, special.image] * 20)[-39:]


def test_the_host_knows_what_every_token_is(scripted, tokenizer):
    """Silences and frames go first: what is left of old times are turns and answers."""
    special, word = tokenizer.special, tokenizer.encode(" a")[0]
    script = []
    for second in range(300):
        script += [word, word, special.silence] if second % 25 == 0 else [special.silence]
    engine = scripted(script, text_capacity=160, bank_capacity=8, memory=WINDOW)
    play(engine, 250, [(at + 0.5, "Well?") for at in range(0, 250, 50)], tokens_per_second=8)
    context = engine.state.context[0]
    recent = int(WINDOW.text_recent * 160)
    old = context[:-recent]
    assert old.count(word) >= 6
    assert tokenizer.encode("Well?")[0] in old
    # Those that have grown old since the last compaction, at most.
    assert old.count(special.image) <= 160 - int(WINDOW.low_water * 160)


def test_a_prompt_that_never_fits_is_refused_and_the_stream_goes_on(scripted, tokenizer):
    engine = scripted(text_capacity=64, bank_capacity=8, memory=WINDOW)
    session = Session(engine, SessionConfig(tokens_per_second=4), system=None)
    room = 64 - session.opening_length - 2
    text = " a" * 50
    while len(chat.interjection(tokenizer, text)) > room:
        with pytest.raises(SessionError, match=f"has room for {room} beside the opening"):
            session.push_prompt(text, 30.0)
        text = text[2:]
    for second in range(60):
        session.push_frame(np.zeros((4, 4, 3), np.uint8), float(second))
    session.push_prompt(text, 30.5)
    session.finish()
    events = list(session)
    assert [event.prompt for event in of(events, Turn)] == ["", text]
    assert of(events, End)[0].reason == "finished"
    assert len(of(events, FrameSeen)) == 60


def test_capacities_end_a_stream_that_asks_for_it(scripted):
    memory = MemoryConfig(policy="full", text="full")
    events = play(scripted(text_capacity=512, bank_capacity=20, memory=memory), 30, [(25.5, "And now?")])
    assert of(events, End)[0].reason == "bank_capacity"
    (warning,) = of(events, NearCapacity)
    assert (warning.setting, warning.left, warning.capacity) == ("bank_capacity", 2, 20)
    assert [event.prompt for event in of(events, NotAsked)] == ["And now?"]
    only_text = dataclasses.replace(memory, policy="window")
    events = play(scripted(text_capacity=64, bank_capacity=8, memory=only_text), 100)
    assert of(events, End)[0].reason == "text_capacity"
    assert [event.setting for event in of(events, NearCapacity)] == ["text_capacity"]


def test_an_answer_that_goes_on_and_on_is_cut(scripted, tokenizer):
    """The stream goes on silent, and the context says that the answer has ended."""
    special, word = tokenizer.special, tokenizer.encode(" a")[0]
    script = [word] * 5 + [special.silence] * 3 + [word, special.silence]
    engine = scripted(script)
    events = play(engine, 8, tokens_per_second=8, max_tokens_per_turn=5)
    (limit,) = of(events, TurnLimit)
    assert limit.tokens == 5
    following = events[events.index(limit) + 1 :]
    assert isinstance(following[0], Silence)
    assert len(of(following, Text)) == 1
    assert of(events, End)[0].reason == "finished"
    context = engine.state.context[0]
    fifth = [i for i, token in enumerate(context) if token == word][4]
    assert context[fifth + 1 : fifth + 3] == [special.silence, special.image]


def test_the_caller_may_interrupt(scripted, tokenizer):
    special, word = tokenizer.special, tokenizer.encode(" a")[0]
    engine = scripted([word] * 50)
    session = Session(engine, SessionConfig(tokens_per_second=8), system=None)
    for second in range(2):
        session.push_frame(np.zeros((4, 4, 3), np.uint8), float(second))
    session.finish()
    events = []
    for event in session:
        events.append(event)
        if len(of(events, Text)) == 3 and not of(events, Interrupted):
            engine.script[0].clear()
            session.interrupt()
    (cut,) = of(events, Interrupted)
    assert cut.said == " a a a"
    assert len(of(events, Text)) == 3
    assert len(of(events, Turn)) == 1  # That of the opening: no new turn.
    context = engine.state.context[0]
    third = [i for i, token in enumerate(context) if token == word][2]
    assert context.count(word) == 3
    assert context[third + 1 : third + 3] == [special.silence, special.image]
    # Nothing is left of it for the next answer.
    session = Session(scripted([special.silence, word, special.silence]), SessionConfig(), system=None)
    session.push_frame(np.zeros((4, 4, 3), np.uint8), 0.0)
    session.interrupt()
    session.finish()
    assert not of(list(session), Interrupted)


@pytest.mark.parametrize("policy", ["window", "pyramid", "merge"])
def test_between_two_compactions_the_law_holds(make_engine, frames, policy):
    """Token by token or in one row, the logits after a compaction are the same."""
    memory = MemoryConfig(policy, low_water=0.75, pyramid_shares=(0.5, 0.25, 0.25))
    engine = make_engine(bank_capacity=8, memory=memory)
    special, compact = engine.tokenizer.special, Compaction(memory, 8)
    image, tokens = special.image, engine.tokenizer.encode("What is there now?")

    def filled():
        state = engine.start()
        features = engine.encode(frames[:8])
        state, _ = engine.step(state, [Row([special.begin_of_text] + [image] * 8, range(8))], features)
        return state

    later = [image, *tokens, image, *tokens[:3]]
    state, sampled = engine.step(filled(), [Row(later, [0, 1], compact=compact)], engine.encode(frames[8:10]))
    at_once = np.asarray(sampled.logits)
    assert int(state.stream.bank.length[0]) <= 8 * engine.model_config.vectors_per_frame
    state, seen = filled(), iter(frames[8:10])
    for index, token in enumerate(later):
        features = engine.encode([next(seen)]) if token == image else None
        row = Row([token], [0] if token == image else [], compact=None if index else compact)
        state, sampled = engine.step(state, [row], features)
    # Sums of some thousand products in float32, through three layers.
    np.testing.assert_allclose(sampled.logits, at_once, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stored", [None, "int8", "fp8"])
def test_a_live_stream_of_a_model_goes_on(make_engine, frames, stored):
    """Through many compactions of bank and text: every frame is seen, and no logits end the stream."""
    shares = 0.5, 0.25, 0.25
    memory = MemoryConfig("pyramid", bank_dtype=stored, text_dtype=stored, pyramid_shares=shares)
    engine = make_engine(text_capacity=96, bank_capacity=8, memory=memory)
    session = Session(engine, SessionConfig(tokens_per_second=2), system=None)
    for second in range(60):
        session.push_frame(frames[second % len(frames)], float(second))
    session.finish()
    events = list(session)
    assert of(events, End)[0].reason == "finished"
    assert [event.index for event in of(events, FrameSeen)] == list(range(60))


def test_dropped_tokens_have_no_influence_and_others_keep_their_positions(make_engine):
    """Dropped keys and values are NaN here, which any influence would spread to the logits."""
    engine = make_engine(memory=WINDOW)
    tokens = engine.tokenizer.encode("What is on the table, and what is the number?")
    begin = engine.tokenizer.special.begin_of_text
    first = engine.step(engine.start(), [Row([begin, *tokens])])[0]
    kept = [i for i in range(len(tokens) + 1) if i not in (2, 3, 4)]
    text = first.stream.text
    spoilt = dataclasses.replace(
        text,
        keys=tuple(x.at[:, :, 2:5].set(np.nan) for x in text.keys),
        values=tuple(x.at[:, :, 2:5].set(np.nan) for x in text.values),
    )
    first = dataclasses.replace(first, stream=dataclasses.replace(first.stream, text=spoilt))
    state, sampled = engine.step(first, [Row(tokens[:2], kept=kept)])
    assert int(state.stream.text.length[0]) == len(kept) + 2
    assert int(state.stream.text.position[0]) == len(tokens) + 3
    assert np.isfinite(np.asarray(sampled.logits)).all()


def test_a_frame_after_dropped_tokens_has_the_position_of_its_token(make_engine, frames):
    """Tokens that stay keep their positions, so the next ones go on from there, frames like words."""
    engine = make_engine(bank_capacity=8, memory=WINDOW)
    special = engine.tokenizer.special
    row = Row([special.begin_of_text, *[special.silence] * 9, special.image], [0])
    state, _ = engine.step(engine.start(), [row], engine.encode(frames[:1]))
    row = Row([special.silence, special.image], [0], kept=range(3))
    state, _ = engine.step(state, [row], engine.encode(frames[1:2]))
    held = int(state.stream.bank.length[0])
    assert sorted(set(np.asarray(state.stream.bank.positions[0, :held]).tolist())) == [10, 12]
    assert int(state.stream.text.position[0]) == 13


def test_compactions_leave_other_slots_alone(make_engine, frames):
    engine = make_engine(slots=2, bank_capacity=8, memory=WINDOW)
    special = engine.tokenizer.special
    row = Row([special.begin_of_text] + [special.image] * 8, range(8))
    state, _ = engine.step(engine.start(), [row, row], engine.encode(frames[:8]))
    before = [np.asarray(x[1]) for x in jax.tree.leaves(state.stream)]
    state, _ = engine.step(state, [Row([PENDING], compact=Compaction(WINDOW, 8), kept=range(5)), None])
    after = [np.asarray(x[1]) for x in jax.tree.leaves(state.stream)]
    vectors = engine.model_config.vectors_per_frame
    assert np.asarray(state.stream.bank.length).tolist() == [6 * vectors, 8 * vectors]
    assert np.asarray(state.stream.text.length).tolist() == [6, 9]
    # Of the text cache, the row behind the capacity is written to by a slot that stands still.
    for x, y in zip(before, after, strict=True):
        rows = engine.config.text_capacity if x.ndim == 3 and x.shape[1] > 512 else None
        np.testing.assert_array_equal(x[:, :rows] if rows else x, y[:, :rows] if rows else y)


@given(st.lists(st.sampled_from([k for k in Kind if k is not Kind.PINNED]), max_size=90), st.integers(-5, 60))
def test_what_stays_of_the_text(kinds, room):
    kinds = [Kind.PINNED] * 10 + kinds
    kept = tokens_to_keep(kinds, room, WINDOW, 100)
    assert kept == sorted(set(kept))
    assert kept[:10] == list(range(10))
    assert len(kept) <= max(room, 10)
    recent = range(len(kinds) - min(40, room - 10), len(kinds))
    old_said = [i for i in kept if i < recent.start and kinds[i] is Kind.ASSISTANT]
    if old_said:
        assert set(range(10, len(kinds))) & set(recent) <= set(kept)


def test_silences_go_first_and_answers_last():
    assistant, user, silence, frame = Kind.ASSISTANT, Kind.USER, Kind.SILENCE, Kind.FRAME
    kinds = (
        [Kind.PINNED] * 4
        + [user] * 6
        + [assistant] * 5
        + [frame, silence] * 10
        + [assistant] * 5
        + [frame] * 5
    )
    memory = MemoryConfig(text_first=0, text_recent=0.1, text_assistant=0.2)

    def left(room):
        counts = [kinds[i] for i in tokens_to_keep(kinds, room, memory, 50)]
        return tuple(counts.count(kind) for kind in (user, assistant, silence, frame))

    assert left(45) == (6, 10, 10, 15)
    assert left(40) == (6, 10, 8, 12)  # The oldest of the 20.
    assert left(25) == (6, 10, 0, 5)
    assert left(20) == (0, 10, 0, 5)
    assert left(14) == (0, 5, 0, 5)
    assert left(9) == (0, 0, 0, 5)
    assert left(6) == (0, 0, 0, 2)


@given(st.lists(st.sampled_from([k for k in Kind if k is not Kind.PINNED]), max_size=40))
def test_the_first_tokens_after_the_opening_stay_through_any_number_of_evictions(new):
    memory = MemoryConfig(text_first=0.2, text_recent=0.3)
    # Each token with its number; an answer that begins among the first 20 of 100 stays whole.
    protected = 30 if Kind.UNKNOWN in new else 34
    opening, answer = [Kind.PINNED] * 10, [Kind.ASSISTANT] * 6
    context = list(enumerate([*opening, *[Kind.FRAME, Kind.SILENCE] * 9, *answer]))
    for number in range(12):
        start = len(opening) + 24 + number * 60
        context += list(enumerate([*new, *[Kind.FRAME] * (60 - len(new))], start))
        if len(context) > 80:
            kept = tokens_to_keep([kind for _, kind in context], 80, memory, 100)
            context = [context[i] for i in kept]
        assert [number for number, _ in context[:protected]] == list(range(protected))


def test_without_room_the_first_tokens_go_before_the_newest():
    kinds = [Kind.PINNED] * 5 + [Kind.FRAME] * 30
    memory = MemoryConfig(text_first=0.2, text_recent=0.2)
    assert tokens_to_keep(kinds, 25, memory, 50) == [*range(15), *range(25, 35)]
    assert tokens_to_keep(kinds, 12, memory, 50) == [*range(5), *range(28, 35)]


def watched(engine, **settings):
    session = Session(engine, SessionConfig(clock="realtime", **settings), system=None)
    return session, Watcher(session)


def spoken(engine, tokenizer):
    """The context behind the opening, without the last token, which may be in it or pending."""
    return engine.state.context[0][len(chat.opening(tokenizer, system=None)) :]


def test_a_realtime_answer_is_cut_though_the_next_step_is_under_way(scripted, tokenizer):
    special, word = tokenizer.special, tokenizer.encode(" a")[0]
    engine = scripted([special.silence, *[word] * 5, special.silence, word, special.silence])
    session, watcher = watched(engine, max_tokens_per_turn=4)
    watcher.wait_for(Silence, 1)
    for count in (2, 3):
        session.push_frame(np.zeros((4, 4, 3), np.uint8))
        watcher.wait_for(Silence, count)
    session.finish()
    watcher.join(60)
    assert len(of(watcher.events, TurnLimit)) == 1
    frame, silence = special.image, special.silence
    talk = spoken(engine, tokenizer)
    # Where the next step was under way, its token is dropped; the silence follows all the same.
    assert talk[: 2 + 4 + 2] == [silence, frame, *[word] * 4, silence, frame]


def test_a_realtime_answer_may_be_interrupted(scripted, tokenizer):
    special, word = tokenizer.special, tokenizer.encode(" a")[0]
    engine = scripted([special.silence, *[word] * 10_000])
    session, watcher = watched(engine, max_tokens_per_turn=10_000)
    watcher.wait_for(Silence, 1)
    session.push_frame(np.zeros((4, 4, 3), np.uint8))
    watcher.wait_for(Text, 3)
    session.interrupt()
    watcher.wait_for(Interrupted, 1)
    said = len(of(watcher.events, Text))
    engine.script[0].clear()
    session.push_frame(np.zeros((4, 4, 3), np.uint8))
    watcher.wait_for(FrameSeen, 2)
    session.finish()
    watcher.join(60)
    (cut,) = of(watcher.events, Interrupted)
    assert cut.said == " a" * said
    talk = spoken(engine, tokenizer)
    first = talk.index(word)
    assert talk[first : first + said + 2] == [*[word] * said, special.silence, special.image]


def test_a_realtime_stream_outlives_its_capacities(scripted, tokenizer):
    """Talking all the while, so that steps are dispatched before their tokens are known."""
    special, word = tokenizer.special, tokenizer.encode(" a")[0]
    engine = scripted(
        ([word] * 6 + [special.silence]) * 500, text_capacity=96, bank_capacity=8, memory=WINDOW
    )
    session, watcher = watched(engine, inbox_frames=1000)
    for number in range(100):
        session.push_frame(np.full((4, 4, 3), number, np.uint8))
        watcher.wait_for(FrameSeen, number + 1)
    session.finish()
    watcher.join(60)
    assert of(watcher.events, End)[0].reason == "finished"
    assert engine.seen == list(range(100))
    assert len(engine.state.context[0]) <= 96
    assert engine.compactions >= (100 - 8) // 2 - 1
