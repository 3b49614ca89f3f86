"""Dialogues: the ideal assistant says what is true when it is due, and nothing else.

Its words are read back from the tokens alone and judged by the world's truth.
"""

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from moss_jax.data.worlds import SPEEDS
from moss_jax.text import chat
from moss_jax.text.labels import IGNORED
from moss_jax.worlds.tabletop.answers import narrate, true_answer, truth_of
from moss_jax.worlds.tabletop.dialogue import Dialogue, Utterance, converse
from moss_jax.worlds.tabletop.language import (
    LIVE,
    LONG_PAST,
    PAST,
    SAY,
    WAIT,
    Sentence,
    agrees,
    holds,
    understand,
)
from moss_jax.worlds.tabletop.stream import TabletopStream, draw_stream
from moss_jax.worlds.tabletop.world import TableEvent

# ------------------------------------------------------------------------- reading a sequence back


@dataclasses.dataclass(frozen=True)
class Speech:
    """The assistant's words between two silences or prompts.

    Attributes:
      at: index of each token in the sequence.
      frames: the last frame seen when each token was sampled.
      tokens: of the words.
      request: index of the request in force, -1 before the first.
      cut: a prompt cut it short.
    """

    at: list[int]
    frames: list[int]
    tokens: list[int]
    request: int
    cut: bool = False


@dataclasses.dataclass(frozen=True)
class Glance:
    """A frame and the assistant's reaction to it.

    Attributes:
      at: index of its token.
      idle: whether nothing was being said.
      silent: whether the next sampled token is a silence.
      request: index of the request in force then.
    """

    frame: int
    at: int
    idle: bool
    silent: bool
    request: int


@dataclasses.dataclass(frozen=True)
class Case:
    """A dialogue, and what is read back from its tokens.

    Attributes:
      speed: tokens per second.
      asked_at: the last frame before each request.
    """

    stream: TabletopStream
    speed: int
    dialogue: Dialogue
    heard: list[Speech]
    glances: list[Glance]
    asked_at: list[int]

    @property
    def truth(self):
        return self.stream.world.truth

    def said(self, request: int):
        return [u for u in self.dialogue.utterances if u.request == request]

    def paired(self, tokenizer) -> list[tuple["Statement", Utterance]]:
        """Pairs of what was read back and what should have been said."""
        begins = [i for i, u in enumerate(self.dialogue.utterances) if not u.cut]
        speeches = [
            self.dialogue.utterances[i:j]
            for i, j in itertools.pairwise([*begins, len(self.dialogue.utterances)])
        ]
        return [
            pair
            for speech, meant in zip(self.heard, speeches, strict=True)
            for pair in zip(statements(speech, tokenizer, len(meant)), meant, strict=True)
        ]


def read_back(stream, dialogue, speed, tokenizer) -> Case:
    special = tokenizer.special
    heard, glances, asked_at = [], [], []
    frame, request, idle = -1, -1, True
    speech, waiting = None, []
    role, in_header = "", False
    for at, token in enumerate(dialogue.tokens):
        if token == special.start_header:
            role, in_header = "", True
        elif token == special.end_header:
            in_header = False
            if role == "user" and dialogue.tokens[at + 2] != special.eot:
                request += 1
                asked_at.append(frame)
        elif in_header:
            role += tokenizer.decode([token])
        elif token == special.eot:
            if speech:
                heard.append(dataclasses.replace(speech, cut=True))
            speech, idle, role = None, True, ""
        elif token == special.image:
            frame += 1
            waiting.append(Glance(frame, at, idle, silent=False, request=-1))
        elif role == "assistant" and tokenizer.decode([token]) != "\n\n":
            silent = token == special.silence
            glances += [dataclasses.replace(seen, silent=silent, request=request) for seen in waiting]
            waiting = []
            if silent and speech:
                heard.append(speech)
                speech = None
            elif not silent:
                speech = speech or Speech([], [], [], request)
                speech.at.append(at)
                speech.frames.append(frame)
                speech.tokens.append(token)
            idle = silent
    # Each frame is followed by a sampled token, and all speech ends.
    assert speech is None
    assert not waiting
    return Case(stream, speed, dialogue, heard, glances, asked_at)


@dataclasses.dataclass(frozen=True)
class Statement:
    """A part of a speech: a sentence, or what was said of it before another replaced it.

    Attributes:
      first: index of its first token in the speech.
      last: index of its last token in the speech.
    """

    speech: Speech
    text: str
    first: int
    last: int
    correction: bool
    cut: bool

    @property
    def frame(self) -> int:
        """The last frame seen when it began."""
        return self.speech.frames[self.first]

    @property
    def end_frame(self) -> int:
        return self.speech.frames[self.last]


def statements(speech: Speech, tokenizer, expected: int) -> list[Statement]:
    """Splits a speech into the expected number of statements."""
    pieces = [tokenizer.decode([token]) for token in speech.tokens]
    begins = [0, *itertools.accumulate(map(len, pieces))]
    found, position = [], 0
    text = "".join(pieces)
    if speech.cut and text.count(WAIT) + 1 < expected:
        # A prompt cut the words that take a statement back.
        begun = next(n for n in range(len(WAIT) - 1, 0, -1) if text.endswith(WAIT[:n]))
        text += WAIT[begun:]
        begins[-1] = len(text)
    parts = text.split(WAIT)
    for number, part in enumerate(parts):
        begin = position - len(WAIT) * (number > 0)
        position += len(part)
        # Raises if one begins within a token.
        first = begins.index(begin)
        last = begins.index(position) - 1
        found.append(Statement(speech, part, first, last, number > 0, speech.cut or number + 1 < len(parts)))
        position += len(WAIT)
    return found


def draw(seed: int, speed: int, tokenizer, past: float | None = None) -> Case:
    rng = np.random.default_rng(seed)
    dense = seed % 4 == 3
    stream = draw_stream(rng, 6 if dense else 24, dense=dense, past=past, impaired=0.0)
    dialogue = converse(
        stream.world,
        stream.requests,
        tokenizer,
        tokens_per_second=speed,
        rng=rng,
        system=(None, chat.SYSTEM_PROMPT)[seed % 2],
    )
    return read_back(stream, dialogue, speed, tokenizer)


@pytest.fixture(scope="module")
def cases(tokenizer) -> list[Case]:
    speeds = sorted(set(SPEEDS))
    drawn = [draw(seed, speeds[seed // 4 % len(speeds)], tokenizer) for seed in range(320)]
    # With questions about all of the past.
    return drawn + [draw(seed, 8, tokenizer, past=0.8) for seed in range(2000, 2120)]


@pytest.fixture(scope="module")
def fast(tokenizer) -> list[Case]:
    """Dialogues in which everything is said before the next frame."""
    return [draw(seed, 64, tokenizer) for seed in range(1000, 1080)]


def understood(text: str, subject: str) -> Sentence:
    parsed = understand(text, subject)
    assert parsed, text
    return parsed


# ------------------------------------------------------------------------------- the sequence


def test_labels_are_the_tokens_of_the_assistant(cases, tokenizer):
    special = tokenizer.special
    for case in cases:
        said = {at for speech in case.heard for at in speech.at}
        header = chat.header(tokenizer, "assistant")
        tokens, labels = case.dialogue.tokens, case.dialogue.labels
        opened = next(i for i in range(len(tokens)) if tokens[i : i + len(header)] == header)
        # The silence in the system prompt is not sampled.
        said |= {i for i, token in enumerate(tokens) if token == special.silence and i > opened}
        assert labels == [token if i in said else IGNORED for i, token in enumerate(tokens)]
        learnt = {label for label in labels if label != IGNORED}
        assert learnt & tokenizer.control_ids == {special.silence}


def test_a_silence_lasts_until_the_next_input(cases, tokenizer):
    special = tokenizer.special
    for case in cases:
        tokens, labels = case.dialogue.tokens, case.dialogue.labels
        assert labels[-1] == special.silence
        for label, following in zip(labels, tokens[1:], strict=False):
            if label == special.silence:
                assert following in (special.image, special.eot)


def test_there_is_a_frame_for_each_second(cases, tokenizer):
    for case in cases:
        tokens, positions = case.dialogue.tokens, case.dialogue.frame_positions
        assert positions == [i for i, token in enumerate(tokens) if token == tokenizer.special.image]
        assert len(positions) == case.stream.world.seconds == len(case.dialogue.speaking)
        assert [glance.frame for glance in case.glances] == list(range(len(positions)))


def test_requests_are_in_their_places(cases, tokenizer):
    for case in cases:
        text = "".join(
            tokenizer.decode([token]) if token not in tokenizer.control_ids else "|"
            for token in case.dialogue.tokens
        )
        turns = [part.removeprefix("|\n\n") for part in text.split("|user")[1:]]
        turns = [turn.split("|")[0] for turn in turns]
        asked = [request.text for request in case.stream.requests]
        assert [turn for turn in turns if turn] == asked
        # No turn but the first is empty.
        assert len(turns) == len(asked) + (not asked or case.stream.requests[0].time > 0)
        assert case.asked_at == [
            -1 if request.time == 0 else int(request.time) for request in case.stream.requests
        ]


def test_the_first_turn_is_asked_before_the_first_frame(cases):
    first = [case for case in cases if case.stream.requests[:1] and case.stream.requests[0].time == 0]
    assert len(first) > 20
    for case in first:
        assert case.glances[0].at > case.dialogue.labels.index(
            next(label for label in case.dialogue.labels if label != IGNORED)
        )


def test_speaking_marks_frames_followed_by_speech(cases):
    for case in cases:
        frames = {frame for speech in case.heard for frame in speech.frames}
        assert case.dialogue.speaking == [f in frames for f in range(case.stream.world.seconds)]


def test_speech_takes_its_time(cases):
    """At most about the tokens of one second fit between two frames."""
    for case in cases:
        per_frame = collections.Counter(frame for speech in case.heard for frame in speech.frames)
        for frame, count in per_frame.items():
            if 0 <= frame < case.stream.world.seconds - 1:
                prompts = sum(asked == frame for asked in case.asked_at)
                assert count <= case.speed + 1 + prompts


# -------------------------------------------------------------------------------- utterances


def test_utterances_are_said_in_full_unless_cut(cases, tokenizer):
    """In one of their wordings, from the frame on that they name."""
    corrections = cut = 0
    for case in cases:
        for statement, utterance in case.paired(tokenizer):
            assert statement.speech.request == utterance.request
            assert statement.frame == utterance.frame
            assert statement.correction == utterance.cut
            assert -1 <= utterance.due <= utterance.frame
            texts = {utterance.sentence.text(variant) for variant in range(2)}
            if utterance.cut:
                texts = {text[0].lower() + text[1:] for text in texts}
            if statement.cut:
                assert any(text.startswith(statement.text) for text in texts)
                cut += 1
            else:
                assert statement.text in texts
                subject = case.stream.requests[utterance.request].subject
                assert understood(statement.text, subject).facts == utterance.sentence.facts
            corrections += statement.correction
        times = [utterance.time for utterance in case.dialogue.utterances]
        assert times == sorted(times)
    assert corrections > 20
    assert cut > 40


def test_both_wordings_are_used(cases, tokenizer):
    said = {
        (utterance.sentence.name, statement.text == utterance.sentence.text())
        for case in cases
        for statement, utterance in case.paired(tokenizer)
        if not statement.cut and not statement.correction
    }
    for name in ("digit", "count", "colour", "place", "there", "list", "now digit", "appear", "okay"):
        assert {(name, True), (name, False)} <= said


def test_all_sentences_occur(cases):
    said = {u.sentence.name for case in cases for u in case.dialogue.utterances}
    # Too rare in 24 seconds, or about an impaired camera.
    assert set(SAY) - said <= {"now empty", "times", "was covered", "blind"}


def test_what_is_said_is_true(cases, tokenizer):
    """At the frame at which it begins; an answer that goes on with a new truth, at its end."""
    continued = 0
    for case in cases:
        for statement, utterance in case.paired(tokenizer):
            facts, request = utterance.sentence.facts, case.stream.requests[utterance.request]
            if not facts:
                assert utterance.sentence.name == "okay"
                continue
            assert utterance.frame >= 0
            if holds(facts, truth_of(request, case.stream.world, utterance.frame)):
                if not statement.cut and request.keys:
                    assert holds(facts, case.truth[statement.end_frame])
                continue
            continued += 1
            assert request.keys
            # It became true while it was said, and still was true at its end.
            frames = range(utterance.frame + 1, statement.end_frame + 1)
            assert any(holds(facts, case.truth[frame]) for frame in frames)
            assert statement.cut or holds(facts, case.truth[statement.end_frame])
    assert continued > 20


def test_a_correction_follows_the_frame_that_requires_it(cases, tokenizer):
    found = 0
    for case in cases:
        for (taken_back, old), (statement, new) in itertools.pairwise(case.paired(tokenizer)):
            if not statement.correction:
                continue
            found += 1
            request = case.stream.requests[new.request]
            assert statement.speech is taken_back.speech
            at = statement.speech.at[statement.first]
            assert case.dialogue.tokens[at - 1] == tokenizer.special.image
            assert not holds(old.sentence.facts, case.truth[new.frame])
            assert holds(old.sentence.facts, case.truth[new.frame - 1])
            assert new.due == new.frame
            assert set(new.sentence.facts) >= set(request.keys)
            # The words so far are not the beginning of the true answer.
            if old is case.said(new.request)[0]:
                texts = {true_answer(request, case.truth[new.frame]).text(variant) for variant in range(2)}
                said = statement.speech.tokens[: statement.first]
                assert any(tokenizer.encode(text)[: len(said)] != said for text in texts)
    assert found > 20


def test_only_answers_that_became_false_are_taken_back(cases, tokenizer):
    """No token of an answer is said after a frame that makes it false."""
    for case in cases:
        for statement, utterance in case.paired(tokenizer):
            if not case.stream.requests[utterance.request].keys:
                assert not utterance.cut
                continue
            if statement.cut and not statement.speech.cut:
                frame = statement.end_frame + 1
                assert not holds(utterance.sentence.facts, case.truth[frame])


def test_a_prompt_cuts_the_speech_in_progress(cases, tokenizer):
    """The next speech serves the new request."""
    cut = 0
    for case in cases:
        for speech, following in itertools.pairwise(case.heard):
            if speech.cut:
                cut += 1
                # A frame may have come in the same tick.
                at = speech.at[-1] + 1
                at += case.dialogue.tokens[at] == tokenizer.special.image
                assert case.dialogue.tokens[at] == tokenizer.special.eot
                assert following.request > speech.request
    assert cut > 40


# ----------------------------------------------------------------------------------------- timing


def test_each_request_is_answered_at_once(cases):
    for case in cases:
        for number, request in enumerate(case.stream.requests):
            said = case.said(number)
            if not said:
                # The next one came in the same tick, or in that of the first frame.
                following = case.stream.requests[number + 1]
                assert following.time - request.time <= 1 / case.speed
                continue
            first = said[0]
            facts = first.sentence.facts
            if request.kind in LIVE:
                assert set(request.keys) <= set(facts)
            elif request.kind in PAST:
                truth = truth_of(request, case.stream.world, first.frame)
                assert first.sentence == true_answer(request, truth)
            else:
                assert first.sentence.name == "okay"
            assert first.due == (
                max(case.asked_at[number], 0) if request.kind in (*LIVE, *PAST) else case.asked_at[number]
            )
            # At once, or with the first frame.
            assert first.time <= max(request.time, 0.0) + 1 / case.speed + 1e-6
            assert first.frame <= max(case.asked_at[number], 0) + 1
            if request.kind in (*PAST, "watch"):
                assert len(said) == 1


def test_answers_about_the_past(cases):
    kinds = collections.Counter()
    for case in cases:
        world = case.stream.world
        for number, request in enumerate(case.stream.requests):
            if request.kind not in PAST:
                continue
            if not case.said(number):
                continue  # the next request came in the same tick
            (said,) = case.said(number)
            kinds[request.kind] += 1
            happened = [event for event in world.events if event.frame <= said.frame]
            if request.kind == "event":
                if happened:
                    assert said.sentence == narrate(happened[-1], case.truth[said.frame])
                else:
                    assert said.sentence.name == "nothing happened"
            elif request.kind in LONG_PAST:
                truth = truth_of(request, world, said.frame)
                assert holds(said.sentence.facts, truth)
            else:
                key = f"seen:{request.subject}" if request.kind == "seen" else request.kind
                assert dict(said.sentence.facts) == {key: case.truth[said.frame][key]}
    assert min(kinds[kind] for kind in PAST) > 5


def told_by(case: Case, glance: Glance) -> dict[str, str]:
    """The facts told in answer to the request in force, up to a frame."""
    told = {}
    for utterance in case.said(glance.request):
        if utterance.frame <= glance.frame:
            told.update(utterance.sentence.facts)
    return told


def is_due(case: Case, glance: Glance, events: dict[int, TableEvent]) -> bool:
    """Whether something is due at a frame, given what was said before it."""
    if glance.request < 0:
        return False
    request, asked = case.stream.requests[glance.request], case.asked_at[glance.request]
    before = [u for u in case.said(glance.request) if u.frame < glance.frame]
    truth = case.truth[glance.frame]
    if not before:
        return True
    if request.keys:
        told = told_by(case, dataclasses.replace(glance, frame=glance.frame - 1))
        return not all(agrees(key, told[key], truth) for key in request.keys)
    if request.awaited:
        return holds(request.awaited.facts, truth) and all(u.sentence != request.awaited for u in before)
    if request.kind == "narrate":
        done = {u.due for u in before}
        return any(
            frame not in done and holds(narrate(event, case.truth[frame]).facts, truth)
            for frame, event in events.items()
            if asked < frame <= glance.frame
        )
    return False


def test_the_assistant_speaks_if_and_only_if_something_is_due(cases):
    spoke = silent = 0
    for case in cases:
        events = {event.frame: event for event in case.stream.world.events}
        begun = {utterance.frame for utterance in case.dialogue.utterances}
        for glance in case.glances:
            asked = case.asked_at[glance.request] if glance.request >= 0 else -1
            if not glance.idle or (glance.request >= 0 and asked == glance.frame):
                continue
            assert is_due(case, glance, events) == (not glance.silent)
            if not glance.silent:
                assert glance.frame in begun
            spoke, silent = spoke + (not glance.silent), silent + glance.silent
    assert spoke > 500
    assert silent > 1500


def test_fast_speech_updates_answers_before_the_next_frame(fast):
    changed = 0
    for case in fast:
        for number, request in enumerate(case.stream.requests):
            if not request.keys:
                continue
            later = [r.time for r in case.stream.requests[number + 1 :]]
            until = later[0] if later else case.stream.world.seconds
            told = {}
            for frame in range(case.asked_at[number] + 1, int(until)):
                last = dict(told)
                for utterance in case.said(number):
                    if utterance.frame <= frame:
                        told.update(utterance.sentence.facts)
                assert all(agrees(key, told[key], case.truth[frame]) for key in request.keys)
                changed += bool(last) and not all(
                    agrees(key, last[key], case.truth[frame]) for key in request.keys
                )
    assert changed > 50


def test_awaited_moments_are_announced_at_the_first_frame_that_shows_them(cases):
    called = 0
    for case in cases:
        for number, request in enumerate(case.stream.requests):
            if request.awaited is None:
                assert not any(u.sentence.name.startswith("alert") for u in case.said(number))
                continue
            okay, *calls = case.said(number)
            assert len(calls) <= 1
            assert all(call.sentence == request.awaited for call in calls)
            moments = [
                glance
                for glance in case.glances
                if glance.request == number
                and glance.frame > okay.frame
                and holds(request.awaited.facts, case.truth[glance.frame])
            ]
            free = [glance.frame for glance in moments if glance.idle]
            assert [call.frame for call in calls] == free[:1]
            assert [call.due for call in calls] == free[:1]
            called += len(calls)
    assert called > 40


def test_events_are_narrated_in_order(cases, fast):
    told = 0
    for case in (*cases, *fast):
        events = {event.frame: event for event in case.stream.world.events}
        for number, request in enumerate(case.stream.requests):
            if request.kind != "narrate":
                continue
            _, *narrated = case.said(number)
            frames = [utterance.due for utterance in narrated]
            assert frames == sorted(set(frames))
            for utterance in narrated:
                assert utterance.due > case.asked_at[number]
                event = events[utterance.due]
                assert utterance.sentence == narrate(event, case.truth[utterance.due])
                assert holds(utterance.sentence.facts, case.truth[utterance.frame])
            told += len(narrated)
            if case in fast:
                # Everything, at once.
                later = [r.time for r in case.stream.requests[number + 1 :]]
                until = later[0] if later else case.stream.world.seconds
                due = [frame for frame in events if case.asked_at[number] < frame < until]
                assert frames == due == [utterance.frame for utterance in narrated]
    assert told > 150


def test_a_seed_determines_the_dialogue(tokenizer):
    for seed in range(5):
        assert draw(seed, 8, tokenizer).dialogue == draw(seed, 8, tokenizer).dialogue
