"""The dialogue of one slot, move by move: what a session in real time meets only by chance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moss_jax.config import EngineConfig, MemoryConfig, SessionConfig
from moss_jax.stream import PENDING, End, FrameSeen, Interrupted, NotAsked, Silence, Text, Turn
from moss_jax.stream.conversation import Conversation, Inbound, Plan
from moss_jax.stream.rows import Encoded

SILENCE, IMAGE = 1021, 1024
OPENING = [1015, 5, 6]
FORGETS_NOTHING = MemoryConfig("full", text="full")
WINDOW = MemoryConfig("window")


@pytest.fixture
def start(tokenizer):
    """A realtime dialogue after its opening, whose first token is `token`."""

    def start(token: int, *, text_capacity=64, memory=FORGETS_NOTHING, **config) -> Conversation:
        capacity = EngineConfig(1, text_capacity, 64, memory)
        config = SessionConfig(clock="realtime", **config)
        conversation = Conversation(tokenizer, capacity, config, 0, opening=OPENING, prompt="")
        opening = move(conversation)
        assert opening.tokens == OPENING
        list(conversation.on_token(opening, token, 0.0))
        return conversation

    return start


def move(conversation: Conversation, wall: float = 0.0, in_flight: Plan | None = None) -> Plan:
    return conversation.plan(wall, in_flight, may_continue=True, perception_async=False)


def frame(time: float, order: int = 0) -> Inbound:
    return Inbound(time, 1, order, rgb=np.zeros((4, 4, 3), np.uint8))


def prompt(time: float, text: str = "And now?", tokens=(7, 8)) -> Inbound:
    return Inbound(time, 0, 0, prompt=text, tokens=[*tokens])


def say(conversation: Conversation, *tokens: int) -> list:
    """Lets the model sample these tokens, one after the other; the events of them."""
    events = []
    for token in tokens:
        plan = move(conversation)
        events += [*conversation.events(plan), *conversation.on_token(plan, token, 0.0)]
    return events


def test_the_tail_of_an_answer_counts_from_the_end_of_the_input(start):
    conversation = start(5, tail_seconds=1.0)
    conversation.finish(100.0)
    plan = move(conversation, 100.9)
    assert plan.tokens == [PENDING]
    list(conversation.on_token(plan, 5, 100.9))
    assert move(conversation, 101.1).end == "finished"


def test_no_room_for_a_speculative_token_is_no_end_yet(start):
    """The token that it would append may be a silence, which needs none."""
    conversation = start(5, text_capacity=len(OPENING) + 1)
    last = move(conversation)
    assert (last.tokens, last.end) == ([PENDING], None)
    assert move(conversation, in_flight=last) is None
    assert [type(e) for e in conversation.on_token(last, SILENCE, 0.0)] == [Silence]
    conversation.finish(0.0)
    assert move(conversation).end == "finished"


def test_the_row_behind_a_speculative_silence_begins_without_a_token(start):
    """Whether the frame comes while the speculative step is in flight, or after it."""
    for while_in_flight in (True, False):
        conversation = start(5)
        first = move(conversation)
        speculative = move(conversation, in_flight=first)
        assert speculative.speculative
        list(conversation.on_token(first, SILENCE, 0.0))
        if not while_in_flight:
            assert not list(conversation.on_token(speculative, 9, 0.0))
        conversation.receive(frame(0.0))
        assert move(conversation, in_flight=speculative if while_in_flight else None).tokens == [IMAGE]


def test_what_waits_is_taken_in_order_of_time_whatever_was_dropped(start):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        conversation = start(SILENCE, inbox_frames=8)
        for order, time in enumerate(rng.permutation(24)):
            inbound = frame(time, order) if rng.random() < 0.7 else prompt(time, text=str(time))
            conversation.receive(inbound)
        plan = move(conversation)
        times = [e.time if isinstance(e, FrameSeen) else int(e.prompt) for e in plan.events]
        assert times == sorted(times)
        assert len(plan.frames) == 8
        assert len(times) > 8


def test_a_frame_that_is_being_encoded_waits_for_its_features(start):
    """Also where the model has fallen silent meanwhile, so that others would be encoded with the step."""
    conversation = start(SILENCE)
    waiting = frame(0.0)
    waiting.claimed = True
    conversation.receive(waiting)
    assert move(conversation) is None
    waiting.encoded = Encoded(np.zeros((1, 1, 1)), 0)
    assert move(conversation).frames == [waiting]


def test_a_row_takes_frames_of_any_batches_up_to_one_that_is_being_encoded(start):
    batches = [np.zeros((2, 1, 1)) for _ in range(2)]
    encoded = [Encoded(batches[0], 1), Encoded(batches[1], 0), None, None, Encoded(batches[1], 1)]
    conversation, waiting = start(SILENCE), frame(3.0, 3)
    waiting.claimed = True
    for order, features in enumerate(encoded):
        inbound = waiting if order == 3 else frame(float(order), order)
        inbound.encoded = features
        conversation.receive(inbound)
    rows = []
    for _ in range(2):
        plan = move(conversation)
        rows.append([int(x.time) for x in plan.frames])
        list(conversation.on_token(plan, SILENCE, 0.0))
        waiting.encoded = Encoded(batches[0], 0)
    assert rows == [[0, 1, 2], [3, 4]]


def test_an_interruption_tells_what_was_said_since_the_last_answer_ended(start, tokenizer):
    red, card, blue = (tokenizer.encode(word)[0] for word in (" red", " card", " blue"))
    conversation = start(SILENCE)
    conversation.receive(frame(0.0))
    say(conversation, red, SILENCE)
    conversation.receive(frame(1.0))
    say(conversation, card)
    for said, answer in ((card, blue), (blue, red)):
        conversation.receive(prompt(2.0))
        (cut,) = [e for e in say(conversation, answer) if isinstance(e, Interrupted)]
        assert cut.said == tokenizer.decode([said])


def test_half_a_character_before_a_silence_is_not_completed_after_it(start, tokenizer):
    first, *rest = tokenizer.encode("☃")
    conversation = start(SILENCE)
    conversation.receive(frame(0.0))
    say(conversation, first, SILENCE)
    conversation.receive(frame(1.0))
    assert "☃" not in "".join(e.text for e in say(conversation, *rest) if isinstance(e, Text))


@st.composite
def prompts_at_fills(draw):
    """A text capacity, its low-water mark, how much is said before a prompt, and how long the prompt is."""
    capacity = draw(st.integers(8, 48))
    low_water = draw(st.sampled_from([0.6, 0.875, 0.99]))
    said, length = draw(st.integers(1, 2 * capacity)), draw(st.integers(1, capacity - len(OPENING) - 2))
    return capacity, low_water, said, length


def test_a_prompt_that_fits_beside_the_opening_is_asked_at_any_fill(start):
    """Also if the pending token before it had tokens evicted already, or a frame joins the row."""

    @given(prompts_at_fills(), st.booleans(), st.booleans(), st.booleans())
    def ask(sizes, in_flight, is_cut, with_frame):
        capacity, low_water, said, length = sizes
        memory = MemoryConfig("window", low_water=low_water)
        conversation = start(5, text_capacity=capacity, memory=memory, max_tokens_per_turn=1000)
        cache, due, last = [*OPENING], 7 * np.ones(length, int), None

        def append(plan: Plan) -> None:
            assert plan.end is None
            if plan.kept is not None:
                assert list(plan.kept) == sorted({*plan.kept, *range(len(OPENING))})
                cache[:] = [cache[i] for i in plan.kept]
            cache.extend(plan.tokens)
            assert len(cache) == conversation.text_length <= capacity

        for number in range(said):
            last = move(conversation)
            append(last)
            if number < said - 1 or not in_flight:
                conversation.interrupted = is_cut and number == said - 1
                list(conversation.on_token(last, 5, 0.0))
        if with_frame:
            conversation.receive(frame(0.0))
        conversation.receive(prompt(0.0, tokens=due))
        turns = []
        for _ in range(3):
            plan = move(conversation, in_flight=last if in_flight else None)
            append(plan)
            if in_flight:
                list(conversation.on_token(last, 5, 0.0))
                in_flight = False
            turns += [e for e in conversation.events(plan) if isinstance(e, Turn)]
            list(conversation.on_token(plan, 5, 0.0))
            if turns:
                break
        assert len(turns) == 1

    ask()


def test_a_prompt_longer_than_the_text_cache_ends_the_stream_unasked(start):
    conversation = start(5, memory=WINDOW)
    conversation.receive(prompt(0.0, "Never", [7] * 64))
    say(conversation, 5)
    end = move(conversation)
    events = list(conversation.events(end))
    assert [type(event) for event in events] == [NotAsked, End]
    assert (events[0].prompt, events[1].reason) == ("Never", "text_capacity")
