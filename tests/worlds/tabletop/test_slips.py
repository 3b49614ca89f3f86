"""Wrong statements of the assistant that it takes back, for training."""

import itertools

import numpy as np
import pytest

from moss_jax.worlds.tabletop.answers import true_answer, truth_of
from moss_jax.worlds.tabletop.dialogue import Dialogue, converse
from moss_jax.worlds.tabletop.language import (
    LIVE,
    PAST,
    WAIT,
    holds,
)
from moss_jax.worlds.tabletop.stream import TabletopStream, draw_stream


@pytest.fixture(scope="module")
def slipped(tokenizer) -> list[tuple[TabletopStream, Dialogue]]:
    drawn = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        stream = draw_stream(rng, 60, past=0.5)
        dialogue = converse(
            stream.world, stream.requests, tokenizer, tokens_per_second=16, rng=rng, slips=0.5
        )
        drawn.append((stream, dialogue))
    return drawn


def test_slips_are_wrong_and_taken_back(slipped):
    slips = taken_back = 0
    for stream, dialogue in slipped:
        said = dialogue.utterances
        for slip, following in itertools.zip_longest(said, said[1:]):
            if not slip or not slip.slip:
                continue
            request = stream.requests[slip.request]
            assert request.kind in (*LIVE, *PAST)
            assert not holds(slip.sentence.facts, truth_of(request, stream.world, slip.frame))
            slips += 1
            if following and following.request == slip.request:
                assert following.cut
                assert not following.slip
                # What is said may go on with what becomes true meanwhile.
                frames = range(following.frame, min(following.frame + 3, stream.world.seconds))
                truths = [truth_of(request, stream.world, frame) for frame in frames]
                assert any(holds(following.sentence.facts, truth) for truth in truths)
                taken_back += 1
    # The others were cut by the next request.
    assert slips > 80
    assert taken_back > 0.9 * slips


def test_there_is_no_loss_on_the_wrong_part_of_a_slip(slipped, tokenizer):
    """But on the words before it, and on the correction from its first token."""
    found = 0
    special = tokenizer.special
    for stream, dialogue in slipped:
        world, slips = stream.world, [u for u in dialogue.utterances if u.slip]
        asked = [(stream.requests[u.request], u.frame) for u in slips]
        meant = [true_answer(request, truth_of(request, world, frame)) for request, frame in asked]
        texts = {u.sentence.text(variant) for u in dialogue.utterances if not u.slip for variant in range(2)}
        wrong_texts = {u.sentence.text(variant) for u in slips for variant in range(2)}
        words, learnt = [], []
        for token, label in zip(dialogue.tokens, dialogue.labels, strict=True):
            if token == special.image or tokenizer.decode([token]) == "\n\n":
                continue
            if token not in tokenizer.control_ids:
                words.append(token)
                learnt.append(label == token)
                continue
            said = tokenizer.decode(words)
            if WAIT in said and any(learnt):
                begin, correction = said.split(WAIT, 1)
                count = len(tokenizer.encode(begin))
                ignored = [n for n in range(len(words)) if not learnt[n]]
                if ignored:
                    found += 1
                    # One stretch, up to the words that take it back.
                    assert ignored == list(range(ignored[0], count))
                    right = tokenizer.decode(words[: ignored[0]])
                    assert any(a.text(v).startswith(right) for a in meant for v in range(2))
                    assert any(text.startswith(begin) for text in wrong_texts)
                    if token == special.silence:
                        # The correction may in turn be overtaken by a change.
                        last = correction.split(WAIT)[-1]
                        assert last[0].upper() + last[1:] in texts
            words, learnt = [], []
    assert found > 60


def test_slips_come_as_often_as_asked(tokenizer):
    shares = []
    for slips in (0.0, 0.3, 1.0):
        answers = wrong = 0
        for seed in range(30):
            rng = np.random.default_rng(seed)
            stream = draw_stream(rng, 40, impaired=0.0)
            dialogue = converse(
                stream.world, stream.requests, tokenizer, tokens_per_second=16, rng=rng, slips=slips
            )
            for number, request in enumerate(stream.requests):
                said = [u for u in dialogue.utterances if u.request == number]
                if request.kind in LIVE and said and "d" in said[0].sentence.values:
                    answers, wrong = answers + 1, wrong + said[0].slip
        shares.append(wrong / answers)
    assert shares[0] == 0
    assert 0.1 < shares[1] < 0.5
    assert shares[2] == 1
    with pytest.raises(ValueError, match="slips must be between 0 and 1; got 2"):
        converse(stream.world, (), tokenizer, tokens_per_second=8, rng=rng, slips=2)
