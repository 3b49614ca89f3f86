"""Trains the tokenizer of the moss_tiny preset: `python -m moss_jax.text.train_tokenizer --out FILE`.

The corpus is generated from this file, and every run writes the same bytes.
"""

import argparse
import random
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from moss_jax.config import moss_tiny
from moss_jax.text.chat import SYSTEM_PROMPT

PREDICTABLE_SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|silence|>",
    "<|...|>",
    "<|video|>",
]

# As in Llama 3.
PRE_TOKENIZATION = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

NUM_TURNS = 12_000
# Repetitions of the prose: a single copy would carry no weight among thousands of turns about a table.
PROSE_COPIES = 150

# Context-free grammar: a name in braces expands to a random one of its alternatives.
GRAMMAR = {
    "turn": (
        "{question}", "{request}", "{answer}", "{correction}", "{acknowledgement}", "{alert}",
        "{answer} {correction}", "{acknowledgement} {alert}", "{narration}", "{narration} {narration}",
        "{narration} {correction}",
    ),
    "digit": ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
    "number": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "count": ("no", "one", "two", "three", "four", "five", "several", "many"),
    "nth": ("first", "second", "third", "fourth", "last", "next", "same", "other"),
    "colour": (
        "red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "black", "white", "grey",
        "light blue", "dark green",
    ),
    "shape": (
        "circle", "square", "triangle", "star", "rectangle", "diamond", "cross", "heart", "ring", "ball",
    ),
    "object": (
        "card", "cup", "box", "book", "block", "key", "bottle", "pen", "phone", "toy", "hand", "cloth",
        "plate",
    ),
    "size": ("small", "large", "big", "little", "tiny"),
    "thing": (
        "{colour} {shape}", "{size} {shape}", "{size} {colour} {shape}", "{colour} {object}", "{object}",
        "card with the number {digit}", "card with a {digit} on it", "{nth} card", "number {number}",
        "{digit}", "{nth} {shape}",
    ),
    "things": (
        "{colour} {shape}s", "{object}s", "{shape}s", "{colour} {object}s", "cards", "objects", "things",
    ),
    "side": ("left", "right", "top", "bottom", "middle", "centre"),
    "way": ("left", "right", "up", "down", "towards the camera", "away", "across the table", "to the {side}"),
    "place": (
        "on the {side}", "on the {side} of the table", "on the table", "in the {side}", "next to the {thing}",
        "to the left of the {thing}", "to the right of the {thing}", "in front of the {thing}",
        "behind the {thing}", "above the {thing}", "below the {thing}", "between the {thing} and the {thing}",
        "under the {thing}", "near the {side} edge", "in the {side} corner", "in the upper left corner",
        "in the lower right corner", "inside the {object}", "at the {side} of the picture",
    ),
    "event": (
        "a {thing} appears {place}", "the {thing} disappears", "a {thing} enters from the {side}",
        "the {thing} leaves on the {side}", "the {thing} moves {way}", "the {thing} is moving {way}",
        "the {thing} turns {colour}", "the {thing} changes from {colour} to {colour}",
        "the {thing} is covered by a {object}", "the {thing} is uncovered again", "a hand takes the {thing}",
        "someone puts a {thing} {place}", "a person picks up the {thing}", "the {thing} stops {place}",
        "the {thing} falls over", "the {thing} is replaced by a {thing}", "the {thing} comes back",
        "a hand turns over the {thing}", "the {thing} is hidden behind the {object}", "the scene changes",
        "the number changes from {digit} to {digit}", "the table is empty", "it gets dark", "nothing changes",
        "the {thing} has gone", "the {thing} rotates slowly", "the {thing} grows", "the {thing} shrinks",
        "there are {count} {things}", "the camera moves {way}", "the {thing} becomes visible",
    ),
    "question": (
        "What number is on the card?", "What number do you see now?", "Which number is shown {place}?",
        "How many {things} are there?", "How many {things} can you see {place}?",
        "What colour is the {thing}?", "Where is the {thing}?", "Where was the {thing} before?",
        "What was there before?", "What is {place}?", "What was the {nth} number?", "What is happening?",
        "What happened to the {thing}?", "Is there a {thing}?", "Is the {thing} still {place}?",
        "What do you see?", "What can you see {place}?", "What has changed?", "Which {shape} is {place}?",
        "Did the {thing} move?", "When did the {thing} appear?", "What does the {thing} look like now?",
        "Was the {thing} {colour} or {colour}?", "Who moved the {thing}?", "What is the sum of the numbers?",
        "What is under the {object}?", "Have you seen a {thing}?", "In which order did the {things} appear?",
        "Are there more {things} than {things}?", "Hello, can you see me?",
    ),
    "request": (
        "Tell me when {event}.", "Let me know when the {thing} appears.", "Warn me if {event}.",
        "Tell me when you see a {thing}.", "Count the {things}.", "Describe what you see.",
        "Please watch the {thing}.", "Keep watching and tell me what changes.", "Read the numbers aloud.",
        "Narrate what is happening in real time.", "Say the number whenever it changes.",
        "Stop when {event}.", "Please describe the {thing} in one sentence.", "Remember the {thing}.",
        "Name the colour of every {shape}.", "Can you tell me when {event}?",
    ),
    "acknowledgement": (
        "Okay, I will tell you.", "Okay, I am watching.", "Yes, I'll let you know.",
        "Sure, I'm watching the {thing}.", "I can see it.", "Of course.", "All right.",
    ),
    "answer": (
        "The number is {digit}.", "It is {digit}.", "It is {colour}.", "The card shows the number {digit}.",
        "I see a {thing} {place}.", "I can see {count} {things}.", "There is a {thing} {place}.",
        "There are {count} {things}.", "The {thing} is {colour}.", "The {thing} is {place}.",
        "It was {digit} before, and now it is {digit}.", "Before that there was a {thing} {place}.",
        "The {nth} number was {digit}.", "I do not see a {thing} yet.", "I don't see any {things}.",
        "Yes, there is a {thing} {place}.", "No, the {thing} is gone.", "No, it is {colour}, not {colour}.",
        "{digit}", "{colour}", "Nothing has changed so far.", "The {thing} appeared after the {thing}.",
        "At the moment {event}.", "First there was a {thing}, then a {thing}.", "It's a {thing}.",
        "I can't see it because it is covered.", "The numbers so far are {digit}, {digit} and {digit}.",
        "Currently, I see {count} {things} and a {thing}.", "That is the number {number}.",
        "A {thing}, a {thing} and a {thing}.", "Together they make {digit}.",
    ),
    "correction": (
        "Wait, now it is {digit}.", "Wait, now it is {colour}.", "Wait, now {event}.", "Now it is {digit}.",
        "Now there are {count} {things}.", "Update: {event}.", "Actually, it is a {thing}.", "Now {event}.",
        "Correction: the {thing} is {place}.", "It has changed: the number is now {digit}.",
        "No longer: now the {thing} is {colour}.", "Sorry, it's {colour}.",
    ),
    "alert": (
        "Now! {Event}.", "Look, {event}.", "There it is: a {thing} {place}.", "{Event} now.",
        "The {thing} has just appeared.", "The {thing} has just left.", "It just turned {colour}.",
        "Attention: {event}.", "The {thing} is here.",
    ),
    "narration": (
        "{Event}.", "{Event}, and {event}.", "{Event}, then {event}.", "Then {event}.",
        "After that, {event}.", "While {event}, {event}.", "Suddenly {event}.", "{Event} again.",
        "Meanwhile, {event}.", "A {thing} is lying {place}.", "A hand is holding the {thing}.",
        "The video shows a table with {things}.", "A person is placing the {thing} {place}.",
        "The {thing} and the {thing} are side by side.", "The {nth} card shows {digit}.",
        "The {thing} is now fully visible.",
    ),
}  # fmt: skip

PROSE = """\
Most of what we know about the world comes from watching it change. A person who sits by a window sees the \
light move across the wall, hears a car start in the street, and knows without thinking about it that \
someone has left for work. Nothing in the room asked for attention, yet a great deal was learned: what time \
it must be, whether it has been raining, who lives next door. To understand a scene is to keep a small story \
of it in mind, to compare each new moment with that story, and to notice the difference when there is one.

Good helpers do the same. They listen more than they speak; they answer when they are asked, and they do not \
repeat what everybody can see. If they were wrong they say so, plainly and at once, because an old answer \
that is no longer true can be worse than none. "I thought the door was closed," one of them might say, "but \
it isn't: it opened while we were talking." They also know how to wait. It takes some practice to look at a \
thing for ten minutes, with nothing to report, and still be ready for the second in which it finally \
happens.

In the morning the children walked down to the river with their father. They carried bread, cheese, apples \
and a bottle of water, and they stopped under the old bridge to rest. There were people on the other side, \
working in the fields or fishing from the bank; a dog ran along the path and would not come when it was \
called. "How far is it from here?" asked the girl. "About three miles," he said, "if we follow the road, but \
we could go through the woods instead." So they went through the woods. It was cold between the trees, and \
quiet, and they came out on top of the hill just before noon, where they could see the whole valley with its \
houses, its green and yellow fields, and the long train that was going slowly towards the city.

Here is how to make tea. First fill the kettle with fresh water and put it on the stove. Warm the pot, add \
one spoon of leaves for each cup, and pour the water over them as soon as it boils. Let it stand for four or \
five minutes, depending on how strong you want it; then pour it through a strainer. Some people take milk or \
sugar. Cooking, building, cleaning, repairing, drawing, writing, playing music and doing sports are all like \
this: a sequence of steps, each of which should look a certain way before the next one begins.

The company said on Monday that its new system had been used by more than a hundred thousand customers \
during the year, although the government has not yet decided which rules should apply. Its president told \
reporters that the information was important for public health, and that further research, development and \
education would be needed. Other members of the group were less certain. "We don't think that's right," they \
wrote, "and we can't say what it will cost. You're asking the wrong question; I've seen it before, and \
they'll see it too."
"""


def corpus() -> Iterator[str]:
    """Yields the training text, the same in every run."""
    rng = random.Random(0)
    for _ in range(NUM_TURNS):
        yield from ("user", "assistant", "\n\n", _expand("turn", rng))
    for _ in range(PROSE_COPIES):
        yield from PROSE.splitlines()
        # The silence in it is a special token and must not be learned as ordinary text.
        yield from ("system", *SYSTEM_PROMPT.split("<|silence|>"))


def train() -> Tokenizer:
    """Trains a byte-level BPE with exactly the vocabulary size of moss_tiny."""
    vocab_size = moss_tiny().decoder.vocab_size
    num_ordinary = vocab_size - len(PREDICTABLE_SPECIAL_TOKENS)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZATION), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_ordinary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if tokenizer.get_vocab_size() != num_ordinary:
        raise RuntimeError(
            f"the corpus yields {tokenizer.get_vocab_size()} ordinary tokens, not {num_ordinary}"
        )
    # Their ids follow the ordinary ones; <|image|> comes last and so gets the id vocab_size.
    tokenizer.add_special_tokens([*PREDICTABLE_SPECIAL_TOKENS, "<|image|>"])
    return tokenizer


def _expand(name: str, rng: random.Random) -> str:
    if name[0].isupper():
        text = _expand(name.lower(), rng)
        return text[0].upper() + text[1:]
    return re.sub(r"\{(\w+)\}", lambda found: _expand(found[1], rng), rng.choice(GRAMMAR[name]))


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m moss_jax.text.train_tokenizer",
        description="Train the tokenizer of the moss_tiny preset; every run writes the same bytes.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="tokenizer.json to write")
    args = parser.parse_args()
    try:
        args.out.write_text(train().to_str(pretty=True) + "\n", encoding="utf-8")
    except OSError as error:
        parser.error(f"--out cannot be written: {error}")


if __name__ == "__main__":
    main()
