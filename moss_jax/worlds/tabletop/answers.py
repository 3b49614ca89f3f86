"""True answers to the requests of a user, their updates, and the evidence that they need."""

import dataclasses
from typing import cast

from moss_jax.worlds.tabletop.language import (
    AGO,
    HIDDEN,
    LIVE,
    Facts,
    Sentence,
    list_of,
    sentence,
)
from moss_jax.worlds.tabletop.requests import Request
from moss_jax.worlds.tabletop.world import CARD, EventKind, TableEvent, World


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
      world: the world that it is about.
      second: the second at which it is asked.

    Returns:
      The second itself for a question about the present. None if the answer is that there was nothing, if
      the evidence is spread over the whole stream, or if the request is not a question.
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
    """The true answer to a question; "Okay." to a request that is not a question.

    Args:
      request: the user's request.
      truth: the current facts, from `truth_of`; for most kinds of request those of `World.truth` suffice.
    """
    if request.kind in LIVE and truth["view"] == "none":
        return sentence("blind")
    return answer(request, truth)


def answer(request: Request, truth: Facts) -> Sentence:
    """The true answer to a question, whether the camera shows anything or not."""
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
    """Answers about a thing at an earlier time: that asked about or, with `ever`, when it was last seen."""
    value = truth[f"was {topic}:{k}"]
    if value == "none":
        return sentence("unseen" if ever else "was none", k=k)
    if value == "covered":
        return sentence("was covered", k=k)
    return sentence(f"was {topic}", k=k, **{gap: value})


def updated_answer(request: Request, truth: Facts) -> Sentence:
    """The update to a live question whose answer has changed."""
    said = answer(request, truth)
    if said.name == "no card":
        return sentence("now none", k=CARD)
    return dataclasses.replace(said, name=f"now {said.name}")


def updated_item(key: str, told: str, truth: Facts) -> Sentence:
    """The update to a list in which one fact has changed.

    Args:
      key: key of the fact.
      told: its value as last stated.
      truth: the current facts.
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
