"""How good a watcher is: scores of what was said over a stream of the tabletop world, by the world's truth.

A *statement* is a sentence, or as much of one as was said; `language.understand` says which facts it asserts.
Where the speaker takes one back in mid-sentence (`language.WAIT`), a new one begins. Nothing here knows a
model: `transcribe` reads the events of a session, `score` judges them. At 8 tokens a second or more the ideal
assistant gets full marks everywhere; much slower speech is late for some of what it should say.
"""

import collections
import dataclasses
import itertools
import math
import statistics
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from moss_jax.stream import End, Event, FrameSeen, Interrupted, Silence, Text, Turn
from moss_jax.text import Tokenizer
from moss_jax.worlds.tabletop import Stream
from moss_jax.worlds.tabletop.dialogue import LISTED, Dialogue, Request, answer, tell
from moss_jax.worlds.tabletop.language import HIDDEN, LIVE, PAST, WAIT, Facts, Sentence, agrees, understand

# Seconds that the speaker is given to react, and those in which a call at an awaited moment is in time.
REACT = 3
CALL = 2
EPSILON = 1e-6


# ------------------------------------------------------------------------------- what was said


@dataclasses.dataclass(frozen=True)
class Statement:
    """A sentence, or what was said of it.

    Attributes:
      text: without the words that take back the one before.
      time, frame: of the stream, and the last frame that was seen, when it began (-1 before the first).
      end, end_frame: when its last piece was said.
      request: index of the request in force, -1 before the first.
      correction: it takes the place of a statement in progress.
      cut: a correction or a request cut it.
      sentence: as it is understood; None if it is no sentence.
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
        return self.sentence.facts if self.sentence else {}

    @property
    def is_alert(self) -> bool:
        return self.sentence is not None and self.sentence.name.startswith("alert")


@dataclasses.dataclass(frozen=True)
class Transcript:
    """What was said over a stream.

    Attributes:
      statements: in order of time.
      speaking: the frames between which and the next something was said.
      whole: the stream did not end for want of room.
    """

    statements: tuple[Statement, ...]
    speaking: frozenset[int]
    whole: bool = True


@dataclasses.dataclass(frozen=True)
class _Piece:
    text: str
    time: float
    frame: int


def transcribe(events: Iterable[Event], requests: Sequence[Request]) -> Transcript:
    """The statements in the events of one slot, which was asked these requests."""
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
            case FrameSeen():
                frame = event.index
            case Text():
                pieces.append(_Piece(event.text, event.stream_time, frame))
                speaking.add(frame)
            case Turn():
                # What it cut was said under the request before.
                request += bool(event.prompt)
            case Interrupted():
                close(cut=True)
            case Silence() | End():
                close(cut=False)
                whole &= not isinstance(event, End) or event.reason == "finished"
    return Transcript(tuple(statements), frozenset(speaking), whole)


def _split(pieces: Sequence[_Piece], request: int, subject: str, cut: bool) -> Iterator[Statement]:
    """The statements of an utterance: one, and one more for each that takes its place in mid-sentence."""
    text = "".join(piece.text for piece in pieces)
    # The piece that each character came with.
    owner = [piece for piece in pieces for _ in piece.text]
    position = 0
    parts = text.split(WAIT)
    for number, part in enumerate(parts):
        begin, position = position, position + len(part)
        # A correction begins with the words that take back the statement before.
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
class Share:
    """So many of so many."""

    hits: float = 0
    of: float = 0

    def __add__(self, other: "Share") -> "Share":
        return Share(self.hits + other.hits, self.of + other.of)

    @property
    def value(self) -> float | None:
        return self.hits / self.of if self.of else None

    @staticmethod
    def count(outcomes: Iterable[bool]) -> "Share":
        found = list(outcomes)
        return Share(sum(found), len(found))


@dataclasses.dataclass(frozen=True)
class Probe:
    """A moment at which a question should have been answered.

    Attributes:
      request: index of the question.
      second: of the stream, whose truth counts.
      value: the right answer.
      right: it was given.
    """

    request: int
    kind: str
    second: int
    value: Hashable
    right: bool


@dataclasses.dataclass(frozen=True)
class Score:
    """How one stream went; see the functions that find each part.

    Attributes:
      delays: of the revisions that were made, in seconds.
    """

    probes: tuple[Probe, ...] = ()
    alert_recall: Share = Share()
    alert_precision: Share = Share()
    silence: Share = Share()
    revision: Share = Share()
    delays: tuple[float, ...] = ()
    corrections: Share = Share()
    stale: Share = Share()
    understood: Share = Share()
    narration_recall: Share = Share()
    narration_precision: Share = Share()
    cut_short: int = 0


def score(
    stream: Stream, said: Transcript, ideal: Dialogue, *, tokenizer: Tokenizer, tokens_per_second: int
) -> Score:
    """Judges what was said over a stream.

    Args:
      ideal: what the ideal assistant says over it at the same speed of speech.
    """
    pace = Pace(tokenizer, tokens_per_second)
    revision, delays = revisions(stream, said)
    alert_recall, alert_precision = alerts(stream, said)
    narration_recall, narration_precision = narration(stream, said, ideal)
    return Score(
        probes=tuple(probes(stream, said, pace)),
        alert_recall=alert_recall,
        alert_precision=alert_precision,
        silence=silence(stream, said, ideal),
        revision=revision,
        delays=delays,
        corrections=corrections(stream, said),
        stale=stale(stream, said),
        understood=Share.count(s.sentence is not None for s in said.statements if not s.cut),
        narration_recall=narration_recall,
        narration_precision=narration_precision,
        cut_short=not said.whole,
    )


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long it takes to say something."""

    tokenizer: Tokenizer
    tokens_per_second: int

    def patience(self, request: Request, truth: Facts) -> float:
        """Seconds in which a question must be answered: 3, or 2 and those that the words take."""
        said = answer(request, truth)
        words = max(len(self.tokenizer.encode(said.text(variant))) for variant in range(2))
        return max(REACT, 2 + words / self.tokens_per_second)


def probes(stream: Stream, said: Transcript, pace: Pace) -> Iterator[Probe]:
    """When each question should have been answered, and whether it was.

    A live question is probed at each whole second until the next request at which it has been open for
    `patience` seconds, and its answer the same for as long. The belief at a probe is what the statements that
    were said since the question assert, later ones over earlier ones; it is right if it holds every fact that
    the question is about and all agree with the truth of that second.

    A past question is probed once, after `patience` seconds or at the next request, if that leaves a second
    more than the words take. Right is a first statement that asserts just the facts of the ideal answer at
    the frame on which it was begun.
    """
    truth = stream.world.truth
    for number, request in enumerate(stream.requests):
        until = _until(stream, number)
        asked = frame_seen(request)
        statements = [s for s in said.statements if s.request == number and s.facts]
        if request.kind in LIVE:
            for second in range(asked + 1, math.ceil(min(until, stream.world.seconds))):
                patience = pace.patience(request, truth[second])
                settled = range(max(asked, math.ceil(second - patience), 0), second)
                value = right_answer(request, truth[second])
                if second < request.time + patience or any(
                    right_answer(request, truth[f]) != value for f in settled
                ):
                    continue
                told: dict[str, str] = {}
                for statement in statements:
                    if statement.end <= second + EPSILON:
                        told.update(statement.facts)
                right = all(is_true({key: told.get(key, "")}, truth[second]) for key in request.keys)
                yield Probe(number, request.kind, second, value, right)
        elif request.kind in PAST and asked >= 0:
            patience = pace.patience(request, truth[asked])
            if until - request.time < patience - 1:
                continue
            at = min(request.time + patience, until)
            first = next((s for s in statements if s.end <= at + EPSILON), None)
            right = first is not None and answers(request, first.facts, truth[max(first.frame, 0)])
            yield Probe(number, request.kind, asked, right_answer(request, truth[asked]), right)


def answers(request: Request, facts: Facts, truth: Facts) -> bool:
    """Whether asserted facts answer a question rightly."""
    if request.kind in PAST:
        return dict(facts) == dict(answer(request, truth).facts)
    return all(key in facts and agrees(key, facts[key], truth) for key in request.keys)


def right_answer(request: Request, truth: Facts) -> Hashable:
    """What there is to answer to a question, in a form that can be compared and counted."""
    if request.kind == "list":
        # What isn't to be seen isn't mentioned, whatever the reason.
        return tuple(HIDDEN if truth[key] in ("none", "covered") else truth[key] for key in LISTED)
    if request.kind == "seen":
        return truth[f"seen:{request.subject}"]
    return truth[request.keys[0] if request.keys else request.kind]


def alerts(stream: Stream, said: Transcript) -> tuple[Share, Share]:
    """Recall and precision of calls at awaited moments.

    The moment comes with the first frame after the request on which what is awaited is true, and a call that
    says so is right if it begins within 2 seconds, once. All other calls are wrong. Due are moments that last
    for two frames at least and come 2 seconds or more before the next request and the end.
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
        called = any(
            s.is_alert
            and dict(s.facts) == dict(awaited)
            and moment <= s.frame
            and s.time <= moment + CALL + EPSILON
            for s in said.statements
            if s.request == number
        )
        right += called
        if moment + CALL <= until and is_true(awaited, truth[moment + 1]):
            due.append(called)
    return Share.count(due), Share(right, sum(s.is_alert for s in said.statements))


def silence(stream: Stream, said: Transcript, ideal: Dialogue) -> Share:
    """Share of the frames on which nothing is due and nothing is said before the next.

    Nothing is due on a frame if no request came in the 3 seconds before it or comes before the next frame,
    and if the ideal assistant neither speaks on it or the 3 frames before nor has anything to say there.
    """
    busy = {frame for frame, speaks in enumerate(ideal.speaking) if speaks} | {
        u.due for u in ideal.utterances
    }
    idle = [
        frame
        for frame in range(stream.world.seconds)
        if not any(frame - REACT <= r.time < frame + 1 for r in stream.requests)
        and busy.isdisjoint(range(frame - REACT, frame + 1))
    ]
    return Share.count(frame not in said.speaking for frame in idle)


def revisions(stream: Stream, said: Transcript) -> tuple[Share, tuple[float, ...]]:
    """Share of the answers that were revised when they became false, and the delays of those.

    A revision is due at a frame that makes a fact false that the model has told since the live question was
    asked and that was true until then, unless a request or the end comes within 3 seconds, or the fact is
    true again by then. It is made if within 3 seconds a statement begins that says truly what it is now.
    """
    truth, end = stream.world.truth, stream.world.seconds - 1
    made, delays = [], []
    for number, request in enumerate(stream.requests):
        last = min(_until(stream, number), end) - REACT
        statements = [s for s in said.statements if s.request == number and s.facts]
        for frame in range(max(frame_seen(request) + 1, 1), math.floor(last) + 1):
            told: dict[str, str] = {}
            for statement in statements:
                if statement.frame < frame:
                    told.update(statement.facts)
            for key in request.keys:
                value = told.get(key)
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
                    and _true_when_said(s, {key: s.facts[key]}, truth)
                ]
                made.append(bool(new))
                delays += new[:1]
    return Share.count(made), tuple(delays)


def corrections(stream: Stream, said: Transcript) -> Share:
    """Of the statements that take one back in mid-sentence, the share that is understood and true."""
    found = [s for s in said.statements if s.correction and not s.cut]
    return Share.count(bool(s.facts) and _true_when_said(s, s.facts, stream.world.truth) for s in found)


def stale(stream: Stream, said: Transcript) -> Share:
    """Share of the statements that are false on every frame that was the last seen while they were said.

    Only those that assert something count. Before the first frame nothing is true. What is told of the last
    event, when that was asked for, is left to the accuracy.
    """
    kinds = [request.kind for request in stream.requests]
    found = [s for s in said.statements if s.facts and (s.request < 0 or kinds[s.request] != "event")]
    return Share.count(not _true_when_said(s, s.facts, stream.world.truth) for s in found)


def narration(stream: Stream, said: Transcript, ideal: Dialogue) -> tuple[Share, Share]:
    """Recall and precision of telling what happens, while that is asked for.

    Recall is over the events that the ideal assistant tells, but for those in the last 3 seconds before the
    next request or the end: a statement of the same facts begins within 3 seconds of the event. Precision is
    over the statements that assert something: an event of the last 3 seconds, told for the first time.
    """
    end = stream.world.seconds - 1
    recall, precision = [], []
    for number, request in enumerate(stream.requests):
        if request.kind != "narrate":
            continue
        statements = [s for s in said.statements if s.request == number and s.facts]
        asked, until = frame_seen(request), _until(stream, number)
        events = {
            event.frame: dict(tell(event, stream.world.truth[event.frame]).facts)
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
            precision.append(bool(of))
            told |= set(of[:1])
        due = [u.due for u in ideal.utterances if u.request == number and u.sentence.facts]
        recall += [frame in told for frame in due if frame + REACT <= min(until, end)]
    return Share.count(recall), Share.count(precision)


def frame_seen(request: Request) -> int:
    """The last frame before a request; -1 if it came before the first."""
    return int(request.time) if request.time else -1


def is_true(facts: Facts, truth: Facts) -> bool:
    """Whether all facts are true; one that makes no sense, such as the colour of the card, isn't."""
    return all((key in truth or key == "some") and agrees(key, value, truth) for key, value in facts.items())


def _true_when_said(statement: Statement, facts: Facts, truth: Sequence[Facts]) -> bool:
    """Whether it is true on one of the frames that were the last seen while it was said.

    A statement that a change overtakes may end as what has become true.
    """
    return any(is_true(facts, truth[f]) for f in range(max(statement.frame, 0), statement.end_frame + 1))


def _until(stream: Stream, number: int) -> float:
    """The time of the next request, or infinity."""
    later = stream.requests[number + 1 : number + 2]
    return later[0].time if later else math.inf


# --------------------------------------------------------------------------- over many streams


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """The scores of many streams, JSON-ready: each value with the number of cases that it is a share of.

    `accuracy` is over the probes, so weighted that each question counts once; `constant guess` is that of the
    one answer to each kind of question that is right most often, chosen in hindsight.
    """

    def total(name: str) -> Share:
        return sum((getattr(s, name) for s in scores), Share())

    delays = [delay for s in scores for delay in s.delays]
    recall, precision = total("alert_recall"), total("alert_precision")
    return {
        **accuracy([s.probes for s in scores]),
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
    """The accuracy over the probes of each stream, as a whole and by kind of question."""
    questions = [
        list(group) for probes in streams for _, group in itertools.groupby(probes, key=lambda p: p.request)
    ]

    def mean(questions: Sequence[Sequence[Probe]]) -> Share:
        return Share(sum(sum(p.right for p in q) / len(q) for q in questions), len(questions))

    by_kind: dict[str, list[list[Probe]]] = collections.defaultdict(list)
    for question in questions:
        by_kind[question[0].kind].append(question)
    guesses = {kind: _constant_guess(asked) for kind, asked in by_kind.items()}
    return {
        "accuracy": entry(mean(questions)),
        "accuracy_all_probes": entry(Share.count(p.right for q in questions for p in q)),
        "accuracy_first_probes": entry(Share.count(q[0].right for q in questions)),
        "constant_guess": entry(sum(guesses.values(), Share())),
        "by_kind": {
            kind: {**entry(mean(by_kind[kind])), "constant_guess": guesses[kind].value}
            for kind in (*LIVE, *PAST)
            if kind in by_kind
        },
    }


def _constant_guess(questions: Sequence[Sequence[Probe]]) -> Share:
    """The accuracy of the one answer that is right most often."""
    weights: dict[Hashable, Fraction] = collections.defaultdict(Fraction)
    for question in questions:
        for probe in question:
            weights[probe.value] += Fraction(1, len(question))
    return Share(float(max(weights.values())), len(questions))


def f1(recall: Share, precision: Share) -> float | None:
    """Their harmonic mean; None if nothing was due and nothing said."""
    if not recall.of and not precision.of:
        return None
    both = (recall.value or 0.0), (precision.value or 0.0)
    return 2 * both[0] * both[1] / sum(both) if sum(both) else 0.0


def entry(share: Share) -> Mapping[str, float | int | None]:
    """A share as JSON holds it."""
    return {"value": share.value, "n": int(share.of)}
