"""The pure step, on a decoder whose logits are given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.config import EngineConfig, TokenSampling
from moss_jax.stream import NOT_FINITE, PENDING
from moss_jax.stream.step import SamplingRules, start, step

SLOTS = 3


@dataclasses.dataclass
class GivenLogits:
    """A decoder that keeps nothing and predicts what it is given."""

    given: jax.Array

    def decode(self, stream, tokens, lengths):
        return jnp.zeros((*tokens.shape, 1)), stream

    def logits(self, hidden):
        return self.given[:, None]


def with_vocabulary(config, tokenizer):
    decoder = dataclasses.replace(config.decoder, vocab_size=tokenizer.vocab_size)
    return dataclasses.replace(config, decoder=decoder)


@pytest.fixture
def sample(small_config, tokenizer):
    """The pending tokens after a step that has sampled from these logits [B, V]."""
    config = with_vocabulary(small_config(), tokenizer)
    capacity = EngineConfig(SLOTS, text_capacity=8, bank_capacity=1)

    def sample(logits, *, lengths=(1,) * SLOTS, allowed=None, **sampling) -> list[int]:
        sampling = TokenSampling(**sampling)
        vocab = tokenizer.vocab_size
        allowed = jnp.ones(vocab, bool) if allowed is None else allowed
        rules = SamplingRules(allowed, jnp.zeros(vocab, bool))
        state = start(config, "float32", sampling, capacity)
        tokens, no_turn = jnp.zeros((SLOTS, 1), jnp.int32), jnp.zeros(SLOTS, bool)
        decoder = GivenLogits(jnp.asarray(logits, jnp.float32))
        return step(
            tokenizer.special, decoder, rules, state, tokens, jnp.array(lengths), no_turn, None
        ).pending.tolist()

    return sample


@pytest.fixture
def logits(tokenizer) -> np.ndarray:
    """Slot `b` would say token `10 + b`."""
    logits = np.random.default_rng(0).uniform(-1, 1, (SLOTS, tokenizer.vocab_size))
    logits[np.arange(SLOTS), 10 + np.arange(SLOTS)] = 9
    return logits


SAMPLINGS = [
    {},
    {"temperature": 0.1},
    {"temperature": 0.1, "top_k": 5, "top_p": 0.9, "repetition_penalty": 2.0},
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_give_no_token_in_their_slot(sample, logits, value, sampling):
    assert sample(logits, **sampling) == [10, 11, 12]
    logits[1, 500] = value
    assert sample(logits, **sampling) == [10, NOT_FINITE, 12]
    logits[1] = value
    assert sample(logits, **sampling) == [10, NOT_FINITE, 12]


def test_also_where_the_token_is_not_allowed(sample, logits, tokenizer):
    logits[2, 500] = np.nan
    allowed = jnp.ones(tokenizer.vocab_size, bool).at[500].set(False)
    assert sample(logits, allowed=allowed) == [10, 11, NOT_FINITE]


def test_a_slot_that_stands_still_keeps_its_token(sample, logits):
    logits[1] = np.nan
    assert sample(logits, lengths=[1, 0, 1]) == [10, 0, 12]


def test_what_was_said_stays_said_where_nothing_is_appended(small_config, tokenizer):
    """Slot 0 appends its pending token, slot 1 another, slot 2 none; 7 is pending in all and said in two."""
    config, vocab = with_vocabulary(small_config(), tokenizer), tokenizer.vocab_size
    rules = SamplingRules(jnp.ones(vocab, bool), jnp.zeros(vocab, bool))
    penalty = TokenSampling(repetition_penalty=2.0)
    state = start(config, "float32", penalty, EngineConfig(SLOTS, text_capacity=8, bank_capacity=1))
    said = state.said.at[jnp.array([1, 2]), 7].set(True)
    state = dataclasses.replace(state, pending=jnp.full(SLOTS, 7), said=said)
    tokens, no_turn = jnp.array([[PENDING], [5], [0]]), jnp.zeros(SLOTS, bool)
    decoder = GivenLogits(jnp.zeros((SLOTS, vocab)))
    lengths = jnp.array([1, 1, 0])
    after = step(tokenizer.special, decoder, rules, state, tokens, lengths, no_turn, None)
    assert np.argwhere(np.asarray(after.said)).tolist() == [[0, 7], [1, 7], [2, 7]]


def test_an_end_of_turn_is_sampled_as_silence(sample, logits, tokenizer):
    logits[1, tokenizer.special.eot] = 20
    assert sample(logits) == [10, tokenizer.special.silence, 12]
