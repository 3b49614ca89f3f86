"""Measures time and memory of the training step, with random weights and random sequences.

    python benchmarks/train.py --out benchmarks/results/train_11b_h200x4.json

All parameters are trained, by the same step as in train.py: float32 master weights and AdamW moments,
bfloat16 forward and backward pass, sharded over all devices of the machine. `mfu` counts model FLOPs, without
the recomputation by remat (moss_jax/train/flops.py). A slice of the layers, at full width, fits one device
and shows the time of each part:

    python benchmarks/train.py --slice 8 --profile
"""

import argparse
import dataclasses
import os
import statistics
import time
from typing import get_args

import jax
import numpy as np
from profiles import device_ms, name_operations
from report import add_out, make_parser, publish

from moss_jax.config import PRESETS, ModelConfig, MomentDType, OptimizerConfig, Remat, TrainConfig
from moss_jax.data.batch import Batch
from moss_jax.sharding import make_mesh
from moss_jax.text.labels import IGNORED
from moss_jax.train.flops import peak_flops, train_flops
from moss_jax.train.step import Trainer

GB = 1e9


def main() -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--preset", default="moss_video_11b", choices=PRESETS, help="model")
    parser.add_argument(
        "--tokens", type=int, default=4096, help="tokens per sequence, including those of frames"
    )
    parser.add_argument("--frames", type=int, default=64, help="frames per sequence")
    parser.add_argument("--batch", type=int, default=0, help="sequences; 0 for one per device")
    parser.add_argument(
        "--tensor", type=int, default=1, help="size of the tensor-parallel mesh axis; the rest is fsdp"
    )
    parser.add_argument("--remat", default="full", choices=get_args(Remat), help="rematerialisation")
    parser.add_argument(
        "--first-moment",
        choices=get_args(MomentDType),
        default="float32",
        help="storage of Adam's first moment",
    )
    parser.add_argument(
        "--vision-remat", choices=get_args(Remat), help="that of the vision encoder, if another"
    )
    parser.add_argument(
        "--slice", type=int, default=1, help="divides the number of layers of encoder and decoder"
    )
    parser.add_argument("--profile", action="store_true", help="device time by phase and part of the model")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after the first")
    add_out(parser)
    args = parser.parse_args()
    # JAX's default is 0.75 of the device's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    if args.profile:
        name_operations()
    publish("train.py", args, run(args))


def run(args: argparse.Namespace) -> dict:
    """Runs the benchmark and returns its figures."""
    remat = {"remat": args.remat, "vision_remat": args.vision_remat}
    config = sliced(dataclasses.replace(PRESETS[args.preset](), **remat), args.slice)
    devices = jax.device_count()
    rows = args.batch or devices
    mesh = make_mesh(fsdp=devices // args.tensor, tensor=args.tensor)
    trainer = Trainer(
        config,
        TrainConfig(batch_size=rows),
        OptimizerConfig(first_moment_dtype=args.first_moment),
        mesh,
        silence_id=config.decoder.vocab_size - 1,
    )
    result: dict = {"devices": devices, "batch": rows, "mesh": dict(mesh.shape)}
    batch = trainer.put(random_batch(config, rows, args.tokens, args.frames))

    started = time.monotonic()
    state = jax.block_until_ready(trainer.init(0))
    result["init_s"] = time.monotonic() - started
    result["parameters"] = sum(x.size for x in state.trained.values())
    result["state_gb_per_device"] = (
        sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)) / GB
    )

    started = time.monotonic()
    step = trainer.step.lower(state, batch).compile()
    result["compile_s"] = time.monotonic() - started
    memory = step.memory_analysis()
    assert memory is not None
    result["temporary_gb_per_device"] = memory.temp_size_in_bytes / GB
    print(result, flush=True)

    seconds, losses = [], []
    for _ in range(args.steps + 1):
        started = time.monotonic()
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.monotonic() - started)
    step_s = statistics.median(seconds[1:])
    flops = train_flops(
        config, batch=rows, tokens=args.tokens, frames=args.frames, trained=TrainConfig().trainable
    )
    if args.profile:

        def call():
            nonlocal state
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)

        result["device_ms"] = device_ms(step, call)
    peak = peak_flops(jax.devices()[0].device_kind)
    memory_stats = [d.memory_stats() or {} for d in jax.local_devices()]
    return result | {
        "first_step_s": seconds[0],
        "step_s": step_s,
        "tokens_per_s": rows * args.tokens / step_s,
        "frames_per_s": rows * args.frames / step_s,
        "model_tflop_per_step": flops / 1e12,
        "mfu": peak and flops / step_s / (peak * devices),
        "peak_memory_gb_per_device": max(m.get("peak_bytes_in_use", 0) for m in memory_stats) / GB,
        "losses": losses,
    }


def sliced(config: ModelConfig, share: int) -> ModelConfig:
    """The model with one in `share` layers of each kind, at full width except for the projector's input."""
    vision, decoder = config.vision, config.decoder
    layers, globals_ = max(1, vision.num_layers // share), max(1, vision.num_global_layers // share)
    depth = decoder.num_layers // share
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(
            vision,
            num_layers=layers,
            num_global_layers=globals_,
            intermediate_layers=tuple(i for i in vision.intermediate_layers if i < layers),
        ),
        decoder=dataclasses.replace(
            decoder,
            num_layers=depth,
            cross_attention_layers=tuple(i for i in decoder.cross_attention_layers if i < depth),
        ),
    )


def random_batch(config, rows: int, tokens: int, frames: int) -> Batch:
    """Creates sequences of random tokens with evenly spaced frames; half of the tokens are targets."""
    rng = np.random.default_rng(0)
    size, image = config.vision.image_size, config.decoder.image_token_id
    ids = rng.integers(1, config.decoder.vocab_size, (rows, tokens), dtype=np.int32)
    positions = np.linspace(8, tokens - tokens // frames, frames).astype(np.int32)
    ids[:, positions] = image
    is_target = (rng.random((rows, tokens)) < 0.5) & (ids != image)
    return Batch(
        tokens=ids,
        labels=np.where(is_target, ids, IGNORED).astype(np.int32),
        frames=rng.integers(0, 256, (rows, frames, size, size, 3), dtype=np.uint8),
        frame_positions=np.broadcast_to(positions, (rows, frames)).copy(),
    )


if __name__ == "__main__":
    main()
