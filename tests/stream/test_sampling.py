"""Sampling of tokens: each setting against its definition, and all of them in one batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.config import TokenSampling
from moss_jax.stream import sampling as sampling_module
from moss_jax.stream.sampling import SamplingKind, SlotSampling, kind_of

COUNT = 4000
# Four standard errors of a share among COUNT samples.
ATOL = 4 * 0.5 / COUNT**0.5
ALL = jnp.ones(8, bool)
LOGITS = jnp.asarray([[0.5, 2.0, 1.0, -1.0, 1.5, 0.0, -2.0, 1.9]])
# Every setting alone, and with others; and each seed another.
MIXED = [
    TokenSampling(seed=1),
    TokenSampling(temperature=1.0, seed=2),
    TokenSampling(temperature=0.7, top_k=9, top_p=0.8, repetition_penalty=1.3, seed=3),
    TokenSampling(temperature=1.5, top_p=0.5, seed=4),
    TokenSampling(temperature=1.0, top_k=3, seed=5),
    TokenSampling(temperature=2.0, repetition_penalty=0.5, seed=6),
    TokenSampling(top_k=5, top_p=0.3, repetition_penalty=2.0, seed=7),
    TokenSampling(temperature=1.0, top_k=5000, top_p=1e-30, seed=8),
]

jitted = jax.jit(sampling_module.sample, static_argnums=2)


def sample(logits, settings, kind=SamplingKind.FILTERED, **arguments):
    """Samples by the program that serves any settings, if not by that of another kind."""
    return jitted(logits, settings, kind, **arguments)


def shares_of(config: TokenSampling, *, count=COUNT, logits=LOGITS, allowed=ALL, said=None) -> np.ndarray:
    """Share of each token among samples at many positions."""
    said = jnp.zeros(logits.shape, bool) if said is None else said
    tokens = sample(
        jnp.repeat(logits, count, 0),
        SlotSampling.of(config, count),
        positions=jnp.arange(count),
        allowed=allowed,
        said=jnp.repeat(said, count, 0),
    )
    return np.bincount(np.asarray(tokens), minlength=8) / count


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def scores_and_kept(
    logits: np.ndarray, config: TokenSampling, allowed: np.ndarray, said: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """By sorting: the penalised scores of one slot, and the tokens that may be drawn, ties included."""
    x = np.where(allowed, logits.astype(np.float64), -np.inf)
    penalty = np.float64(np.float32(config.repetition_penalty))
    x = np.where(said, np.where(x > 0, x / penalty, x * penalty), x)
    order = np.argsort(-x, kind="stable")
    if config.temperature == 0:
        return x, order[:1]
    if config.top_k:
        order = order[x[order] >= x[order[min(config.top_k, len(x)) - 1]]]
    probabilities = softmax(x[order] / config.temperature)
    likelier = np.array([probabilities[x[order] > score].sum() for score in x[order]])
    # Else float32 and float64 might disagree.
    assert config.top_p == 1 or np.abs(likelier[likelier > 0] - config.top_p).min() > 1e-5
    return x, order[likelier < config.top_p] if config.top_p < 1 else order


def batch(seed: int, vocabulary: int = 203):
    """Random logits of a slot for each of `MIXED`, with many ties and some masks."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(size=(len(MIXED), vocabulary)) * 6).astype(np.float32) / 2
    # Masks of the caller's, and zeros of both signs.
    logits[rng.random(logits.shape) < 0.05] = -np.inf
    logits[logits == 0] *= rng.choice([-1, 1], np.sum(logits == 0))
    return (
        logits,
        rng.random(vocabulary) < 0.9,
        rng.random(logits.shape) < 0.3,
        rng.integers(0, 999, len(MIXED)),
    )


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


@pytest.mark.parametrize("top_p", [0.4, 0.6])
def test_top_p_is_a_share_of_what_top_k_leaves(top_p):
    """Of four, the likeliest has 0.36, and of all 0.30; with the next it is 0.69 and 0.57."""
    config = TokenSampling(temperature=1, top_k=4, top_p=top_p)
    assert set(np.flatnonzero(shares_of(config))) == {1, 7}


@pytest.mark.parametrize("sampling", [{"top_k": 3}, {"top_p": 0.45}], ids=str)
def test_ties_stay_together(sampling):
    logits = jnp.asarray([[2.0, 1.0, -0.0, 2.0, 0.0, 2.0, 1.0, 2.0]])
    shares = shares_of(TokenSampling(temperature=1, **sampling), logits=logits)
    np.testing.assert_allclose(shares[[0, 3, 5, 7]], 0.25, atol=ATOL)
    # The zeros of both signs are equal, too.
    zeros = jnp.where(logits == 2, -1.0, logits - 1)
    zeros = jnp.where(zeros == 0, jnp.asarray([[0.0, -0.0] * 4]), zeros)
    assert set(np.flatnonzero(shares_of(TokenSampling(temperature=1, top_k=1), logits=zeros))) == {1, 6}


@pytest.mark.parametrize("sampling", [{}, {"top_k": 5}, {"top_p": 0.99}])
def test_tokens_that_are_not_allowed_are_never_sampled(sampling):
    allowed = jnp.asarray([True, False] * 4)
    shares = shares_of(TokenSampling(temperature=5, **sampling), allowed=allowed)
    assert not shares[1::2].any()


def test_the_penalty_lowers_the_logits_of_said_tokens_of_either_sign():
    said = jnp.zeros((1, 8), bool).at[0, jnp.asarray([1, 6])].set(True)
    shares = shares_of(TokenSampling(temperature=1, repetition_penalty=2.0), said=said)
    expected = np.asarray(LOGITS[0]).copy()
    expected[1], expected[6] = 1.0, -4.0
    np.testing.assert_allclose(shares, softmax(expected), atol=ATOL)


@pytest.mark.parametrize("seed", range(20))
def test_slots_with_settings_of_their_own_sample_by_the_definition(seed):
    """The token is that with the highest sum of score and Gumbel noise among those that are left."""
    logits, allowed, said, positions = batch(seed)
    tokens = sample(logits, SlotSampling.of(MIXED, 8), positions=positions, allowed=allowed, said=said)
    for slot, config in enumerate(MIXED):
        x, kept = scores_and_kept(logits[slot], config, allowed, said[slot])
        key = jax.random.fold_in(jax.random.key(config.seed), positions[slot])
        noise = np.asarray(jax.random.gumbel(key, x.shape), np.float64)
        perturbed = x[kept] / config.temperature + noise[kept] if config.temperature else x[kept]
        best = np.sort(perturbed)[::-1]
        assert len(best) == 1 or best[0] - best[1] > 1e-5, "rounding might decide"
        assert tokens[slot] == kept[np.argmax(perturbed)], config


def test_a_slot_samples_the_same_alone_and_in_any_slot_of_a_batch():
    alone, together = [], []
    for seed in range(12):
        logits, allowed, said, positions = batch(seed)

        def run(order, allowed=allowed, logits=logits, said=said, positions=positions):
            order = np.asarray(order)
            settings = SlotSampling.of([MIXED[i] for i in order], len(order))
            own = logits[order], settings
            return np.asarray(sample(*own, positions=positions[order], allowed=allowed, said=said[order]))

        alone.append([run([i])[0] for i in range(8)])
        # In every slot once.
        for shift in range(8):
            order = (np.arange(8) + shift) % 8
            assert run(order).tolist() == [alone[-1][i] for i in order]
        # Beside seven others of its kind, so that no other slot asks for more.
        for i in range(8):
            assert run([i] * 8).tolist() == [alone[-1][i]] * 8
        together.append(run(range(8)).tolist())
    assert alone == together
    assert len({tuple(tokens) for tokens in together}) == 12


def test_greedy_slots_take_the_first_of_the_likeliest():
    logits, allowed, said, positions = batch(0)
    settings = SlotSampling.of(TokenSampling(top_k=2, top_p=0.1), 8)
    tokens = sample(logits, settings, positions=positions, allowed=allowed, said=said)
    assert tokens.tolist() == np.argmax(np.where(allowed, logits, -np.inf), axis=-1).tolist()


def test_filters_that_keep_all_change_no_draw():
    logits, allowed, said, positions = batch(1)

    def run(**sampling):
        settings = SlotSampling.of(TokenSampling(temperature=1.5, **sampling), 8)
        return sample(logits, settings, positions=positions, allowed=allowed, said=said).tolist()

    plain = run()
    for vocabulary in (203, 204, 10**6, 2**31 - 1):
        assert run(top_k=vocabulary) == plain
    assert run(top_p=1.0) == plain
    assert run(seed=1) != plain


@pytest.mark.parametrize(
    "sampling", [{"top_k": 1}, {"top_p": 1e-30}, {"top_p": 1e-60}, {"top_p": 1e-3}], ids=str
)
def test_filters_that_keep_one_are_greedy(sampling):
    logits = np.random.default_rng(0).permuted(np.tile(np.arange(64, dtype=np.float32), (8, 1)), axis=1) / 50
    settings = SlotSampling.of(TokenSampling(temperature=2.0, **sampling), 8)
    arguments = {"positions": np.arange(8), "allowed": np.ones(64, bool), "said": np.zeros((8, 64), bool)}
    assert sample(logits, settings, **arguments).tolist() == np.argmax(logits, axis=-1).tolist()


@pytest.mark.parametrize("sampling", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.9}], ids=str)
def test_extreme_logits(sampling):
    huge = np.float32(3e38)
    logits = jnp.asarray([[-huge, huge, 0.0, -np.inf, 1.0, np.nextafter(huge, 0), -huge, -np.inf]])
    assert shares_of(TokenSampling(temperature=1e-6, **sampling), logits=logits, count=64)[1] == 1
    # As likely as each other, far below all that float32 can tell apart around zero.
    low = jnp.where(jnp.arange(8) < 2, -huge, -jnp.inf)[None]
    shares = shares_of(TokenSampling(temperature=1.0, **sampling), logits=low)
    np.testing.assert_allclose(shares[:2], 0.5, atol=ATOL)


def test_draws_have_the_distribution_of_the_kept_tokens():
    """Pearson's chi-square of draws at successive positions, each slot with another filter."""
    logits = np.random.default_rng(5).normal(size=24).astype(np.float32)
    configs = [
        TokenSampling(temperature=1.0, seed=11),
        TokenSampling(temperature=1.3, top_k=10, seed=12),
        TokenSampling(temperature=0.8, top_p=0.9, seed=13),
        TokenSampling(temperature=1.1, top_k=12, top_p=0.9, repetition_penalty=1.5, seed=14),
    ]
    count, allowed, said = 8192, np.ones(24, bool), np.arange(24) % 3 == 0
    settings = SlotSampling.of([config for config in configs for _ in range(count)], 4 * count)
    tokens = sample(
        np.tile(logits, (4 * count, 1)),
        settings,
        positions=np.tile(np.arange(count), 4),
        allowed=allowed,
        said=np.tile(said, (4 * count, 1)),
    )
    for config, drawn in zip(configs, np.asarray(tokens).reshape(4, count), strict=True):
        x, kept = scores_and_kept(logits, config, allowed, said)
        expected = softmax(x[kept] / config.temperature) * count
        found = np.bincount(drawn, minlength=24)
        assert found[kept].sum() == count
        assert expected.min() > 5
        freedom = len(kept) - 1
        statistic = ((found[kept] - expected) ** 2 / expected).sum()
        # Of mean `freedom` and variance `2 freedom`; beyond six standard deviations, 1 of 1,000 at most.
        assert statistic < freedom + 6 * (2 * freedom) ** 0.5


def test_draws_differ_from_position_to_position_and_seed_to_seed():
    count, logits = 64, np.zeros((64, 4096), np.float32)
    arguments = {"allowed": np.ones(4096, bool), "said": np.zeros((64, 4096), bool)}
    one = SlotSampling.of(TokenSampling(temperature=1.0), count)
    assert len(set(sample(logits, one, positions=np.arange(count), **arguments).tolist())) > 48
    assert len(set(sample(logits, one, positions=np.full(count, 3), **arguments).tolist())) == 1
    seeds = SlotSampling.of([TokenSampling(temperature=1.0, seed=i) for i in range(count)], count)
    assert len(set(sample(logits, seeds, positions=np.full(count, 3), **arguments).tolist())) > 48


@pytest.mark.parametrize(
    ("sampling", "kind"),
    [
        (TokenSampling(), SamplingKind.GREEDY),
        (TokenSampling(top_k=3, top_p=0.5, repetition_penalty=2.0), SamplingKind.GREEDY),
        (TokenSampling(temperature=1e-3), SamplingKind.DRAWN),
        (TokenSampling(temperature=1.0, repetition_penalty=1.3, seed=4), SamplingKind.DRAWN),
        (TokenSampling(temperature=1.0, top_k=1), SamplingKind.FILTERED),
        (TokenSampling(temperature=1.0, top_p=0.999), SamplingKind.FILTERED),
    ],
    ids=str,
)
def test_what_a_way_of_sampling_takes(sampling, kind):
    assert kind_of(sampling) == kind


@pytest.mark.parametrize("seed", range(10))
def test_a_slot_gets_the_same_token_where_others_ask_for_more(seed):
    """Each of the slots by its own kind, alone, and by every kind above it, with the others."""
    logits, allowed, said, positions = batch(seed)
    settings = SlotSampling.of(MIXED, 8)
    together = {
        kind: sample(logits, settings, kind, positions=positions, allowed=allowed, said=said)
        for kind in SamplingKind
    }
    kinds = [kind_of(config) for config in MIXED]
    assert set(kinds) == set(SamplingKind)
    for i, config in enumerate(MIXED):
        own = logits[i : i + 1], SlotSampling.of(config, 1), kinds[i]
        (alone,) = sample(*own, positions=positions[i : i + 1], allowed=allowed, said=said[i : i + 1])
        assert all(together[kind][i] == alone for kind in SamplingKind if kind >= kinds[i])


def test_no_kind_computes_more_than_it_has_to():
    """Draws take random bits, filters a loop; nothing is sorted, and nothing branches on the device."""
    arguments = {"positions": np.zeros(2, int), "allowed": np.ones(8, bool), "said": np.zeros((2, 8), bool)}
    settings = SlotSampling.of([TokenSampling(), TokenSampling(temperature=1.0, top_k=2)], 2)

    def primitives(kind):
        traced = jax.make_jaxpr(functools.partial(sample, kind=kind))(
            np.zeros((2, 8), np.float32), settings, **arguments
        )
        return set(inner(traced.jaxpr))

    names = {kind: primitives(kind) for kind in SamplingKind}
    wanted = {"random_bits", "scan", "while", "sort", "top_k", "cond"}
    assert not names[SamplingKind.GREEDY] & wanted
    assert names[SamplingKind.DRAWN] & wanted == {"random_bits"}
    assert names[SamplingKind.FILTERED] & wanted <= {"random_bits", "scan", "while"}


def inner(jaxpr):
    """Names of the primitives of a program and of those that it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "jit":
            yield from inner(equation.params["jaxpr"].jaxpr)
        else:
            yield equation.primitive.name


def test_samplings_that_are_not_one_a_slot_are_refused():
    with pytest.raises(ValueError, match="there are 2 samplings for 3 slots; give one for each slot"):
        SlotSampling.of([TokenSampling()] * 2, 3)
