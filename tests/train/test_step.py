"""The training step on one device: trained and frozen parameters, metrics, micro-batches, loss terms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moss_jax.config import ConfigError, OptimizerConfig, TrainConfig, moss_tiny, moss_video_11b
from moss_jax.data.batch import Batch
from moss_jax.nn import MossVideo
from moss_jax.sharding import make_mesh
from moss_jax.text.labels import IGNORED
from moss_jax.train import step as step_module
from moss_jax.train.step import Trainer, TrainState

SILENCE, IMAGE = 7, 64  # IMAGE is the vocabulary size of `tiny_config`.
B, S, F = 4, 16, 3
STEPS = 24
# Relative error of losses that are computed by another program: sums in another order, and no cancellation.
RTOL = 1e-4


def make_batch(seed: int = 0) -> Batch:
    """Makes rows of several lengths with two of three frames, silences, and ignored prompts."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, IMAGE, (B, S), np.int32)
    tokens[:, [4, 7, 8]] = SILENCE
    positions = np.tile(np.array([2, 5, S], np.int32), (B, 1))
    tokens[:, positions[0, :2]] = IMAGE
    for row, length in enumerate((16, 13, 10, 9)):
        tokens[row, length:] = 0
    labels = np.where((tokens == IMAGE) | (tokens == 0), IGNORED, tokens)
    labels[:, :4] = IGNORED
    return Batch(tokens, labels, rng.integers(0, 256, (B, F, 28, 28, 3), np.uint8), positions)


@pytest.fixture(scope="module")
def make_trainer(tiny_config):
    def make(model=None, optimizer=None, **train) -> Trainer:
        train = {"steps": STEPS, "batch_size": B, "compute_dtype": "float32"} | train
        return Trainer(
            model or tiny_config(),
            TrainConfig(**train),
            optimizer or OptimizerConfig(learning_rate=1e-2, weight_decay=0.01),
            make_mesh(devices=jax.devices()[:1]),
            silence_id=SILENCE,
        )

    return make


def run(trainer: Trainer, steps: int, batch: Batch | None = None) -> tuple[TrainState, list[dict]]:
    """Takes steps on one batch from the initial state; returns the last state and all metrics."""
    state, batch = trainer.init(0), trainer.put(batch or make_batch())
    rows = []
    for _ in range(steps):
        state, metrics = trainer.step(state, batch)
        rows.append({name: float(value) for name, value in metrics.items()})
    return state, rows


def equal(a, b) -> bool:
    """Returns whether two trees are equal bit for bit."""
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


@pytest.fixture(scope="module")
def trainer(make_trainer):
    """Trains all parts in float32."""
    return make_trainer()


@pytest.fixture(scope="module")
def three_steps(trainer):
    return run(trainer, 3)


@pytest.fixture(scope="module")
def frozen_trainer(make_trainer):
    """Trains projector and decoder in bfloat16, with first moments in it too."""
    optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=0.01, first_moment_dtype="bfloat16")
    return make_trainer(optimizer=optimizer, trainable=("projector", "decoder"), compute_dtype="bfloat16")


def test_a_batch_is_memorised(trainer):
    state, rows = run(trainer, STEPS)
    losses = [row["loss"] for row in rows]
    assert losses[-1] < 0.4 * losses[0]
    assert state.step == STEPS


def test_metrics(trainer, three_steps, compiled):
    _, (row, *_) = three_steps
    batch = make_batch()
    targets = batch.labels[:, 1:] != IGNORED
    assert row["targets"] == targets.sum()
    assert row["tokens"] == 16 + 13 + 10 + 9
    assert row["frames"] == 2 * B
    rate = OptimizerConfig(learning_rate=1e-2).learning_rate
    assert row["learning_rate"] == pytest.approx(rate / 3)  # the first step of a warm-up of two
    # The definition, from the logits of the whole model.
    model, vision = trainer.model(trainer.init(0), "float32"), trainer.model_config.vision
    pixels = (batch.frames / 255 - vision.image_mean) / vision.image_std
    logits = compiled(model)(batch.tokens, pixels, batch.frame_positions)
    scores = jax.nn.log_softmax(logits[:, :-1])
    following = np.where(targets, batch.labels[:, 1:], 0)
    losses = -np.take_along_axis(np.asarray(scores), following[..., None], -1)[..., 0]
    silence = targets & (following == SILENCE)
    text = targets & ~silence
    # Token 6 follows a silence and a frame; 9 follows a silence.
    after = text.copy()
    after[:, [s for s in range(S - 1) if s + 1 not in (6, 9)]] = False
    assert after.sum() == 7
    assert row["loss_text"] == pytest.approx(losses[text].mean(), rel=RTOL)
    assert row["loss_silence"] == pytest.approx(losses[silence].mean(), rel=RTOL)
    assert row["loss_after_silence"] == pytest.approx(losses[after].mean(), rel=RTOL)
    weighted = losses[text].sum() + 0.1 * losses[silence].sum()
    assert row["loss"] == pytest.approx(weighted / targets.sum(), rel=RTOL)
    counts = [row[f"targets_{kind}"] for kind in ("text", "silence", "after_silence")]
    assert counts == [text.sum(), silence.sum(), 7]


def test_norms_of_each_trained_part(frozen_trainer):
    state, (row,) = run(frozen_trainer, 1)
    gradient = [row[f"grad_norm/{part}"] for part in ("projector", "decoder")]
    assert min(gradient) > 0
    assert np.hypot(*gradient) == pytest.approx(row["grad_norm"], rel=RTOL)
    for part in ("projector", "decoder"):
        values = [np.ravel(x) for name, x in state.trained.items() if name.startswith(f"{part}/")]
        assert row[f"param_norm/{part}"] == pytest.approx(np.linalg.norm(np.concatenate(values)), rel=RTOL)
    assert not {name for name in row if "/" in name and name.endswith(("vision", "compressor"))}


def test_an_additional_loss_term_is_added_with_its_weight(make_trainer, three_steps):
    _, (plain, *_) = three_steps
    _, (row,) = run(make_trainer(loss_terms=(("z_loss", 0.5),), silence_weight=0.0), 1)
    silence = make_batch().labels[:, 1:] == SILENCE
    cross_entropy = plain["loss_text"] * (1 - silence.sum() / plain["targets"])
    assert row["z_loss"] > 1
    assert row["loss_text"] == pytest.approx(plain["loss_text"], rel=RTOL)
    # Its targets are weighted like those of the cross-entropy.
    assert row["loss"] > cross_entropy + 0.1 * row["z_loss"]
    assert row["grad_norm"] > 1.1 * plain["grad_norm"]


def test_an_unknown_loss_term_is_refused(make_trainer):
    with pytest.raises(ConfigError, match="loss_terms must be some of z_loss; got entropy"):
        make_trainer(loss_terms=(("entropy", 0.1),))


def test_metrics_stay_on_the_device(frozen_trainer):
    _, metrics = frozen_trainer.step(frozen_trainer.init(0), frozen_trainer.put(make_batch()))
    assert {(value.dtype, value.shape) for value in metrics.values()} == {(jnp.dtype("float32"), ())}


def test_frozen_parts_stay_bit_for_bit(frozen_trainer):
    before = jax.tree.map(np.asarray, frozen_trainer.init(0))
    state, _ = run(frozen_trainer, 3)
    assert {name.split("/")[0] for name in state.frozen} == {"vision"}
    assert {name.split("/")[0] for name in state.trained} == {"projector", "decoder"}
    assert equal(state.frozen, before.frozen)
    same = [name for name, value in state.trained.items() if equal(value, before.trained[name])]
    assert not same


def test_frozen_parts_have_no_optimizer_state(frozen_trainer):
    state = frozen_trainer.init(0)
    paths, arrays = zip(*jax.tree_util.tree_flatten_with_path(state.optimizer)[0], strict=True)
    names = {key.key for path in paths for key in path if isinstance(key, jax.tree_util.DictKey)}
    assert names == set(state.trained)
    moments = 2 * sum(x.size for x in state.trained.values())
    assert sum(x.size for x in arrays if x.ndim) == moments


def test_master_weights_are_float32(frozen_trainer, three_steps):
    state, rows = run(frozen_trainer, 3)
    assert {x.dtype for x in state.trained.values()} == {jnp.dtype("float32")}
    adam = state.optimizer[1][0]
    assert {x.dtype for x in adam.nu.values()} == {jnp.dtype("float32")}
    assert {x.dtype for x in adam.mu.values()} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in state.frozen.values()} == {jnp.dtype("bfloat16")}
    # Updates below the resolution of bfloat16 accumulate.
    assert any(np.any(x != x.astype(jnp.bfloat16)) for x in state.trained.values())
    assert rows[0]["loss"] == pytest.approx(three_steps[1][0]["loss"], rel=0.05)


def test_micro_batches_and_chunks_of_the_logits_give_the_same_step(
    make_trainer, trainer, three_steps, monkeypatch
):
    """The micro-batches have different numbers of targets, and the chunks don't divide the sequence."""
    monkeypatch.setattr(step_module, "MAX_LOGITS", B * 3 * IMAGE)
    saving = make_trainer(accumulate=2)
    assert saving._chunks(B // 2, S) == 3
    rows, hidden = [], MossVideo.hidden
    monkeypatch.setattr(
        MossVideo, "hidden", lambda self, ids, *args: rows.append(len(ids)) or hidden(self, ids, *args)
    )
    state, (row,) = run(saving, 1)
    assert set(rows) == {B // 2}
    assert row == pytest.approx(three_steps[1][0], rel=RTOL)
    gradients, expected = first_moments(state), first_moments(run(trainer, 1)[0])
    # Normwise, and for sums with cancellation relative to the whole gradient.
    atol = np.finfo(np.float32).eps * float(optax.tree.norm(expected))
    for name, gradient in gradients.items():
        error = np.linalg.norm(gradient - expected[name])
        assert error <= RTOL * np.linalg.norm(expected[name]) + atol, name


def first_moments(state: TrainState) -> dict[str, jax.Array]:
    """Returns Adam's first moments: after one step, a tenth of the gradient."""
    (moments,) = (x.mu for x in jax.tree.leaves(state.optimizer, is_leaf=is_adam) if is_adam(x))
    return moments


def is_adam(x) -> bool:
    return isinstance(x, optax.ScaleByAdamState)


def test_the_11b_computes_its_logits_in_chunks(make_trainer):
    trainer = make_trainer(moss_video_11b())
    assert trainer._chunks(1, 4096) == 2
    assert trainer._chunks(1, 1024) == 1


def test_absent_frames_have_no_influence(trainer):
    batch = make_batch()
    frames = batch.frames.copy()
    frames[:, 2] = 255 - frames[:, 2]
    (state, rows), (other, other_rows) = (
        run(trainer, 1, b) for b in (batch, dataclasses.replace(batch, frames=frames))
    )
    assert rows == other_rows
    assert equal(state, other)
    frames[0, 1] = 255 - frames[0, 1]
    assert run(trainer, 1, dataclasses.replace(batch, frames=frames))[1] != rows


def test_a_row_without_targets_has_no_influence(trainer):
    """Such as one whose video could not be read."""
    batch = make_batch()
    batch.tokens[1], batch.labels[1], batch.frame_positions[1] = 0, IGNORED, S
    _, (row,) = run(trainer, 1, batch)
    batch.frames[1] = 9
    assert run(trainer, 1, batch)[1] == [row]
    assert row["tokens"] == 16 + 10 + 9
    batch.labels[:] = IGNORED
    state, (row,) = run(trainer, 1, batch)
    assert row["loss"] == row["grad_norm"] == row["targets"] == 0
    assert all(np.isfinite(x).all() for x in state.trained.values())


def test_adopted_parameters(frozen_trainer, tiny_config):
    """A model is copied in and out, and neither copy is donated by the steps."""
    model = MossVideo(tiny_config(), rngs=nnx.Rngs(3))
    state = frozen_trainer.adopt(model)
    first = frozen_trainer.model(state, "float32")
    batch = frozen_trainer.put(make_batch())
    state, _ = frozen_trainer.step(state, batch)
    second = frozen_trainer.model(state, "bfloat16")
    state, _ = frozen_trainer.step(state, batch)
    assert equal(nnx.state(first.decoder), nnx.state(model.decoder))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model.vision))
    assert equal(nnx.state(second.vision), rounded)
    assert second.dtype == jnp.bfloat16
    assert not equal(nnx.state(second.projector), nnx.state(first.projector))


def test_the_abstract_state(frozen_trainer):
    state, abstract = frozen_trainer.init(0), frozen_trainer.abstract()

    def check(array, expected):
        assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
        assert array.sharding == expected.sharding

    jax.tree.map(check, state, abstract)
    state, _ = frozen_trainer.step(state, frozen_trainer.put(make_batch()))
    jax.tree.map(check, state, abstract)
    jax.tree.map(lambda array, sharding: array.sharding == sharding, state, frozen_trainer.shardings)


def test_untrainable_settings_are_refused(make_trainer, tiny_config, trainer):
    with pytest.raises(ConfigError, match="only parts without parameters: compressor"):
        make_trainer(trainable=("compressor",))
    assert make_trainer(tiny_config("channelFusion"), trainable=("compressor",)).abstract().trained
    with pytest.raises(ValueError, match="parameters of this model are not those"):
        trainer.adopt(MossVideo(tiny_config("channelFusion"), rngs=nnx.Rngs(0)))
    half = jax.tree.map(lambda x: x[:3], make_batch())
    with pytest.raises(ConfigError, match=r"batch of 3 sequences .* multiple of 2"):
        make_trainer(accumulate=2).put(half)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["mosaic_gpu", None])
def test_kernels_train_like_plain_xla(attention):
    """Losses of three steps and the norm of the first gradient agree to the precision of bfloat16."""
    rng = np.random.default_rng(0)
    config = dataclasses.replace(moss_tiny(), attention="xla")
    vocab, size, frames, length = config.decoder.vocab_size, config.vision.image_size, 4, 96
    tokens = rng.integers(1, vocab, (2, length), np.int32)
    positions = np.tile(np.array([3, 20, 41, 77], np.int32), (2, 1))
    tokens[:, positions[0]] = config.decoder.image_token_id
    labels = np.where(tokens == config.decoder.image_token_id, IGNORED, tokens)
    pixels = rng.integers(0, 256, (2, frames, size, size, 3), np.uint8)
    batch = Batch(tokens, labels, pixels, positions)

    def losses(name):
        trainer = Trainer(
            dataclasses.replace(config, attention=name),
            TrainConfig(steps=3, batch_size=2, compute_dtype="bfloat16"),
            OptimizerConfig(learning_rate=1e-3),
            make_mesh(devices=jax.devices()[:1]),
            silence_id=SILENCE,
        )
        _, rows = run(trainer, 3, batch)
        return np.array([row["loss"] for row in rows]), rows[0]["grad_norm"]

    expected, norm = losses("xla")
    found, found_norm = losses(attention)
    np.testing.assert_allclose(found, expected, rtol=2e-3)
    assert found_norm == pytest.approx(norm, rel=0.02)
    assert expected[2] < expected[0]
