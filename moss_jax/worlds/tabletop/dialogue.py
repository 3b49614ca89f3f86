"""Dialogues about the tabletop world: requests of a user, and the timed replies of an ideal assistant.

The assistant is a small program that knows the truth of each frame as soon as it has seen it. It runs on the
lockstep clock of a live session, token by token, so it writes the sequences that a session builds. The last
request counts: until the next one, the assistant keeps the answer to a question up to date, narrates changes,
or announces an awaited moment.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import cast

import numpy as np

from moss_jax.text import Tokenizer, chat
from moss_jax.text.labels import IGNORED
from moss_jax.worlds.tabletop import language
from moss_jax.worlds.tabletop.language import (
    AGO,
    HIDDEN,
    LIVE,
    PAST,
    SPANS,
    TIMES,
    WAIT,
    Facts,
    Sentence,
    agrees,
    holds,
    list_of,
    sentence,
)
from moss_jax.worlds.tabletop.render import COLOURS, SHAPES
from moss_jax.worlds.tabletop.world import CARD, PLACES, EventKind, Table, TableEvent, World, pick

# Tolerance of comparisons of times, in seconds.
EPSILON = 1e-6
# The facts that a list is about.
LISTED = (*(f"colour:{shape}" for shape in SHAPES), "digit")


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt of the user.

    Attributes:
      time: of the stream, in seconds.
      text: the wording.
      kind: a key of `language.ASK`.
      subject: the kind of thing that it is about, if any.
      awaited: of an alert, the sentence that is due as soon as it is true.
      other: the other kind of thing in a question about the order of two.
      span: of a question about a time ago, how long, in seconds.
    """

    time: float
    text: str
    kind: str
    subject: str = ""
    awaited: Sentence | None = None
    other: str = ""
    span: int = 0

    @property
    def keys(self) -> tuple[str, ...]:
        """The facts that a live question is about."""
        match self.kind:
            case "list":
                return LISTED
            case "digit" | "count":
                return (self.kind,)
            case _ if self.kind in LIVE:
                return (f"{self.kind}:{self.subject}",)
            case _:
                return ()


@dataclasses.dataclass(frozen=True)
class Utterance:
    """A sentence of the assistant.

    Attributes:
      time: of the stream, in seconds, when it begins.
      frame: the last frame seen when it begins.
      due: the frame since which it has been due; -1 before the first.
      request: index of the request that it serves.
      sentence: to be said.
      cut: replaces a statement in progress.
      slip: wrong, to be taken back.
    """

    time: float
    frame: int
    due: int
    request: int
    sentence: Sentence
    cut: bool = False
    slip: bool = False


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """The token sequence of a stream, and what is said in it.

    Attributes:
      tokens: the whole sequence.
      labels: the targets of its tokens; IGNORED where there is no loss.
      frame_positions: index of each frame's `<|image|>`.
      utterances: in order of time.
      speaking: for each frame, whether something is said before the next.
    """

    tokens: list[int]
    labels: list[int]
    frame_positions: list[int]
    utterances: list[Utterance]
    speaking: list[bool]


# --------------------------------------------------------------------------------------- requests


# Mean time between two requests of a user, in seconds: shortest and longest.
PACE = (2.5, 11.0)
# Share of the groups of requests, and how far an alert looks ahead, in seconds.
GROUPS = {"live": 0.48, "past": 0.16, "narrate": 0.11, "alert": 0.18, "watch": 0.07}
DENSE_GROUPS = {"live": 0.9, "past": 0.1}
HORIZON = 32


def draw_requests(
    rng: np.random.Generator,
    world: World,
    *,
    first_turn: float = 0.0,
    dense: bool = False,
    past: float | None = None,
    pace: tuple[float, float] = PACE,
) -> tuple[Request, ...]:
    """Samples the requests of a stream.

    Args:
      rng: the source of randomness.
      world: that they are about.
      first_turn: probability of a request at time 0, before the first frame.
      dense: only questions, in quick succession.
      past: share of questions about the past, all kinds of them; None for the usual share of those in
        `language.RECENT_PAST`.
      pace: shortest and longest time from most requests to the next, in seconds.

    Returns:
      The requests in order of time.
    """
    end = world.seconds - 1
    requests = []
    time = rng.uniform(0.05, 0.8) if dense else rng.uniform(0.05, max(1, min(8, end)))
    if rng.random() < first_turn:
        requests.append(draw_request(rng, world, 0.0, past=past))
    while time < end + 0.5:
        # Never at the time of a frame, where the order of the two would be undefined.
        time = np.floor(time) + np.clip(time % 1, 0.05, 0.95)
        requests.append(draw_request(rng, world, float(round(time, 2)), dense=dense, past=past))
        if dense:
            time += rng.uniform(0.5, 1.2)
        elif rng.random() < 0.15:
            time += rng.uniform(0.3, 1.5)
        else:
            time += rng.uniform(*pace)
    return tuple(requests)


def draw_request(
    rng: np.random.Generator, world: World, time: float, *, dense: bool = False, past: float | None = None
) -> Request:
    """Samples one request that makes sense at this time; see `draw_requests`."""
    frame = -1 if time == 0 else int(time)
    shares = DENSE_GROUPS if dense else GROUPS
    if past is not None:
        scale = (1 - past) / (1 - shares["past"])
        shares = {group: past if group == "past" else scale * share for group, share in shares.items()}
    groups = list(shares)
    group = groups[rng.choice(len(groups), p=list(shares.values()))]
    match group:
        case "live":
            return _live(rng, world, time, frame, dense)
        case "past" if frame >= 0:
            return _past(rng, world, time, frame, long=past is not None)
        case "alert":
            return _alert(rng, world, time, frame)
        case "watch" if frame >= 0:
            return Request(time, language.ask(rng, "watch"), "watch")
        case _:
            return Request(time, language.ask(rng, "narrate"), "narrate")


def draw_question(rng: np.random.Generator, world: World) -> Request:
    """Samples a question about a whole clip."""
    frame = world.seconds - 1
    if rng.random() < 0.35:
        return _past(rng, world, float(frame), frame, long=False)
    return _live(rng, world, float(frame), frame, dense=False)


def _live(rng: np.random.Generator, world: World, time: float, frame: int, dense: bool) -> Request:
    """Samples a question about the present, more often one whose answer will soon change."""
    changing = world.events_between(frame + 1, frame + 9)
    if changing and not dense and rng.random() < 0.6:
        event = changing[0]
        kinds = {
            "digit": ["digit", "list"],
            "colour": ["colour", "list"],
            "move": ["place"],
        }.get(event.change, ["there", "list"] if event.kind != CARD else ["digit", "list"])
        if event.kind != CARD and event.change not in ("colour", "move"):
            kinds = [*kinds, "count"]
        kind, subject = pick(rng, kinds), event.kind
    else:
        odds = [0.25, 0.1, 0.15, 0.1, 0.1, 0.3] if dense else [0.28, 0.16, 0.16, 0.14, 0.14, 0.12]
        kind = LIVE[rng.choice(len(LIVE), p=odds)]
        subject = _some_kind(rng, world.tables[max(frame, 0)], card=kind == "place")
    if subject == CARD and kind in ("there", "colour"):
        kind = "digit"
    if kind in ("digit", "count", "list"):
        subject = CARD if kind == "digit" else ""
    return Request(time, language.ask(rng, kind, k=subject), kind, subject)


def _past(rng: np.random.Generator, world: World, time: float, frame: int, long: bool) -> Request:
    """Samples a question about the past: of a kind in `language.RECENT_PAST`, or if `long` of any."""
    table, truth = world.tables[frame], world.truth[frame]
    kinds = ["event", "event", "seen"]
    if truth["digit"] not in ("none", "covered"):
        kinds += ["previous"] * (3 if truth["previous"] != "none" else 1)
    if table.covered or rng.random() < 0.1:
        kinds += ["under"] * 4
    if long:
        return _long_past(rng, world, time, frame, sorted(set(kinds)))
    return _recent_past(rng, world, time, frame, pick(rng, kinds))


def _recent_past(rng: np.random.Generator, world: World, time: float, frame: int, kind: str) -> Request:
    """Samples a question of a kind in `language.RECENT_PAST`."""
    truth = world.truth[frame]
    subject = ""
    if kind == "seen":
        gone = [s for s in SHAPES if truth[f"seen:{s}"] == "yes" and truth[f"there:{s}"] == "none"]
        subject = pick(rng, gone) if gone and rng.random() < 0.5 else pick(rng, SHAPES)
    return Request(time, language.ask(rng, kind, k=subject), kind, subject)


def _long_past(
    rng: np.random.Generator, world: World, time: float, frame: int, kinds: Sequence[str]
) -> Request:
    """Samples a question about the past, of one of these kinds or of a kind in `language.LONG_PAST`."""
    truth = world.truth[frame]
    seen = [kind for kind in (*SHAPES, CARD) if truth[f"seen:{kind}"] == "yes"]
    pairs = [(a, b) for a in seen for b in seen if a != b and world.sightings[a][0] != world.sightings[b][0]]
    spans = [span for span in SPANS if frame - span - _slack(span) >= 0]
    weights = {
        **dict.fromkeys(kinds, 1.0),
        # After long enough, everything has been seen.
        "seen": 0.3 if len(seen) > len(SHAPES) else 1.0,
        "first": 0.3 if truth["first"] == "none" else 1.0,
        "order": 1.5 * bool(pairs),
        "times": 1.5,
        "last place": 1.5,
        "last colour": 1.5,
        "was under": 0.2 if truth["was under"] == "none" else 1.5,
        "ago": 3.0 * bool(spans),
    }
    names = [name for name, weight in weights.items() if weight]
    odds = np.array([weights[name] for name in names])
    kind = names[rng.choice(len(names), p=odds / odds.sum())]
    if kind == "ago":
        request = _ago(rng, world, time, frame, pick(rng, spans))
        if request:
            return request
        # Nothing stayed the same for long enough around that time.
        kind = "last place"
    match kind:
        case "order":
            k, j = pick(rng, pairs)
            return Request(time, language.ask(rng, kind, k=k, j=j), kind, k, other=j)
        case "times" | "last place" | "last colour":
            things = [*SHAPES] if kind == "last colour" else [*SHAPES, CARD]
            known = [thing for thing in things if thing in seen]
            away = [thing for thing in known if truth[f"there:{thing}"] != "yes"]
            if kind != "times" and away and rng.random() < 0.6:
                known = away
            k = pick(rng, known if known and rng.random() < 0.9 else things)
            return Request(time, language.ask(rng, kind, k=k), kind, k)
        case "first" | "was under":
            return Request(time, language.ask(rng, kind), kind)
        case _:
            return _recent_past(rng, world, time, frame, kind)


def _ago(rng: np.random.Generator, world: World, time: float, frame: int, span: int) -> Request | None:
    """Samples a question about a time ago, around which the answer was the same; None if there is none.

    More often about a thing that was there, and about an answer that is another now.
    """
    slack, then = _slack(span), frame - span
    around = _distinct(world, then - slack, then + slack + 1)
    if any(truth["view"] == "none" for truth in around):
        return None
    topics = [("digit ago", "digit", CARD)]
    topics += [("place ago", f"place:{kind}", kind) for kind in (*SHAPES, CARD)]
    topics += [("colour ago", f"colour:{kind}", kind) for kind in SHAPES]
    now, past = world.truth[frame], world.truth[then]
    topics = [t for t in topics if len({truth[t[1]] for truth in around}) == 1]
    if not topics:
        return None
    # The number first: it changes so often that it seldom qualifies, and places and colours are many.
    number = topics[0][0] == "digit ago" and rng.random() < 0.5
    topics = topics[:1] if number else topics
    there = [t for t in topics if past[t[1]] != "none"]
    topics = there if there and rng.random() < 0.85 else topics
    other = [t for t in topics if past[t[1]] != now[t[1]]]
    topics = other if other and rng.random() < 0.6 else topics
    kind, _, subject = pick(rng, topics)
    return Request(time, language.ask(rng, kind, k=subject, s=SPANS[span]), kind, subject, span=span)


def _slack(span: int) -> int:
    """How far around a time ago the answer must have been the same, in seconds."""
    return max(2, span // 6)


def _distinct(world: World, start: int, stop: int) -> list[Facts]:
    """The facts of a range of seconds, once where nothing changed from one to the next."""
    found = world.truth[start:stop]
    return [truth for n, truth in enumerate(found) if n == 0 or truth is not found[n - 1]]


def _alert(rng: np.random.Generator, world: World, time: float, frame: int) -> Request:
    """Samples a request for an alert, more often about a moment that will come soon."""
    before = world.truth[frame] if frame >= 0 else None
    possible = _awaitable()
    coming = _distinct(world, frame + 1, min(frame + 1 + HORIZON, world.seconds))
    later = [
        s
        for s in possible
        if any(holds(s.facts, truth) for truth in coming) and not (before and holds(s.facts, before))
    ]
    if later and rng.random() < 0.75:
        # By kind first: otherwise digits and shapes, which are many, would crowd out the rest.
        name = pick(rng, sorted({s.name for s in later}))
        awaited = pick(rng, [s for s in later if s.name == name])
    else:
        awaited = pick(rng, [s for s in possible if not (before and holds(s.facts, before))])
    values = awaited.values
    text = language.ask(rng, awaited.name, **values)
    return Request(time, text, awaited.name, values.get("k", ""), awaited)


def _awaitable() -> list[Sentence]:
    """All alerts."""
    kinds = [*SHAPES, CARD]
    return [
        *(sentence("alert there", k=k) for k in kinds),
        *(sentence("alert none", k=k) for k in kinds),
        *(sentence("alert covered", k=k) for k in kinds),
        *(sentence("alert digit", d=str(d)) for d in range(10)),
        *(sentence("alert colour", c=c) for c in COLOURS),
        sentence("alert empty"),
    ]


def _some_kind(rng: np.random.Generator, table: Table, card: bool) -> str:
    """Samples a kind of thing, more often one that is on the table."""
    there = [t.kind for t in table.things if card or t.kind != CARD]
    if there and rng.random() < 0.8:
        return pick(rng, there)
    return pick(rng, SHAPES)


# ------------------------------------------------------------------------------------- sentences


def truth_of(request: Request, world: World, second: int) -> Facts:
    """The facts of a second, with those about the past that a question at this second asks for.

    These are, in addition to the keys of `World.truth`:

    was digit, was place:KIND, was colour:SHAPE, was there:KIND
                 those facts at the time that the question is about
    earlier      the one of the question's two things that was visible first, or none
    """
    truth, k = world.truth[second], request.subject
    match request.kind:
        case "last place" | "last colour":
            topic = request.kind.removeprefix("last ")
            return {**truth, f"was {topic}:{k}": truth[f"{request.kind}:{k}"]}
        case "order":
            first = {
                kind: world.sightings[kind][0]
                for kind in (k, request.other)
                if truth[f"seen:{kind}"] == "yes"
            }
            return {**truth, "earlier": min(first, key=lambda kind: first[kind], default="none")}
        case kind if kind in AGO:
            then = world.truth[max(second - request.span, 0)]
            about = {"digit": "was digit", f"place:{k}": f"was place:{k}", f"there:{k}": f"was there:{k}"}
            if k != CARD:
                about[f"colour:{k}"] = f"was colour:{k}"
            return {**truth, **{was: then[key] for key, was in about.items()}}
        case _:
            return truth


def evidence(request: Request, world: World, second: int) -> int | None:
    """The latest second at which what a question needs was visible.

    Args:
      request: the question.
      world: that it is about.
      second: at which it is asked.

    Returns:
      The second itself for a question about the present. None if the answer is that there was nothing, if
      the evidence is spread over the whole stream, or if the request is no question.
    """
    truth, k = world.truth[second], request.subject
    match request.kind:
        case kind if kind in LIVE:
            return second
        case "seen" | "last place" | "last colour":
            return world.last_sighting(k, second)
        case "previous" if truth["previous"] != "none":
            shown = _numbers(world, second)
            return next(s for s, number in reversed(shown) if number != shown[-1][1])
        case "event":
            events = world.events_between(0, second + 1)
            return events[-1].frame if events else None
        case "under" | "was under" if truth[request.kind] != "none":
            covers = [e for e in world.events_between(0, second + 1) if e.change == "cover"]
            cover = covers[-1 if request.kind == "under" or truth["under"] == "none" else -2]
            return world.last_sighting(cover.kind, cover.frame - 1)
        case "first" if truth["first"] != "none":
            shown = _numbers(world, second)
            # The first run ends before another number, or before a second that shows none.
            return next(
                s
                for (s, _), following in zip(shown, [*shown[1:], None], strict=True)
                if following != (s + 1, truth["first"])
            )
        case "order":
            return max(world.sightings[kind][0] for kind in (k, request.other))
        case kind if kind in AGO:
            return second - request.span
        case _:
            return None


def _numbers(world: World, second: int) -> list[tuple[int, str]]:
    """The seconds up to this one at which a number was visible, and the number."""
    return [(s, world.truth[s]["digit"]) for s in world.sightings[CARD] if s <= second]


def true_answer(request: Request, truth: Facts) -> Sentence:
    """The true answer to a question; "Okay." to a request that is no question.

    Args:
      request: of the user.
      truth: the facts of now, from `truth_of`; for most kinds of request those of `World.truth` do.
    """
    if request.kind in LIVE and truth["view"] == "none":
        return sentence("blind")
    return _answer(request, truth)


def _answer(request: Request, truth: Facts) -> Sentence:
    """The true answer, whether the camera shows anything or not."""
    k = request.subject
    match request.kind:
        case "list":
            things = list_of(truth)
            return sentence("list", l=things) if things else sentence("empty")
        case "count":
            return sentence("one" if truth["count"] == "1" else "count", n=truth["count"])
        case "digit":
            if truth["digit"] == "none":
                return sentence("no card")
            if truth["digit"] == "covered":
                return sentence("covered", k=CARD)
            return sentence("digit", d=truth["digit"])
        case "colour" | "place" | "there":
            value = truth[f"{request.kind}:{k}"]
            if value in ("none", "covered"):
                return sentence(value, k=k)
            gap = {"colour": {"c": value}, "place": {"p": value}, "there": {}}[request.kind]
            return sentence(request.kind, k=k, **gap)
        case "previous":
            value = truth["previous"]
            return sentence("no previous") if value == "none" else sentence("previous", d=value)
        case "seen":
            return sentence("seen" if truth[f"seen:{k}"] == "yes" else "not seen", k=k)
        case "under":
            value = truth["under"]
            return sentence("nothing under") if value == "none" else sentence("under", k=value)
        case "event":
            if truth["event"] == "none":
                return sentence("nothing happened")
            change, kind, value = truth["event"].split(":")
            return narrate(TableEvent(0, cast(EventKind, change), kind, value), truth)
        case "first":
            value = truth["first"]
            return sentence("no first") if value == "none" else sentence("first", d=value)
        case "order":
            return sentence("earlier", k=truth["earlier"])
        case "times":
            value = truth[f"times:{k}"]
            name = {"0": "never", "1": "once", "2": "twice"}.get(value)
            return sentence(name, k=k) if name else sentence("times", k=k, m=value)
        case "was under":
            value = truth["was under"]
            return sentence("never covered") if value == "none" else sentence("was under", k=value)
        case "last place" | "place ago":
            return _was("place", k, "p", truth, ever=request.kind == "last place")
        case "last colour" | "colour ago":
            return _was("colour", k, "c", truth, ever=request.kind == "last colour")
        case "digit ago":
            value = truth["was digit"]
            if value == "none":
                return sentence("was no card")
            return sentence("was covered", k=CARD) if value == "covered" else sentence("was digit", d=value)
        case _:
            return sentence("okay")


def _was(topic: str, k: str, gap: str, truth: Facts, *, ever: bool) -> Sentence:
    """What a thing was like: when it was last visible if it `ever` was, or a time ago."""
    value = truth[f"was {topic}:{k}"]
    if value == "none":
        return sentence("unseen" if ever else "was none", k=k)
    if value == "covered":
        return sentence("was covered", k=k)
    return sentence(f"was {topic}", k=k, **{gap: value})


def updated_answer(request: Request, truth: Facts) -> Sentence:
    """The update to a live question whose answer has changed."""
    said = _answer(request, truth)
    if said.name == "no card":
        return sentence("now none", k=CARD)
    return dataclasses.replace(said, name=f"now {said.name}")


def updated_item(key: str, told: str, truth: Facts) -> Sentence:
    """The update to a list of which one fact has changed.

    Args:
      key: of the fact.
      told: its value in what was said before.
      truth: the facts of now.
    """
    value = truth[key]
    k = CARD if key == "digit" else key.removeprefix("colour:")
    if value in ("none", "covered"):
        return sentence(f"now {value}", k=k)
    new = told in (HIDDEN, "none", "covered")
    if k == CARD:
        return sentence("now also card" if new else "card changes", d=value)
    return sentence("now also" if new else "turn", c=value, k=k)


def narrate(event: TableEvent, truth: Facts) -> Sentence:
    """The sentence that narrates an event.

    Args:
      event: to be narrated.
      truth: the facts right after it.
    """
    kind, value = event.kind, event.value
    match event.change:
        case "appear" if kind == CARD:
            return sentence("card appears", d=truth["digit"], p=truth["place:card"])
        case "appear":
            return sentence("appear", c=truth[f"colour:{kind}"], k=kind, p=truth[f"place:{kind}"])
        case "move":
            return sentence("move", k=kind, p=value)
        case "colour":
            return sentence("turn", k=kind, c=value)
        case "digit":
            return sentence("card changes", d=value)
        case name:
            return sentence(name, k=kind)


class Assistant:
    """The ideal assistant: says what is due, token by token.

    Args:
      world: that it watches.
      tokenizer: of the model.
      rng: for the choice of words.
      slips: probability that an answer begins with a wrong value and is then corrected.

    Attributes:
      frame: the last frame seen; -1 before the first.
      utterances: what it has said so far.
      learnt: whether the last token is an example to learn from; not the wrong part of a slip.
    """

    def __init__(self, world: World, tokenizer: Tokenizer, rng: np.random.Generator, slips: float = 0.0):
        self._world, self._tokenizer, self._rng, self._slips = world, tokenizer, rng, slips
        self._events = {event.frame: event for event in world.events}
        self.frame = -1
        self.utterances: list[Utterance] = []
        self.learnt = True
        self._number = -1
        self._request: Request | None = None
        self._asked_at = -1
        # The facts told since the request, and the narrations that wait: (frame, sentence).
        self._told: dict[str, str] = {}
        self._untold: list[tuple[int, Sentence]] = []
        self._acknowledged = self._called = self._updating = False
        # The utterance in progress: its tokens so far and those to come.
        self._said: list[int] = []
        self._rest: list[int] = []
        self._variant = 0
        self._seen_since = False
        # During a slip: the number of its tokens that are right.
        self._right: int | None = None

    def on_request(self, request: Request) -> None:
        """Takes a request, which cuts the utterance in progress."""
        self._number += 1
        self._request, self._asked_at = request, self.frame
        self._told, self._untold = {}, []
        self._acknowledged = self._called = self._updating = False
        self._said, self._rest, self._right = [], [], None

    def on_frame(self, frame: int) -> None:
        """Takes a frame."""
        self.frame = frame
        self._seen_since = True
        if self._request and self._request.kind == "narrate" and (event := self._events.get(frame)):
            self._untold.append((frame, narrate(event, self._truth)))

    def next_token(self, time: float) -> int | None:
        """Returns the token said at this time of the stream, or None for silence."""
        if self._right is not None:
            if not self._rest:
                self._take_back(time)
        elif self._rest and self._seen_since and self._is_false():
            self._correct(time)
        self._seen_since = False
        if not self._rest and not self._said:
            self._begin(time)
        self.learnt = self._right is None or len(self._said) < self._right
        if not self._rest:
            self._said = []
            return None
        token = self._rest.pop(0)
        self._said.append(token)
        return token

    @property
    def _active(self) -> Request:
        """The request in force; only after the first."""
        assert self._request
        return self._request

    @property
    def _truth(self) -> Facts:
        return self._world.truth[self.frame]

    def _is_false(self) -> bool:
        """Whether the answer in progress to a live question has become false."""
        facts = self.utterances[-1].sentence.facts
        return bool(self._active.keys) and not holds(facts, self._truth)

    def _correct(self, time: float) -> None:
        """Goes on with what is true now if the words so far fit it; otherwise takes them back."""
        last = self.utterances[-1]
        now = updated_answer(self._active, self._truth) if last.cut else self._answer_or_update()
        text = now.text(self._variant)
        tokens = self._tokenizer.encode(_interjected(text) if last.cut else text)
        if tokens[: len(self._said)] == self._said:
            self.utterances[-1] = dataclasses.replace(last, sentence=now)
        else:
            now = updated_answer(self._active, self._truth)
            tokens, self._said = self._tokenizer.encode(_interjected(now.text(self._variant))), []
            self.utterances.append(Utterance(time, self.frame, self.frame, self._number, now, cut=True))
        self._rest = tokens[len(self._said) :]
        self._acknowledged = True
        self._told.update(now.facts)

    def _begin(self, time: float) -> None:
        """Begins the utterance that is due, if any."""
        if self._request is None or (found := self._due(self._request)) is None:
            return
        due, said = found
        self._variant = int(self._rng.integers(2))
        if self._slips and not self._updating and self._request.kind in (*LIVE, *PAST):
            wrong = mistaken(self._rng, said, self._request) if self._rng.random() < self._slips else None
            if wrong:
                self._slip(time, due, said, wrong)
                return
        self._rest = self._tokenizer.encode(said.text(self._variant))
        self._told.update(said.facts)
        self.utterances.append(Utterance(time, self.frame, due, self._number, said))

    def _slip(self, time: float, due: int, right: Sentence, wrong: Sentence) -> None:
        """Begins an answer with a wrong value, which ends soon after that or as a whole sentence."""
        tokens = self._tokenizer.encode(wrong.text(self._variant))
        as_right = self._tokenizer.encode(right.text(self._variant))
        self._right = next(n for n, token in enumerate(tokens) if as_right[n : n + 1] != [token])
        whole = self._rng.random() < 0.5
        self._rest = tokens if whole else tokens[: self._right + int(self._rng.integers(1, 5))]
        self.utterances.append(Utterance(time, self.frame, due, self._number, wrong, slip=True))

    def _take_back(self, time: float) -> None:
        """Goes on from a slip with what is true now."""
        self._right = None
        said = _answer(self._active, truth_of(self._active, self._world, self.frame))
        self._rest, self._said = self._tokenizer.encode(_interjected(said.text(self._variant))), []
        self._told.update(said.facts)
        self.utterances.append(Utterance(time, self.frame, self.frame, self._number, said, cut=True))

    def _due(self, request: Request) -> tuple[int, Sentence] | None:
        """The sentence to say now, and the frame since which it has been due."""
        if request.kind in (*LIVE, *PAST):
            if self.frame < 0:
                return None
            if not self._acknowledged:
                return self._first_answer(request)
            self._updating = True
            return None if self._changed() is None else (self.frame, self._answer_or_update())
        if not self._acknowledged:
            self._acknowledged = True
            return self._asked_at, sentence("okay")
        if (
            request.awaited
            and self.frame >= 0
            and not self._called
            and holds(request.awaited.facts, self._truth)
        ):
            self._called = True
            return self.frame, request.awaited
        while self._untold:
            frame, told = self._untold.pop(0)
            if holds(told.facts, self._truth):
                return frame, told
        return None

    def _first_answer(self, request: Request) -> tuple[int, Sentence] | None:
        """The answer to a question; as long as nothing is visible, that, once, and the answer later."""
        said = true_answer(request, truth_of(request, self._world, self.frame))
        if said.name != "blind":
            self._acknowledged = True
        elif self._told:
            return None
        return (self.frame if self._told else max(self._asked_at, 0)), said

    def _answer_or_update(self) -> Sentence:
        if not self._updating:
            return true_answer(self._active, self._truth)
        key = self._changed()
        if self._active.kind == "list" and key is not None:
            return updated_item(key, self._told[key], self._truth)
        return updated_answer(self._active, self._truth)

    def _changed(self) -> str | None:
        """The first fact of a live question that was told and isn't true any more."""
        return next(
            (key for key in self._active.keys if not agrees(key, self._told.get(key, ""), self._truth)), None
        )


def mistaken(rng: np.random.Generator, said: Sentence, request: Request) -> Sentence | None:
    """The answer to a question with one value wrong; None if it has none that could be."""
    values = said.values
    options = {
        "c": COLOURS,
        "p": PLACES,
        "d": tuple("0123456789"),
        "n": ("0", "2", "3", "4"),
        "m": tuple(TIMES),
    }
    if said.name in ("under", "was under"):
        options = {"k": SHAPES}
    elif said.name == "earlier":
        options = {"k": (request.subject, request.other)}
    if things := values.get("l"):
        colours = [word for word in re.findall(r"\w+", things) if word in COLOURS]
        if not colours:
            return None
        old = pick(rng, colours)
        new = pick(rng, [colour for colour in COLOURS if colour != old])
        return sentence(said.name, l=re.sub(rf"\b{old}\b", new, things, count=1))
    gaps = [gap for gap in options if gap in values]
    if not gaps:
        return None
    gap = pick(rng, gaps)
    values[gap] = pick(rng, [value for value in options[gap] if value != values[gap]])
    return sentence("count" if said.name == "one" else said.name, **values)


def _interjected(text: str) -> str:
    """A sentence as it replaces one in progress."""
    return WAIT + (text if text.startswith("I ") else text[0].lower() + text[1:])


# ----------------------------------------------------------------------------------- sequences


def converse(
    world: World,
    requests: Sequence[Request],
    tokenizer: Tokenizer,
    *,
    tokens_per_second: int,
    rng: np.random.Generator,
    system: str | None = chat.SYSTEM_PROMPT,
    max_tokens: int | None = None,
    slips: float = 0.0,
) -> Dialogue:
    """Plays a live session of the ideal assistant.

    Args:
      world: that it watches.
      requests: in order of time.
      tokenizer: of the model.
      tokens_per_second: speed of speech.
      rng: for the choice of words.
      system: system prompt; None for none.
      max_tokens: maximum length of the sequence, which is cut there; None for no limit.
      slips: probability that an answer begins with a wrong value, without loss on it, and is then corrected.

    Raises:
      ValueError: `slips` is no probability.
    """
    if not 0 <= slips <= 1:
        raise ValueError(f"slips must be between 0 and 1; got {slips}")
    special = tokenizer.special
    requests = list(requests)
    assistant = Assistant(world, tokenizer, rng, slips)
    # A request at time 0 is the first user turn.
    first = requests.pop(0) if requests and requests[0].time == 0 else None
    if first:
        assistant.on_request(first)
    tokens = chat.opening(tokenizer, system=system, prompt=first.text if first else "")
    learnt = [False] * len(tokens)
    positions: list[int] = []
    speaking = [False] * world.seconds
    inputs: list[tuple[float, Request | int]] = sorted(
        [(r.time, r) for r in requests] + [(float(f), f) for f in range(world.seconds)], key=lambda i: i[0]
    )
    instant, ticks, talking = 0.0, 0, False

    def next_token():
        nonlocal ticks, talking
        token = assistant.next_token(instant + ticks / tokens_per_second)
        ticks += 1
        talking = token is not None
        if talking and assistant.frame >= 0:
            speaking[assistant.frame] = True
        tokens.append(special.silence if token is None else token)
        learnt.append(assistant.learnt)

    next_token()
    while inputs:
        now = instant + ticks / tokens_per_second
        if talking and inputs[0][0] > now + EPSILON:
            next_token()
            continue
        limit = max(inputs[0][0], now) + EPSILON
        while inputs and inputs[0][0] <= limit:
            time, what = inputs.pop(0)
            if time > instant:
                instant, ticks = time, 0
            if isinstance(what, Request):
                assistant.on_request(what)
                new = chat.interjection(tokenizer, what.text)
            else:
                assistant.on_frame(what)
                new = [special.image]
                positions.append(len(tokens))
            tokens += new
            learnt += [False] * len(new)
        next_token()
    while talking:
        next_token()
    length = len(tokens) if max_tokens is None else min(max_tokens, len(tokens))
    tokens, learnt = tokens[:length], learnt[:length]
    return Dialogue(
        tokens=tokens,
        labels=[token if learn else IGNORED for token, learn in zip(tokens, learnt, strict=True)],
        frame_positions=[p for p in positions if p < length],
        utterances=assistant.utterances,
        speaking=speaking,
    )


def converse_offline(
    world: World,
    request: Request,
    tokenizer: Tokenizer,
    *,
    rng: np.random.Generator,
    system: str | None = None,
) -> Dialogue:
    """Writes an offline dialogue: the whole clip, then one question and its answer.

    Args:
      world: of the clip.
      request: the question.
      tokenizer: of the model.
      rng: for the choice of words.
      system: system prompt; None for none.
    """
    tokens = chat.offline_opening(tokenizer, system=system, num_frames=world.seconds, prompt=request.text)
    begin = tokens.index(tokenizer.special.image)
    last = world.seconds - 1
    said = true_answer(request, truth_of(request, world, last))
    reply = [*tokenizer.encode(said.text(int(rng.integers(2)))), tokenizer.special.eot]
    return Dialogue(
        tokens=tokens + reply,
        labels=[IGNORED] * len(tokens) + reply,
        frame_positions=list(range(begin, begin + world.seconds)),
        utterances=[Utterance(float(last), last, last, 0, said)],
        speaking=[False] * world.seconds,
    )
