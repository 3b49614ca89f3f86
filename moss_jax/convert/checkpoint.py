"""Loading and saving checkpoint folders: configs, safetensors, tokenizer."""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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
from moss_jax.text import Tokenizer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
# Maximum number of problems listed in an error.
MAX_LISTED = 20

# Supported dtypes, by their names in safetensors files.
_FLOATS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
}
# Buffers derived from the config, and scales of 8-bit activations, which stay unquantized here.
_IGNORED = re.compile(r"(.*\.)?(rotary_emb\.\w+|position_ids|input_scale|[kv]_scale)")
# Scale of the weight of the same name, which is the stored tensor times its scale.
_SCALE = re.compile(r"(.*\.weight)_scale(_inv)?")


def load_config(path: str | os.PathLike, *, revision: str | None = None) -> ModelConfig:
    """Reads the model's config from a checkpoint.

    Args:
      path, revision: a folder or a Hugging Face repo id; see `hub.resolve`.

    Raises:
      CheckpointError: no such checkpoint, a missing or malformed config.json, or an unknown model type.
    """
    folder = hub.resolve(path, revision)
    config = _read_json(folder / "config.json")
    if config is None:
        raise CheckpointError(f"{folder} is not a checkpoint folder: it has no config.json")
    # transformers 5 nests the settings of the image processor in the first file, and only there.
    preprocessor = (_read_json(folder / "processor_config.json") or {}).get("image_processor")
    if preprocessor is None:
        preprocessor = _read_json(folder / "preprocessor_config.json")
    try:
        return configs.from_hugging_face(config, preprocessor)
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
      dtype: dtype of the parameters.
      mesh: shards the parameters over its devices by `sharding.RULES`; None for the default device.
      rows_before_first_frame, attention: see `ModelConfig`.

    Raises:
      CheckpointError: no such checkpoint, or one that is damaged, does not match its config or has values
        that are not finite; the message says which files or tensors are wrong.
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
    tensors = _open_tensors(folder)
    entries = list(names.entries(config))
    _check_tensors(folder, entries, tensors)
    by_path = {entry.path: entry for entry in entries}
    loaded, not_finite = [], []
    for place, variable in nnx.to_flat_state(params):
        entry = by_path[place]
        parts = [tensors[name].read(dtype) for name in entry.names]
        not_finite += [name for name, part in zip(entry.names, parts, strict=True) if not is_finite(part)]
        loaded.append((place, variable.replace(_put(entry.join(parts), variable, dtype, mesh))))
    require_finite(folder, not_finite, dtype)
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def save(
    path: str | os.PathLike,
    model: MossVideo,
    *,
    tokenizer: str | os.PathLike | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a checkpoint folder in Hugging Face layout, which transformers opens as well.

    The files appear in the folder once all of them are written; an error leaves nothing behind.

    Args:
      path: the folder, which must not exist yet or be empty.
      model: written in its own dtype.
      tokenizer: a tokenizer.json, or a folder that holds one, to copy into the folder.
      shard_bytes: maximum size of a safetensors file, unless a single tensor is larger.

    Returns:
      The folder.

    Raises:
      CheckpointError: the folder is not empty or cannot be written, the model is quantized or not finite, or
        the tokenizer is another model's.
      TokenizerError: the tokenizer cannot be read.
    """
    if is_quantized(model):
        raise CheckpointError("a quantized model cannot be saved; save it before quantizing")
    opened = None if tokenizer is None else Tokenizer.load(tokenizer)
    size = model.config.decoder.vocab_size
    if opened and opened.vocab_size != size:
        raise CheckpointError(
            f"{tokenizer} predicts {opened.vocab_size} tokens, the model {size}; they must belong together"
        )
    folder = Path(path)
    try:
        exists = folder.exists()
        if exists and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} exists and is not empty; save to a new folder")
        # A folder that exists stays, since it may be a mount point, a link or the working directory.
        beside = folder if exists else folder.absolute().parent
        beside.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".saving-", dir=beside))
        try:
            _write(draft, folder, model, opened, shard_bytes)
            if exists:
                # The config comes last: without it, the folder is not a checkpoint.
                for file in sorted(draft.iterdir(), key=lambda file: file.name == "config.json"):
                    file.rename(folder / file.name)
                draft.rmdir()
            else:
                draft.chmod(0o755)
                draft.rename(folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be written, and nothing was left there: {error}") from error
    return folder


def _write(
    draft: Path, folder: Path, model: MossVideo, tokenizer: Tokenizer | None, shard_bytes: int
) -> None:
    """Writes the files of a checkpoint into `draft`; error messages name `folder`."""
    config, preprocessor = configs.to_hugging_face(model.config, tokenizer)
    config["torch_dtype"] = str(model.dtype)
    _write_json(draft / "config.json", config)
    _write_json(draft / "preprocessor_config.json", preprocessor)
    if tokenizer is not None:
        tokenizer.save(draft)
        max_length = model.config.decoder.max_positions
        tokenizer_config = configs.tokenizer_to_hugging_face(tokenizer, max_length)
        _write_json(draft / "tokenizer_config.json", tokenizer_config)
        _write_json(draft / "generation_config.json", configs.generation_to_hugging_face(tokenizer))
    not_finite = _save_tensors(draft, names.to_hugging_face(model.config, nnx.state(model)), shard_bytes)
    require_finite(folder, not_finite, model.dtype)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor in a mapped safetensors file.

    Attributes:
      dtype: dtype of the file, such as "BF16".
      shape: shape of the tensor.
      content: its bytes.
      scale: scale of an 8-bit tensor, [] or [1] for all of it, or [rows] or [rows, 1]; None for 1.
    """

    dtype: str
    shape: tuple[int, ...]
    content: np.ndarray
    scale: "_Tensor | None" = None

    def read(self, dtype: np.dtype) -> np.ndarray:
        """Returns the values in `dtype`, as a view of the file where that is the file's."""
        values = self.content.view(_FLOATS[self.dtype]).reshape(self.shape)
        if self.scale is None:
            return values.astype(dtype, copy=False)
        scale = self.scale.read(np.dtype(np.float32)).reshape(-1, *[1] * (values.ndim - 1))
        return (values.astype(np.float32) * scale).astype(dtype)

    def problem(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Returns why the tensor can't be read as one of this shape; None if it can."""
        if self.dtype not in _FLOATS:
            return f"{name} has type {self.dtype}; supported are {', '.join(_FLOATS)}"
        if self.shape != shape:
            return f"{name} has shape {list(self.shape)}, not {list(shape)}"
        if self.scale is None:
            return None
        if self.scale.dtype not in _FLOATS:
            return self.scale.problem(f"the scale of {name}", self.scale.shape)
        if self.scale.shape not in ((), (1,), shape[:1], (*shape[:1], 1)):
            return (
                f"the scale of {name} has shape {list(self.scale.shape)}; it must be one number, or one a row"
            )
        return None


def _open_tensors(folder: Path) -> dict[str, _Tensor]:
    """Opens all tensors of a folder that are parameters or unknown; returns them by canonical name."""
    index = _read_json(folder / INDEX)
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(s, str) for s in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX} has no weight_map from tensor names to shards")
        shards = sorted(set(weight_map.values()))
    elif (folder / SINGLE).exists():
        shards = [SINGLE]
    else:
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}")
    tensors, problems = {}, []
    for shard in shards:
        try:
            tensors |= {names.canonical(name): tensor for name, tensor in _open_file(folder / shard).items()}
        except (OSError, SafetensorError) as error:
            problems.append(f"{shard} is missing, truncated or damaged ({error})")
    if problems:
        raise CheckpointError(f"{folder}: {'; '.join(problems)}")
    for name in list(tensors):
        if _IGNORED.fullmatch(name):
            del tensors[name]
        elif (match := _SCALE.fullmatch(name)) and match[1] in tensors:
            tensors[match[1]] = dataclasses.replace(tensors[match[1]], scale=tensors.pop(name))
    return tensors


def _open_file(file: Path) -> dict[str, _Tensor]:
    """Maps a safetensors file and returns its tensors by name.

    Raises:
      OSError, SafetensorError: it cannot be read, or its header is damaged or does not match its length.
    """
    # The library checks the header, but reports any file it cannot open as missing, and reads no 8 bits.
    with file.open("rb"), safe_open(file, framework="numpy"):
        pass
    content = np.asarray(np.memmap(file, np.uint8, "r"))
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    header.pop("__metadata__", None)
    return {
        name: _Tensor(
            entry["dtype"], tuple(entry["shape"]), content[slice(*np.add(entry["data_offsets"], start))]
        )
        for name, entry in header.items()
    }


def _check_tensors(folder: Path, entries: list[names.Entry], tensors: dict[str, _Tensor]) -> None:
    expected = {
        name: shape for entry in entries for name, shape in zip(entry.names, entry.shapes, strict=True)
    }
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    found = (tensors[name].problem(name, shape) for name, shape in expected.items() if name in tensors)
    problems += [problem for problem in found if problem]
    if problems:
        rest = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise CheckpointError(
            f"the tensors in {folder} do not match its config.json:\n  "
            + "\n  ".join(problems[:MAX_LISTED])
            + rest
        )


def is_finite(x: np.ndarray) -> bool:
    """Whether a floating-point array has neither NaN nor infinite values, at memory bandwidth."""
    # Only such values have all bits of the exponent set. Blocks of this size stay in the CPU's cache.
    bits, block = x.reshape(-1).view(f"u{x.itemsize}"), 1 << 16
    exponent = np.array(np.inf, x.dtype).view(bits.dtype)
    return all((bits[i : i + block] & exponent).max() < exponent for i in range(0, bits.size, block))


def require_finite(source: str | os.PathLike, not_finite: list[str], dtype: DTypeLike) -> None:
    """Raises CheckpointError if any tensors, given by name, are not finite in `dtype`."""
    if not_finite:
        raise CheckpointError(
            f"{source}: {len(not_finite)} of its tensors, the first of them {not_finite[0]}, have NaN or "
            f"infinite values in {jnp.dtype(dtype)}; take a checkpoint from before the training diverged"
        )


def _put(value: np.ndarray, variable: nnx.Variable, dtype: np.dtype, mesh: Mesh | None) -> jax.Array:
    # A copy, because `value` may be a view of the mapped file.
    value = np.array(value, dtype=dtype, order="C")
    if mesh is None:
        return jax.device_put(value)
    return jax.device_put(value, sharding.named_sharding(variable.get_metadata()["axes"], value.shape, mesh))


def _save_tensors(folder: Path, tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int) -> list[str]:
    """Writes shards as they fill up, and renames them once their number is known.

    Returns:
      The names of the tensors that are not finite.
    """
    parts: list[list[str]] = []
    not_finite: list[str] = []
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
        not_finite += [] if is_finite(tensor) else [name]
        total += tensor.nbytes
    flush()
    if len(parts) == 1:
        (folder / "part-0").rename(folder / SINGLE)
        return not_finite
    weight_map = {}
    for i, part in enumerate(parts):
        shard = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part-{i}").rename(folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return not_finite


def _read_json(path: Path) -> dict[str, Any] | None:
    """Reads a JSON object; None if there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
