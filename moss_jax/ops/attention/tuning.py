"""Autotuning table, tuning.json: the fastest kernel configuration by device and shape.

Each entry names a device kind, a kernel, the shape that it was measured on, the fastest configuration and its
microseconds. `python benchmarks/attention.py --tune` writes the entries.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moss_jax.ops.attention.base import Arguments

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FILE = Path(__file__).with_name("tuning.json")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of the table.

    Attributes:
      device: JAX's `device_kind`.
      shape: from `shape_of`.
      config: the fields of the kernel's config class.
      microseconds: of one call, by pass: "forward", "gradients" (forward and backward).
    """

    device: str
    kernel: str
    shape: Mapping[str, int | str]
    config: Mapping[str, int | None]
    microseconds: Mapping[str, float]


def shape_of(a: Arguments) -> dict[str, int | str]:
    """The part of a call that a kernel's configuration depends on."""
    (rows, queries, heads, head_dim), (_, kv_heads, keys, _) = a.q.shape, a.k.shape
    return {
        "dtype": a.k.dtype.name,
        "head_dim": head_dim,
        "rows": rows,
        "queries": queries,
        "keys": keys,
        "heads": heads,
        "kv_heads": kv_heads,
    }


def lookup[Config: "DataclassInstance"](
    kernel: str, default: Config, device_kind: str, *, file: Path = FILE, **shape: int | str
) -> Config:
    """The configuration measured on this device for the nearest shape; `default` if there is none.

    dtype and head_dim must be the same; among those, the smallest sum of |log2| ratios of the other numbers
    wins. Fields that an entry doesn't name keep the default's value.

    Args:
      file: the table.

    Raises:
      ValueError: the table is malformed, or names fields that the config doesn't have.
    """
    near = [
        entry
        for entry in entries(file)
        if (entry.kernel, entry.device) == (kernel, device_kind)
        and all(entry.shape.get(name) == shape.get(name) for name in ("dtype", "head_dim"))
    ]
    if not near:
        return default
    best = min(near, key=lambda entry: _distance(entry.shape, shape))
    known = [field.name for field in dataclasses.fields(default)]
    if unknown := sorted(set(best.config) - set(known)):
        raise ValueError(
            f"{file}: {type(default).__name__} has no {', '.join(unknown)}, which the entry of {kernel} on "
            f"{device_kind} for {dict(best.shape)} sets; it has {', '.join(known)}"
        )
    return dataclasses.replace(default, **best.config)


def _distance(a: Mapping[str, int | str], b: Mapping[str, int | str]) -> float:
    sizes = [(a[name], b[name]) for name in a.keys() & b.keys()]
    ratios = (max(x, 1) / max(y, 1) for x, y in sizes if isinstance(x, int) and isinstance(y, int))
    return sum(abs(math.log2(ratio)) for ratio in ratios)


@functools.cache
def entries(file: Path) -> tuple[Entry, ...]:
    """Loads the whole table, cached."""
    try:
        return tuple(Entry(**entry) for entry in json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not a list of tuning entries: {error}") from error


def record(new: Entry, *, file: Path = FILE) -> None:
    """Writes an entry to the table, replacing that of the same device, kernel and shape."""

    def key(entry: Entry) -> tuple:
        return entry.device, entry.kernel, sorted((name, str(size)) for name, size in entry.shape.items())

    kept = [entry for entry in entries(file) if key(entry) != key(new)]
    lines = [json.dumps(dataclasses.asdict(entry)) for entry in sorted([*kept, new], key=key)]
    file.write_text("[\n" + ",\n".join(f"  {line}" for line in lines) + "\n]\n", encoding="utf-8")
    entries.cache_clear()
