"""Small training runs for tests, in this process or by the command."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from moss_jax import convert
from moss_jax.text import Tokenizer
from moss_jax.train.__main__ import read_config
from moss_jax.train.log import read_metrics
from moss_jax.train.loop import RunConfig

ROOT = Path(__file__).parents[1]
BINDINGS = (
    "train.steps = 6",
    "train.batch_size = 2",
    "train.compute_dtype = 'float32'",
    "train.log_every = 2",
    "train.checkpoint_every = 2",
    "optimizer.learning_rate = 1e-3",
    "tabletop.image_size = 56",
    "tabletop.min_seconds = 2",
    "tabletop.max_seconds = 3",
    "tabletop.max_tokens = 128",
)
# For processes that spend more time compiling than computing.
FAST_COMPILING = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def make_checkpoint(folder: Path, small_config, random_model) -> Path:
    """Writes a random model of few layers and image_size 56, to start training from."""
    config, tokenizer = small_config(), Tokenizer.moss_tiny()
    layers = {"num_layers": 1, "intermediate_layers": (0,)}
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, image_size=56, **layers),
        decoder=dataclasses.replace(
            config.decoder, vocab_size=tokenizer.vocab_size, num_layers=2, cross_attention_layers=(1,)
        ),
    )
    convert.save(folder, random_model(config))
    tokenizer.save(folder)
    return folder


def bindings(checkpoint: Path, *more: str) -> list[str]:
    """Returns the gin bindings of a run from a checkpoint; `more` override them."""
    return [f"model.checkpoint = '{checkpoint}'", *BINDINGS, *more]


def make_config(checkpoint: Path, *more: str) -> RunConfig:
    return read_config([], bindings(checkpoint, *more))


def start(workdir: Path, checkpoint: Path, *more: str, flags=(), cache: Path) -> subprocess.Popen:
    """Starts train.py as a subprocess; runs with the same `cache` share compiled programs."""
    params = [word for binding in bindings(checkpoint, *more) for word in ("--gin_param", binding)]
    environment = (
        os.environ
        | FAST_COMPILING
        | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONWARNDEFAULTENCODING": "1"}
    )
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", "--workdir", workdir, *params, *flags],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def losses(workdir: Path) -> list[tuple[int, float]]:
    """Returns the step and loss of every record."""
    return [(row["step"], row["loss"]) for row in read_metrics(workdir)]
