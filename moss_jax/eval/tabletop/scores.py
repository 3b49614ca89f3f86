"""Metrics of the tabletop evaluation: what was said over a stream, judged by the world's truth.

A *statement* is a sentence, or the part of it that was said; `language.understand` gives the facts that it
asserts. Where the speaker retracts one in mid-sentence (`language.WAIT`), a new one begins. The metrics are
independent of the model: `transcribe` reads the events of a session, `score` judges them. At 8 tokens a
second or more the ideal assistant has a perfect score; much slower speech misses some deadlines.
"""

import collections
import dataclasses
import itertools
import math
import statistics
import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from moss_jax.stream import End, Event, FrameSeen, FrameUnseen, Interrupted, Silence, Text, Turn
from moss_jax.text import Tokenizer
from moss_jax.worlds.tabletop import TabletopStream
from moss_jax.worlds.tabletop.answers import narrate, true_answer, truth_of
from moss_jax.worlds.tabletop.dialogue import Dialogue
from moss_jax.worlds.tabletop.language import (
    HIDDEN,
    LIVE,
    LONG_PAST,
    PAST,
    WAIT,
    Facts,
    Sentence,
    agrees,
    understand,
)
from moss_jax.worlds.tabletop.requests import LISTED, Request

# Seconds in which the speaker must react, and in which an alert counts as in time.
REACT = 3
CALL = 2
# Tolerance of comparisons of times, in seconds.
EPSILON = 1e-6
# All frames of a stream, and -1 for the time before the first.
ALWAYS = range(-1, sys.maxsize)
# The right answer to a question about the present as long as the camera shows nothing.
UNSEEN = "unseen"


# ------------------------------------------------------------------------------- what was said


@dataclasses.dataclass(frozen=True)
class Statement:
    """A sentence, or the part of it that was said.

    Attributes:
      text: its words, without those that retract the previous statement.
      time: at which it began, in seconds of the stream.
      frame: the last frame seen when it began; -1 before the first.
      end: time of its last piece, in seconds of the stream.
      end_frame: the last frame seen when its last piece was said.
      request: index of the request in force; -1 before the first.
      correction: whether it replaces a statement in progress.
      cut: whether a correction or a request cut it short.
      sentence: the parsed text; None if it is not a sentence of the language.
    """

    text: str
    time: float
    frame: int
    end: float
    end_frame: int
    request: int
    correction: bool = False
    cut: bool = False
    sentence: Sentence | None = None

    @property
    def facts(self) -> Facts:
        """The facts that it asserts."""
        return self.sentence.facts if self.sentence else {}

    @property
    def is_alert(self) -> bool:
        """Whether it announces an awaited moment."""
        return self.sentence is not None and self.sentence.name.startswith("alert")


@dataclasses.dataclass(frozen=True)
class StreamTranscript:
    """The statements of one stream.

    Attributes:
      statements: in order of time.
      speaking: the frames after which something was said before the next frame.
      whole: whether the stream was played to its end, not cut short for lack of capacity.
    """

    statements: tuple[Statement, ...]
    speaking: frozenset[int]
    whole: bool = True


@dataclasses.dataclass(frozen=True)
class _Piece:
    text: str
    time: float
    frame: int


def transcribe(events: Iterable[Event], requests: Sequence[Request]) -> StreamTranscript:
    """Collects the statements in the events of one slot.

    Args:
      events: events of one stream, in order.
      requests: the prompts of that stream.
    """
    statements: list[Statement] = []
    pieces: list[_Piece] = []
    speaking = set()
    frame, request, whole = -1, -1, True

    def close(cut: bool) -> None:
        if pieces:
            subject = requests[request].subject if request >= 0 else ""
            statements.extend(_split(pieces, request, subject, cut))
            pieces.clear()

    for event in events:
        match event:
            case FrameSeen() | FrameUnseen():
                frame = event.index
            case Text():
                pieces.append(_Piece(event.text, event.stream_time, frame))
                speaking.add(frame)
            case Turn():
                # `Interrupted` comes first, so what was cut belongs to the request before.
                request += bool(event.prompt)
            case Interrupted():
                close(cut=True)
            case Silence() | End():
                close(cut=False)
                whole &= not isinstance(event, End) or event.reason == "finished"
    return StreamTranscript(tuple(statements), frozenset(speaking), whole)


def _split(pieces: Sequence[_Piece], request: int, subject: str, cut: bool) -> Iterator[Statement]:
    """Splits an utterance into statements: one, and one more for each correction in mid-sentence."""
    text = "".join(piece.text for piece in pieces)
    # For each character, the piece that it came with.
    owner = [piece for piece in pieces for _ in piece.text]
    position = 0
    parts = text.split(WAIT)
    for number, part in enumerate(parts):
        begin, position = position, position + len(part)
        # A correction begins at the words that retract the previous statement.
        first = owner[begin - len(WAIT)] if number else pieces[0]
        last = owner[max(position - 1, 0)]
        yield Statement(
            text=part,
            time=first.time,
            frame=first.frame,
            end=last.time,
            end_frame=last.frame,
            request=request,
            correction=number > 0,
            cut=cut or number + 1 < len(parts),
            sentence=understand(part, subject),
        )
        position += len(WAIT)


# ---------------------------------------------------------------------------------- the scores


@dataclasses.dataclass(frozen=True)
class Ratio:
    """hits / total. Ratios add up as counts do."""

    hits: float = 0
    total: float = 0

    def __add__(self, other: "Ratio") -> "Ratio":
        return Ratio(self.hits + other.hits, self.total + other.total)

    @property
    def value(self) -> float | None:
        """The quotient; None if the total is 0."""
        return self.hits / self.total if self.total else None

    @staticmethod
    def count(outcomes: Iterable[bool]) -> "Ratio":
        """The share of outcomes that are true."""
        found = list(outcomes)
        return Ratio(sum(found), len(found))


@dataclasses.dataclass(frozen=True)
class Probe:
    """A moment at which a question should have been answered.

    Attributes:
      request: index of the question.
      kind: kind of question.
      second: second of the stream; the truth of this second counts.
      value: the right answer.
      right: whether it was given.
    """

    request: int
    kind: str
    second: int
    value: Hashable
    right: bool


@dataclasses.dataclass(frozen=True)
class Score:
    """The metrics of one stream, each defined by the function that computes it.

    Attributes:
      probes: see `probes`.
      alert_recall: see `alerts`.
      alert_precision: see `alerts`.
      silence: see `silence`.
      revision: see `revisions`.
      delays: delays of the revisions that were made, in seconds.
      corrections: see `corrections`.
      stale: see `stale`.
      understood: share of the uncut statements that are sentences of the language.
      narration_recall: see `narration`.
      narration_precision: see `narration`.
      cut_short: whether the stream ended early for lack of capacity.
    """

    probes: tuple[Probe, ...] = ()
    alert_recall: Ratio = Ratio()
    alert_precision: Ratio = Ratio()
    silence: Ratio = Ratio()
    revision: Ratio = Ratio()
    delays: tuple[float, ...] = ()
    corrections: Ratio = Ratio()
    stale: Ratio = Ratio()
    understood: Ratio = Ratio()
    narration_recall: Ratio = Ratio()
    narration_precision: Ratio = Ratio()
    cut_short: bool = False


def score(
    stream: TabletopStream,
    said: StreamTranscript,
    ideal: Dialogue,
    *,
    tokenizer: Tokenizer,
    tokens_per_second: int,
    during: range = ALWAYS,
) -> Score:
    """Scores what was said over a stream, or over a part of it.

    Args:
      stream: with its truth.
      said: to be scored.
      ideal: what the ideal assistant says over the stream at the same speed.
      tokenizer: the model's tokenizer.
      tokens_per_second: speed of speech.
      during: the seconds that count: of probes, of moments that are awaited, of idle frames, of changes, and
        of the frames at which statements begin.
    """
    rate = SpeechRate(tokenizer, tokens_per_second)
    revision, delays = revisions(stream, said, during)
    alert_recall, alert_precision = alerts(stream, said, during)
    narration_recall, narration_precision = narration(stream, said, ideal, during)
    return Score(
        probes=tuple(probe for probe in probes(stream, said, rate) if probe.second in during),
        alert_recall=alert_recall,
        alert_precision=alert_precision,
        silence=silence(stream, said, ideal, during),
        revision=revision,
        delays=delays,
        corrections=corrections(stream, said, during),
        stale=stale(stream, said, during),
        understood=Ratio.count(
            s.sentence is not None for s in said.statements if s.frame in during and not s.cut
        ),
        narration_recall=narration_recall,
        narration_precision=narration_precision,
        cut_short=not said.whole,
    )


@dataclasses.dataclass(frozen=True)
class SpeechRate:
    """The speed of speech, which sets the deadlines of answers.

    Attributes:
      tokenizer: the model's tokenizer.
      tokens_per_second: speed of speech, per second of the stream.
    """

    tokenizer: Tokenizer
    tokens_per_second: int

    def seconds_to_answer(self, request: Request, truth: Facts) -> float:
        """The deadline of an answer, in seconds: 2 plus the time that its words take, at least 3."""
        ideal = true_answer(request, truth)
        tokens = max(len(self.tokenizer.encode(ideal.text(variant))) for variant in range(2))
        return max(REACT, 2 + tokens / self.tokens_per_second)


def probes(stream: TabletopStream, said: StreamTranscript, rate: SpeechRate) -> Iterator[Probe]:
    """Yields the moments at which each question should have been answered, and whether it was.

    A live question is probed at each whole second before the next request at which it has been open for
    `SpeechRate.seconds_to_answer` and its right answer has been the same for that long. The model's belief at
    a probe is what its statements since the question assert, later ones overriding earlier ones; it is right
    if it holds every fact that the question is about and all agree with the truth of that second.

    A past question is probed once, at its deadline or at the next request, unless that request comes more
    than a second before the deadline. The answer is right if the first statement asserts exactly the facts of
    the ideal answer at the frame at which it began.

    While nothing has been visible since a live question, the right answer is that nothing can be seen.
    """
    truth, clear = stream.world.truth, stream.world.clear
    for number, request in enumerate(stream.requests):
        until = _until(stream, number)
        asked = frame_seen(request)
        first_clear = next((f for f in range(max(asked, 0), stream.world.seconds) if clear[f]), math.inf)

        def value_at(frame: int, request: Request = request, first_clear: float = first_clear) -> Hashable:
            return right_answer(request, truth[frame]) if frame >= first_clear else UNSEEN

        statements = [s for s in said.statements if s.request == number and s.facts]
        if request.kind in LIVE:
            for second in range(asked + 1, math.ceil(min(until, stream.world.seconds))):
                # Before the first clear frame, the deadline is that of an answer with a clear view.
                seen = truth[second] if second < first_clear else {**truth[second], "view": "clear"}
                deadline = rate.seconds_to_answer(request, seen)
                settled = range(max(asked, math.ceil(second - deadline), 0), second)
                value = value_at(second)
                if second < request.time + deadline or any(value_at(f) != value for f in settled):
                    continue
                stated: dict[str, str] = {}
                for statement in statements:
                    if statement.end <= second + EPSILON:
                        stated.update(statement.facts)
                keys = ("view",) if value == UNSEEN else request.keys
                right = all(is_true({key: stated.get(key, "")}, truth[second]) for key in keys)
                yield Probe(number, request.kind, second, value, right)
        elif request.kind in PAST and asked >= 0:
            then = truth_of(request, stream.world, asked)
            deadline = rate.seconds_to_answer(request, then)
            if until - request.time < deadline - 1:
                continue
            at = min(request.time + deadline, until)
            first = next((s for s in statements if s.end <= at + EPSILON), None)
            right = first is not None and is_right_answer(
                request, first.facts, truth_of(request, stream.world, max(first.frame, 0))
            )
            yield Probe(number, request.kind, asked, right_answer(request, then), right)


def is_right_answer(request: Request, facts: Facts, truth: Facts) -> bool:
    """Whether asserted facts are the right answer to a question."""
    if request.kind in PAST or truth["view"] == "none":
        return dict(facts) == dict(true_answer(request, truth).facts)
    return all(key in facts and agrees(key, facts[key], truth) for key in request.keys)


def right_answer(request: Request, truth: Facts) -> Hashable:
    """The right answer to a question, in a form that can be compared and counted."""
    if request.kind == "list":
        # A list leaves out what isn't visible, for whatever reason.
        return tuple(HIDDEN if truth[key] in ("none", "covered") else truth[key] for key in LISTED)
    if request.kind == "seen":
        return truth[f"seen:{request.subject}"]
    if request.kind == "order":
        # Whether it was the one that the question names first.
        return truth["earlier"] == request.subject
    if request.kind in LONG_PAST:
        said = true_answer(request, truth)
        return said.name, *((gap, value) for gap, value in said.fields if value != request.subject)
    return truth[request.keys[0] if request.keys else request.kind]


def alerts(stream: TabletopStream, said: StreamTranscript, during: range = ALWAYS) -> tuple[Ratio, Ratio]:
    """Recall and precision of alerts.

    The awaited moment is the first frame after the request on which the awaited facts are true. An alert that
    states them is right if it begins within 2 seconds of that, once; all other alerts are wrong. Recall
    counts moments that last for at least two frames and come at least 2 seconds before the next request and
    the end.
    """
    truth, end = stream.world.truth, stream.world.seconds - 1
    due, right = [], 0
    for number, request in enumerate(stream.requests):
        if request.awaited is None:
            continue
        until = min(_until(stream, number), end)
        awaited = request.awaited.facts
        after = range(frame_seen(request) + 1, math.floor(until) + 1)
        moment = next((f for f in after if is_true(awaited, truth[f])), None)
        if moment is None:
            continue
        called = [
            s.frame
            for s in said.statements
            if s.request == number
            and s.is_alert
            and dict(s.facts) == dict(awaited)
            and moment <= s.frame
            and s.time <= moment + CALL + EPSILON
        ]
        right += bool(called) and called[0] in during
        if moment in during and moment + CALL <= until and is_true(awaited, truth[moment + 1]):
            due.append(bool(called))
    made = sum(s.is_alert for s in said.statements if s.frame in during)
    return Ratio.count(due), Ratio(right, made)


def silence(stream: TabletopStream, said: StreamTranscript, ideal: Dialogue, during: range = ALWAYS) -> Ratio:
    """Share of the idle frames after which nothing is said before the next frame.

    A frame is idle if no request came in the 3 seconds before it or comes before the next frame, and if the
    ideal assistant neither speaks nor has anything due on it or on the 3 frames before.
    """
    busy = {frame for frame, speaks in enumerate(ideal.speaking) if speaks} | {
        u.due for u in ideal.utterances
    }
    asked = {int(r.time) + since for r in stream.requests for since in range(REACT + 1)}
    idle = [
        frame
        for frame in range(stream.world.seconds)
        if frame in during and frame not in asked and busy.isdisjoint(range(frame - REACT, frame + 1))
    ]
    return Ratio.count(frame not in said.speaking for frame in idle)


def revisions(
    stream: TabletopStream, said: StreamTranscript, during: range = ALWAYS
) -> tuple[Ratio, tuple[float, ...]]:
    """Share of the answers that were revised when they became false, and the delays of the revisions.

    A revision is due at a frame that makes a stated fact false: one that the model has asserted since the
    live question was asked and that was true until then. It is not due if a request or the end comes within 3
    seconds, or if the fact is true again by then. It is made if a statement that asserts the new truth begins
    within 3 seconds.
    """
    truth, end = stream.world.truth, stream.world.seconds - 1
    made, delays = [], []
    for number, request in enumerate(stream.requests):
        last = min(_until(stream, number), end) - REACT
        statements = [s for s in said.statements if s.request == number and s.facts]
        for frame in range(max(frame_seen(request) + 1, 1), math.floor(last) + 1):
            if frame not in during:
                continue
            stated: dict[str, str] = {}
            for statement in statements:
                if statement.frame < frame:
                    stated.update(statement.facts)
            for key in request.keys:
                value = stated.get(key)
                if value is None or not is_true({key: value}, truth[frame - 1]):
                    continue
                if any(is_true({key: value}, truth[f]) for f in range(frame, frame + REACT + 1)):
                    continue
                new = [
                    s.time - frame
                    for s in statements
                    if frame <= s.frame
                    and s.time <= frame + REACT + EPSILON
                    and key in s.facts
                    and _true_when_said(s, {key: s.facts[key]}, stream)
                ]
                made.append(bool(new))
                delays += new[:1]
    return Ratio.count(made), tuple(delays)


def corrections(stream: TabletopStream, said: StreamTranscript, during: range = ALWAYS) -> Ratio:
    """Share of the corrections in mid-sentence that are understood and true."""
    found = [s for s in said.statements if s.frame in during and s.correction and not s.cut]
    return Ratio.count(bool(s.facts) and _true_when_said(s, s.facts, stream) for s in found)


def stale(stream: TabletopStream, said: StreamTranscript, during: range = ALWAYS) -> Ratio:
    """Share of the statements that were false on every frame from their beginning to their end.

    Only statements that assert something count. Before the first frame nothing is true. Answers to "What
    happened last?" are left to the accuracy.
    """
    kinds = [request.kind for request in stream.requests]
    found = [
        s
        for s in said.statements
        if s.frame in during and s.facts and (s.request < 0 or kinds[s.request] != "event")
    ]
    return Ratio.count(not _true_when_said(s, s.facts, stream) for s in found)


def narration(
    stream: TabletopStream, said: StreamTranscript, ideal: Dialogue, during: range = ALWAYS
) -> tuple[Ratio, Ratio]:
    """Recall and precision of narrating events, while that is asked for.

    Recall is over the events that the ideal assistant narrates, except those in the last 3 seconds before the
    next request or the end; an event is recalled if a statement of the same facts begins within 3 seconds.
    Precision is over the statements that assert something; right are those about an event of the last 3
    seconds that was not narrated before.
    """
    end = stream.world.seconds - 1
    recall, precision = [], []
    for number, request in enumerate(stream.requests):
        if request.kind != "narrate":
            continue
        statements = [s for s in said.statements if s.request == number and s.facts]
        asked, until = frame_seen(request), _until(stream, number)
        events = {
            event.frame: dict(narrate(event, stream.world.truth[event.frame]).facts)
            for event in stream.world.events
            if asked < event.frame < until
        }
        told = set()
        for statement in statements:
            of = [
                frame
                for frame, facts in events.items()
                if frame not in told
                and frame <= statement.frame
                and statement.time <= frame + REACT + EPSILON
                and facts == dict(statement.facts)
            ]
            if statement.frame in during:
                precision.append(bool(of))
            told |= set(of[:1])
        due = [u.due for u in ideal.utterances if u.request == number and u.sentence.facts]
        recall += [frame in told for frame in due if frame in during and frame + REACT <= min(until, end)]
    return Ratio.count(recall), Ratio.count(precision)


def frame_seen(request: Request) -> int:
    """The last frame before a request; -1 before the first."""
    return int(request.time) if request.time else -1


def is_true(facts: Facts, truth: Facts) -> bool:
    """Whether all facts are true. A fact that makes no sense, such as the colour of the card, is false."""
    return all((key in truth or key == "some") and agrees(key, value, truth) for key, value in facts.items())


def _true_when_said(statement: Statement, facts: Facts, stream: TabletopStream) -> bool:
    """Whether facts of a statement were true on any frame from its beginning to its end.

    A statement overtaken by a change may continue with what has become true.
    """
    frames = range(max(statement.frame, 0), statement.end_frame + 1)
    if statement.request < 0:
        return any(is_true(facts, stream.world.truth[f]) for f in frames)
    request = stream.requests[statement.request]
    return any(is_true(facts, truth_of(request, stream.world, f)) for f in frames)


def _until(stream: TabletopStream, number: int) -> float:
    """The time of the request after `number`; infinity after the last."""
    later = stream.requests[number + 1 : number + 2]
    return later[0].time if later else math.inf


# --------------------------------------------------------------------------- over many streams


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """Aggregates the scores of many streams, JSON-ready: each value with its number of cases.

    `accuracy` is over the probes, weighted so that each question counts once, and `accuracy_now` is that of
    questions about the present. `constant_guess` is the accuracy of always giving the one answer to each kind
    of question that is right most often, chosen in hindsight.
    """

    def total(name: str) -> Ratio:
        return sum((getattr(s, name) for s in scores), Ratio())

    delays = [delay for s in scores for delay in s.delays]
    live = [[probe for probe in s.probes if probe.kind in LIVE] for s in scores]
    recall, precision = total("alert_recall"), total("alert_precision")
    return {
        **accuracy([s.probes for s in scores]),
        "accuracy_now": accuracy(live)["accuracy"],
        "alerts": {"f1": f1(recall, precision), "recall": entry(recall), "precision": entry(precision)},
        "silence": entry(total("silence")),
        "revision": {
            **entry(total("revision")),
            "median_delay_s": statistics.median(delays) if delays else None,
            "mid_sentence": entry(total("corrections")),
        },
        "stale": entry(total("stale")),
        "understood": entry(total("understood")),
        "narration": {
            "recall": entry(total("narration_recall")),
            "precision": entry(total("narration_precision")),
        },
        "streams_cut_short": sum(s.cut_short for s in scores),
    }


def accuracy(streams: Sequence[Sequence[Probe]]) -> dict[str, Any]:
    """Aggregates the probes of each stream to accuracies, overall and by kind of question."""
    questions = [
        list(group) for probes in streams for _, group in itertools.groupby(probes, key=lambda p: p.request)
    ]

    def mean(questions: Sequence[Sequence[Probe]]) -> Ratio:
        return Ratio(sum(sum(p.right for p in q) / len(q) for q in questions), len(questions))

    by_kind: dict[str, list[list[Probe]]] = collections.defaultdict(list)
    for question in questions:
        by_kind[question[0].kind].append(question)
    guesses = {kind: _constant_guess(asked) for kind, asked in by_kind.items()}
    return {
        "accuracy": entry(mean(questions)),
        "accuracy_all_probes": entry(Ratio.count(p.right for q in questions for p in q)),
        "accuracy_first_probes": entry(Ratio.count(q[0].right for q in questions)),
        "constant_guess": entry(sum(guesses.values(), Ratio())),
        "by_kind": {
            kind: {**entry(mean(by_kind[kind])), "constant_guess": guesses[kind].value}
            for kind in (*LIVE, *PAST)
            if kind in by_kind
        },
    }


def _constant_guess(questions: Sequence[Sequence[Probe]]) -> Ratio:
    """The accuracy of the one answer that is right most often."""
    weights: dict[Hashable, Fraction] = collections.defaultdict(Fraction)
    for question in questions:
        for probe in question:
            weights[probe.value] += Fraction(1, len(question))
    return Ratio(float(max(weights.values())), len(questions))


def f1(recall: Ratio, precision: Ratio) -> float | None:
    """F1 score; None if nothing was due and nothing said."""
    if not recall.total and not precision.total:
        return None
    both = (recall.value or 0.0), (precision.value or 0.0)
    return 2 * both[0] * both[1] / sum(both) if sum(both) else 0.0


def entry(ratio: Ratio) -> Mapping[str, float | int | None]:
    """A ratio as an entry of the JSON result."""
    return {"value": ratio.value, "n": int(ratio.total)}
