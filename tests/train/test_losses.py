"""The loss against the original's values and gradients, and what it ignores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moss_jax.convert import to_hugging_face
from moss_jax.train.losses import IGNORED, next_token_loss

SILENCE_WEIGHT = 0.1
# Of gradients; that of one gate is a sum that nearly cancels, and GPUs add in another order.
TOLERANCE = {"cpu": 1e-4, "gpu": 1e-3}


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
    loss = next_token_loss(
        values[logits],
        values["labels"],
        silence_id=int(values["silence_token_id"]),
        silence_weight=weight,
    )
    assert float(loss.loss) == pytest.approx(float(values[expected]), rel=1e-6)
    assert loss.targets == (values["labels"][:, 1:] != IGNORED).sum()


def test_gradients(golden, platform):
    graph, params = nnx.split(golden.model)

    @jax.jit
    @jax.value_and_grad
    def loss_of(params):
        logits = nnx.merge(graph, params)(golden.tokens, golden.pixels, golden.frame_positions)
        return next_token_loss(
            logits,
            golden.vectors["labels"],
            silence_id=int(golden.vectors["silence_token_id"]),
            silence_weight=SILENCE_WEIGHT,
        ).loss

    loss, gradient = loss_of(params)
    expected = golden.gradients
    assert float(loss) == pytest.approx(float(expected["loss_silence_0p1_causal"]), rel=1e-5)

    tensors = dict(to_hugging_face(golden.model.config, gradient))
    assert set(tensors) == set(expected["norm_names"])
    for name, norm in zip(expected["norm_names"], expected["norms"], strict=True):
        actual = np.linalg.norm(tensors[name].astype(np.float64))
        assert actual == pytest.approx(norm, rel=TOLERANCE[platform]), name
    full = {key.removeprefix("grad:"): of for key, of in expected.items() if key.startswith("grad:")}
    assert len(full) == 8
    for name, tensor in full.items():
        error = np.abs(tensors[name] - tensor).max()
        assert error <= TOLERANCE[platform] * np.abs(tensor).max(), name


def definition(logits, labels, silence_id, weight):
    """Target by target, in float64."""
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


@pytest.mark.parametrize("silence_id", [None, 3])
def test_is_what_it_says(batch, silence_id):
    logits, labels = batch
    labels = labels.copy()
    labels[0, 5] = 3
    loss = next_token_loss(logits, labels, silence_id=silence_id, silence_weight=0.25)
    assert float(loss.loss) == pytest.approx(definition(logits, labels, silence_id, 0.25), rel=1e-6)
    assert loss.targets == 16 - 3 - 2


def test_ignored_labels_have_no_influence(batch):
    logits, labels = batch
    gradient = jax.grad(lambda x: next_token_loss(x, labels).loss)(jnp.asarray(logits))
    counted = labels[:, 1:] != IGNORED
    assert (np.abs(gradient[:, :-1]).max(axis=-1) > 0).tolist() == counted.tolist()
    assert not np.asarray(gradient[:, -1]).any()
    other = logits.copy()
    other[:, :-1][~counted] = 100.0
    assert next_token_loss(other, labels).loss == next_token_loss(logits, labels).loss


def test_nothing_to_learn_is_no_loss(batch):
    logits, labels = batch
    value, gradient = jax.value_and_grad(lambda x: next_token_loss(x, np.full_like(labels, IGNORED)).loss)(
        jnp.asarray(logits)
    )
    assert value == 0
    assert not np.asarray(gradient).any()


def test_is_computed_in_float32(batch):
    logits, labels = batch
    half = jnp.asarray(logits, jnp.bfloat16)
    assert next_token_loss(half, labels).loss == next_token_loss(half.astype(jnp.float32), labels).loss
    assert next_token_loss(half, labels).loss.dtype == jnp.float32
    # Scores far apart overflow the exponential, but not the loss.
    assert next_token_loss(1000 * logits, labels).loss < 1e4
