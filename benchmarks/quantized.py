"""Measures the quality lost by 8-bit quantization: logits of held-out sequences, and tabletop scores.

    python benchmarks/quantized.py --out benchmarks/results/quantized_moss_tiny.json

Logits: those from which each token of the ideal assistant would be sampled, in one pass over a held-out
stream. The error is the norm of the difference to the float32 model over the norm of its logits, both centred
for each token; `greedy_agree` is the share of tokens with the same argmax. `bfloat16` is the baseline: the
loss of loading a model for an accelerator.

Scores: `python -m moss_jax.eval.tabletop` with and without `--weights` and `--encoder-weights`, on the same
streams, in the dtype in which this machine loads a model.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from report import add_out, make_parser, publish

from moss_jax.command import seed
from moss_jax.config import DecoderWeights, EncoderWeights
from moss_jax.convert import OpenModel, open_model
from moss_jax.eval.tabletop import EvaluationConfig, evaluate, ideal_dialogue
from moss_jax.text.labels import IGNORED
from moss_jax.video import preprocess
from moss_jax.worlds.tabletop import TabletopStream, evaluation_stream


class Mode(TypedDict, total=False):
    """Settings of `open_model`."""

    weights: DecoderWeights
    encoder_weights: EncoderWeights


MODES: dict[str, Mode] = {
    "as loaded": {},
    "int8": {"weights": "int8"},
    "fp8": {"weights": "fp8"},
    "encoder fp8": {"encoder_weights": "fp8"},
    "int8, encoder fp8": {"weights": "int8", "encoder_weights": "fp8"},
}
SECONDS = 32
# Sequences are padded to this length, so that one program serves all.
MAX_TOKENS = 512


def main() -> None:
    """Runs the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/moss-tiny"), help="model")
    parser.add_argument("--streams", type=int, default=50, help="number of scored streams")
    parser.add_argument(
        "--sequences", type=int, default=16, help="number of sequences whose logits are compared"
    )
    parser.add_argument("--seed", type=seed, default=1, help="seed of the held-out streams")
    add_out(parser)
    args = parser.parse_args()
    result = {"logits": compare_logits(args), "scores": {name: score(args, name) for name in MODES}}
    publish("quantized.py", args, result)


def compare_logits(args: argparse.Namespace) -> dict[str, Any]:
    """Relative errors of the logits against float32, by dtype and mode."""
    streams = [evaluation_stream(args.seed, index, SECONDS) for index in range(args.sequences)]
    exact = logits_of(open_model(args.checkpoint, dtype=jnp.float32), streams)
    found: dict[str, Any] = {"sequences": len(streams), "tokens": sum(map(len, exact))}
    for dtype in ("float32", "bfloat16"):
        found[dtype] = {}
        for name, mode in MODES.items():
            logits = logits_of(open_model(args.checkpoint, dtype=dtype, **mode), streams)
            off = np.sqrt(sum(squares(a - b) for a, b in zip(logits, exact, strict=True)))
            agree = [a.argmax(-1) == b.argmax(-1) for a, b in zip(logits, exact, strict=True)]
            found[dtype][name] = {
                "relative_error": float(off / np.sqrt(sum(map(squares, exact)))),
                "greedy_agree": float(np.concatenate(agree).mean()),
            }
    return found


def squares(logits: Float[np.ndarray, "T V"]) -> float:
    """Sum of squares of centred logits."""
    return float(np.sum((logits - logits.mean(axis=-1, keepdims=True)) ** 2))


def logits_of(opened: OpenModel, streams: list[TabletopStream]) -> list[Float[np.ndarray, "T V"]]:
    """The logits from which each token of the ideal assistant would be sampled, for each stream."""
    graph, params = nnx.split(opened.model)
    vision = opened.model.config.vision
    found = []
    for stream in streams:
        dialogue = ideal_dialogue(stream, opened.tokenizer, tokens_per_second=8)
        length = min(len(dialogue.tokens), MAX_TOKENS)
        tokens = np.zeros((1, MAX_TOKENS), np.int32)
        tokens[0, :length] = dialogue.tokens[:length]
        positions = np.full((1, SECONDS), MAX_TOKENS, np.int32)
        positions[0, : len(dialogue.frame_positions)] = dialogue.frame_positions
        pixels = preprocess(
            jnp.asarray(stream.frames(vision.image_size)),
            image_size=vision.image_size,
            mean=vision.image_mean,
            std=vision.image_std,
        )
        logits = np.asarray(one_pass(graph, params, tokens, pixels[None], positions))[0]
        found.append(logits[: length - 1][np.array(dialogue.labels[1:length]) != IGNORED])
    return found


@functools.partial(jax.jit, static_argnums=0)
def one_pass(graph: nnx.GraphDef, params: nnx.State, *inputs: Array) -> Float[Array, "B S V"]:
    """Runs the model's one-pass call, compiled."""
    return nnx.merge(graph, params)(*inputs)


def score(args: argparse.Namespace, name: str) -> dict[str, float]:
    """Runs the tabletop evaluation of a mode; returns the main scores."""
    config = EvaluationConfig(
        checkpoint=args.checkpoint,
        streams=args.streams,
        seed=args.seed,
        seconds=SECONDS,
        offline=False,
        blind_streams=0,
        **MODES[name],
    )
    found = evaluate(config, functools.partial(print, file=sys.stderr))
    return {
        "dtype": found["dtype"],
        "accuracy": found["accuracy"]["value"],
        "alerts_f1": found["alerts"]["f1"],
        "silence": found["silence"]["value"],
        "revision": found["revision"]["value"],
        "stale": found["stale"]["value"],
    }


if __name__ == "__main__":
    main()
