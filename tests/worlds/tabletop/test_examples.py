"""Dialogues about worlds that are told in a line, word for word."""

import functools

import numpy as np
import pytest

from moss_jax.text import chat
from moss_jax.text.labels import IGNORED
from moss_jax.worlds.tabletop import digits
from moss_jax.worlds.tabletop.answers import true_answer, truth_of
from moss_jax.worlds.tabletop.dialogue import converse, converse_offline
from moss_jax.worlds.tabletop.language import (
    LIVE,
    PAST,
    RECENT_PAST,
    holds,
    list_of,
    sentence,
)
from moss_jax.worlds.tabletop.requests import Request, draw_question
from moss_jax.worlds.tabletop.stream import draw_stream
from moss_jax.worlds.tabletop.world import CARD, Impairment, Table, TableEvent, Thing, World, generate


class FixedWording(np.random.Generator):
    """A generator that always chooses the same wording."""

    def __init__(self, variant: int):
        super().__init__(np.random.PCG64(0))
        self.variant = variant

    def integers(self, *_, **__) -> int:
        return self.variant


def star(colour: str, column: int = 0) -> Thing:
    return Thing("star", (column, 0), colour)


def card(number: int) -> Thing:
    return Thing(CARD, (1, 1), digit=next(i for i in range(100) if digits.label(i) == number))


RED, BLUE = Table((star("red"),)), Table((star("blue"),))
EMPTY = Table()


@pytest.fixture(scope="module")
def play(tokenizer):
    """Plays a story and transcribes it: `▫` is a frame, `·` a silence, `|` a prompt."""

    def play(tables, *requests, speed=8, variant=0, events=()):
        dialogue = converse(
            World(tuple(tables), tuple(events)),
            requests,
            tokenizer,
            tokens_per_second=speed,
            rng=FixedWording(variant),
            system=None,
        )
        special = tokenizer.special
        marks = {special.silence: "·", special.image: "▫", special.end_header: "|"}
        text = "".join(
            marks.get(token) or (tokenizer.decode([token]) if label != IGNORED else "")
            for token, label in zip(dialogue.tokens, dialogue.labels, strict=True)
        )
        # A user turn and the assistant's header.
        return text.replace("||", "|")

    return play


def ask_for(kind: str, time: float, subject: str = "", awaited=None) -> Request:
    return Request(time, "Well?", kind, subject, awaited)


def test_an_answer_is_kept_up_to_date(play):
    colour = ask_for("colour", 0.4, "star")
    text = play([RED, RED, BLUE, EMPTY, EMPTY], colour, speed=16)
    assert text == "|·▫·|It is red.·▫·▫Now it is blue.·▫Now the star is gone.·▫·"
    text = play([RED, RED, BLUE, EMPTY, EMPTY], colour, speed=16, variant=1)
    assert text == "|·▫·|The star is red.·▫·▫Now the star is blue.·▫Now the star is gone.·▫·"


def test_an_answer_is_taken_back_in_mid_sentence(play):
    text = play([RED, BLUE, BLUE], ask_for("colour", 0.4, "star"), speed=4)
    assert text == "|·▫·|It is red▫ - wait,▫ now it is blue.·"
    # And again, if it changes again.
    text = play([RED, BLUE, RED, RED, RED], ask_for("colour", 0.5, "star"), speed=8, variant=1)
    assert text == "|·▫·|The star is red▫ - wait, now the star is▫ red.·▫·▫·"
    text = play([RED, BLUE, EMPTY, EMPTY, EMPTY], ask_for("colour", 0.6, "star"), speed=9, variant=1)
    assert text == "|·▫·|The star is red▫ - wait, now the star is blue▫ - wait, now the star is gone▫.·▫·"


def test_a_finished_sentence_is_followed_by_its_silence(play):
    text = play([RED, BLUE, BLUE], ask_for("colour", 0.4, "star"), variant=1)
    assert text == "|·▫·|The star is red.▫·▫Now the star is blue.·"


def test_an_answer_goes_on_with_a_new_truth(play):
    """If the words so far fit it."""
    text = play([RED, BLUE, BLUE], ask_for("colour", 0.7, "star"), speed=8, variant=1)
    assert text == "|·▫·|The star is▫ blue.·▫·"
    both = Table((star("blue"), card(3)))
    text = play([BLUE, both, both], ask_for("list", 0.4))
    assert text == "|·▫·|There is a blue star▫ and a card with a 3.▫·"


def test_unrelated_changes_do_not_disturb_an_answer(play):
    moved = Table((star("red", 2),))
    assert play([RED, moved, moved], ask_for("colour", 0.75, "star")) == "|·▫·|It is▫ red.·▫·"
    text = play([RED, moved, moved], ask_for("place", 0.4, "star"))
    assert text == "|·▫·|It is on the left▫ - wait, now it is on▫ the right.·"


def test_a_list_is_updated_by_its_changes(play):
    red, both = Table((star("red"),)), Table((star("red"), card(3)))
    five, hidden = Table((star("red"), card(5))), Table((star("red"), card(5)), covered="star")
    text = play([EMPTY, red, both, five, hidden, five], ask_for("list", 0.4), speed=32)
    assert text == (
        "|·▫·|The table is empty.·▫Now there is also a red star.·▫Now there is also a card with a 3.·"
        "▫The card now shows 5.·▫Now the star is covered.·▫Now there is also a red star.·"
    )


def test_a_moment_is_announced_once(play):
    awaited = sentence("alert colour", c="blue")
    request = ask_for("alert colour", 0.1, awaited=awaited)
    text = play([RED, RED, BLUE, RED, BLUE], request, speed=16)
    assert text == "|·▫·|Okay.·▫·▫Now! Something is blue.·▫·▫·"


def test_narration(play):
    tables = [EMPTY, RED, BLUE, Table((star("blue", 2),)), EMPTY]
    events = [
        TableEvent(1, "appear", "star"),
        TableEvent(2, "colour", "star", "blue"),
        TableEvent(3, "move", "star", "right"),
        TableEvent(4, "leave", "star"),
    ]
    assert play(tables, ask_for("narrate", 0.1), events=events, speed=16) == (
        "|·▫·|Okay.·▫A red star appears on the left.·▫The star turns blue.·▫The star moves to the right.·"
        "▫The star leaves.·"
    )
    # An event whose facts are no longer true when its turn comes is left out: the star was blue, but is gone.
    text = play(tables, ask_for("narrate", 0.1), events=events, speed=3)
    assert "The star leaves." in text
    assert "moves" not in text


def test_events_that_wait_are_narrated_in_order(play):
    ring, circle = Thing("ring", (1, 0), "green"), Thing("circle", (2, 0), "black")
    tables = [
        EMPTY,
        Table((star("red"),)),
        Table((star("red"), ring)),
        *[Table((star("red"), ring, circle))] * 9,
    ]
    events = [
        TableEvent(1, "appear", "star"),
        TableEvent(2, "appear", "ring"),
        TableEvent(3, "appear", "circle"),
    ]
    text = play(tables, ask_for("narrate", 0.2), events=events, speed=4)
    told = [part for part in text.replace("▫", "").split("·") if part.startswith("A ")]
    assert told == [
        "A red star appears on the left.",
        "A green ring appears in the middle.",
        "A black circle appears on the right.",
    ]


def test_the_last_request_counts(play):
    requests = [ask_for("colour", 0.2, "star"), ask_for("watch", 0.4)]
    assert play([RED, BLUE, RED], *requests) == "|·▫·|It is|Okay.·▫·▫·"
    requests = [ask_for("narrate", 0.2), ask_for("colour", 1.2, "star")]
    text = play([RED, BLUE, RED], *requests, events=[TableEvent(1, "colour", "star", "blue")])
    assert text == "|·▫·|Okay.·▫The star|It is blue.·▫Now it is red.·"


def test_a_question_before_the_first_frame_waits_for_it(play):
    assert play([RED, RED], ask_for("colour", 0.0, "star")) == "|·▫It is red.·▫·"
    assert play([RED, RED], ask_for("watch", 0.0)) == "|Okay▫.·▫·"
    assert play([RED, RED]) == "|·▫·▫·"


# -------------------------------------------------------------------------- truncated and offline


def test_a_sequence_is_truncated_at_max_tokens(tokenizer):
    rng = np.random.default_rng(0)
    stream = draw_stream(rng, 12)
    play = functools.partial(converse, stream.world, stream.requests, tokenizer, tokens_per_second=8)
    whole = play(rng=np.random.default_rng(1))
    for most in (10, len(whole.tokens) // 2, len(whole.tokens), len(whole.tokens) + 10):
        cut = play(rng=np.random.default_rng(1), max_tokens=most)
        assert cut.tokens == whole.tokens[:most]
        assert cut.labels == whole.labels[:most]
        assert cut.frame_positions == [p for p in whole.frame_positions if p < most]


def test_offline_the_whole_clip_comes_first(tokenizer):
    special = tokenizer.special
    kinds = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        world = generate(rng, 9, digit_indices=digits.training_indices(), rate=0.5, gap=1)
        request = draw_question(rng, world)
        kinds.add(request.kind)
        dialogue = converse_offline(world, request, tokenizer, rng=rng, system=("Look.", None)[seed % 2])
        (said,) = dialogue.utterances
        truth = world.truth[-1]
        assert said.sentence == true_answer(request, truth)
        assert holds(said.sentence.facts, truth)

        # All frames, then the question, then an answer that ends its turn.
        tokens = dialogue.tokens
        first = tokens.index(special.image)
        assert dialogue.frame_positions == list(range(first, first + 9))
        assert tokens.count(special.image) == 9
        learnt = [label for label in dialogue.labels if label != IGNORED]
        assert learnt[-1] == special.eot
        assert tokenizer.decode(learnt[:-1]) in {said.sentence.text(v) for v in range(2)}
        assert tokens[-len(learnt) :] == learnt == dialogue.labels[-len(learnt) :]
        header = chat.header(tokenizer, "assistant")
        question = [*tokenizer.encode(request.text), special.eot, *header]
        assert tokens[first + 9 : -len(learnt)] == question
        assert ("Look." in tokenizer.decode(tokens)) == (seed % 2 == 0)
        assert len(dialogue.speaking) == 9
    assert kinds == {*LIVE, *RECENT_PAST}


def test_list_of_the_visible_things():
    truth = World((Table((star("red"), card(8), Thing("circle", (0, 1), "blue"))),), ()).truth[0]
    assert list_of(truth) == "a blue circle, a red star and a card with a 8"
    assert (
        true_answer(ask_for("list", 1.0), truth).text()
        == "There is a blue circle, a red star and a card with an 8."
    )


def test_an_answer_of_the_assistant_is_that_of_its_question(tokenizer):
    for seed in range(8):
        stream = draw_stream(np.random.default_rng(seed), 300, past=1.0, impaired=1.0)
        world = stream.world
        dialogue = converse(
            world, stream.requests, tokenizer, tokens_per_second=16, rng=np.random.default_rng(0)
        )
        for utterance in dialogue.utterances:
            request = stream.requests[utterance.request]
            if request.kind in PAST:
                assert utterance.sentence == true_answer(request, truth_of(request, world, utterance.frame))
                assert utterance.frame == int(request.time)


# ----------------------------------------------------------------------------- an impaired camera


def say(world: World, requests: list[Request], tokenizer, **settings) -> list[tuple[int, str]]:
    """Returns the sentences of a dialogue, each with the frame at which it begins."""
    dialogue = converse(
        world, requests, tokenizer, tokens_per_second=32, rng=np.random.default_rng(0), **settings
    )
    return [(utterance.frame, utterance.sentence.text()) for utterance in dialogue.utterances]


def dark(*tables: Table, events=(), start=4, stop=8) -> World:
    return World(tables, tuple(events), (Impairment(start, stop, "black"),))


def test_nothing_can_be_seen_and_the_answer_follows_with_the_view(tokenizer):
    world = dark(*[RED] * 12)
    for kind, answer in (
        ("colour", "It is red."),
        ("place", "It is on the left."),
        ("there", "Yes, there is."),
        ("list", "There is a red star."),
        ("count", "There is one shape."),
        ("digit", "There is no card."),
    ):
        request = Request(5.5, "?", kind, CARD if kind == "digit" else "star")
        assert say(world, [request], tokenizer) == [(5, "I can't see anything."), (8, answer)]


def test_an_answer_is_kept_while_nothing_can_be_seen(tokenizer):
    """It is neither retracted nor repeated; what changes as the view comes back is told."""
    request = Request(2.5, "?", "colour", "star")
    assert say(dark(*[RED] * 12), [request], tokenizer) == [(2, "It is red.")]
    event = TableEvent(8, "colour", "star", "blue")
    world = dark(*[RED] * 8, *[BLUE] * 4, events=[event])
    assert say(world, [request], tokenizer) == [(2, "It is red."), (8, "Now it is blue.")]


def test_the_past_is_remembered_while_nothing_can_be_seen(tokenizer):
    world = dark(*[RED] * 12)
    assert say(world, [Request(6.5, "?", "last colour", "star")], tokenizer) == [(6, "It was red.")]
    assert say(world, [Request(6.5, "?", "seen", "ring")], tokenizer) == [(6, "No, not so far.")]


def test_alerts_and_narrations_wait_for_something_to_see(tokenizer):
    event = TableEvent(8, "colour", "star", "blue")
    world = dark(*[RED] * 8, *[BLUE] * 4, events=[event])
    assert say(world, [Request(5.5, "?", "narrate")], tokenizer) == [
        (5, "Okay."),
        (8, "The star turns blue."),
    ]
    awaited = sentence("alert colour", c="blue")
    alert = Request(5.5, "?", "alert colour", awaited=awaited)
    assert say(world, [alert], tokenizer) == [(5, "Okay."), (8, "Now! Something is blue.")]


def test_a_frozen_camera_changes_nothing(tokenizer):
    world = World((RED,) * 12, (), (Impairment(4, 8, "frozen"),))
    assert say(world, [Request(5.5, "?", "colour", "star")], tokenizer) == [(5, "It is red.")]


def test_speech_goes_over_to_the_answer_as_the_view_comes_back(tokenizer):
    request = Request(7.9, "?", "colour", "star")
    dialogue = converse(
        dark(*[RED] * 14), [request], tokenizer, tokens_per_second=3, rng=np.random.default_rng(0)
    )
    first, second = dialogue.utterances
    assert first.sentence.name == "blind"
    assert second.cut
    assert second.frame == 8
    assert holds(second.sentence.facts, {"colour:star": "red"})
