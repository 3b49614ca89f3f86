"""The decoder-only twin of the benchmarks obeys its law, and is what it says it is."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks.twin import Twin, TwinDecoderConfig, room, twin_of
from moss_jax.config import ConfigError, SessionConfig, moss_video_11b
from moss_jax.stream import PENDING, Engine, Row, Session
from moss_jax.video import preprocess

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def twin(small_config, random_model, tokenizer) -> Twin:
    """Random weights, large enough that frames and tokens matter to what is said."""
    config = small_config()
    decoder = dataclasses.replace(config.decoder, vocab_size=tokenizer.vocab_size, max_positions=4096)
    return random_model(twin_of(dataclasses.replace(config, decoder=decoder)), of=Twin)


@pytest.fixture(scope="module")
def engine(twin, tokenizer) -> Engine:
    return Engine(twin, tokenizer, room(twin.config, tokens=200, frames=20))


@pytest.fixture(scope="module")
def one_pass(twin):
    """Logits after each token of a sequence, whose vectors are put one after the other by hand."""
    graph, params = nnx.split(twin)
    size = 384  # One program for all sequences, as for all numbers of frames.
    vision = twin.config.vision

    @jax.jit
    def encode(params, frames):
        pixels = preprocess(
            frames, image_size=vision.image_size, mean=vision.image_mean, std=vision.image_std
        )
        return nnx.merge(graph, params).encode(pixels)

    @jax.jit
    def run(params, vectors):
        decoder = nnx.merge(graph, params).decoder
        return decoder.logits(decoder(vectors[None]))[0]

    def one_pass(tokens: list[int], frames: list[np.ndarray]) -> np.ndarray:
        padding = [np.zeros_like(frames[0])] * (16 - len(frames))
        features = iter(encode(params, np.stack([*frames, *padding])))
        embedding = np.asarray(twin.decoder.embedding[...])
        image = twin.config.decoder.image_token_id
        parts = [np.asarray(next(features)) if t == image else embedding[t][None] for t in tokens]
        vectors = np.concatenate(parts)
        padded = np.zeros((size, vectors.shape[1]), np.float32)
        padded[: len(vectors)] = vectors
        ends = np.cumsum([len(part) for part in parts])
        return np.asarray(run(params, padded))[ends - 1]

    return one_pass


@pytest.mark.parametrize("stream", range(2))
def test_streaming_is_one_pass(engine, one_pass, frames, tokenizer, stream):
    """Rows of every kind, in two streams."""
    image = tokenizer.special.image
    rng = np.random.default_rng(2)

    def words(count):
        return rng.integers(1, 200, count).tolist()

    plan = [
        [
            Row(words(5)),
            Row([PENDING, image], range(1, 2)),
            Row([PENDING]),
            Row([image] * 8, range(2, 10)),
            Row([PENDING, *words(19)]),
            Row([PENDING, *[image] * 3, *words(1)], range(10, 13)),
            Row([PENDING]),
        ],
        [
            Row([*words(3), image], range(1)),
            Row([PENDING, *words(2), image, image, *words(1)], range(1, 3)),
            Row([PENDING]),
            Row([PENDING, image], range(3, 4)),
            Row([PENDING, *words(3)]),
            Row([PENDING]),
        ],
    ][stream]
    pool = engine.encode(frames)
    state, pending = engine.start(), None
    told, seen, found = [], [], []
    for row in plan:
        state, drawn = engine.step(state, [row], pool)
        told += [pending if t == PENDING else t for t in row.tokens]
        seen += [frames[i] for i in row.frames]
        pending = int(drawn.tokens[0])
        found.append((len(told) - 1, np.asarray(drawn.logits[0])))
    vectors = engine.model_config.vectors_per_frame
    expected = one_pass(told, seen)
    assert 0.3 < expected.std() < 5
    for at, logits in found:
        np.testing.assert_allclose(logits, expected[at], rtol=0, atol=TOLERANCE)
    assert int(state.stream.text.length[0]) == len(told) + len(seen) * (vectors - 1)
    assert int(state.stream.bank.length[0]) == len(seen) * vectors
    blind = one_pass(told, [np.zeros_like(frame) for frame in seen])
    assert np.abs(blind - expected)[found[-1][0]].max() > 0.1


def test_several_slots_are_refused(twin, tokenizer):
    config = dataclasses.replace(room(twin.config, tokens=20, frames=2), slots=2)
    engine = Engine(twin, tokenizer, config)
    with pytest.raises(ConfigError, match=r"a twin runs one stream; engine\.slots must be 1, not 2"):
        engine.step(engine.start(), [Row([1, 2, 3]), None])


def test_a_session_runs_it(twin, tokenizer, frames):
    engine = Engine(twin, tokenizer, room(twin.config, tokens=1000, frames=3))
    session = Session(engine, SessionConfig(tokens_per_second=2, tail_seconds=1), prompt="What is there?")
    for i, frame in enumerate(frames[:4]):
        session.push_frame(frame, float(i))
    session.push_prompt("And now?", 1.5)
    session.finish()
    *_, end = session
    assert (end.reason, end.counters.frames, end.counters.prompts) == ("bank_capacity", 3, 2)


def test_the_twin_of_the_11b_has_the_shape_of_llama_3_1_8b():
    config = twin_of(moss_video_11b())
    decoder = config.decoder
    assert (decoder.num_layers, decoder.hidden_size, decoder.intermediate_size) == (32, 4096, 14_336)
    assert (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim) == (32, 8, 128)
    assert config.vectors_per_frame == 101
    twin = nnx.eval_shape(lambda: Twin(config, rngs=nnx.Rngs(0), dtype="bfloat16"))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(twin.decoder)))
    assert count == 8_030_261_248 + 8 * 4096  # The rows of <|image|> and its neighbours.


def test_a_twin_has_no_cross_attention():
    decoder = twin_of(moss_video_11b()).decoder
    with pytest.raises(ConfigError, match="no cross-attention"):
        dataclasses.replace(decoder, cross_attention_layers=(3,))
    assert isinstance(decoder, TwinDecoderConfig)
