"""Binds the config dataclasses to names in `.gin` files; the only module that imports gin."""

import dataclasses
import difflib
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import gin
from gin import config as gin_config

from moss_jax.config import (
    ChatConfig,
    ConfigError,
    ConversationConfig,
    DataConfig,
    EngineConfig,
    FrameSampling,
    InitialModelConfig,
    MemoryConfig,
    MeshConfig,
    OptimizerConfig,
    SecurityConfig,
    SegmentsConfig,
    SelectionConfig,
    ServerConfig,
    SessionConfig,
    TabletopConfig,
    TokenSampling,
    TrainConfig,
)
from moss_jax.shipped import shipped

_NAMES = {
    EngineConfig: "engine",
    MemoryConfig: "memory",
    FrameSampling: "frames",
    SessionConfig: "session",
    SelectionConfig: "selection",
    ServerConfig: "server",
    ChatConfig: "chat",
    SecurityConfig: "security",
    TokenSampling: "sampling",
    TrainConfig: "train",
    OptimizerConfig: "optimizer",
    MeshConfig: "mesh",
    InitialModelConfig: "model",
    DataConfig: "data",
    ConversationConfig: "conversations",
    TabletopConfig: "tabletop",
    SegmentsConfig: "segments",
}
_CLASS_NAMES = {kind.__name__: name for kind, name in _NAMES.items()}
_BOUND = {
    kind: gin.external_configurable(kind, name=name, module="moss_jax") for kind, name in _NAMES.items()
}
_FIELDS = {name: [field.name for field in dataclasses.fields(kind)] for kind, name in _NAMES.items()}


def parse(files: Sequence[str] = (), parameters: Sequence[str] = ()) -> None:
    """Parses gin files, then single bindings such as `train.steps = 100`; later bindings win.

    An `include` is looked up next to the given file, then in the working directory, then among the
    shipped files.

    Args:
      files: paths of gin files, or names of shipped ones.
      parameters: bindings.

    Raises:
      ConfigError: an unreadable file, a syntax error, or an unknown name, with the nearest valid one.
    """
    gin.clear_config()
    try:
        for path in map(_locate, files):
            gin_config._LOCATION_PREFIXES[:] = [str(path.parent), "", str(shipped("configs"))]
            gin.parse_config_file(str(path))
        gin.parse_config_files_and_bindings([], list(parameters))
    except (OSError, SyntaxError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(_explain(error)) from error
    _refuse_unused_bindings()


def settings[Setting](kind: type[Setting]) -> Setting:
    """Instantiates a config dataclass with the values from the parsed gin files.

    Raises:
      ConfigError: a value that the dataclass rejects; the message begins with its name in gin files.
    """
    try:
        made: Any = _BOUND[kind]()
    except ConfigError as error:
        # gin appends lines about where it called the dataclass.
        raise ConfigError(f"{_NAMES[kind]}.{str(error).splitlines()[0]}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(_explain(error)) from error
    return dataclasses.replace(made)  # gin has made an instance of a subclass.


def refuse_changed(kind: type, because: str, *, fields: Sequence[str] = ()) -> None:
    """Refuses settings that cannot have an effect but differ from their defaults.

    Args:
      kind: a config dataclass; its settings count as made for `operative`.
      because: why they have no effect, and what to do.
      fields: only these; all of them by default.

    Raises:
      ConfigError: naming them.
    """
    found, default = settings(kind), kind()
    fields = fields or _FIELDS[_NAMES[kind]]
    changed = [name for name in fields if getattr(found, name) != getattr(default, name)]
    if changed:
        names = ", ".join(f"{_NAMES[kind]}.{name}" for name in changed)
        raise ConfigError(f"{names} {'has' if len(changed) == 1 else 'have'} no effect: {because}")


def operative() -> str:
    """Returns the operative config: all values, with defaults, of the `settings` made since `parse`."""
    return gin.operative_config_str()


def _locate(file: str) -> Path:
    """Finds a gin file by its path, or a shipped one by its name."""
    configs = shipped("configs")
    for path in (Path(file), configs / file):
        if path.exists():
            return path.absolute()
    names = sorted(path.name for path in configs.glob("*.gin"))
    raise ConfigError(f"{file} does not exist, nor does a shipped config of this name: {', '.join(names)}")


def _refuse_unused_bindings() -> None:
    """Rejects what gin silently accepts: a bare `steps = 100`, and scopes, which nothing here enters."""
    bindings = gin_config._CONFIG
    used = {reference.scoped_selector for reference in gin_config.iterate_references(bindings)}
    for scope, selector in bindings:
        if selector == "gin.macro" and f"{scope}/gin.macro" not in used:
            meant = _full_names(scope) or _nearest(
                scope, [f"{name}.{field}" for name, fields in _FIELDS.items() for field in fields]
            )
            raise ConfigError(f"{scope!r} is set but never used; the nearest valid name is {meant[0]}")
        if selector != "gin.macro" and scope:
            name = selector.rsplit(".", 1)[-1]
            raise ConfigError(f"'{scope}/{name}' has a scope, but nothing here enters one; say '{name}'")


def _explain(error: Exception) -> str:
    """Returns gin's message on one line, with the name that was probably meant."""
    text = str(error).partition(" in config string:")[0]  # After that, gin lists all bindings.
    message = "; ".join(line.strip() for line in text.splitlines() if line.strip())
    nearest = []
    if unknown := re.search(r"No configurable matching '(?:moss_jax\.)?([^']*)'", message):
        if name := _CLASS_NAMES.get(unknown[1]):
            return f"{message} ({unknown[1]} is called {name} in gin files)"
        nearest = _nearest(unknown[1], _FIELDS)
    elif unknown := re.search(r"Configurable '([^']*)' doesn't have a parameter named '([^']*)'", message):
        nearest = _full_names(unknown[2]) or _nearest(unknown[2], _FIELDS[unknown[1].rsplit(".", 1)[-1]])
    return message + (f" (the nearest valid name is {nearest[0]})" if nearest else "")


def _full_names(field: str) -> list[str]:
    """Returns `config.field` for every config that has this field."""
    return [f"{name}.{field}" for name, fields in _FIELDS.items() if field in fields]


def _nearest(name: str, valid: Collection[str]) -> list[str]:
    return difflib.get_close_matches(name, list(valid), n=1, cutoff=0)
