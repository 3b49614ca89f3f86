"""The requests of a user of the tabletop world: questions, alerts, narration."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from moss_jax.worlds.tabletop import language
from moss_jax.worlds.tabletop.language import (
    LIVE,
    SPANS,
    Facts,
    Sentence,
    holds,
    sentence,
)
from moss_jax.worlds.tabletop.render import COLOURS, SHAPES
from moss_jax.worlds.tabletop.world import CARD, Table, World, pick

# The facts that a list is about.
LISTED = (*(f"colour:{shape}" for shape in SHAPES), "digit")


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt of the user.

    Attributes:
      time: time in seconds of the stream.
      text: the wording.
      kind: a key of `language.ASK`.
      subject: the kind of thing that it is about, if any.
      awaited: for an alert, the sentence that is due as soon as it is true.
      other: the other kind of thing in a question about the order of two.
      span: for a question about an earlier time, how long ago that was, in seconds.
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
      world: the world that they are about.
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
    """Samples a question about an earlier time with a stable answer; None if there is none.

    Prefers things that were there, and answers that have changed since.
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
    """How long before and after the earlier time the answer must have been the same, in seconds."""
    return max(2, span // 6)


def _distinct(world: World, start: int, stop: int) -> list[Facts]:
    """The facts of a range of seconds, without repeating those that did not change."""
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


@functools.cache
def _awaitable() -> tuple[Sentence, ...]:
    """The sentences that an alert can await."""
    kinds = [*SHAPES, CARD]
    return (
        *(sentence("alert there", k=k) for k in kinds),
        *(sentence("alert none", k=k) for k in kinds),
        *(sentence("alert covered", k=k) for k in kinds),
        *(sentence("alert digit", d=str(d)) for d in range(10)),
        *(sentence("alert colour", c=c) for c in COLOURS),
        sentence("alert empty"),
    )


def _some_kind(rng: np.random.Generator, table: Table, card: bool) -> str:
    """Samples a kind of thing, more often one that is on the table."""
    there = [t.kind for t in table.things if card or t.kind != CARD]
    if there and rng.random() < 0.8:
        return pick(rng, there)
    return pick(rng, SHAPES)
