"""The language of the tabletop world: one table of wordings serves to generate sentences and to parse them.

A sentence asserts facts, with the keys of `World.truth`. In the wordings, {k} is a kind of thing, {c} a
colour, {p} a place, {w} a direction, {d} a number on a card, {n} a number of shapes, {m} a number of times
and {l} a list of things; {j} is another kind of thing and {s} a time ago, only in requests.

What a sentence in the past tense is about depends on the question: "It was red." asserts `was colour:KIND`,
which `answers.truth_of` gives for the time that the question is about.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping

import numpy as np

from moss_jax.worlds.tabletop.render import COLOURS, SHAPES
from moss_jax.worlds.tabletop.world import CARD

Facts = Mapping[str, str]

NUMBERS = ("no", "one", "two", "three", "four")
# How often something appeared, from three times on.
TIMES = {
    "3": "three", "4": "four", "5": "five", "6": "six", "7": "seven", "8": "eight", "9": "nine",
    "many": "many",
}  # fmt: skip
# How far back questions about an earlier time go, in seconds.
SPANS = {10: "ten seconds ago", 60: "a minute ago", 300: "five minutes ago"}
PLACE_WORDS = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
WAY_WORDS = {"left": "to the left", "middle": "to the middle", "right": "to the right"}
# Introduces a statement that replaces the one in progress.
WAIT = " - wait, "
# The value that a list asserts for things it doesn't mention: not visible, for whatever reason.
HIDDEN = "hidden"

# name -> wordings. An update begins with "Now", an alert with "Now!".
SAY: dict[str, tuple[str, ...]] = {
    "digit": ("It is a {d}.", "The card shows {d}."),
    "no card": ("There is no card.",),
    "count": ("There are {n} shapes.", "I see {n} shapes."),
    "one": ("There is one shape.", "I see one shape."),
    "colour": ("It is {c}.", "The {k} is {c}."),
    "place": ("It is {p}.", "The {k} is {p}."),
    "there": ("Yes, there is.", "Yes, I see it."),
    "none": ("There is no {k}.",),
    "covered": ("The {k} is covered.",),
    "list": ("There is {l}.", "I see {l}."),
    "empty": ("The table is empty.",),
    "now digit": ("Now it is {d}.", "Now the card shows {d}."),
    "now also card": ("Now there is also a card with a {d}.",),
    "now count": ("Now there are {n} shapes.",),
    "now one": ("Now there is one shape.",),
    "now colour": ("Now it is {c}.", "Now the {k} is {c}."),
    "now also": ("Now there is also a {c} {k}.",),
    "now place": ("Now it is {p}.", "Now the {k} is {p}."),
    "now there": ("Now the {k} is here.",),
    "now none": ("Now the {k} is gone.",),
    "now covered": ("Now the {k} is covered.",),
    "now list": ("Now there is {l}.",),
    "now empty": ("Now the table is empty.",),
    "appear": ("A {c} {k} appears {p}.", "A {c} {k} is now {p}."),
    "leave": ("The {k} leaves.", "The {k} is taken away."),
    "move": ("The {k} moves {w}.",),
    "turn": ("The {k} turns {c}.", "The {k} is now {c}."),
    "cover": ("The {k} is covered now.", "Something covers the {k}."),
    "uncover": ("The {k} is visible again.",),
    "card appears": ("A card with a {d} appears {p}.",),
    "card changes": ("The card now shows {d}.", "The card changes to {d}."),
    "previous": ("Before that it was {d}.",),
    "no previous": ("There was no other number.",),
    "seen": ("Yes, there was.",),
    "not seen": ("No, not so far.",),
    "under": ("The {k}.", "The {k} is under it."),
    "nothing under": ("There is no cover.",),
    "nothing happened": ("Nothing has happened yet.",),
    "first": ("The first number was {d}.",),
    "no first": ("There was no number.",),
    "earlier": ("The {k} came first.",),
    "never": ("Never so far.",),
    "once": ("It came once.",),
    "twice": ("It came twice.",),
    "times": ("It came {m} times.",),
    "was place": ("It was {p}.", "The {k} was {p}."),
    "was colour": ("It was {c}.", "The {k} was {c}."),
    "was digit": ("It was a {d}.", "The card showed {d}."),
    "was no card": ("There was no card.",),
    "was none": ("It was not there.",),
    "was covered": ("It was covered.",),
    "unseen": ("I have not seen it.",),
    "was under": ("The {k} was under it.",),
    "never covered": ("Nothing was covered before.",),
    "blind": ("I can't see anything.",),
    "alert there": ("Now! The {k} is here.",),
    "alert none": ("Now! The {k} is gone.",),
    "alert covered": ("Now! The {k} is covered.",),
    "alert digit": ("Now! The card shows {d}.",),
    "alert colour": ("Now! Something is {c}.",),
    "alert empty": ("Now! The table is empty.",),
    "okay": ("Okay.", "All right."),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A sentence of the language.

    Attributes:
      name: a key of SAY.
      fields: (gap, value) pairs that fill its wordings, in order of the gaps' names.
    """

    name: str
    fields: tuple[tuple[str, str], ...] = ()

    @property
    def values(self) -> dict[str, str]:
        """The fields, by gap."""
        return dict(self.fields)

    def text(self, variant: int = 0) -> str:
        """The sentence in one of its wordings; `variant` counts modulo their number."""
        wordings = SAY[self.name]
        values = self.values
        words = {
            "k": values.get("k", ""),
            "c": values.get("c", ""),
            "d": values.get("d", ""),
            "p": PLACE_WORDS.get(values.get("p", ""), ""),
            "w": WAY_WORDS.get(values.get("p", ""), ""),
            "n": NUMBERS[int(values.get("n", 0))],
            "m": TIMES.get(values.get("m", ""), ""),
            "l": values.get("l", ""),
        }
        return _articles(wordings[variant % len(wordings)].format(**words))

    @functools.cached_property
    def facts(self) -> Facts:
        """The facts that it asserts."""
        v = self.values
        k, c, d, p = (v.get(name, "") for name in "kcdp")
        match self.name:
            case "digit" | "now digit" | "now also card" | "card changes" | "alert digit":
                return {"digit": d}
            case "card appears":
                return {"digit": d, "place:card": p}
            case "no card":
                return _invisible(CARD, "none")
            case "count" | "one" | "now count" | "now one":
                return {"count": v["n"]}
            case "colour" | "now colour" | "turn" | "now also":
                return {f"colour:{k}": c}
            case "place" | "now place" | "move":
                return {f"place:{k}": p}
            case "there" | "now there" | "uncover" | "alert there":
                return {f"there:{k}": "yes"}
            case "none" | "now none" | "leave" | "alert none":
                return _invisible(k, "none")
            case "covered" | "now covered" | "cover" | "alert covered":
                return _invisible(k, "covered")
            case "appear":
                return {f"colour:{k}": c, f"place:{k}": p}
            case "list" | "now list":
                return _listed(v["l"])
            case "empty" | "now empty" | "alert empty":
                return _listed("")
            case "previous":
                return {"previous": d}
            case "no previous":
                return {"previous": "none"}
            case "seen":
                return {f"seen:{k}": "yes"}
            case "not seen":
                return {f"seen:{k}": "none"}
            case "under":
                return {"under": k}
            case "nothing under":
                return {"under": "none"}
            case "nothing happened":
                return {"event": "none"}
            case "first":
                return {"first": d}
            case "no first":
                return {"first": "none"}
            case "earlier":
                return {"earlier": k}
            case "never" | "once" | "twice":
                return {f"times:{k}": str(("never", "once", "twice").index(self.name))}
            case "times":
                return {f"times:{k}": v["m"]}
            case "was place":
                return {f"was place:{k}": p}
            case "was colour":
                return {f"was colour:{k}": c}
            case "was digit":
                return {"was digit": d}
            case "was no card":
                return {"was digit": "none"}
            case "was none":
                return {f"was there:{k}": "none"}
            case "was covered":
                return {f"was there:{k}": "covered"}
            case "unseen":
                return {f"seen:{k}": "none"}
            case "was under":
                return {"was under": k}
            case "never covered":
                return {"was under": "none"}
            case "blind":
                return {"view": "none"}
            case "alert colour":
                return {"some": c}
            case _:  # "okay"
                return {}


def sentence(name: str, **fields: str) -> Sentence:
    """The sentence with a name in SAY and these fields."""
    return Sentence(name, tuple(sorted(fields.items())))


def holds(facts: Facts, truth: Facts) -> bool:
    """Whether all asserted facts are true."""
    return all(agrees(key, value, truth) for key, value in facts.items())


def agrees(key: str, value: str, truth: Facts) -> bool:
    """Whether one asserted fact is true."""
    if key == "some":
        return any(truth[f"colour:{shape}"] == value for shape in SHAPES)
    if value == HIDDEN:
        return truth[key] in ("none", "covered")
    return truth[key] == value


def list_of(truth: Facts) -> str:
    """The visible things as a list in words; empty if there are none."""
    things = [f"a {truth[f'colour:{s}']} {s}" for s in SHAPES if truth[f"there:{s}"] == "yes"]
    if truth[f"there:{CARD}"] == "yes":
        things.append(f"a card with a {truth['digit']}")
    return ", ".join(things[:-1]) + " and " + things[-1] if len(things) > 1 else "".join(things)


def understand(text: str, subject: str = "") -> Sentence | None:
    """Parses a text.

    Args:
      text: one sentence, in upper or lower case at its beginning.
      subject: the kind of thing that "it" refers to.

    Returns:
      The sentence; None if the text is not in the language.
    """
    text = text.strip()
    # A correction in mid-sentence begins in lower case.
    for form in (text, text[:1].upper() + text[1:]):
        for name, pattern in _patterns():
            if found := pattern.fullmatch(form):
                fields: dict[str, str] = {"k": subject} | found.groupdict()
                fields = {field: _VALUES.get(word, word) for field, word in fields.items()}
                if "w" in fields:
                    fields["p"] = fields.pop("w")
                if name in ("one", "now one"):
                    fields["n"] = "1"
                return sentence(name, **fields)
    return None


def _invisible(kind: str, state: str) -> Facts:
    """The facts of a thing that is absent or covered."""
    if kind == CARD:
        return {"there:card": state, "place:card": state, "digit": state}
    return {f"there:{kind}": state, f"colour:{kind}": state, f"place:{kind}": state}


def _listed(things: str) -> Facts:
    """The facts that a list in words asserts."""
    facts = {f"colour:{shape}": HIDDEN for shape in SHAPES} | {"digit": HIDDEN}
    for thing in re.split(r", | and ", things) if things else ():
        if card := re.fullmatch(r"an? card with an? (\d)", thing):
            facts["digit"] = card[1]
        else:
            _, colour, shape = thing.split(" ")
            facts[f"colour:{shape}"] = colour
    return facts


def _articles(text: str) -> str:
    """Turns "a 8" into "an 8"."""
    return re.sub(r"\b([Aa]) (8\b)", r"\1n \2", text)


# The values of words in gaps.
_VALUES = (
    {words: place for place, words in PLACE_WORDS.items()}
    | {words: place for place, words in WAY_WORDS.items()}
    | {word: str(number) for number, word in enumerate(NUMBERS)}
    | {word: times for times, word in TIMES.items()}
)


@functools.cache
def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    """The name and the pattern of each wording."""
    thing = rf"an? (?:(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})|card with an? \d)"
    gaps = {
        "k": "|".join((*SHAPES, CARD)),
        "c": "|".join(COLOURS),
        "p": "|".join(PLACE_WORDS.values()),
        "w": "|".join(WAY_WORDS.values()),
        "d": r"\d",
        "n": "|".join(NUMBERS),
        "m": "|".join(TIMES.values()),
        "l": rf"{thing}(?:, {thing})*(?: and {thing})?",
    }
    patterns = []
    for name, wordings in SAY.items():
        for wording in wordings:
            pattern = re.escape(wording).replace(r"\{", "{").replace(r"\}", "}").replace(r"\ ", " ")
            pattern = re.sub(r"\b([Aa]) \{d\}", r"\1n? {d}", pattern)
            pattern = re.sub(r"\{(\w)\}", lambda gap: f"(?P<{gap[1]}>{gaps[gap[1]]})", pattern)
            patterns.append((name, re.compile(pattern)))
    return patterns


# ---------------------------------------------------------------------------- the user's requests

# kind of request -> wordings, with the gaps of SAY.
ASK: dict[str, tuple[str, ...]] = {
    "digit": (
        "What number is on the card?", "Which number does the card show?", "What does the card show?",
        "Read the card.", "Can you read the number on the card?", "What is the number?",
        "Please tell me the number on the card.",
    ),
    "count": (
        "How many shapes are there?", "How many shapes do you see?", "How many shapes are on the table?",
        "Count the shapes.", "What is the number of shapes?", "Please count the shapes on the table.",
    ),
    "colour": (
        "What colour is the {k}?", "Which colour has the {k}?", "What is the colour of the {k}?",
        "The {k}, what colour is it?", "Tell me the colour of the {k}.",
    ),
    "place": (
        "Where is the {k}?", "Where do you see the {k}?", "On which side is the {k}?", "Find the {k}.",
        "Tell me where the {k} is.",
    ),
    "there": (
        "Is there a {k}?", "Is there a {k} on the table?", "Do you see a {k}?", "Can you see the {k}?",
        "Is the {k} there?",
    ),
    "list": (
        "What is on the table?", "What do you see?", "Describe the table.", "What can you see?",
        "Tell me what is on the table.", "What things are there?", "What is there?",
    ),
    "previous": (
        "What number was on the card before?", "Which number was it before?",
        "What was the number before this one?", "What did the card show before?",
    ),
    "seen": (
        "Was there a {k}?", "Have you seen a {k}?", "Was a {k} on the table before?", "Did you see a {k}?",
    ),
    "under": (
        "What is under the cover?", "What is covered?", "What lies under the paper?", "What is hidden?",
    ),
    "event": (
        "What happened last?", "What was the last change?", "What has just happened?", "What changed?",
        "What did I do?",
    ),
    "first": (
        "What was the first number on the card?", "Which number did the card show first?",
        "What was the very first number?",
    ),
    "order": (
        "Which came first, the {k} or the {j}?", "Which did you see first, the {k} or the {j}?",
        "What was there first, the {k} or the {j}?",
    ),
    "times": (
        "How many times did the {k} appear?", "How often has the {k} come?", "How often did the {k} appear?",
    ),
    "last place": (
        "Where was the {k} last?", "Where did you last see the {k}?",
        "Where was the {k} when you last saw it?",
    ),
    "last colour": (
        "What colour did the {k} have?", "Which colour did the {k} have last?", "What colour was the {k}?",
    ),
    "was under": (
        "What was under the cover before?", "What was covered before?", "What did the cover hide before?",
    ),
    "digit ago": (
        "What number was on the card {s}?", "Which number did the card show {s}?",
        "What did the card show {s}?",
    ),
    "place ago": ("Where was the {k} {s}?", "On which side was the {k} {s}?"),
    "colour ago": ("What colour was the {k} {s}?", "Which colour did the {k} have {s}?"),
    "narrate": (
        "Tell me what changes.", "Tell me everything that happens.", "Narrate what happens.",
        "Describe what is happening.", "Keep me posted.", "Say what changes.",
    ),
    "alert there": (
        "Tell me when the {k} appears.", "Tell me when you see a {k}.", "Say when a {k} is on the table.",
        "Let me know when there is a {k}.", "Call me when the {k} is here.",
    ),
    "alert none": (
        "Tell me when the {k} is gone.", "Tell me when the {k} leaves.",
        "Let me know when the {k} is taken away.", "Say when the {k} is gone.",
    ),
    "alert covered": (
        "Tell me when the {k} is covered.", "Let me know when the {k} is covered.",
        "Say when something covers the {k}.",
    ),
    "alert digit": (
        "Tell me when the card shows {d}.", "Tell me when you see a {d}.",
        "Let me know when the number is {d}.", "Say when there is a {d} on the card.",
    ),
    "alert colour": (
        "Tell me when something is {c}.", "Tell me when you see something {c}.",
        "Let me know when a thing is {c}.", "Say when anything turns {c}.",
    ),
    "alert empty": (
        "Tell me when the table is empty.", "Let me know when nothing is on the table.",
        "Say when the table is empty.",
    ),
    "watch": (
        "Just watch.", "Watch for now.", "Stop.", "Thank you, that is all.", "Thanks.", "Nothing for now.",
        "Be quiet now.", "Please wait.",
    ),
}  # fmt: skip

# Questions about the present, whose answers are kept up to date, and about the past.
LIVE = ("digit", "count", "colour", "place", "there", "list")
RECENT_PAST = ("previous", "seen", "under", "event")
AGO = ("digit ago", "place ago", "colour ago")
LONG_PAST = ("first", "order", "times", "last place", "last colour", "was under", *AGO)
PAST = (*RECENT_PAST, *LONG_PAST)


def ask(rng: np.random.Generator, kind: str, **fields: str) -> str:
    """Samples the user's wording of a request."""
    wording = ASK[kind][rng.integers(len(ASK[kind]))]
    text = _articles(wording.format(**fields))
    if rng.random() < 0.1:
        text = ("Please, ", "Hey, ", "Now, ", "Hello. ")[rng.integers(4)] + text[0].lower() + text[1:]
    if rng.random() < 0.05:
        text = text[0].lower() + text[1:].rstrip(".?")
    return text
