"""The language: each sentence is parsed back to its facts, and nothing else is parsed."""

import collections
import itertools
import re
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moss_jax.worlds.tabletop import digits
from moss_jax.worlds.tabletop.language import (
    ASK,
    HIDDEN,
    LIVE,
    NUMBERS,
    PAST,
    SAY,
    SPANS,
    TIMES,
    WAIT,
    Facts,
    Sentence,
    agrees,
    ask,
    holds,
    list_of,
    sentence,
    understand,
)
from moss_jax.worlds.tabletop.render import COLOURS, SHAPES
from moss_jax.worlds.tabletop.world import CARD, PLACES, generate

KINDS = (*SHAPES, CARD)
# Sentences about shapes, never about the card.
OF_SHAPES = (
    "colour", "now colour", "turn", "now also", "appear", "seen", "not seen", "there", "was colour",
)  # fmt: skip
# Sentences whose subject no wording names.
UNNAMED = (
    "there", "seen", "not seen", "never", "once", "twice", "times", "was none", "was covered", "unseen",
)  # fmt: skip


def gaps(wording: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(wording) if name}


def fields_of(name: str) -> set[str]:
    """The fields of a sentence: its gaps, and its subject where no wording names it."""
    fields = set().union(*map(gaps, SAY[name]))
    fields = {"p" if field == "w" else field for field in fields}
    if name in ("one", "now one"):
        fields.add("n")
    return fields | ({"k"} if name in UNNAMED else set())


def values_of(name: str, field: str) -> tuple[str, ...]:
    lists = [some_list(np.random.default_rng(seed)) for seed in range(60)]
    return {
        "k": SHAPES if name in OF_SHAPES else KINDS,
        "c": COLOURS,
        "p": PLACES,
        "d": tuple("0123456789"),
        "m": tuple(TIMES),
        "n": ("1",) if name.endswith("one") else ("0", "2", "3", "4"),
        "l": tuple(dict.fromkeys(lists)),
    }[field]


def some_list(rng: np.random.Generator) -> str:
    """A random list of at least one thing, in words."""
    shapes = rng.permutation(SHAPES)[: rng.integers(5)]
    truth = {f"there:{s}": "yes" if s in shapes else "none" for s in SHAPES}
    truth |= {f"colour:{s}": COLOURS[rng.integers(len(COLOURS))] for s in SHAPES}
    with_card = rng.random() < 0.5 or not len(shapes)
    return list_of(truth | {"there:card": "yes" if with_card else "none", "digit": str(rng.integers(10))})


def sentences() -> list[Sentence]:
    """All sentences, with a choice of lists."""
    found = []
    for name in SAY:
        fields = sorted(fields_of(name))
        for values in itertools.product(*(values_of(name, field) for field in fields)):
            found.append(sentence(name, **dict(zip(fields, values, strict=True))))
    return found


EVERYTHING = sentences()


def wordings(said: Sentence) -> set[str]:
    """The texts of a sentence: alone, and as a correction in mid-sentence."""
    texts = {said.text(variant) for variant in range(2)}
    return texts | {text[0].lower() + text[1:] for text in texts}


def truths(seed: int) -> tuple[dict, ...]:
    rng = np.random.default_rng(seed)
    return generate(rng, 40, digit_indices=digits.training_indices(), rate=0.8, gap=1).truth


def facts_of(text: str, subject: str = "") -> Facts:
    parsed = understand(text, subject)
    assert parsed, text
    return parsed.facts


# ------------------------------------------------------------------------- generating and parsing


def test_every_sentence_is_parsed_back_to_its_facts():
    assert {said.name for said in EVERYTHING} == set(SAY)
    for said in EVERYTHING:
        for text in wordings(said):
            assert facts_of(text, said.values.get("k", "")) == said.facts, text


def test_the_subject_does_not_matter_where_the_thing_is_named():
    for said in EVERYTHING:
        k = said.values.get("k")
        for variant, other in itertools.product(range(2), ("", "star", CARD)):
            text = said.text(variant)
            if k is None or re.search(rf"\b{k}\b", text):
                assert facts_of(text, other) == said.facts, text


def test_no_text_is_ambiguous():
    """Sentences with the same subject and different facts have different texts."""
    for subject in KINDS:
        meanings = collections.defaultdict(set)
        for said in EVERYTHING:
            for text in wordings(said):
                if said.values.get("k", subject) == subject or said.values["k"] in text:
                    meanings[text].add(frozenset(said.facts.items()))
        assert not {text: facts for text, facts in meanings.items() if len(facts) > 1}


def test_every_sentence_but_okay_asserts_something():
    for said in EVERYTHING:
        assert bool(said.facts) == (said.name != "okay")
        assert "" not in said.facts.values()
        assert not any(key.endswith(":") for key in said.facts)


def test_facts_have_the_keys_of_the_truth():
    keys = set(truths(0)[0]) | {"some", "earlier", "was digit"}
    keys |= {f"was {topic}:{kind}" for topic in ("place", "there") for kind in KINDS}
    keys |= {f"was colour:{shape}" for shape in SHAPES}
    for said in EVERYTHING:
        assert set(said.facts) <= keys


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("It is an 8.", {"digit": "8"}),
        ("The card shows 3.", {"digit": "3"}),
        ("There are no shapes.", {"count": "0"}),
        ("I see one shape.", {"count": "1"}),
        ("It is green.", {"colour:star": "green"}),
        ("It is in the middle.", {"place:star": "middle"}),
        ("The ring moves to the right.", {"place:ring": "right"}),
        ("Yes, there is.", {"there:star": "yes"}),
        ("Yes, there was.", {"seen:star": "yes"}),
        ("No, not so far.", {"seen:star": "none"}),
        ("The ring is under it.", {"under": "ring"}),
        ("There is no cover.", {"under": "none"}),
        ("Before that it was 4.", {"previous": "4"}),
        ("Nothing has happened yet.", {"event": "none"}),
        ("There is no card.", {"there:card": "none", "place:card": "none", "digit": "none"}),
        ("Now the ring is gone.", {"there:ring": "none", "place:ring": "none", "colour:ring": "none"}),
        ("The ring is covered.", dict.fromkeys(("there:ring", "place:ring", "colour:ring"), "covered")),
        ("A red ring is now on the left.", {"colour:ring": "red", "place:ring": "left"}),
        ("A card with a 2 appears on the right.", {"digit": "2", "place:card": "right"}),
        ("Now! Something is black.", {"some": "black"}),
        ("Now there is also a card with an 8.", {"digit": "8"}),
        ("The first number was 3.", {"first": "3"}),
        ("There was no number.", {"first": "none"}),
        ("The ring came first.", {"earlier": "ring"}),
        ("Never so far.", {"times:star": "0"}),
        ("It came twice.", {"times:star": "2"}),
        ("It came seven times.", {"times:star": "7"}),
        ("It came many times.", {"times:star": "many"}),
        ("It was on the left.", {"was place:star": "left"}),
        ("The ring was in the middle.", {"was place:ring": "middle"}),
        ("It was red.", {"was colour:star": "red"}),
        ("It was an 8.", {"was digit": "8"}),
        ("There was no card.", {"was digit": "none"}),
        ("It was not there.", {"was there:star": "none"}),
        ("It was covered.", {"was there:star": "covered"}),
        ("I have not seen it.", {"seen:star": "none"}),
        ("The ring was under it.", {"was under": "ring"}),
        ("Nothing was covered before.", {"was under": "none"}),
        ("I can't see anything.", {"view": "none"}),
        ("Okay.", {}),
    ],
)
def test_examples(text, facts):
    assert facts_of(text, "star") == facts
    assert facts_of(f"  {text}\n", "star") == facts


def test_a_list_asserts_the_visibility_of_all_things():
    everything = {f"colour:{shape}": HIDDEN for shape in SHAPES} | {"digit": HIDDEN}
    assert facts_of("The table is empty.") == everything
    facts = everything | {"colour:star": "red", "digit": "8"}
    assert facts_of("I see a red star and a card with an 8.") == facts
    facts = everything | {"colour:star": "red", "colour:ring": "red", "colour:circle": "blue"}
    assert facts_of("There is a blue circle, a red star and a red ring.") == facts


def test_articles():
    assert sentence("digit", d="8").text() == "It is an 8."
    assert sentence("digit", d="3").text() == "It is a 3."
    assert sentence("card appears", d="8", p="left").text() == "A card with an 8 appears on the left."
    assert ask(np.random.default_rng(0), "alert digit", d="8").count(" a 8") == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "Hello.",
        "It is.",
        "It is a shape.",
        "It is pink.",
        "It is 12.",
        "The dog is red.",
        "There is a red card.",
        "There is a star.",
        "There is a red star and.",
        "There are five shapes.",
        "It is red. It is red.",
        "It is red. Okay.",
        "IT IS RED.",
        "It is red",
        "Now! It is red!",
        "The {k} is {c}.",
        WAIT,
        f"It is{WAIT}now it is red.",
    ],
)
def test_other_text_is_not_parsed(text):
    assert understand(text, "star") is None


def test_an_incomplete_sentence_is_not_parsed():
    rng = np.random.default_rng(0)
    for said in rng.choice(np.array(EVERYTHING, object), 400):
        text = said.text(int(rng.integers(2)))
        for end in range(len(text)):
            assert understand(text[:end], "star") is None


@given(st.data())
def test_a_corrupted_sentence_is_not_parsed(data):
    """With a few characters changed, a text is parsed only if it is another sentence."""
    text = data.draw(st.sampled_from(EVERYTHING)).text(data.draw(st.integers(0, 1)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 2))
        text = text[:at] + data.draw(st.text("aeinotx8.,! (*", max_size=2)) + text[at + cut :]
    heard = understand(text, "star")
    if heard is not None:
        assert text.strip().replace("an 8", "a 8") in {t.replace("an 8", "a 8") for t in wordings(heard)}


def test_sentences_survive_the_tokenizer(tokenizer):
    for said in EVERYTHING[::7]:
        for text in wordings(said) | {WAIT + said.text()[0].lower() + said.text()[1:]}:
            assert tokenizer.decode(tokenizer.encode(text)) == text


# ------------------------------------------------------------------------------------------ truth


def test_agrees():
    truth = truths(1)[0] | {"colour:star": "red", "colour:ring": "covered", "colour:cross": "none"}
    truth |= dict.fromkeys(["colour:circle", "colour:square", "colour:triangle"], "none")
    assert agrees("colour:star", "red", truth)
    assert not agrees("colour:star", "blue", truth)
    assert not agrees("colour:star", "", truth)
    assert not agrees("colour:star", HIDDEN, truth)
    assert agrees("colour:ring", HIDDEN, truth)
    assert agrees("colour:ring", "covered", truth)
    assert not agrees("colour:ring", "none", truth)
    assert agrees("colour:cross", HIDDEN, truth)
    assert not agrees("colour:cross", "covered", truth)
    assert agrees("some", "red", truth)
    assert not agrees("some", "blue", truth)
    assert not agrees("some", "blue", truth | {"colour:star": "covered"})


def test_holds_needs_everything():
    truth = truths(1)[0] | {"colour:star": "red", "place:star": "left"}
    assert holds({}, truth)
    assert holds({"colour:star": "red", "place:star": "left"}, truth)
    assert not holds({"colour:star": "red", "place:star": "right"}, truth)


@pytest.mark.parametrize("seed", range(4))
def test_a_list_holds_while_the_visible_things_stay_the_same(seed):
    keys = [f"colour:{shape}" for shape in SHAPES] + ["digit"]

    def shown(truth):
        return [truth[key] if truth[key] not in ("none", "covered") else HIDDEN for key in keys]

    for now, other in itertools.product(truths(seed), repeat=2):
        things = list_of(now)
        said = sentence("list", l=things) if things else sentence("empty")
        assert holds(said.facts, other) == (shown(now) == shown(other))


# --------------------------------------------------------------------------- the user's requests

FIELDS = {"k": KINDS, "j": KINDS, "s": tuple(SPANS.values()), "d": tuple("0123456789"), "c": COLOURS}


def requests(kind: str):
    """All fillings of the gaps of a kind of request."""
    names = sorted(set().union(*map(gaps, ASK[kind])))
    return [dict(zip(names, v, strict=True)) for v in itertools.product(*(FIELDS[n] for n in names))]


@pytest.mark.parametrize("kind", ASK)
def test_requests(kind):
    rng = np.random.default_rng(0)
    spoken = collections.Counter()
    for fields in requests(kind):
        for _ in range(60):
            text = ask(rng, kind, **fields)
            assert not set("{}") & set(text)
            assert text == text.strip()
            for value in fields.values():
                assert re.search(rf"\b{value}\b", text)
            assert not re.search(r"\ba 8\b", text)
            spoken[text] += 1
    # All wordings are used, most of the time unchanged.
    plain = {w.format(**f).replace(" a 8", " an 8") for w in ASK[kind] for f in requests(kind)}
    assert sum(spoken[text] for text in plain) > 0.75 * spoken.total()
    if spoken.total() > 10 * len(plain):
        assert plain <= set(spoken)
    assert any(text[0].islower() for text in spoken)
    assert any(text.startswith(("Please, ", "Hey, ", "Now, ", "Hello. ")) for text in spoken)


def test_no_request_is_ambiguous():
    meanings = collections.defaultdict(set)
    for kind, wordings in ASK.items():
        for wording, fields in itertools.product(wordings, requests(kind)):
            meanings[wording.format(**fields).lower().rstrip(".?")].add((kind, *fields.items()))
    assert not {text: kinds for text, kinds in meanings.items() if len(kinds) > 1}


def test_kinds_of_requests():
    alerts = {name for name in SAY if name.startswith("alert ")}
    assert set(ASK) == {*LIVE, *PAST, *alerts, "narrate", "watch"}
    # Each answer to a live question has an update.
    for name in (*LIVE, "one", "none", "covered", "empty"):
        assert f"now {name}" in SAY


def test_numbers_cover_all_counts_of_shapes():
    assert [sentence("count", n=str(n)).text() for n in range(5)] == [
        f"There are {word} shapes." for word in NUMBERS
    ]


def test_sentences_compare_by_their_values():
    assert sentence("turn", k="star", c="red") == sentence("turn", c="red", k="star")
    assert sentence("turn", k="star", c="red") != sentence("turn", k="ring", c="red")
    assert sentence("turn", k="star", c="red").values == {"k": "star", "c": "red"}
