"""Attention maps: the weights are those that the model itself attends with."""

import jax
import numpy as np
import pytest

from moss_jax.config import SessionConfig
from moss_jax.eval.attention import Recorder, frame_attention
from moss_jax.ops.attention import attention
from moss_jax.stream import Session

EPS = np.finfo(np.float32).eps
LENGTH, FRAMES = 12, 3
# The second sequence lacks its third frame; both have tokens before the first.
POSITIONS = np.asarray([[2, 5, 9], [1, 1, LENGTH]], np.int32)
SEEN = (POSITIONS[:, None] <= np.arange(LENGTH)[:, None]).sum(axis=-1)  # [B, T]


@pytest.fixture(scope="module", params=["skip", "attend"])
def watched(request, small_config, random_model):
    """A model, and arguments of its one-pass call."""
    model = random_model(small_config(rows_before_first_frame=request.param, remat="dots"))
    rng = np.random.default_rng(0)
    size = model.config.vision.image_size
    tokens = rng.integers(0, model.config.decoder.vocab_size, (2, LENGTH), np.int32)
    pixels = rng.standard_normal((2, FRAMES, size, size, 3), np.float32)
    return model, (tokens, pixels, POSITIONS)


@pytest.fixture(scope="module")
def weights(watched):
    """Weights [B, L, H, T, F, N]."""
    model, sequence = watched
    return frame_attention(model, *sequence, per_vector=True)


@pytest.fixture
def attended(watched, monkeypatch):
    """Values and result of cross-attention in each layer of the model itself."""
    model, (tokens, pixels, positions) = watched
    calls = []

    def spy(q, k, v, kv_range=None, **options):
        out = attention(q, k, v, kv_range, **options)
        if kv_range is not None:
            calls.append((v, out))
        return out

    @jax.jit
    def run():
        features = model.encode(pixels.reshape(-1, *pixels.shape[2:]))
        model.decoder(tokens, features.reshape(*pixels.shape[:2], *features.shape[1:]), positions)
        return calls

    monkeypatch.setattr("moss_jax.nn.decoder.attention", spy)
    return run()


def test_weights_times_values_give_the_result_of_each_layer(weights, attended):
    assert len(attended) == weights.shape[1] == 2
    for layer, (values, out) in enumerate(attended):
        values = np.repeat(values, weights.shape[2] // values.shape[1], axis=1)  # [B, H, S, D]
        by_key = weights[:, layer].reshape(*weights.shape[:1], *weights.shape[2:4], -1)
        mine = np.einsum("BHTS,BHSD->BTHD", by_key, values)
        # A score of normed queries and keys is below 8, a sum of D = 8 products: its error is below 64 eps.
        # It enters a weight twice, in numerator and denominator, and there are two computations.
        np.testing.assert_allclose(mine, out, rtol=0, atol=4 * 64 * EPS * np.abs(values).max())
        assert np.abs(out).max() > 0.1


def test_weights_add_up_to_one_over_the_frames_that_a_token_sees(watched, weights):
    by_frame = weights.sum(axis=-1)
    total = by_frame.sum(axis=-1).transpose(0, 3, 1, 2)  # [B, T, L, H]
    atol = 2 * weights[0, 0, 0, 0].size * EPS  # a sum of this many rounded quotients
    np.testing.assert_allclose(total[SEEN > 0], 1, rtol=0, atol=atol)
    future = np.arange(FRAMES) >= SEEN[..., None]  # [B, T, F]
    if watched[0].config.rows_before_first_frame == "skip":
        assert not total[SEEN == 0].any()
    else:
        np.testing.assert_allclose(total[SEEN == 0], 1, rtol=0, atol=atol)
        future &= SEEN[..., None] > 0
    assert not by_frame.transpose(0, 3, 4, 1, 2)[future].any()


def test_weights_of_a_frame_are_the_sum_over_its_vectors(watched, weights):
    model, sequence = watched
    by_frame = frame_attention(model, *sequence)
    assert by_frame.shape == (2, 2, 4, LENGTH, FRAMES)
    # Two sums of N numbers that are at most 1 together.
    np.testing.assert_allclose(by_frame, weights.sum(axis=-1), rtol=0, atol=2 * weights.shape[-1] * EPS)


def test_the_model_stays_as_it_is(watched):
    model, sequence = watched
    before = type(model.decoder.layers[0].attention)
    frame_attention(model, *sequence)
    assert type(model.decoder.layers[0].attention) is before
    assert model.config.remat == "dots"


def test_a_recorder_keeps_what_the_model_read_and_said(make_engine, one_pass, tokenizer, frames):
    recorder = Recorder(make_engine())
    session = Session(recorder, SessionConfig(tokens_per_second=4), prompt="What is this?")
    for second, frame in enumerate(frames[:5]):
        session.push_frame(frame, float(second))
    session.push_prompt("And now?", 2.6)
    session.finish()
    events = [event.to_dict() for event in session]

    tokens, pixels, positions = recorder.sequence()
    assert tokens.shape == (1, len(recorder.tokens))
    assert pixels.shape[:2] == positions.shape == (1, 5)
    np.testing.assert_array_equal(recorder.frames, frames[:5])

    # Every token of its text is the most likely one after those before it.
    special = tokenizer.special
    never = sorted(tokenizer.control_ids - {special.silence, special.eot, special.image})
    scores = one_pass(recorder.tokens, recorder.frames).copy()
    scores[:, [token for token in never if token < tokenizer.vocab_size]] = -np.inf
    said = recorder.said
    assert len(said) > 5
    before = scores[np.asarray(said) - 1]
    # Streaming and one pass differ by up to 1e-4.
    assert (before[np.arange(len(said)), tokens[0, said]] >= before.max(axis=-1) - 2e-4).all()
    # The token sampled last was never read.
    text = "".join(event["text"] for event in events if event["type"] == "text")
    assert text.startswith(tokenizer.decode(tokens[0, said]))


def test_a_recorder_refuses_an_engine_of_several_slots(make_engine):
    with pytest.raises(ValueError, match="an engine of 1 slot, not of 2"):
        Recorder(make_engine(slots=2))
