"""Trains a tiny model on meshes of up to eight devices: takes runs as JSON and prints their results as JSON.

A separate program, because the number of CPU devices must be set before JAX starts.
"""

import dataclasses
import json
import math
import sys
import tempfile

import jax
import numpy as np
from flax import nnx

from moss_jax.config import (
    CompressorConfig,
    DecoderConfig,
    ModelConfig,
    OptimizerConfig,
    SegmentsConfig,
    TrainConfig,
    VisionConfig,
)
from moss_jax.data.batch import Batch, Segments
from moss_jax.nn import MossVideo
from moss_jax.sharding import make_mesh
from moss_jax.text.labels import IGNORED
from moss_jax.train.checkpoints import Checkpoints
from moss_jax.train.step import Trainer

STEPS, SAVED_STEP, SEGMENT_STEPS = 20, 8, 4
B, S, F = 8, 12, 2
SILENCE, IMAGE = 7, 64
MODEL = ModelConfig(
    vision=VisionConfig(
        image_size=28,
        patch_size=14,
        hidden_size=16,
        intermediate_size=32,
        num_layers=1,
        num_global_layers=0,
        num_heads=2,
        intermediate_layers=(0,),
    ),
    compressor=CompressorConfig(stride=2),
    decoder=DecoderConfig(
        vocab_size=IMAGE,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        cross_attention_layers=(1,),
        max_positions=64,
    ),
)


def make_batch() -> Batch:
    """Makes rows with different numbers of targets, the longest first."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, IMAGE, (B, S), np.int32)
    tokens[:, [4, 6]] = SILENCE
    positions = np.tile(np.array([2, 5], np.int32), (B, 1))
    positions[-1, 1] = S
    for row in range(B):
        tokens[row, S - row // 2 :] = 0
        tokens[row, positions[row, positions[row] < S]] = IMAGE
    labels = np.where((tokens == IMAGE) | (tokens == 0), IGNORED, tokens)
    return Batch(tokens, labels, rng.integers(0, 256, (B, F, 28, 28, 3), np.uint8), positions)


# The rows cycle through two memories, both of which are compacted.
SEGMENTS = SegmentsConfig(
    per_step=2,
    frames=1,
    tokens=S // 2,
    streams=(2,),
    memories=(("window", 2, "model"), ("merge", 2, "model")),
    text_capacities=(64,),
)


def make_segments() -> Batch:
    """Makes two segments of a stream for each row, one frame each, which go on from step to step."""
    batch = make_batch()
    tokens = np.where((batch.tokens == IMAGE) | (batch.tokens == 0), 1, batch.tokens)
    positions = np.tile(np.array([2, S // 2 + 1], np.int32), (B, 1))
    tokens[np.arange(B)[:, None], positions] = IMAGE
    kept = np.broadcast_to(np.arange(64, dtype=np.int32), (B, 2, 64)).copy()
    whole = np.full((B, 2), S // 2, np.int32)
    segments = Segments(np.zeros((B, 2), bool), whole, 0 * whole, kept, whole // 2)
    return Batch(tokens, np.where(tokens == IMAGE, IGNORED, tokens), batch.frames, positions, segments)


def train_on_segments(mesh: tuple[int, int, int]) -> list[float]:
    """Trains on segments, and returns the losses."""
    trainer = make_trainer(mesh, 1, "none", SEGMENTS)
    state, batch = trainer.init(0), trainer.put(make_segments())
    losses = []
    for _ in range(SEGMENT_STEPS):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses


def make_trainer(
    mesh: tuple[int, int, int], accumulate: int, remat: str, segments: SegmentsConfig | None = None
) -> Trainer:
    return Trainer(
        dataclasses.replace(MODEL, remat=remat),
        TrainConfig(steps=STEPS, batch_size=B, accumulate=accumulate, compute_dtype="float32"),
        # With a small eps, Adam would amplify rounding errors of gradients near zero to whole steps.
        OptimizerConfig(learning_rate=3e-3, eps=1e-4),
        make_mesh(*mesh, devices=jax.devices()[: math.prod(mesh)]),
        silence_id=SILENCE,
        segments=segments,
    )


def train(trainer: Trainer, model: MossVideo, *, save_to: str = "", resume_from: str = "") -> dict:
    """Trains on one batch; may save a checkpoint on the way, and may train again from one."""
    state, batch = trainer.adopt(model), trainer.put(make_batch())
    step = trainer.step.lower(state, batch).compile()
    losses = []
    for number in range(1, STEPS + 1):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        if save_to and number == SAVED_STEP:
            with Checkpoints(save_to, keep=1) as checkpoints:
                checkpoints.save(number, state, position={"batch": number}, config={"gin": ""})

    def specs(params):
        return {name: str(x.sharding.spec) for name, x in params.items()}

    def parts(name):
        x = state.trained[name]
        return x.size // x.addressable_shards[0].data.size

    (adam,) = [x for x in jax.tree.leaves(state.optimizer, is_leaf=_has_moments) if _has_moments(x)]
    return {
        "losses": losses,
        "parts": {name: parts(name) for name in state.trained},
        "rows": [shard.data.shape[0] for shard in batch.frames.addressable_shards],
        "moments_are_sharded_like_parameters": specs(adam.mu) == specs(adam.nu) == specs(state.trained),
        "has_hidden_states_of_the_whole_batch": f"f32[{B},{S}," in step.as_text(),
        "keeps_its_shardings": jax.tree.map(lambda x: x.sharding, state) == trainer.shardings,
        "resumed_losses": resume(trainer, step, batch, resume_from) if resume_from else None,
    }


def resume(trainer: Trainer, step, batch: Batch, workdir: str) -> list[float]:
    """Continues from the checkpoint in `workdir`, and returns the losses."""
    with Checkpoints(workdir, keep=1) as checkpoints:
        restored = checkpoints.restore(trainer.abstract())
    assert restored is not None
    state, losses = restored.state, []
    for _ in range(int(state.step), STEPS):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses


def _has_moments(x) -> bool:
    return hasattr(x, "mu")


def main() -> None:
    model = MossVideo(MODEL, rngs=nnx.Rngs(0))
    runs, segment_meshes = json.loads(sys.argv[1])
    trainers = [make_trainer(*run) for run in runs]
    with tempfile.TemporaryDirectory() as workdir:
        first, second, *rest, last = trainers
        results = [train(first, model), train(second, model, save_to=workdir)]
        results += [train(trainer, model) for trainer in rest]
        results += [train(last, model, resume_from=workdir)]
    # The parameters of a seed don't depend on the mesh that they are initialised on.
    made, expected = trainers[-1].init(0).trained, trainers[-1].adopt(model).trained
    same = all(np.array_equal(made[name], expected[name]) for name in expected)
    segments = [train_on_segments(mesh) for mesh in segment_meshes]
    print(json.dumps({"runs": results, "same_initial_parameters": same, "segments": segments}))


if __name__ == "__main__":
    main()
