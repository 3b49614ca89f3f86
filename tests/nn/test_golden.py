"""The model against the vectors of the original PyTorch code."""

import dataclasses

import jax
import numpy as np

import moss_jax
from moss_jax.nn.compressor import stack

TOLERANCE = 1e-4


def frames(golden, name):
    """A vector [B, F, 1, N, D] as the frames of a batch."""
    vector = golden.vectors[name]
    return vector.reshape(-1, *vector.shape[3:])


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def test_features_after_each_stage(golden, platform):
    @jax.jit
    def stages(pixels):
        states = golden.model.vision(pixels)
        pooled = golden.model.compressor(states)
        return stack(states), pooled, golden.model.projector(pooled)

    vision, pooled, projected = stages(golden.pixels.reshape(-1, *golden.pixels.shape[2:]))
    close(vision, frames(golden, "vision_features"))
    close(pooled, frames(golden, "pooled_features"))
    close(projected, frames(golden, "projected_features"))


def test_causal_logits(golden, compiled, platform):
    logits = compiled(golden.model)(golden.tokens, golden.pixels, golden.frame_positions)
    assert logits.dtype == np.float32
    close(logits, golden.vectors["logits_causal"])


def test_logits_of_the_training_forward(golden, compiled, platform):
    model = moss_jax.load(golden.folder, rows_before_first_frame="attend")
    logits = compiled(model)(golden.tokens, golden.pixels, golden.frame_positions)
    close(logits, golden.vectors["logits_reference"])
    first = golden.frame_positions[0, 0]
    difference = np.abs(logits[0, :first] - golden.vectors["logits_causal"][0, :first])
    assert difference.max() > 100 * TOLERANCE


def test_streaming_logits(golden, compiled, platform):
    """The first row through the three verbs: a token a call, each frame just before its token."""
    model = compiled(golden.model)
    tokens, positions = golden.tokens[:1], list(golden.frame_positions[0])
    features = model.encode(golden.pixels[0])
    state = model.init_state(1, text_capacity=tokens.shape[1], bank_capacity=len(positions))
    logits = []
    for t in range(tokens.shape[1]):
        if t in positions:
            state = model.remember(state, features[positions.index(t)][None], np.array([t]))
        out, state = model.decode(state, tokens[:, t : t + 1])
        logits.append(out[0, 0])
    close(np.stack(logits), golden.vectors["logits_streaming_row0"])
    assert state.text.length == tokens.shape[1]
    assert state.bank.length == len(positions) * features.shape[1]


def test_a_named_implementation_of_attention(golden, compiled):
    model = moss_jax.load(golden.folder, attention="reference")
    assert model.config == dataclasses.replace(golden.model.config, attention="reference")
    logits = compiled(model)(golden.tokens, golden.pixels, golden.frame_positions)
    close(logits, golden.vectors["logits_causal"])
