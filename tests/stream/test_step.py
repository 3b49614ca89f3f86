"""The pure step and what samples after it, on a decoder whose logits are given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.config import EngineConfig, TokenSampling
from moss_jax.stream import NOT_FINITE, PENDING, Row
from moss_jax.stream.rows import pack, step_arguments
from moss_jax.stream.sampling import SamplingKind
from moss_jax.stream.step import SamplingRules, packed_step, sample_pending, start

SLOTS = 3


@dataclasses.dataclass
class GivenLogits:
    """A decoder that keeps nothing and predicts what it is given, at each of a slot's tokens."""

    given: jax.Array

    def remember(self, bank, *frames):
        return bank

    def decode_rows(self, stream, rows):
        """The hidden state of a token is the number of its slot."""
        slots = [jnp.arange(len(x.tokens)) if x.slots is None else x.slots for x in rows]
        hidden = [jnp.repeat(s, x.tokens.shape[1]) for s, x in zip(slots, rows, strict=True)]
        return jnp.concatenate(hidden)[None, :, None], stream

    def logits(self, hidden):
        return self.given[hidden[..., 0]]


def stepped(tokenizer, logits, state, rows, allowed=None):
    """The state after a step that appends these rows and samples from these logits [B, V]."""
    vocab, settings = tokenizer.vocab_size, state.sampling
    allowed = jnp.ones(vocab, bool) if allowed is None else allowed
    rules = SamplingRules(allowed, jnp.zeros(vocab, bool))
    arguments = step_arguments(rows, SLOTS, tokenizer.special.image)
    features = None if arguments.frames is None else jnp.zeros((1, 1, 1))
    packed, decoder = pack(arguments, SLOTS), GivenLogits(jnp.asarray(logits, jnp.float32))
    state = packed_step(decoder, rules, state, packed, features, arguments.shape)
    own = rules, state.logits, state.said, settings, state.stream.text.position, packed
    pending, tokens = sample_pending(tokenizer.special, SamplingKind.FILTERED, state.pending, *own)
    assert pending.tolist() == tokens.tolist()
    return dataclasses.replace(state, pending=pending)


def with_vocabulary(config, tokenizer):
    decoder = dataclasses.replace(config.decoder, vocab_size=tokenizer.vocab_size)
    return dataclasses.replace(config, decoder=decoder)


@pytest.fixture
def sample(small_config, tokenizer):
    """The pending tokens after a step that has sampled from these logits [B, V]."""
    config = with_vocabulary(small_config(), tokenizer)
    capacity = EngineConfig(SLOTS, text_capacity=8, bank_capacity=1)

    def sample(logits, *, slots=range(SLOTS), allowed=None, **sampling) -> list[int]:
        state = start(config, "float32", TokenSampling(**sampling), capacity)
        rows = {slot: Row([PENDING]) for slot in slots}
        return stepped(tokenizer, logits, state, rows, allowed).pending.tolist()

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
    assert sample(logits, slots=[0, 2]) == [10, 0, 12]


def test_what_was_said_stays_said_where_nothing_is_appended(small_config, tokenizer):
    """Slot 0 appends its pending token, slot 1 another, slot 2 none; 7 is pending in all and said in two."""
    config, vocab = with_vocabulary(small_config(), tokenizer), tokenizer.vocab_size
    penalty = TokenSampling(repetition_penalty=2.0)
    state = start(config, "float32", penalty, EngineConfig(SLOTS, text_capacity=8, bank_capacity=1))
    said = state.said.at[jnp.array([1, 2]), 7].set(True)
    state = dataclasses.replace(state, pending=jnp.full(SLOTS, 7), said=said)
    after = stepped(tokenizer, np.zeros((SLOTS, vocab)), state, {0: Row([PENDING]), 1: Row([5])})
    assert np.argwhere(np.asarray(after.said)).tolist() == [[0, 7], [1, 7], [2, 7]]
    after = stepped(tokenizer, np.zeros((SLOTS, vocab)), state, {1: Row([PENDING, 5], new_turn=True)})
    assert np.argwhere(np.asarray(after.said)).tolist() == [[2, 7]]


def test_logits_are_those_of_each_slots_last_token_and_stay_where_it_stands_still(
    small_config, tokenizer, logits
):
    config = with_vocabulary(small_config(), tokenizer)
    state = start(config, "float32", TokenSampling(), EngineConfig(SLOTS, text_capacity=64, bank_capacity=1))
    state = stepped(tokenizer, logits, state, {2: Row(list(range(40))), 0: Row([PENDING])})
    np.testing.assert_array_equal(state.logits[::2], logits[::2].astype(np.float32))
    assert state.pending.tolist() == [10, 0, 12]
    assert not np.asarray(state.logits[1]).any()
    later = stepped(tokenizer, -logits, state, {1: Row([PENDING])})
    np.testing.assert_array_equal(later.logits[::2], state.logits[::2])
    np.testing.assert_array_equal(later.logits[1], -logits[1].astype(np.float32))


def test_an_end_of_turn_is_sampled_as_silence(sample, logits, tokenizer):
    logits[1, tokenizer.special.eot] = 20
    assert sample(logits) == [10, tokenizer.special.silence, 12]
