"""Sampling of tokens: each setting against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.config import TokenSampling
from moss_jax.stream.sampling import sample

COUNT = 4000
# Four standard errors of a share among COUNT samples.
ATOL = 4 * 0.5 / COUNT**0.5
ALL = jnp.ones(8, bool)
LOGITS = jnp.asarray([[0.5, 2.0, 1.0, -1.0, 1.5, 0.0, -2.0, 1.9]])


def shares_of(config: TokenSampling, *, count=COUNT, logits=LOGITS, **arguments) -> np.ndarray:
    """Share of each token among many samples."""
    keys = jax.random.split(jax.random.key(config.seed), count)
    tokens = sample(
        jnp.repeat(logits, count, 0), config, keys=keys, allowed=arguments.pop("allowed", ALL), **arguments
    )
    return np.bincount(np.asarray(tokens), minlength=8) / count


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def test_temperature_zero_takes_the_likeliest_allowed_token():
    allowed = ALL.at[1].set(False)
    assert shares_of(TokenSampling(), count=3, allowed=allowed)[7] == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature):
    shares = shares_of(TokenSampling(temperature=temperature))
    np.testing.assert_allclose(shares, softmax(np.asarray(LOGITS[0]) / temperature), atol=ATOL)


def test_top_k_samples_among_the_k_likeliest():
    shares = shares_of(TokenSampling(temperature=1, top_k=3))
    kept = [1, 7, 4]
    np.testing.assert_allclose(shares[kept], softmax(np.asarray(LOGITS[0])[kept]), atol=ATOL)
    assert shares.sum() == pytest.approx(shares[kept].sum())


@pytest.mark.parametrize("top_p", [0.1, 0.6, 0.95])
def test_top_p_keeps_the_smallest_set_with_that_probability(top_p):
    probabilities = softmax(np.asarray(LOGITS[0]))
    order = np.argsort(-probabilities)
    kept = order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1]
    shares = shares_of(TokenSampling(temperature=1, top_p=top_p))
    assert set(np.flatnonzero(shares)) == set(kept)
    np.testing.assert_allclose(shares[kept], probabilities[kept] / probabilities[kept].sum(), atol=ATOL)


@pytest.mark.parametrize("sampling", [{}, {"top_k": 5}, {"top_p": 0.99}])
def test_tokens_that_are_not_allowed_are_never_sampled(sampling):
    allowed = jnp.asarray([True, False] * 4)
    shares = shares_of(TokenSampling(temperature=5, **sampling), allowed=allowed)
    assert not shares[1::2].any()


def test_the_penalty_lowers_the_logits_of_said_tokens_of_either_sign():
    said = jnp.zeros((1, 8), bool).at[0, jnp.asarray([1, 6])].set(True)
    shares = shares_of(TokenSampling(temperature=1, repetition_penalty=2.0), said=jnp.repeat(said, COUNT, 0))
    expected = np.asarray(LOGITS[0]).copy()
    expected[1], expected[6] = 1.0, -4.0
    np.testing.assert_allclose(shares, softmax(expected), atol=ATOL)


def test_slots_are_independent():
    config = TokenSampling(temperature=1, top_k=6, top_p=0.9)
    keys = jax.random.split(jax.random.key(3), 5)
    logits = jax.random.normal(jax.random.key(4), (5, 8)) * 3
    together = sample(logits, config, keys=keys, allowed=ALL)
    alone = [sample(logits[i : i + 1], config, keys=keys[i : i + 1], allowed=ALL)[0] for i in range(5)]
    assert together.tolist() == [int(token) for token in alone]
