"""Saved streams: one safetensors file holds everything that is needed to resume a stream.

Its tensors are the arrays of the slot, the frames queued in its inbox, and what the next frame is compared
with; its metadata are the format, the settings of the engine, how its weights are stored and the dialogue, as
JSON, and a checksum of it all.
"""

import contextlib
import dataclasses
import json
import logging
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

FORMAT = "moss_jax stream 2"
# Name prefixes of queued frames, and of the tensors that the next frame is compared with.
INBOX, COMPARED = "inbox.", "compared."
# Dtypes by their names in safetensors files.
_DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_logger = logging.getLogger(__name__)
# Maximum number of differences listed in an error.
_MAX_LISTED = 8


class SavedStreamError(ValueError):
    """A file is not a stream that the engine can resume; the message says why."""


@dataclasses.dataclass(frozen=True)
class SavedStream:
    """Contents of the file of a stream.

    Attributes:
      settings: of the engine, by name.
      dialogue: as JSON-ready values.
      arrays: of the slot, by name.
      frames: in the inbox, in order.
      compared: what the next frame is compared with, by name: "thumbnail" of the frame that was encoded last,
        "features" of the one that was remembered last; empty if frames are not selected. Also the times of
        the frames in the bank; see `FrameTimes.save`.
      weights: how the engine's weights are stored, by part of the model; empty if the file does not say.
    """

    settings: dict[str, Any]
    dialogue: dict[str, Any]
    arrays: Mapping[str, np.ndarray]
    frames: list[np.ndarray]
    compared: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write_stream(path: str | os.PathLike, saved: SavedStream) -> None:
    """Writes a stream to a file, replacing an existing one atomically: on failure the old file is intact.

    Raises:
      OSError: the file cannot be written.
    """
    # Replaces the target of a symbolic link, not the link.
    path = Path(path).resolve()
    tensors = dict(saved.arrays) | {f"{INBOX}{i}": frame for i, frame in enumerate(saved.frames)}
    tensors |= {f"{COMPARED}{name}": x for name, x in saved.compared.items()}
    # Widest dtypes first, so that all tensors are aligned.
    tensors = {
        name: np.ascontiguousarray(tensors[name]).reshape(tensors[name].shape)
        for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    }
    metadata = {
        "format": FORMAT,
        "settings": json.dumps(saved.settings),
        "dialogue": json.dumps(saved.dialogue),
        "weights": json.dumps(dict(saved.weights)),
    }
    metadata["checksum"] = _checksum(metadata, tensors)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, x in tensors.items():
        begin, end = end, end + x.nbytes
        header[name] = {"dtype": _NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    draft = path.with_name(f".{path.name}.saving")
    try:
        with draft.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for x in tensors.values():
                file.write(_bytes(x))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        # Names the requested file, which an error such as a full disk does not.
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def read_stream(path: str | os.PathLike) -> SavedStream:
    """Reads the file of a stream into memory.

    Raises:
      SavedStreamError: it cannot be read, is not a stream, has another format, or is damaged.
    """
    path = Path(path)
    damaged = f"{path} is truncated or damaged; it cannot be continued"
    try:
        # The library checks the header against the length, but does not read 8-bit floats.
        with path.open("rb"), safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise SavedStreamError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise SavedStreamError(
            f"{path} is not a saved stream, or is truncated or damaged ({error}); give a file that was saved"
        ) from error
    if (found := metadata.get("format", "")) != FORMAT:
        other = (
            f"is a stream of the format {found!r}"
            if found.startswith("moss_jax stream")
            else "is not a saved stream"
        )
        raise SavedStreamError(f"{path} {other}; this version reads {FORMAT!r}")
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    try:
        header = json.loads(content[8:start].tobytes())
        del header["__metadata__"]
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            x = content[start + begin : start + end].view(_DTYPES[entry["dtype"]])
            tensors[name] = x.reshape(entry["shape"])
        if metadata.pop("checksum", "") != _checksum(metadata, tensors):
            raise SavedStreamError(damaged)
        settings, dialogue = json.loads(metadata["settings"]), json.loads(metadata["dialogue"])
        # Files of earlier versions have neither.
        weights = json.loads(metadata.get("weights", "{}"))
        if "memory.text" in settings:
            settings.setdefault("memory.text_first", 0.0)
    except (KeyError, TypeError, ValueError) as error:
        raise SavedStreamError(damaged) from error
    names = sorted((name for name in tensors if name.startswith(INBOX)), key=lambda n: int(n[len(INBOX) :]))
    frames = [tensors.pop(name) for name in names]
    compared = {
        name.removeprefix(COMPARED): tensors.pop(name) for name in list(tensors) if name.startswith(COMPARED)
    }
    return SavedStream(settings, dialogue, tensors, frames, compared, weights)


def check_settings(path: str | os.PathLike, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Checks that a stream was saved with the settings of the engine that is to resume it.

    Raises:
      SavedStreamError: naming what differs.
    """
    names = [n for n in sorted(saved.keys() | settings.keys()) if saved.get(n) != settings.get(n)]
    if not names:
        return
    opaque = ("model.weights", "tokenizer")
    differences = [
        f"{n} differs" if n in opaque else f"{n} is {saved.get(n)!r} there and {settings.get(n)!r} here"
        for n in names
    ]
    more = f", and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    is_model = any(name.startswith(("model.", "tokenizer")) for name in names)
    remedy = (
        "open the checkpoint that it was saved with"
        if is_model
        else "give the settings that it was saved with"
    )
    raise SavedStreamError(
        f"{path} does not fit this engine: {', '.join(differences[:_MAX_LISTED])}{more}; {remedy}"
    )


def compare_weights(path: str | os.PathLike, saved: Mapping[str, str], weights: Mapping[str, str]) -> None:
    """Logs a warning if a stream was saved with weights that were stored otherwise, which is allowed.

    Args:
      saved: of the file; empty if it does not say.
      weights: of the engine that is to resume it.
    """
    if saved and saved != weights:
        _logger.warning(
            "%s was saved with %s and continues with %s",
            path,
            _describe_weights(saved),
            _describe_weights(weights),
        )


def _describe_weights(weights: Mapping[str, str]) -> str:
    return " and ".join(f"{part} weights in {dtype}" for part, dtype in weights.items())


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> str:
    """CRC-32 of the metadata and the named tensors, independent of their order."""
    checksum = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name]
        checksum = zlib.crc32(f"{name} {x.dtype} {x.shape}".encode(), checksum)
        checksum = zlib.crc32(_bytes(x), checksum)
    return f"{checksum:08x}"


def _bytes(x: np.ndarray) -> memoryview:
    return memoryview(x.reshape(-1).view(np.uint8))
