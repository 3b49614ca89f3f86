"""The loss: values and gradients of the original, ignored labels, chunks, additional terms."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moss_jax.convert import to_hugging_face
from moss_jax.text.labels import IGNORED
from moss_jax.train.losses import cross_entropy, find_targets, mean_over, token_losses, z_loss

SILENCE_WEIGHT = 0.1
# An id that no token has.
NONE = -1
# Relative error of losses: they are sums of some hundred positive numbers at most.
RTOL = 1e-5
EPS = float(np.finfo(np.float32).eps)
# Normwise relative error of the gradient of a tensor. A gradient that is a sum with cancellation, such as
# that of a gate, may also be off by EPS times the norm of the whole gradient.
GRADIENT_RTOL = {"cpu": 1e-4, "gpu": 1e-3}


def loss_of(logits, labels, *, tokens=None, silence_id=NONE, silence_weight=1.0):
    """The loss as in a training step."""
    targets = find_targets(
        labels if tokens is None else tokens,
        labels,
        silence_id=silence_id,
        image_id=NONE,
        silence_weight=silence_weight,
    )
    return (cross_entropies(logits, targets.ids, lambda x: x) * targets.weights).sum()


def cross_entropies(hidden, ids, logits_of, chunks=1):
    terms = {"cross_entropy": cross_entropy}
    return token_losses(hidden, ids, logits_of, terms=terms, chunks=chunks)["cross_entropy"]


@pytest.mark.parametrize(
    ("logits", "weight", "expected"),
    [
        ("logits_reference", 1.0, "loss_plain"),
        ("logits_reference", SILENCE_WEIGHT, "loss_silence_0p1"),
        ("logits_causal", SILENCE_WEIGHT, "loss_silence_0p1_causal"),
    ],
)
def test_values(golden, logits, weight, expected):
    values = golden.vectors | golden.gradients
    silence = int(values["silence_token_id"])
    loss = loss_of(values[logits], values["labels"], silence_id=silence, silence_weight=weight)
    assert float(loss) == pytest.approx(float(values[expected]), rel=RTOL)


def test_gradients(golden, platform):
    graph, params = nnx.split(golden.model)

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(params):
        logits = nnx.merge(graph, params)(golden.tokens, golden.pixels, golden.frame_positions)
        silence = int(golden.vectors["silence_token_id"])
        return loss_of(logits, golden.vectors["labels"], silence_id=silence, silence_weight=SILENCE_WEIGHT)

    loss, gradient = loss_and_gradient(params)
    expected = golden.gradients
    assert float(loss) == pytest.approx(float(expected["loss_silence_0p1_causal"]), rel=RTOL)

    tensors = dict(to_hugging_face(golden.model.config, gradient))
    assert set(tensors) == set(expected["norm_names"])
    rtol, atol = GRADIENT_RTOL[platform], EPS * np.linalg.norm(expected["norms"])
    for name, norm in zip(expected["norm_names"], expected["norms"], strict=True):
        actual = np.linalg.norm(tensors[name].astype(np.float64))
        assert abs(actual - norm) <= rtol * norm + atol, name
    full = {key.removeprefix("grad:"): value for key, value in expected.items() if key.startswith("grad:")}
    assert len(full) == 8
    for name, tensor in full.items():
        error = np.abs(tensors[name] - tensor).max()
        assert error <= rtol * np.abs(tensor).max() + atol, name


def definition(logits, labels, silence_id, weight):
    """The loss target by target, in float64."""
    total, count = 0.0, 0
    for row, wanted in zip(logits.astype(np.float64)[:, :-1], labels[:, 1:], strict=True):
        for scores, target in zip(row, wanted, strict=True):
            if target == IGNORED:
                continue
            loss = np.log(np.exp(scores).sum()) - scores[target]
            total += loss * (weight if target == silence_id else 1)
            count += 1
    return total / count


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((2, 9, 7)).astype(np.float32), rng.integers(0, 7, (2, 9))
    labels[0, :4] = labels[1, 3] = labels[1, -1] = IGNORED
    return logits, labels


@pytest.mark.parametrize("silence_id", [NONE, 3])
def test_definition(batch, silence_id):
    logits, labels = batch
    labels = labels.copy()
    labels[0, 5] = 3
    loss = loss_of(logits, labels, silence_id=silence_id, silence_weight=0.25)
    assert float(loss) == pytest.approx(definition(logits, labels, silence_id, 0.25), rel=RTOL)


def test_ignored_labels_have_no_influence(batch):
    logits, labels = batch
    gradient = jax.grad(loss_of)(jnp.asarray(logits), labels)
    counted = labels[:, 1:] != IGNORED
    assert (np.abs(gradient[:, :-1]).max(axis=-1) > 0).tolist() == counted.tolist()
    assert not np.asarray(gradient[:, -1]).any()
    other = logits.copy()
    other[:, :-1][~counted] = 100.0
    assert loss_of(other, labels) == loss_of(logits, labels)


def test_the_loss_without_targets_is_zero(batch):
    logits, labels = batch
    value, gradient = jax.value_and_grad(loss_of)(jnp.asarray(logits), np.full_like(labels, IGNORED))
    assert value == 0
    assert not np.asarray(gradient).any()


def test_the_loss_is_computed_in_float32(batch):
    logits, labels = batch
    half = jnp.asarray(logits, jnp.bfloat16)
    assert loss_of(half, labels) == loss_of(half.astype(jnp.float32), labels)
    assert loss_of(half, labels).dtype == jnp.float32
    # Large logits would overflow the exponential.
    assert loss_of(1000 * logits, labels) < 1e4


@pytest.mark.parametrize("chunks", [2, 4, 9])
def test_chunks_change_nothing(chunks):
    """Losses and gradients are those of one chunk, also where the chunks don't divide the sequence."""
    rng = np.random.default_rng(1)
    hidden, head = rng.standard_normal((2, 9, 5), np.float32), rng.standard_normal((5, 7), np.float32)
    ids, weights = rng.integers(0, 7, (2, 9)), rng.random((2, 9), np.float32)

    def loss_and_gradient(chunks):
        @jax.value_and_grad
        def loss(arguments):
            hidden, head = arguments
            return (cross_entropies(hidden, ids, lambda x: x @ head, chunks=chunks) * weights).sum()

        return loss((hidden, head))

    # Gradients are sums over the n tokens of numbers up to max |hidden|.
    atol = EPS * ids.size**2 * np.abs(hidden).max()
    pairs = zip(*(jax.tree.leaves(loss_and_gradient(n)) for n in (chunks, 1)), strict=True)
    for actual, expected in pairs:
        np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=atol)


def test_an_additional_term():
    logits = np.random.default_rng(1).standard_normal((2, 9, 7)).astype(np.float32)
    terms = {"cross_entropy": cross_entropy, "z_loss": z_loss}
    for chunks in (1, 4):
        losses = token_losses(logits, np.zeros((2, 9), int), lambda x: x, terms=terms, chunks=chunks)
        assert set(losses) == set(terms)
        expected = np.log(np.exp(logits.astype(np.float64)).sum(axis=-1)) ** 2
        np.testing.assert_allclose(losses["z_loss"], expected, rtol=RTOL, atol=RTOL)


def test_only_a_chunk_of_the_logits_is_in_memory():
    hidden, head = jnp.zeros((1, 64, 4)), jnp.zeros((4, 1000))

    def loss(head, chunks):
        return cross_entropies(hidden, jnp.zeros((1, 64), int), lambda x: x @ head, chunks=chunks).sum()

    def largest(chunks):
        program = str(jax.make_jaxpr(lambda head: jax.grad(loss)(head, chunks))(head))
        shapes = re.findall(r"f32\[([\d,]+)\]", program)
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    assert largest(1) == 64 * 1000
    assert largest(8) == 8 * 1000


SILENCE, IMAGE = 5, 9


def test_masks_of_targets():
    """Text, silence, and text after a silence, possibly with frames in between."""
    tokens = np.array([[1, 5, 9, 2, 3, 5, 9, 9, 4, 9, 6, 5], [9, 2, 5, 5, 2, 9, 5, 9, 5, 0, 0, 0]])
    labels = np.where((tokens == IMAGE) | (tokens == 0), IGNORED, tokens)
    labels[0, :1] = IGNORED
    labels[1, 4] = IGNORED
    targets = find_targets(tokens, labels, silence_id=SILENCE, image_id=IMAGE, silence_weight=0.1)

    def places(mask):  # of the targets, not of the tokens before them
        return [(b, s + 1) for b, s in np.argwhere(np.asarray(mask)).tolist()]

    silence = [(0, 1), (0, 5), (0, 11), (1, 2), (1, 3), (1, 6), (1, 8)]
    assert places(targets.silence) == silence
    assert places(targets.text) == [(0, 3), (0, 4), (0, 8), (0, 10), (1, 1)]
    # (0, 10) comes after text and a frame, (1, 1) after a frame alone, and (1, 4) is no target.
    assert places(targets.after_silence) == [(0, 3), (0, 8)]
    for b, s in places(targets.text | targets.silence):
        assert targets.ids[b, s - 1] == tokens[b, s]
        assert targets.weights[b, s - 1] == pytest.approx((0.1 if (b, s) in silence else 1) / 12)
    assert float(targets.weights.sum()) == pytest.approx((5 + 0.1 * 7) / 12)


def test_mean_over():
    losses = jnp.array([1.0, 2.0, 6.0])
    assert mean_over(losses, jnp.array([True, False, True])) == 3.5
    assert mean_over(losses, jnp.zeros(3, bool)) == 0
