"""Metrics of the tabletop evaluation: the ideal assistant's, and the effect of each kind of mistake."""

import dataclasses
import itertools

import pytest
from engines import ScriptedEngine

from moss_jax.config import EngineConfig
from moss_jax.eval.harness import play
from moss_jax.eval.tabletop import ideal_dialogue, scores
from moss_jax.eval.tabletop.scores import Ratio, SpeechRate, Statement, StreamTranscript
from moss_jax.stream import Counters, End, FrameSeen, Interrupted, Silence, Text, Turn
from moss_jax.text.labels import IGNORED
from moss_jax.worlds.tabletop import TabletopStream, digits, evaluation_stream
from moss_jax.worlds.tabletop.dialogue import Dialogue
from moss_jax.worlds.tabletop.language import LIVE, LONG_PAST, RECENT_PAST, sentence, understand
from moss_jax.worlds.tabletop.render import TABLES, Look
from moss_jax.worlds.tabletop.requests import Request
from moss_jax.worlds.tabletop.world import CARD, Impairment, Table, TableEvent, Thing, World

SPEED = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """A stream, the ideal dialogue over it, and its transcript from a session that says the same."""

    stream: TabletopStream
    ideal: Dialogue
    said: StreamTranscript


def replay(stream: TabletopStream, tokenizer, speed: int) -> Case:
    ideal = ideal_dialogue(stream, tokenizer, speed)
    drawn = [token for token in ideal.labels if token != IGNORED]
    engine = ScriptedEngine(tokenizer, drawn, EngineConfig(1, 8192, 1024))
    (events,) = play({1: engine}, [stream], image_size=8, tokens_per_second=speed)
    return Case(stream, ideal, scores.transcribe(events, stream.requests))


@pytest.fixture(scope="module")
def cases(tokenizer) -> list[Case]:
    return [replay(evaluation_stream(1, index, 32), tokenizer, SPEED) for index in range(40)]


@pytest.fixture(scope="module")
def summary_of(cases, tokenizer):
    """Computes the summary of the cases with transcripts that `change` has altered."""

    def judge(change=lambda case: case.said):
        return scores.summary(
            [
                scores.score(c.stream, change(c), c.ideal, tokenizer=tokenizer, tokens_per_second=SPEED)
                for c in cases
            ]
        )

    return judge


@pytest.fixture(scope="module")
def best(summary_of):
    return summary_of()


def values(summary) -> dict:
    """Headline values of a summary, flat."""
    return {
        "accuracy": summary["accuracy"]["value"],
        "alert recall": summary["alerts"]["recall"]["value"],
        "alert precision": summary["alerts"]["precision"]["value"],
        "silence": summary["silence"]["value"],
        "revision": summary["revision"]["value"],
        "stale": summary["stale"]["value"],
        "understood": summary["understood"]["value"],
        "narration recall": summary["narration"]["recall"]["value"],
        "narration precision": summary["narration"]["precision"]["value"],
    }


def changed(before, after) -> set[str]:
    before, after = values(before), values(after)
    return {name for name in before if before[name] != after[name]}


def rewrite(case: Case, change) -> StreamTranscript:
    """Replaces each statement by what `change(statement, request)` returns; None drops it."""
    requests = case.stream.requests
    new = [change(s, requests[s.request] if s.request >= 0 else None) for s in case.said.statements]
    return dataclasses.replace(case.said, statements=tuple(s for s in new if s is not None))


# --------------------------------------------------------------------------- the ideal assistant


@pytest.mark.parametrize("speed", [SPEED, 32])
def test_the_ideal_assistant_has_a_perfect_score(tokenizer, speed):
    found = []
    for index in range(30):
        case = replay(evaluation_stream(0, index, 32), tokenizer, speed)
        found.append(
            scores.score(case.stream, case.said, case.ideal, tokenizer=tokenizer, tokens_per_second=speed)
        )
    result = scores.summary(found)
    assert values(result) == {name: float(name != "stale") for name in values(result)}
    assert result["alerts"]["f1"] == result["revision"]["mid_sentence"]["value"] == 1
    assert result["revision"]["median_delay_s"] == 0
    assert result["streams_cut_short"] == 0
    # There are enough cases of each.
    assert result["accuracy"]["n"] > 40
    assert result["alerts"]["recall"]["n"] > 3
    assert result["silence"]["n"] > 200
    assert result["revision"]["n"] > 15
    assert set(result["by_kind"]) == {*LIVE, *RECENT_PAST}


@pytest.mark.parametrize(("seconds", "impaired"), [(32, 1.0), (400, 0.0), (400, 1.0)])
def test_the_ideal_assistant_is_perfect_about_the_past_and_with_an_impaired_camera(
    tokenizer, seconds, impaired
):
    found, unseen = [], 0
    for index in range(2000 // seconds):
        stream = evaluation_stream(2, index, seconds, past=0.5, impaired=impaired)
        case = replay(stream, tokenizer, SPEED)
        found.append(
            scores.score(stream, case.said, case.ideal, tokenizer=tokenizer, tokens_per_second=SPEED)
        )
        unseen += sum(probe.value == scores.UNSEEN for probe in found[-1].probes)
    result = scores.summary(found)
    # In so few streams there may be no alert.
    assert all(value in (None, name != "stale") for name, value in values(result).items())
    assert result["accuracy"]["value"] == result["silence"]["value"] == 1
    assert len(set(result["by_kind"]) & set(LONG_PAST)) >= 7
    # No constant guess comes near.
    assert result["constant_guess"]["value"] < 0.7
    assert (unseen > 0) == (impaired > 0)


def test_the_transcript_of_the_ideal_assistant_is_what_it_said(cases):
    for case in cases:
        for utterance in case.ideal.utterances:
            (found,) = [s for s in case.said.statements if abs(s.time - utterance.time) < 1e-6]
            assert (found.frame, found.request) == (utterance.frame, utterance.request)
            assert found.correction == utterance.cut
            if found.sentence:
                assert found.facts == utterance.sentence.facts
            else:
                assert found.cut
        speaking = {frame for frame, speaks in enumerate(case.ideal.speaking) if speaks}
        assert speaking == case.said.speaking - {-1}


def test_the_scores_of_parts_add_up_to_those_of_the_whole(cases, tokenizer):
    """With some statements taken away, so that not all is right."""
    settings = {"tokenizer": tokenizer, "tokens_per_second": SPEED}
    ratios = [f.name for f in dataclasses.fields(scores.Score) if isinstance(f.default, Ratio)]
    totals = dict.fromkeys(ratios, Ratio())
    for number, case in enumerate(cases):
        said = rewrite(case, lambda s, r, n=number: None if (s.frame + n) % 5 == 0 else s)
        whole, *parts = (
            scores.score(case.stream, said, case.ideal, **settings, during=during)
            for during in (scores.ALWAYS, range(-1, 9), range(9, 20), range(20, 32))
        )
        for name in ratios:
            assert sum((getattr(part, name) for part in parts), Ratio()) == getattr(whole, name)
            totals[name] += getattr(whole, name)
        assert sorted(p.second for part in parts for p in part.probes) == sorted(
            p.second for p in whole.probes
        )
        assert all(9 <= probe.second < 20 for probe in parts[1].probes)
        assert sum((part.delays for part in parts), ()) == whole.delays
    assert all(totals[name].value > 0 for name in ratios if name != "stale")


# ------------------------------------------------------------------------------------- mistakes


def test_constant_silence(summary_of):
    result = summary_of(lambda case: StreamTranscript((), frozenset()))
    assert values(result) == {
        "accuracy": 0,
        "alert recall": 0,
        "alert precision": None,
        "silence": 1,
        "revision": None,
        "stale": None,
        "understood": None,
        "narration recall": 0,
        "narration precision": None,
    }
    assert result["alerts"]["f1"] == 0


def test_chatter_costs_silence(best, summary_of):
    chatter = Statement("Lovely day.", 1.5, 1, 2.0, 1, -1)

    def talk(case):
        return StreamTranscript((*case.said.statements, chatter), frozenset(range(32)))

    result = summary_of(talk)
    assert changed(best, result) == {"silence", "understood"}
    assert result["silence"]["value"] == 0


def test_a_constant_answer_costs_accuracy_and_is_stale(best, summary_of):
    three = sentence("digit", d="3")

    def answer(statement, request):
        wrong = request and request.kind in LIVE and statement.facts
        return dataclasses.replace(statement, sentence=three) if wrong else statement

    result = summary_of(lambda case: rewrite(case, answer))
    assert changed(best, result) == {"accuracy", "revision", "stale"}
    assert result["by_kind"]["colour"]["value"] == result["by_kind"]["list"]["value"] == 0
    assert result["by_kind"]["event"]["value"] == 1
    digits = result["by_kind"]["digit"]
    assert digits["value"] <= digits["constant_guess"]


def test_answers_without_revisions_fail_later_probes(best, summary_of):
    answered = set()

    def once(case):
        answered.clear()

        def keep(statement, request):
            if not (request and request.kind in LIVE and statement.facts):
                return statement
            if statement.request in answered:
                return None
            answered.add(statement.request)
            return statement

        return rewrite(case, keep)

    result = summary_of(once)
    assert changed(best, result) == {"accuracy", "revision"}
    assert result["revision"]["value"] == 0
    assert 0.5 < result["accuracy"]["value"] < 1
    assert result["accuracy_first_probes"]["value"] > result["accuracy_all_probes"]["value"]


def test_revisions_count_within_three_seconds(best, summary_of):
    """Delays statements that begin at a later frame than the question, so not the first answers."""

    def later(seconds):
        def delay(statement, request):
            if not (request and request.kind in LIVE) or statement.frame <= int(request.time) + 1:
                return statement
            return dataclasses.replace(
                statement,
                time=statement.time + seconds,
                end=statement.end + seconds,
                frame=statement.frame + seconds,
                end_frame=statement.end_frame + seconds,
            )

        # No statement is moved beyond the last frame.
        return lambda case: rewrite(case, lambda s, r: s if s.end_frame + seconds > 31 else delay(s, r))

    result = summary_of(later(2))
    assert result["revision"]["median_delay_s"] == pytest.approx(2, abs=0.5)
    assert result["revision"]["value"] > 0.8
    assert summary_of(later(4))["revision"]["value"] < 0.2


def test_late_alerts_do_not_count(best, summary_of):
    def late(statement, request):
        if not statement.is_alert:
            return statement
        return dataclasses.replace(statement, time=statement.time + 3, end=statement.end + 3)

    result = summary_of(lambda case: rewrite(case, late))
    assert changed(best, result) == {"alert recall", "alert precision"}
    assert result["alerts"]["f1"] == 0


def test_repeated_alerts_cost_precision(best, summary_of):
    def twice(case):
        again = [s for s in case.said.statements if s.is_alert]
        return dataclasses.replace(case.said, statements=(*case.said.statements, *again))

    result = summary_of(twice)
    assert changed(best, result) == {"alert precision"}
    assert result["alerts"]["precision"]["value"] == 0.5
    assert result["alerts"]["f1"] == pytest.approx(2 / 3)


def test_early_alerts_are_wrong(best, summary_of):
    """Even if they are repeated in time."""

    def early(case):
        calls = [
            Statement("Now!", r.time, int(r.time), r.time + 0.5, int(r.time), i, sentence=r.awaited)
            for i, r in enumerate(case.stream.requests)
            if r.awaited
        ]
        return dataclasses.replace(case.said, statements=(*calls, *case.said.statements))

    result = summary_of(early)
    assert changed(best, result) == {"alert precision", "stale"}
    assert result["alerts"]["precision"]["value"] < 0.5


def test_invented_events_cost_precision(best, summary_of):
    def invent(case):
        tales = [
            dataclasses.replace(s, sentence=sentence("appear", c="black", k="cross", p="left"))
            for s in case.said.statements
            if s.request >= 0 and case.stream.requests[s.request].kind == "narrate" and not s.facts
        ]
        return dataclasses.replace(case.said, statements=(*case.said.statements, *tales))

    result = summary_of(invent)
    assert changed(best, result) == {"narration precision", "stale"}


def test_missing_narration_costs_recall(best, summary_of):
    def quiet(statement, request):
        return None if request and request.kind == "narrate" and statement.facts else statement

    result = summary_of(lambda case: rewrite(case, quiet))
    assert changed(best, result) == {"narration recall", "narration precision"}
    assert result["narration"]["recall"]["value"] == 0


def test_facts_that_make_no_sense_are_false():
    assert not scores.is_true({"colour:card": "red"}, {"digit": "3"})
    assert not scores.is_true({"colour:": "red"}, {"digit": "3"})


# ------------------------------------------------------------------------------ hand-made streams


def colours(*seen: str, requests: tuple[Request, ...]) -> TabletopStream:
    """A stream of a star with these colours, one a second."""
    tables = tuple(Table((Thing("star", (0, 0), colour=colour),)) for colour in seen)
    pairs = enumerate(itertools.pairwise(seen), start=1)
    events = tuple(TableEvent(f, "colour", "star", new) for f, (old, new) in pairs if old != new)
    return TabletopStream(World(tables, events), look=Look(0, TABLES[0]), requests=requests, noise=0)


def spoken(text: str, time: float, *, request: int = 0, subject: str = "star") -> Statement:
    return Statement(
        text, time, int(time), time + 0.5, int(time + 0.5), request, sentence=understand(text, subject)
    )


def said(*statements: Statement) -> StreamTranscript:
    return StreamTranscript(statements, frozenset(s.frame for s in statements))


ASKED = Request(0.5, "What colour is the star?", "colour", "star")


def test_a_question_is_probed_once_its_answer_has_settled(tokenizer):
    stream = colours(*["red"] * 6, *["blue"] * 5, requests=(ASKED, Request(9.5, "Thanks.", "watch")))
    told = said(spoken("It is red.", 0.5), spoken("Now it is blue.", 7.0))
    found = list(scores.probes(stream, told, SpeechRate(tokenizer, SPEED)))
    assert [(p.second, p.value, p.right) for p in found] == [
        (4, "red", True),
        (5, "red", True),
        (9, "blue", True),
    ]
    late = said(spoken("It is red.", 0.5), spoken("Now it is blue.", 8.8))
    assert [p.right for p in scores.probes(stream, late, SpeechRate(tokenizer, SPEED))] == [True, True, False]


def test_a_question_is_not_probed_if_the_next_request_comes_too_soon(tokenizer):
    stream = colours(*["red"] * 6, requests=(ASKED, Request(2.5, "Thanks.", "watch")))
    assert not list(scores.probes(stream, said(), SpeechRate(tokenizer, SPEED)))


def test_the_deadline_allows_for_long_answers(tokenizer):
    truth = colours("red", requests=()).world.truth[0]
    request = Request(0.5, "What is on the table?", "list")
    assert SpeechRate(tokenizer, 32).seconds_to_answer(request, truth) == 3
    assert SpeechRate(tokenizer, 1).seconds_to_answer(request, truth) > 6


def test_a_past_question_is_judged_by_its_first_statement(tokenizer):
    asked = Request(2.5, "What happened last?", "event")
    stream = colours("red", "blue", "blue", "blue", "green", "green", requests=(asked,))
    rate = SpeechRate(tokenizer, SPEED)

    def right(*statements):
        (probe,) = scores.probes(stream, said(*statements), rate)
        return probe.right

    assert right(spoken("The star turns blue.", 2.5))
    assert right(spoken("The star is now blue.", 3.0))
    assert not right(spoken("The star turns green.", 2.5))
    assert not right(spoken("A blue star appears on the left.", 2.5), spoken("The star turns blue.", 4.0))
    assert not right(spoken("The star turns green.", 5.3))
    assert not right()


@pytest.mark.parametrize(
    ("seen", "says", "due", "made"),
    [
        (["red"] * 4 + ["blue"] * 6, ["Now it is blue.", 5.0], 1, 1),
        (["red"] * 4 + ["blue"] * 6, ["Now it is blue.", 7.5], 1, 0),
        (["red"] * 4 + ["blue"] * 6, ["Now it is green.", 5.0], 1, 0),
        # Red again within 3 seconds.
        (["red"] * 4 + ["blue"] * 2 + ["red"] * 4, ["Now it is red.", 6.0], 0, 0),
        # The end is near.
        (["red"] * 8 + ["blue"] * 2, ["Now it is blue.", 8.0], 0, 0),
        # Wrong from the beginning.
        (["green"] * 4 + ["blue"] * 6, ["Now it is blue.", 4.0], 0, 0),
    ],
)
def test_revisions(seen, says, due, made):
    stream = colours(*seen, requests=(ASKED,))
    found, delays = scores.revisions(stream, said(spoken("It is red.", 0.5), spoken(*says)))
    assert found == Ratio(made, due)
    assert list(delays) == [says[1] - 4] * made


def test_statements_before_the_first_frame_are_false():
    stream = colours("red", "red", requests=(ASKED,))
    blind = dataclasses.replace(spoken("It is red.", 0.0), frame=-1, end_frame=-1)
    assert scores.stale(stream, said(blind)) == Ratio(1, 1)
    assert scores.stale(stream, said(spoken("It is red.", 0.0))) == Ratio(0, 1)


def test_a_statement_may_become_true_before_its_end():
    stream = colours("red", "blue", "blue", requests=(ASKED,))
    assert scores.stale(stream, said(spoken("It is blue.", 0.7))) == Ratio(0, 1)
    assert scores.stale(stream, said(spoken("It is red.", 0.7))) == Ratio(0, 1)
    assert scores.stale(stream, said(spoken("It is red.", 1.0))) == Ratio(1, 1)


def test_the_constant_guess_is_the_most_frequent_answer_of_a_kind():
    def probe(request, kind, value):
        return scores.Probe(request, kind, 5, value, right=False)

    found = scores.accuracy(
        [
            [probe(0, "digit", "3"), probe(0, "digit", "4"), probe(1, "digit", "3")],
            [probe(0, "digit", "7"), probe(1, "count", "2")],
        ]
    )
    assert found["by_kind"]["digit"]["constant_guess"] == pytest.approx(1.5 / 3)
    assert found["by_kind"]["count"]["constant_guess"] == 1
    assert found["constant_guess"] == {"value": pytest.approx(2.5 / 4), "n": 4}
    assert found["accuracy"] == {"value": 0, "n": 4}
    assert found["accuracy_all_probes"]["n"] == 5


# --------------------------------------------------------------------------------- transcripts


def at(time: float) -> dict:
    return {"stream_time": time, "wall_time": 0.0}


def frame(index: int) -> FrameSeen:
    return FrameSeen(**at(float(index)), index=index, time=float(index))


def test_a_correction_is_a_statement_of_its_own():
    pieces = [
        (2.5, "It is"),
        (2.75, " r"),
        (3.0, " -"),
        (3.125, " wait"),
        (3.25, ", now it"),
        (3.5, " is blue."),
    ]
    events = [Turn(**at(0), prompt=""), frame(2), Turn(**at(2.5), prompt="?")]
    events += [Text(**at(time), text=text) for time, text in pieces[:2]]
    events += [frame(3), *(Text(**at(time), text=text) for time, text in pieces[2:])]
    events += [Silence(**at(3.75))]
    found = scores.transcribe(events, [ASKED])
    first, second = found.statements
    assert (first.text, first.time, first.frame, first.end, first.cut) == ("It is r", 2.5, 2, 2.75, True)
    assert first.sentence is None
    assert (second.text, second.time, second.frame, second.end) == ("now it is blue.", 3.0, 3, 3.5)
    assert second.correction
    assert not second.cut
    assert second.facts == {"colour:star": "blue"}
    assert found.speaking == {2, 3}


def test_a_request_cuts_the_answer_in_progress():
    prompts = (ASKED, Request(1.5, "What number is on the card?", "digit", CARD))
    events = [Turn(**at(0), prompt=""), frame(0), Turn(**at(0.5), prompt="?"), Text(**at(0.5), text="It is")]
    events += [Interrupted(**at(1.5), said="It is"), Turn(**at(1.5), prompt="?")]
    events += [Text(**at(1.5), text="It is a 3."), Silence(**at(2.0))]
    events += [End(**at(2.0), reason="text_capacity", counters=Counters())]
    found = scores.transcribe(events, prompts)
    assert [(s.text, s.request, s.cut) for s in found.statements] == [
        ("It is", 0, True),
        ("It is a 3.", 1, False),
    ]
    assert found.statements[1].facts == {"digit": "3"}
    assert not found.whole


# ------------------------------------------------------------------- the long past, and no view


@pytest.fixture
def history() -> World:
    """A red star on the left is covered, uncovered, and gone; then a blue ring and a card with a 3 come."""
    star, ring = Thing("star", (0, 0), "red"), Thing("ring", (2, 0), "blue")
    card = Thing(CARD, (1, 1), digit=next(i for i in range(99) if digits.label(i) == 3))
    tables = (
        *[Table((star,))] * 5,
        *[Table((star,), covered="star")] * 5,
        *[Table((star,))] * 5,
        *[Table()] * 5,
        *[Table((ring,))] * 5,
        *[Table((ring, card))] * 15,
    )
    events = (
        TableEvent(5, "cover", "star"),
        TableEvent(10, "uncover", "star"),
        TableEvent(15, "leave", "star"),
        TableEvent(20, "appear", "ring"),
        TableEvent(25, "appear", CARD),
    )
    return World(tables, events)


@pytest.mark.parametrize(
    ("request_", "right", "wrong"),
    [
        (Request(35.5, "?", "first"), "The first number was 3.", "There was no number."),
        (
            Request(35.5, "?", "order", "ring", other="star"),
            "The star came first.",
            "The ring came first.",
        ),
        (Request(35.5, "?", "times", "ring"), "It came once.", "It came three times."),
        (Request(35.5, "?", "times", "star"), "Never so far.", "It came once."),
        (Request(35.5, "?", "last place", "star"), "The star was on the left.", "It is on the left."),
        (Request(35.5, "?", "last place", "cross"), "I have not seen it.", "It was on the left."),
        (Request(35.5, "?", "last colour", "star"), "It was red.", "It was blue."),
        (Request(35.5, "?", "was under"), "The star was under it.", "Nothing was covered before."),
        (Request(35.5, "?", "digit ago", CARD, span=10), "It was a 3.", "There was no card."),
        (Request(31.5, "?", "digit ago", CARD, span=10), "There was no card.", "It was a 3."),
        (Request(22.5, "?", "place ago", "star", span=10), "It was on the left.", "It was not there."),
        (Request(17.5, "?", "colour ago", "star", span=10), "It was covered.", "It was red."),
        (Request(28.5, "?", "colour ago", "star", span=10), "It was not there.", "I have not seen it."),
    ],
)
def test_answers_about_the_long_past_are_judged(history, tokenizer, request_, right, wrong):
    stream = TabletopStream(history, Look(0, TABLES[0]), (request_,), 0)
    rate = SpeechRate(tokenizer, SPEED)
    values = set()
    for text, is_right in ((right, True), (wrong, False)):
        said = said_once(text, request_)
        (probe,) = scores.probes(stream, said, rate)
        assert probe.right == is_right
        assert probe.kind == request_.kind
        values.add(probe.value)
        # What is false of the past is stale as well.
        stale = scores.stale(stream, said)
        assert stale.total == 1
        if is_right:
            assert stale.hits == 0
    assert len(values) == 1


def said_once(text: str, request: Request) -> StreamTranscript:
    """A transcript of one statement, said at once."""
    frame = int(request.time)
    statement = Statement(
        text, request.time, frame, request.time + 1, frame + 1, 0, sentence=understand(text, request.subject)
    )
    return StreamTranscript((statement,), frozenset({frame}))


def test_a_constant_guess_knows_no_subject():
    """Places of different things are the same answer, and of two things the first named is one."""
    truth = {"last place:star": "left", "last place:ring": "left", "earlier": "star"}
    truth |= {"was place:star": "left", "was place:ring": "left"}
    values = {scores.right_answer(Request(1.0, "?", "last place", k), truth) for k in ("star", "ring")}
    assert len(values) == 1
    first = scores.right_answer(Request(1.0, "?", "order", "star", other="ring"), truth)
    assert first != scores.right_answer(Request(1.0, "?", "order", "ring", other="star"), truth)


@pytest.mark.parametrize(
    ("at", "text", "right_without_view"),
    [
        (6.5, "I can't see anything.", True),
        (6.5, "The ring is blue.", False),
        (2.5, "The ring is blue.", True),
        (2.5, "I can't see anything.", False),
    ],
)
def test_without_a_view_an_answer_is_wrong_unless_it_was_given_before(
    tokenizer, at, text, right_without_view
):
    ring = Table((Thing("ring", (2, 0), "blue"),))
    world = World((ring,) * 20, (), (Impairment(5, 13, "black"),))
    request = Request(at, "?", "colour", "ring")
    stream = TabletopStream(world, Look(0, TABLES[0]), (request,), 0)
    said = said_once(text, request)
    probes = list(scores.probes(stream, said, SpeechRate(tokenizer, SPEED)))
    blind = [p for p in probes if p.second < 13]
    clear = [p for p in probes if p.second >= 13]
    assert {p.right for p in blind} == {right_without_view}
    assert {p.right for p in clear} == {"ring" in text}
    assert {p.value for p in blind} == {scores.UNSEEN if at > 5 else "blue"}
