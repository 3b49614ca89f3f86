"""Where things lie in a training checkpoint, and the model of one.

    WORKDIR/tokenizer.json
    WORKDIR/checkpoints/STEP/params     {"trained": float32 master weights, "frozen": the other parameters},
                                        each a dict from names such as decoder/layers/0/attention/qkv/kernel
                            /optimizer  the optimizer's state and the step
                            /position   JSON: where the run stands in its data
                            /config     JSON: the gin text of the run; the model as Hugging Face has it

A checkpoint appears under its step number when it is whole. It holds all that it takes to go on.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jaxtyping import DTypeLike

from moss_jax.config import ModelConfig
from moss_jax.convert import checkpoint, configs
from moss_jax.convert.checkpoint import CheckpointError
from moss_jax.nn import MossVideo

TOKENIZER = "tokenizer.json"
FOLDER = "checkpoints"
ARRAYS = ("params", "optimizer")
TEXTS = ("position", "config")


def export(
    workdir: str | os.PathLike,
    out: str | os.PathLike,
    *,
    step: int | None = None,
    dtype: DTypeLike = "bfloat16",
) -> int:
    """Writes the model of a training run as a folder in Hugging Face layout, whole or not at all.

    Args:
      workdir: of the run.
      out: the folder, which must not exist yet or be empty.
      step: of the checkpoint; None for the newest.
      dtype: of the parameters that are written.

    Returns:
      The step.

    Raises:
      CheckpointError: there is no such checkpoint, or `out` has something in it.
    """
    folder = find(workdir, step)
    tokenizer = Path(workdir) / TOKENIZER
    if not tokenizer.is_file():
        raise CheckpointError(f"{tokenizer} is gone; put the tokenizer.json of the run there")
    checkpoint.save(out, load(folder, dtype=dtype), tokenizer=tokenizer)
    return int(folder.name)


def find(workdir: str | os.PathLike, step: int | None = None) -> Path:
    """The folder of a whole checkpoint: that of `step`, or the newest.

    Raises:
      CheckpointError: there is none, or it is not whole.
    """
    whole, broken = survey(workdir)
    if step is None and whole:
        return whole[-1]
    for folder in whole:
        if int(folder.name) == step:
            return folder
    if not whole:
        raise CheckpointError(f"{workdir} holds no checkpoint of a training run")
    steps = ", ".join(folder.name for folder in whole)
    state = "is not whole" if step in [int(folder.name) for folder in broken] else "does not exist"
    raise CheckpointError(f"the checkpoint of step {step} in {workdir} {state}; there are those of {steps}")


def survey(workdir: str | os.PathLike) -> tuple[list[Path], list[Path]]:
    """The checkpoints that are whole and those that are not, each in the order of their steps.

    What a run that was killed had begun to write has another name, and is neither.
    """
    # orbax reads from absolute paths only.
    folder = Path(workdir).absolute() / FOLDER
    steps = [path for path in folder.glob("*") if path.name.isdecimal() and path.is_dir()]
    steps.sort(key=lambda path: int(path.name))
    whole = [path for path in steps if _is_whole(path)]
    return whole, [path for path in steps if path not in whole]


def load(folder: Path, *, dtype: DTypeLike) -> MossVideo:
    """The model of a training checkpoint.

    Parameters are read in `dtype`, on the default device.

    Raises:
      CheckpointError: what it holds is not the model that it says.
    """
    params = read_arrays(folder, "params", dtype)
    params = params["trained"] | params["frozen"]
    config = read_json(folder, "config")
    try:
        model_config = model_from_json(config["model"])
    except KeyError as error:
        raise CheckpointError(f"{folder} does not say which model it is of: no {error}") from None
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: MossVideo(model_config, rngs=nnx.Rngs(0), dtype=dtype))
    )
    variables = {"/".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(abstract)}
    if {name: x.shape for name, x in params.items()} != {name: v.shape for name, (_, v) in variables.items()}:
        raise CheckpointError(f"{folder} holds other parameters than the model that it says it is of")
    loaded = [
        (path, variable.replace(jnp.asarray(params[name]))) for name, (path, variable) in variables.items()
    ]
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def read_arrays(folder: Path, item: str, dtype: DTypeLike) -> Any:
    """The arrays of an item in host memory, converted to `dtype`."""
    handler, path = ocp.PyTreeCheckpointHandler(), epath.Path(folder / item)
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray, dtype=jnp.dtype(dtype)), read_shapes(folder, item)
    )
    try:
        return handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / item} is damaged: {error}") from error


def read_shapes(folder: Path, item: str) -> Any:
    """What is said of the arrays of an item, shapes among it."""
    return ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder / item)).tree


def read_json(folder: Path, item: str) -> dict[str, Any]:
    return ocp.JsonCheckpointHandler().restore(epath.Path(folder / item))


def model_to_json(config: ModelConfig) -> dict[str, Any]:
    """A model's settings, as they are kept in a checkpoint."""
    config, preprocessor = configs.to_hugging_face(config)
    return {"config": config, "preprocessor": preprocessor}


def model_from_json(value: dict[str, Any]) -> ModelConfig:
    """The settings that `model_to_json` made."""
    return configs.from_hugging_face(value["config"], value["preprocessor"])


def _is_whole(folder: Path) -> bool:
    """Whether a checkpoint was committed and has all its items; not what the files hold."""
    try:
        committed = json.loads((folder / "_CHECKPOINT_METADATA").read_text())["commit_timestamp_nsecs"]
        texts = [json.loads((folder / item / "metadata").read_text()) for item in TEXTS]
    except (OSError, ValueError, KeyError):
        return False
    files = [folder / item / name for item in ARRAYS for name in ("_METADATA", "manifest.ocdbt")]
    return bool(committed and all(texts) and all(file.is_file() for file in files))
