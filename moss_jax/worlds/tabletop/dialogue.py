"""Dialogues about the tabletop world: the timed replies of an ideal assistant to the requests of a user.

The assistant is a small program that knows the truth of each frame as soon as it has seen it. It runs on the
lockstep clock of a live session, token by token, so it writes the sequences that a session builds. The last
request counts: until the next one, the assistant keeps the answer to a question up to date, narrates changes,
or announces an awaited moment.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from moss_jax.text import Tokenizer, chat
from moss_jax.text.labels import IGNORED
from moss_jax.worlds.tabletop.answers import (
    answer,
    narrate,
    true_answer,
    truth_of,
    updated_answer,
    updated_item,
)
from moss_jax.worlds.tabletop.language import (
    LIVE,
    PAST,
    TIMES,
    WAIT,
    Facts,
    Sentence,
    agrees,
    holds,
    sentence,
)
from moss_jax.worlds.tabletop.render import COLOURS, SHAPES
from moss_jax.worlds.tabletop.requests import Request
from moss_jax.worlds.tabletop.world import PLACES, World, pick

# Tolerance of comparisons of times, in seconds.
EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Utterance:
    """A sentence of the assistant.

    Attributes:
      time: time when it begins, in seconds of the stream.
      frame: the last frame seen when it begins.
      due: the frame since which it has been due; -1 before the first.
      request: index of the request that it serves.
      sentence: to be said.
      cut: whether it replaces a statement in progress.
      slip: whether it is wrong on purpose, to be retracted.
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


class Assistant:
    """The ideal assistant: says what is due, token by token.

    Args:
      world: the world that it watches.
      tokenizer: the model's tokenizer.
      rng: for the choice of words.
      slips: probability that an answer begins with a wrong value and is then corrected.

    Attributes:
      frame: the last frame seen; -1 before the first.
      utterances: what it has said so far.
      learnt: whether the last token is a training target, which the wrong part of a slip is not.
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
        # Facts stated since the request, and the queue of narrations: (frame, sentence).
        self._told: dict[str, str] = {}
        self._untold: list[tuple[int, Sentence]] = []
        self._acknowledged = self._called = self._updating = False
        # The utterance in progress: its tokens so far and those to come.
        self._said: list[int] = []
        self._rest: list[int] = []
        self._variant = 0
        self._seen_since = False
        # During a slip: the number of its leading tokens that are right.
        self._right: int | None = None

    def on_request(self, request: Request) -> None:
        """Handles a request, which cuts the utterance in progress."""
        self._number += 1
        self._request, self._asked_at = request, self.frame
        self._told, self._untold = {}, []
        self._acknowledged = self._called = self._updating = False
        self._said, self._rest, self._right = [], [], None

    def on_frame(self, frame: int) -> None:
        """Handles a frame."""
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
        """The request in force; there must have been one."""
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
        """Continues with what is true now if the words so far fit it; otherwise retracts them."""
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
        """Begins an answer with a wrong value, cut soon after that value or said as a whole sentence."""
        tokens = self._tokenizer.encode(wrong.text(self._variant))
        as_right = self._tokenizer.encode(right.text(self._variant))
        self._right = next(n for n, token in enumerate(tokens) if as_right[n : n + 1] != [token])
        whole = self._rng.random() < 0.5
        self._rest = tokens if whole else tokens[: self._right + int(self._rng.integers(1, 5))]
        self.utterances.append(Utterance(time, self.frame, due, self._number, wrong, slip=True))

    def _take_back(self, time: float) -> None:
        """Retracts a slip and says what is true now."""
        self._right = None
        said = answer(self._active, truth_of(self._active, self._world, self.frame))
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
        """The answer to a question; while nothing is visible, says so once and answers later."""
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
        """The first fact of a live question whose stated value is no longer true."""
        return next(
            (key for key in self._active.keys if not agrees(key, self._told.get(key, ""), self._truth)), None
        )


def mistaken(rng: np.random.Generator, said: Sentence, request: Request) -> Sentence | None:
    """The answer to a question with one value wrong; None if it has no value to change."""
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
    """Words a sentence so that it replaces one in progress."""
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
      world: the world that it watches.
      requests: in order of time.
      tokenizer: the model's tokenizer.
      tokens_per_second: speed of speech.
      rng: for the choice of words.
      system: system prompt; None for none.
      max_tokens: maximum length of the sequence, which is cut there; None for no limit.
      slips: probability that an answer begins with a wrong value, without loss on it, and is then corrected.

    Raises:
      ValueError: `slips` is not a probability.
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
      world: the world of the clip.
      request: the question.
      tokenizer: the model's tokenizer.
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
