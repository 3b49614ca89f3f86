"""Loading and saving checkpoint folders: config.json, safetensors, tokenizer.json."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moss_jax import sharding
from moss_jax.config import ConfigError, ModelConfig, RowsBeforeFirstFrame
from moss_jax.convert import configs, hub, names
from moss_jax.convert.hub import CheckpointError
from moss_jax.nn import MossVideo, is_quantized

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
# Maximum number of problems listed in an error.
MAX_LISTED = 20


def load_config(path: str | os.PathLike, *, revision: str | None = None) -> ModelConfig:
    """Reads the model's config from a checkpoint.

    Args:
      path, revision: a folder or a Hugging Face repo id; see `hub.resolve`.

    Raises:
      CheckpointError: no such checkpoint, a missing or malformed config.json, or an unknown model type.
    """
    folder = hub.resolve(path, revision)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a checkpoint folder: it has no config.json")
    preprocessor = folder / "preprocessor_config.json"
    try:
        return configs.from_hugging_face(
            _read_json(folder / "config.json"), _read_json(preprocessor) if preprocessor.is_file() else None
        )
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def load(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: DTypeLike = "float32",
    mesh: Mesh | None = None,
    rows_before_first_frame: RowsBeforeFirstFrame = "skip",
    attention: str | None = None,
) -> MossVideo:
    """Loads the model of a checkpoint in Hugging Face layout.

    Parameters are read one at a time, converted to `dtype` and placed on their devices, so the host never
    holds more than a few copies of the largest one beside the parameters that stay on it.

    Args:
      path: folder with config.json and model.safetensors, or shards with their index; or a Hugging Face repo
        id such as `OpenMOSS-Team/moss-video-preview-realtime-sft`, which is downloaded to a cache.
      revision: branch, tag or commit of a repo id, which can also be written `repo@revision`.
      dtype: of the parameters.
      mesh: lays the parameters on its devices by `sharding.RULES`; None puts them on the default one.
      rows_before_first_frame, attention: see `ModelConfig`.

    Raises:
      CheckpointError: no such checkpoint, or one that is damaged or does not match its config; the message
        lists all files or tensors that are wrong.
    """
    folder = hub.resolve(path, revision)
    base = load_config(folder)
    config = ModelConfig(
        vision=base.vision,
        compressor=base.compressor,
        decoder=base.decoder,
        rows_before_first_frame=rows_before_first_frame,
        attention=attention,
    )
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    abstract = nnx.eval_shape(lambda: MossVideo(config, rngs=nnx.Rngs(0), dtype=dtype))
    graph, params = nnx.split(abstract)
    with contextlib.ExitStack() as files:
        tensors = _open_tensors(folder, files)
        entries = list(names.entries(config))
        _check_tensors(folder, entries, tensors)
        by_path = {entry.path: entry for entry in entries}
        loaded = []
        for place, variable in nnx.to_flat_state(params):
            entry = by_path[place]
            value = entry.join([tensors[name].get_tensor() for name in entry.names])
            loaded.append((place, variable.replace(_put(value, variable, dtype, mesh))))
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def save(
    path: str | os.PathLike,
    model: MossVideo,
    *,
    tokenizer: str | os.PathLike | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a checkpoint folder in Hugging Face layout, atomically.

    Args:
      path: the folder, which must not exist yet or be empty.
      model: written in its own dtype.
      tokenizer: a tokenizer.json to copy into the folder.
      shard_bytes: maximum size of a safetensors file, unless a single tensor is larger.

    Returns:
      The folder.

    Raises:
      CheckpointError: the folder is not empty, or the model is quantized.
    """
    if is_quantized(model):
        raise CheckpointError("a quantized model cannot be saved; save it before quantizing")
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; save to a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        config, preprocessor = configs.to_hugging_face(model.config)
        config["torch_dtype"] = str(model.dtype)
        _write_json(draft / "config.json", config)
        _write_json(draft / "preprocessor_config.json", preprocessor)
        _save_tensors(draft, names.to_hugging_face(model.config, nnx.state(model)), shard_bytes)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, draft / "tokenizer.json")
        draft.chmod(0o755)
        os.replace(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return folder


class _Tensor:
    """A tensor in an open file, read lazily."""

    def __init__(self, file: Any, name: str):
        self._file, self._name = file, name
        self.shape = tuple(file.get_slice(name).get_shape())

    def get_tensor(self) -> np.ndarray:
        return self._file.get_tensor(self._name)


def _open_tensors(folder: Path, files: contextlib.ExitStack) -> dict[str, _Tensor]:
    """Opens all tensors of a folder; returns them by canonical name."""
    if (folder / INDEX).is_file():
        index = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise CheckpointError(f"{folder / INDEX} has no weight_map from tensor names to shards")
        shards = sorted(set(index.values()))
    elif (folder / SINGLE).is_file():
        shards = [SINGLE]
    else:
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}")
    tensors, problems = {}, []
    for shard in shards:
        try:
            file = files.enter_context(safe_open(folder / shard, framework="numpy"))
        except (OSError, SafetensorError) as error:
            problems.append(f"{shard} is missing, truncated or damaged ({error})")
            continue
        tensors |= {names.canonical(name): _Tensor(file, name) for name in file.keys()}  # noqa: SIM118
    if problems:
        raise CheckpointError(f"{folder}: {'; '.join(problems)}")
    return tensors


def _check_tensors(folder: Path, entries: list[names.Entry], tensors: dict[str, _Tensor]) -> None:
    expected = {
        name: shape for entry in entries for name, shape in zip(entry.names, entry.shapes, strict=True)
    }
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        rest = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise CheckpointError(
            f"the tensors in {folder} do not match its config.json:\n  "
            + "\n  ".join(problems[:MAX_LISTED])
            + rest
        )


def _put(value: np.ndarray, variable: nnx.Variable, dtype: np.dtype, mesh: Mesh | None) -> jax.Array:
    # A copy, because `value` may be a view of the mapped file, which is closed afterwards.
    value = np.array(value, dtype=dtype, order="C")
    if mesh is None:
        return jax.device_put(value)
    return jax.device_put(value, sharding.named_sharding(variable.get_metadata()["axes"], value.shape, mesh))


def _save_tensors(folder: Path, tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int) -> None:
    """Writes shards as they fill up, and renames them once their number is known."""
    parts: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = 0

    def flush():
        save_file(pending, folder / f"part-{len(parts)}", metadata={"format": "pt"})
        parts.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor
        total += tensor.nbytes
    flush()
    if len(parts) == 1:
        (folder / "part-0").rename(folder / SINGLE)
        return
    weight_map = {}
    for i, part in enumerate(parts):
        shard = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part-{i}").rename(folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
