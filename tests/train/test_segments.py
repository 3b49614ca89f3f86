"""Training on segments of long streams: the pass over them is the one pass, and the memory between them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_jax.config import ConfigError, OptimizerConfig, SegmentsConfig, TrainConfig
from moss_jax.data.batch import Batch, Segments
from moss_jax.sharding import make_mesh
from moss_jax.text.labels import IGNORED
from moss_jax.train.segments import empty_memory, make_memories, run_segments
from moss_jax.train.step import Trainer

IMAGE = 64  # The vocabulary size of `small_config`.
B, K, T, F = 2, 3, 8, 2
# Two streams of three segments: tokens of each, and the frames' places among them.
LENGTHS = np.array([[8, 6, 7], [7, 8, 5]])
FRAMES = np.array([[[2, 5], [0, 3], [0, 9]], [[1, 9], [0, 4], [0, 2]]])  # 9: absent.
ROOMY = SegmentsConfig(
    per_step=K, frames=F, tokens=T, streams=(K,), memories=(("pyramid", 16, "model"),), text_capacities=(64,)
)
# Sums of some hundred products in float32, through a few layers.
ATOL = 1e-4


@pytest.fixture(scope="module")
def model(small_config, random_model):
    return random_model(small_config())


def pad(rows: list[np.ndarray], length: int, value: int = 0) -> np.ndarray:
    return np.stack([np.pad(row, (0, length - len(row)), constant_values=value) for row in rows])


def make_streams(seed: int = 0):
    """Whole sequences, and the same cut into segments: tokens, features' index and positions of each."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, IMAGE, (B, K, T), np.int32)
    for b, k in np.ndindex(B, K):
        tokens[b, k, FRAMES[b, k][FRAMES[b, k] < LENGTHS[b, k]]] = IMAGE
        tokens[b, k, LENGTHS[b, k] :] = 0
    whole = [np.concatenate([tokens[b, k, : LENGTHS[b, k]] for k in range(K)]) for b in range(B)]
    starts = np.cumsum(LENGTHS, axis=1) - LENGTHS
    present = LENGTHS[..., None] > FRAMES
    positions = [(FRAMES + starts[..., None])[b][present[b]] for b in range(B)]
    return tokens, whole, positions, present


def segments_of(kept=None, **changes) -> Segments:
    """Every token stays, unless `kept` says which."""
    held = np.cumsum(LENGTHS, axis=1) - LENGTHS
    everything = np.broadcast_to(np.arange(64, dtype=np.int32), (B, K, 64)).copy()
    begins = np.zeros((B, K), bool)
    begins[:, 0] = True
    segments = Segments(begins, LENGTHS.astype(np.int32), np.zeros((B, K), np.int32), everything, held)
    return dataclasses.replace(segments, **changes)


def run(model, config, tokens, features, segments, present, memory=None, offsets=FRAMES):
    flat = np.where(present, offsets + np.arange(K)[:, None] * T, K * T).reshape(B, K * F)
    memory = memory or empty_memory(config, model.config, B, jnp.float32)
    hidden, memory = run_segments(
        model,
        memory,
        jnp.asarray(tokens.reshape(B, K * T)),
        features,
        jnp.asarray(flat),
        jax.tree.map(jnp.asarray, segments),
        make_memories(config, model.config),
    )
    return hidden.reshape(B, K, T, -1), memory


def features_of(model, seed: int = 1):
    config = model.config
    shape = (B, K * F, config.vectors_per_frame, config.decoder.hidden_size)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def one_pass(model, whole, positions, features, present):
    length = max(map(len, whole))
    index = [np.flatnonzero(row.reshape(-1)) for row in present]
    most = max(map(len, index))
    picked = jnp.stack([features[b][np.pad(index[b], (0, most - len(index[b])))] for b in range(B)])
    hidden = model.decoder(
        jnp.asarray(pad(whole, length)), picked, jnp.asarray(pad(positions, most, length).astype(np.int32))
    )
    return np.asarray(hidden)


def test_segments_are_the_one_pass(model):
    """With room for everything, hidden states are those of the whole sequences."""
    tokens, whole, positions, present = make_streams()
    features = features_of(model)
    hidden, _ = run(model, ROOMY, tokens, features, segments_of(), present)
    expected = one_pass(model, whole, positions, features, present)
    for b in range(B):
        found = np.concatenate([hidden[b, k, : LENGTHS[b, k]] for k in range(K)])
        np.testing.assert_allclose(found, expected[b, : len(whole[b])], rtol=0, atol=ATOL)


def test_a_memory_is_carried_from_step_to_step(model):
    """Three segments in two calls are those of one, and a stream that begins finds nothing of the last."""
    tokens, _, _, present = make_streams()
    features = features_of(model)
    whole, _ = run(model, ROOMY, tokens, features, segments_of(), present)
    # The same again behind another stream: rows begin anew, whatever the memory holds.
    _, used = run(model, ROOMY, *make_streams(5)[:1], features_of(model, 6), segments_of(), present)
    again, memory = run(model, ROOMY, tokens, features, segments_of(), present, used)
    np.testing.assert_allclose(again, whole, rtol=0, atol=ATOL)
    # And from there on, without beginning.
    held = np.asarray(memory.text.length)
    np.testing.assert_array_equal(held, LENGTHS.sum(axis=1))
    kept = held[:, None] + np.cumsum(LENGTHS, axis=1) - LENGTHS
    _, after = run(
        model,
        ROOMY,
        tokens,
        features,
        segments_of(begins=np.zeros((B, K), bool), kept_length=kept),
        present,
        memory,
    )
    np.testing.assert_array_equal(after.text.position, 2 * LENGTHS.sum(axis=1))
    assert (np.diff(np.asarray(after.bank.positions[0, : after.bank.length[0]])) >= 0).all()


def test_skipped_positions_move_tokens_and_frames_alike(small_config, random_model):
    """Where attention knows distances only, a gap before everything changes nothing."""
    model = random_model(small_config())
    for layer in model.decoder.layers:
        if hasattr(layer.attention, "k_norm"):
            # Behind the rotation, so that weights of their own for each channel tell positions apart.
            layer.attention.k_norm.weight[...] = jnp.ones_like(layer.attention.k_norm.weight[...])
    tokens, _, _, present = make_streams()
    features = features_of(model)
    skipped = np.zeros((B, K), np.int32)
    skipped[:, 0] = 1000
    before, _ = run(model, ROOMY, tokens, features, segments_of(), present)
    after, memory = run(model, ROOMY, tokens, features, segments_of(skipped=skipped), present)
    # Angles of positions up to a thousand are off by 1000 * 2^-24 each.
    np.testing.assert_allclose(after, before, rtol=0, atol=5e-3)
    assert int(memory.bank.positions[0, 0]) == 1000 + FRAMES[0, 0, 0]


def test_full_banks_are_compacted_and_gradients_pass_through(model):
    """The loss of the last segment depends on features of the first, through their means."""
    config = dataclasses.replace(
        ROOMY, memories=(("window", 3, "model"), ("merge", 4, "int8")), text_capacities=(64,)
    )
    tokens, _, _, present = make_streams()
    present = np.ones_like(present)
    offsets = np.broadcast_to(np.array([0, 3]), FRAMES.shape)
    # No text stays, through which the oldest frames would have an influence all the same.
    segments = segments_of(kept_length=np.zeros((B, K), np.int32))

    def last(features):
        hidden, memory = run(model, config, tokens, features, segments, present, offsets=offsets)
        return (hidden[:, -1] ** 2).sum(), memory

    gradient, memory = jax.jit(jax.grad(last, has_aux=True))(features_of(model))
    size = np.abs(np.asarray(gradient)).sum(axis=(2, 3))
    vectors = model.config.vectors_per_frame
    # Six frames through a window of three: the oldest are forgotten, and have no gradient.
    assert (size[0, :3] == 0).all()
    assert (size[0, 3:] > 0).all()
    assert (size[1] > 0).all()
    assert int(memory.bank.length[0]) == 3 * vectors
    assert int(memory.bank.length[1]) <= 4 * vectors
    assert float(memory.bank.counts[1].sum()) == 6 * vectors


def make_trainer(tiny_config, **changes) -> Trainer:
    segments = dataclasses.replace(ROOMY, memories=(("merge", 4, "model"), ("window", 4, "fp8")), **changes)
    return Trainer(
        tiny_config(),
        TrainConfig(steps=8, batch_size=B, compute_dtype="float32"),
        OptimizerConfig(learning_rate=1e-2),
        make_mesh(devices=jax.devices()[:1]),
        silence_id=7,
        segments=segments,
    )


def test_steps_train_and_carry_the_memory(tiny_config):
    trainer = make_trainer(tiny_config)
    tokens, _, _, present = make_streams()
    tokens = tokens.reshape(B, K * T)
    flat = np.where(present, FRAMES + np.arange(K)[:, None] * T, K * T).reshape(B, K * F).astype(np.int32)
    labels = np.where((tokens == IMAGE) | (tokens == 0), IGNORED, tokens)
    frames = np.random.default_rng(2).integers(0, 256, (B, K * F, 28, 28, 3), np.uint8)
    state, losses = trainer.init(0), []
    held = np.zeros(B, np.int64)
    for step in range(8):
        begins = np.zeros((B, K), bool)
        begins[:, 0] = step % 2 == 0
        held = np.where(begins[:, 0], 0, held)
        kept = held[:, None] + np.cumsum(LENGTHS, axis=1) - LENGTHS
        held = held + LENGTHS.sum(axis=1)
        segments = segments_of(begins=begins, kept_length=kept.astype(np.int32))
        state, metrics = trainer.step(state, trainer.put(Batch(tokens, labels, frames, flat, segments)))
        losses.append(float(metrics["loss"]))
        np.testing.assert_array_equal(state.memory.text.length, held)
        assert float(metrics["tokens"]) == LENGTHS.sum()
    assert losses[-2] < 0.8 * losses[0]
    assert losses[-1] < 0.8 * losses[1]


def test_what_cannot_be_is_refused(small_config):
    with pytest.raises(ConfigError, match="makes no room"):
        make_memories(dataclasses.replace(ROOMY, memories=(("full", 8, "model"),)), small_config())
    with pytest.raises(ConfigError, match="must be one of 'full', 'window'"):
        make_memories(dataclasses.replace(ROOMY, memories=(("pyramids", 8, "model"),)), small_config())
    with pytest.raises(ConfigError, match=r"multiple of the 3 segments\.memories"):
        Trainer(
            small_config(),
            TrainConfig(batch_size=4),
            OptimizerConfig(),
            make_mesh(devices=jax.devices()[:1]),
            silence_id=7,
            segments=dataclasses.replace(ROOMY, memories=ROOMY.memories * 3),
        )
