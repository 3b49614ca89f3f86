"""A whole dialogue as one more stream of a scheduler."""

import json
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from moss_jax.config import (
    ConversationConfig,
    FrameSampling,
    MemoryConfig,
    SchedulerConfig,
    SessionConfig,
    TokenSampling,
)
from moss_jax.data.rows import read_rows
from moss_jax.stream import (
    NOT_FINITE,
    DialogueTurn,
    End,
    Event,
    FrameSeen,
    Refused,
    Scheduler,
    SessionError,
    Text,
    Turn,
    answer_offline,
)
from moss_jax.stream.completion import dialogue_parts
from moss_jax.text import chat
from moss_jax.video import Frame

LOCKSTEP, REALTIME = SchedulerConfig(clock="lockstep"), SchedulerConfig(clock="realtime")
POLICIES = ("window", "pyramid", "merge")
SILENCE, EOT = 1021, 1020


def clip(frames: list[np.ndarray], count: int) -> list[Frame]:
    return [Frame(frames[i % len(frames)], i / 2) for i in range(count)]


def user(*content: str | Frame) -> DialogueTurn:
    return DialogueTurn("user", content)


def told(events) -> list[dict]:
    """Events without the slot, the time of the wall and what is measured by it."""
    return [
        {k: v for k, v in event.to_dict().items() if k not in ("slot", "wall_time", "figures")}
        for event in events
    ]


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


@pytest.mark.parametrize("clock", ["lockstep", "realtime"])
@pytest.mark.parametrize(
    ("slots", "count"),
    [
        (3, 30),
        pytest.param(3, 1, marks=pytest.mark.slow),
        pytest.param(1, 7, marks=pytest.mark.slow),
        pytest.param(1, 30, marks=pytest.mark.slow),
    ],
)
def test_the_events_are_those_of_the_offline_answer(make_engine, frames, clock, slots, count):
    shown = clip(frames, count)
    expected = told(answer_offline(make_engine(), shown, "What is it?", system="Look.", max_tokens=9))
    assert {"frame", "turn", "text", "end"} == {event["type"] for event in expected}
    dialogue = [DialogueTurn("system", ["Look."]), user(*shown, "What is it?")]
    with Scheduler(make_engine(slots=slots), SchedulerConfig(clock=clock)) as scheduler:
        assert told(scheduler.complete(dialogue, max_tokens=9)) == expected
        # Once more in the used slot.
        assert told(scheduler.complete(dialogue, max_tokens=9)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("clock", ["lockstep", "realtime"])
@pytest.mark.parametrize("policy", POLICIES)
def test_memory_is_compacted_as_offline(make_engine, frames, clock, policy):
    """Frames in the bank and tokens in the text cache are both more than there is room for."""
    memory = MemoryConfig(
        policy, text="window", low_water=0.75, text_recent=0.4, pyramid_shares=(0.5, 0.25, 0.25)
    )
    shown = clip(frames, 90)
    engine = make_engine(bank_capacity=8, text_capacity=64, memory=memory)
    expected = told(answer_offline(engine, shown, "What is it?", max_tokens=40))
    engine = make_engine(slots=2, bank_capacity=8, text_capacity=64, memory=memory)
    with Scheduler(engine, SchedulerConfig(clock=clock)) as scheduler:
        assert told(scheduler.complete([user(*shown, "What is it?")], max_tokens=40)) == expected


def live(scheduler: Scheduler, frames: list[np.ndarray], seed: int) -> list[dict]:
    stream = scheduler.open(
        SessionConfig(tokens_per_second=5, max_tokens_per_turn=12),
        sampling=TokenSampling(temperature=1.0, seed=seed),
    )
    for second in range(12):
        stream.push_frame(frames[(second + seed) % len(frames)], float(second))
        if second % 3 == 1:
            stream.push_prompt("And now?", second + 0.5)
    stream.finish()
    return told(stream)


@pytest.mark.slow
def test_live_neighbours_and_completions_say_what_they_say_alone(make_engine, frames):
    sampling = TokenSampling(temperature=0.9, top_p=0.9, seed=5)
    dialogues = [[user(*clip(frames, n), "What is it?" + " Why?" * n)] for n in (3, 20, 31)]
    with Scheduler(make_engine(), LOCKSTEP) as scheduler:
        alone = [live(scheduler, frames, seed) for seed in range(2)]
        answers = [told(scheduler.complete(d, max_tokens=20, sampling=sampling)) for d in dialogues]
    streams, completions = {}, {}

    def run_live(seed: int) -> None:
        streams[seed] = live(scheduler, frames, seed)

    def run_completions() -> None:
        for number, dialogue in enumerate(dialogues):
            completions[number] = told(scheduler.complete(dialogue, max_tokens=20, sampling=sampling))

    with Scheduler(make_engine(slots=3), LOCKSTEP) as scheduler:
        threads = [threading.Thread(target=run_live, args=(seed,)) for seed in range(2)]
        threads.append(threading.Thread(target=run_completions))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        assert scheduler.free_slots == 3
    assert [completions[i] for i in range(3)] == answers
    assert [streams[i] for i in range(2)] == alone


@pytest.mark.slow
def test_in_realtime_a_live_stream_is_answered_beside_a_long_clip(make_engine, frames):
    """Its frames are neither dropped nor behind those of the clip."""
    with Scheduler(make_engine(slots=2), REALTIME) as scheduler:
        stream = scheduler.open(SessionConfig(max_tokens_per_turn=5), prompt="What is there?")
        answer = scheduler.complete([user(*clip(frames, 32), "What is it?")], max_tokens=8)
        for at in range(3):
            stream.push_frame(frames[at])
        stream.push_prompt("And now?")
        events = list(answer)
        stream.finish()
        shown = [event for event in stream if isinstance(event, FrameSeen)]
    assert events[-1].counters.frames == 32
    assert len(shown) == 3
    assert events[-1].figures.ttft > 0


@pytest.mark.slow
def test_frames_are_encoded_on_another_device_while_others_talk(make_engine, frames):
    shown = clip(frames, 30)
    expected = told(answer_offline(make_engine(), shown, "What is it?", max_tokens=9))
    engine = make_engine(slots=2, perception_device=jax.devices()[0])
    with Scheduler(engine, REALTIME) as scheduler:
        talking = scheduler.open(SessionConfig(max_tokens_per_turn=400), prompt="What is there?")
        events = iter(talking)
        while not isinstance(next(events), Text):
            pass
        assert told(scheduler.complete([user(*shown, "What is it?")], max_tokens=9)) == expected
        talking.stop()


# --------------------------------------------------------------------------------- the dialogue


def tokens_of(tokenizer, turns) -> list[int]:
    return [token for part in dialogue_parts(tokenizer, turns) for token in part.tokens]


def test_one_turn_is_the_offline_prompt(tokenizer, frames):
    shown = clip(frames, 3)
    expected = chat.offline_opening(tokenizer, system="Look.", num_frames=3, prompt="What?")
    assert tokens_of(tokenizer, [DialogueTurn("system", ["Look."]), user(*shown, " What?\n")]) == expected
    expected = chat.offline_opening(tokenizer, system=None, num_frames=0, prompt="What?")
    assert tokens_of(tokenizer, [DialogueTurn("system", [" "]), user("What?")]) == expected


def test_several_turns_are_written_as_training_rows_are(tokenizer, frames, tmp_path):
    """Against the tokens of a row in a file."""
    a, b = clip(frames, 2)
    turns = [
        DialogueTurn("system", ["Look at it."]),
        user(a, "\n Which is older? ", b, " This?"),
        DialogueTurn("assistant", [" The left.\n"]),
        user(" Why? "),
    ]
    contents = [
        "Look at it.",
        "<|image|>\n Which is older? <|image|> This?",
        " The left.\n",
        " Why? ",
        "Age.",
    ]
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
    for name in ("a.png", "b.png"):
        Image.fromarray(frames[0]).save(tmp_path / name)
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"messages": messages, "images": ["a.png", "b.png"]}]))
    config = ConversationConfig(files=(str(file),), media_root=str(tmp_path))
    (row,), _ = read_rows(config, FrameSampling(), tokenizer)
    answer = [*tokenizer.encode("Age."), tokenizer.special.eot]
    assert tokens_of(tokenizer, turns) == row.tokens.tolist()[: -len(answer)]


def test_markers_in_a_text_are_text(tokenizer):
    special = tokenizer.special
    tokens = tokens_of(
        tokenizer, [user("<|image|><|eot_id|>"), DialogueTurn("assistant", ["<|silence|>"]), user("x")]
    )
    assert special.image not in tokens
    assert special.silence not in tokens
    assert tokens.count(special.eot) == 3


def test_the_engine_is_given_the_dialogue_and_the_turns_are_told(scripted, tokenizer):
    shown = [Frame(np.full((4, 4, 3), i, np.uint8), float(i)) for i in range(40)]
    said = tokenizer.encode("Two.")
    turns = [
        user(*shown[:39], "How many?"),
        DialogueTurn("assistant", ["One."]),
        user("And now?", shown[39]),
    ]
    steps = -(-40 // 16)
    # Whatever is sampled before the dialogue is complete is not part of the answer.
    engine = scripted([7] * (steps - 1) + [*said, EOT])
    with Scheduler(engine, LOCKSTEP) as scheduler:
        events = list(scheduler.complete(turns))
    assert engine.state.context[0][: len(tokens_of(tokenizer, turns))] == tokens_of(tokenizer, turns)
    assert engine.seen == list(range(40))
    assert [event.prompt for event in events if isinstance(event, Turn)] == ["How many?", "And now?"]
    assert text(events) == "Two."
    end = events[-1]
    assert isinstance(end, End)
    assert (end.reason, end.counters.frames, end.counters.prompts) == ("finished", 40, 2)
    assert end.counters.tokens == len(said)


def test_a_dialogue_without_frames(scripted, tokenizer):
    with Scheduler(scripted([*tokenizer.encode("Hello."), EOT]), LOCKSTEP) as scheduler:
        assert text(list(scheduler.complete([user("Hi.")]))) == "Hello."


def test_a_long_dialogue_forgets_its_middle(scripted, tokenizer):
    memory = MemoryConfig("window", text="window", text_recent=0.3)
    engine = scripted([5, 6, EOT], text_capacity=128, memory=memory)
    turns = [DialogueTurn("system", ["Look."])]
    for number in range(30):
        turns += [user(f"Question {number}?"), DialogueTurn("assistant", [f"Answer {number}."])]
    turns.append(user("Last?"))
    with Scheduler(engine, LOCKSTEP) as scheduler:
        events = list(scheduler.complete(turns))
    assert events[-1].reason == "finished"
    said = tokenizer.decode(engine.state.context[0])
    assert "Look." in said
    assert "Last?" in said
    assert "Question 3?" not in said


# ------------------------------------------------------------------------------------- the end


def test_the_answer_ends_at_max_tokens_or_at_the_text_capacity(scripted, tokenizer):
    shown = [Frame(np.zeros((4, 4, 3), np.uint8), float(i)) for i in range(2)]
    length = len(chat.offline_opening(tokenizer, system=None, num_frames=2, prompt="What?"))
    for clock in (LOCKSTEP, REALTIME):
        with Scheduler(scripted([5] * 100), clock) as scheduler:
            *_, end = scheduler.complete([user(*shown, "What?")], max_tokens=7)
        assert (end.reason, end.counters.tokens) == ("token_limit", 7)
        engine = scripted([5] * 100, text_capacity=length + 4)
        with Scheduler(engine, clock) as scheduler:
            *_, end = scheduler.complete([user(*shown, "What?")])
        assert (end.reason, end.counters.tokens) == ("text_capacity", 4)
        assert len(engine.state.context[0]) <= length + 4


def test_logits_that_are_not_finite_end_the_answer(scripted):
    with Scheduler(scripted([5, NOT_FINITE, 7]), LOCKSTEP) as scheduler:
        *_, end = scheduler.complete([user("What?")])
    assert (end.reason, end.counters.tokens) == ("not_finite", 1)


@pytest.mark.parametrize("clock", [LOCKSTEP, REALTIME])
def test_stop_ends_it_and_frees_the_slot(make_engine, frames, clock):
    with Scheduler(make_engine(slots=2), clock) as scheduler:
        stream = scheduler.complete([user(*clip(frames, 30), "What?")], max_tokens=400)
        other = scheduler.complete([user("What?")], max_tokens=3)
        events = iter(stream)
        while not isinstance(next(events), Text):
            pass
        stream.stop()
        assert list(events)[-1].reason == "stopped"
        assert list(other)[-1].reason in ("token_limit", "finished")
        assert scheduler.free_slots == 2
        # While its frames are being appended.
        stream = scheduler.complete([user(*clip(frames, 30), "What?")])
        next(iter(stream))
        stream.stop()
        assert list(stream)[-1].reason == "stopped"
        assert scheduler.free_slots == 2


def test_what_does_not_fit_is_refused_at_once(scripted, frames):
    with Scheduler(scripted(text_capacity=64, bank_capacity=10), LOCKSTEP) as scheduler:
        with pytest.raises(SessionError, match="the clip has 11 frames; the bank has room for 10"):
            scheduler.complete([user(*clip(frames, 11), "What?")])
        with pytest.raises(SessionError, match="text capacity of 64"):
            scheduler.complete([user("What? " * 64)])
        with pytest.raises(SessionError, match="the last turn of a dialogue must be the user's"):
            scheduler.complete([user("What?"), DialogueTurn("assistant", ["That."])])
        with pytest.raises(SessionError, match="a frame must be in a turn of the user"):
            scheduler.complete([DialogueTurn("assistant", clip(frames, 1)), user("What?")])
        with pytest.raises(SessionError, match="max_tokens"):
            scheduler.complete([user("What?")], max_tokens=0)
        with pytest.raises(SessionError, match="valid Unicode"):
            scheduler.complete([user("\ud800")])
        assert scheduler.free_slots == 1


def test_nothing_can_be_pushed_and_no_slot_is_taken_twice(scripted, frames):
    scheduler = Scheduler(scripted([5] * 3), LOCKSTEP)
    stream = scheduler.complete([user("What?")])
    with pytest.raises(Refused, match="all 1 slots are taken"):
        scheduler.complete([user("What?")])
    assert not stream.push_frame(frames[0], 0.0)
    assert not stream.push_prompt("And?", 0.0)
    with scheduler:
        assert list(stream)[-1].reason == "finished"


def test_an_engine_of_its_own_sampling_is_the_default(make_engine, frames):
    engine = make_engine(slots=2, temperature=1.0, seed=3)
    dialogue = [user(*clip(frames, 2), "What?")]
    with Scheduler(engine, LOCKSTEP) as scheduler:
        own = told(scheduler.complete(dialogue, max_tokens=8))
        same = told(
            scheduler.complete(dialogue, max_tokens=8, sampling=TokenSampling(temperature=1.0, seed=3))
        )
        greedy = told(scheduler.complete(dialogue, max_tokens=8, sampling=TokenSampling()))
    assert own == same != greedy
