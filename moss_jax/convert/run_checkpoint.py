"""Layout of training checkpoints, and export of their model to Hugging Face layout.

    WORKDIR/tokenizer.json
    WORKDIR/checkpoints/STEP/params     {"trained": float32 master weights, "frozen": the other parameters},
                                        each a dict from names such as decoder/layers/0/attention/qkv/kernel
                            /optimizer  optimizer state and step
                            /position   JSON: position in the data
                            /config     JSON: the run's gin text; the model's config in Hugging Face layout

A checkpoint is complete once it is renamed to its step number, and holds everything needed to resume.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import DTypeLike

from moss_jax.config import ModelConfig
from moss_jax.convert import checkpoint, configs
from moss_jax.convert.hub import CheckpointError
from moss_jax.nn import MossVideo
from moss_jax.text.tokenizer import TOKENIZER_FILE

CHECKPOINTS = "checkpoints"
ARRAY_ITEMS = ("params", "optimizer")
JSON_ITEMS = ("position", "config")


def export(
    workdir: str | os.PathLike,
    out: str | os.PathLike,
    *,
    step: int | None = None,
    dtype: DTypeLike = "bfloat16",
) -> int:
    """Writes the model of a training run in Hugging Face layout, as `checkpoint.save` does.

    Args:
      workdir: the run's folder.
      out: the folder, which must not exist yet or be empty.
      step: step of the checkpoint; the latest if None.
      dtype: dtype of the parameters that are written.

    Returns:
      The step of the exported checkpoint.

    Raises:
      CheckpointError: there is no such checkpoint, it is damaged or not finite, or `out` is not empty, is
        among the run's checkpoints or cannot be written.
      TokenizerError: the run's tokenizer cannot be read.
    """
    source = (Path(workdir) / CHECKPOINTS).resolve()
    if Path(out).resolve().is_relative_to(source):
        raise CheckpointError(
            f"{out} is in {source}, which holds the run's own checkpoints; name another folder"
        )
    folder = find_checkpoint(workdir, step)
    tokenizer = Path(workdir) / TOKENIZER_FILE
    if not tokenizer.is_file():
        raise CheckpointError(f"{tokenizer} is missing; copy the run's {TOKENIZER_FILE} there")
    checkpoint.save(out, load_model(folder, dtype=dtype), tokenizer=tokenizer)
    return int(folder.name)


def find_checkpoint(workdir: str | os.PathLike, step: int | None = None) -> Path:
    """Returns the folder of the complete checkpoint of `step`, or of the latest one if None.

    Raises:
      CheckpointError: there is none, or it is incomplete.
    """
    complete, incomplete = list_checkpoints(workdir)
    if step is None and complete:
        return complete[-1]
    for folder in complete:
        if int(folder.name) == step:
            return folder
    if not complete:
        raise CheckpointError(f"{workdir} holds no complete checkpoint of a training run")
    steps = ", ".join(folder.name for folder in complete)
    state = "is incomplete" if step in [int(folder.name) for folder in incomplete] else "does not exist"
    raise CheckpointError(f"the checkpoint of step {step} in {workdir} {state}; there are those of {steps}")


def list_checkpoints(workdir: str | os.PathLike) -> tuple[list[Path], list[Path]]:
    """Lists the folders of complete and of incomplete checkpoints, each in order of their steps.

    Temporary folders, which a killed run may leave behind, are in neither list.
    """
    # orbax reads from absolute paths only.
    folder = Path(workdir).absolute() / CHECKPOINTS
    steps = [path for path in folder.glob("*") if path.name.isdecimal() and path.is_dir()]
    steps.sort(key=lambda path: int(path.name))
    complete = [path for path in steps if _is_complete(path)]
    return complete, [path for path in steps if path not in complete]


def load_model(folder: Path, *, dtype: DTypeLike) -> MossVideo:
    """Loads the model of a training checkpoint in `dtype`, on the default device.

    Raises:
      CheckpointError: the checkpoint is damaged, or its parameters do not match its config or are not finite.
    """
    params = _read_arrays(folder, "params", dtype)
    try:
        params = params["trained"] | params["frozen"]
        model_config = model_from_json(read_json(folder, "config")["model"])
    except KeyError as error:
        raise CheckpointError(f"{folder} lacks the key {error}") from None
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: its config cannot be read ({error})") from error
    not_finite = [name for name, x in params.items() if not checkpoint.is_finite(x)]
    checkpoint.require_finite(folder, not_finite, dtype)
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: MossVideo(model_config, rngs=nnx.Rngs(0), dtype=dtype))
    )
    variables = {"/".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(abstract)}
    if {name: x.shape for name, x in params.items()} != {name: v.shape for name, (_, v) in variables.items()}:
        raise CheckpointError(f"{folder}: its parameters do not match the model of its config")
    loaded = [
        (path, variable.replace(jnp.asarray(params[name]))) for name, (path, variable) in variables.items()
    ]
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def read_array_metadata(folder: Path, item: str) -> Any:
    """Reads the tree of an item's array metadata, such as shapes.

    Raises:
      OSError, ValueError: it is missing or damaged.
    """
    # Declared as etils' Path, which pathlib's stands in for on a local file system.
    path: Any = folder / item
    return ocp.PyTreeCheckpointHandler().metadata(path).tree


def read_json(folder: Path, item: str) -> dict[str, Any]:
    """Reads a JSON item of a checkpoint."""
    return json.loads((folder / item / "metadata").read_text(encoding="utf-8"))


def model_to_json(config: ModelConfig) -> dict[str, Any]:
    """Returns a model's config as stored in a checkpoint."""
    config_json, preprocessor = configs.to_hugging_face(config)
    return {"config": config_json, "preprocessor": preprocessor}


def model_from_json(value: Mapping[str, Any]) -> ModelConfig:
    """Inverts `model_to_json`."""
    return configs.from_hugging_face(value["config"], value["preprocessor"])


def _is_complete(folder: Path) -> bool:
    """Whether a checkpoint was committed and has all its items; the arrays' content is not checked."""
    try:
        committed = json.loads((folder / "_CHECKPOINT_METADATA").read_text())["commit_timestamp_nsecs"]
        texts = [read_json(folder, item) for item in JSON_ITEMS]
    except (OSError, ValueError, KeyError):
        return False
    files = [folder / item / name for item in ARRAY_ITEMS for name in ("_METADATA", "manifest.ocdbt")]
    return bool(committed and all(texts) and all(file.is_file() for file in files))


def _read_arrays(folder: Path, item: str, dtype: DTypeLike) -> dict[str, dict[str, np.ndarray]]:
    """Reads the arrays of an item into host memory, converted to `dtype`."""
    try:
        restore_args = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray, dtype=jnp.dtype(dtype)),
            read_array_metadata(folder, item),
        )
        args = ocp.args.PyTreeRestore(restore_args=restore_args)
        return ocp.PyTreeCheckpointer().restore(folder / item, args=args)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / item} is damaged: {error}") from error
