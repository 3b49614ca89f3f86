"""The only file that knows gin: it binds the settings' dataclasses to names in `.gin` files."""

import dataclasses
import difflib
import re
from collections.abc import Sequence

import gin
from gin import config as gin_config

from moss_jax.config import (
    ConfigError,
    ConversationConfig,
    DataConfig,
    EngineConfig,
    FrameSampling,
    MeshConfig,
    ModelChoice,
    OptimizerConfig,
    SessionConfig,
    TabletopConfig,
    TokenSampling,
    TrainConfig,
)

_NAMES = {
    EngineConfig: "EngineConfig",
    FrameSampling: "FrameSampling",
    SessionConfig: "SessionConfig",
    TokenSampling: "TokenSampling",
    TrainConfig: "train",
    OptimizerConfig: "optimizer",
    MeshConfig: "mesh",
    ModelChoice: "model",
    DataConfig: "data",
    ConversationConfig: "conversations",
    TabletopConfig: "tabletop",
}
_BOUND = {
    kind: gin.external_configurable(kind, name=name, module="moss_jax") for kind, name in _NAMES.items()
}
_FIELDS = {name: [field.name for field in dataclasses.fields(kind)] for kind, name in _NAMES.items()}


def parse(files: Sequence[str] = (), parameters: Sequence[str] = ()) -> None:
    """Reads gin files, then single bindings such as `train.steps = 100`.

    Raises:
      ConfigError: an unreadable file, a syntax error, or an unknown name, with the nearest valid one.
    """
    gin.clear_config()
    try:
        gin.parse_config_files_and_bindings(list(files), list(parameters))
    except (OSError, SyntaxError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(_explain(error)) from error
    _refuse_what_binds_nothing()


def settings[Setting](kind: type[Setting]) -> Setting:
    """The settings of one kind, with what the parsed gin files say of them.

    Raises:
      ConfigError: a value that the settings refuse.
    """
    try:
        made = _BOUND[kind]()
    except (TypeError, ValueError) as error:
        raise ConfigError(_explain(error)) from error
    # A list in a gin file means a tuple: settings can be hashed.
    values = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return dataclasses.replace(made, **lists)


def operative() -> str:
    """What all `settings` asked for since the last `parse` hold, defaults among them, as a gin file."""
    return gin.operative_config_str()


def _refuse_what_binds_nothing() -> None:
    """Refuses what gin takes without a word: a bare `steps = 100`, and a scope, which nothing here opens."""
    bindings = gin_config._CONFIG
    used = {reference.scoped_selector for reference in gin_config.iterate_references(bindings)}
    for scope, selector in bindings:
        if selector == "gin.macro" and f"{scope}/gin.macro" not in used:
            meant = _homes(scope) or _near(
                scope, [f"{n}.{f}" for n, fields in _FIELDS.items() for f in fields]
            )
            raise ConfigError(f"{scope!r} is set but never used; the nearest valid name is {meant[0]}")
        if selector != "gin.macro" and scope:
            name = selector.rsplit(".", 1)[-1]
            raise ConfigError(f"'{scope}/{name}' has a scope, but nothing here opens one; say '{name}'")


def _explain(error: Exception) -> str:
    """gin's message on one line, with the name that was probably meant."""
    message = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    near = []
    if unknown := re.search(r"No configurable matching '([^']*)'", message):
        names = {name: name for name in _FIELDS} | {kind.__name__: name for kind, name in _NAMES.items()}
        near = [names[match] for match in _near(unknown[1], names)]
    elif unknown := re.search(r"Configurable '([^']*)' doesn't have a parameter named '([^']*)'", message):
        near = _homes(unknown[2]) or _near(unknown[2], _FIELDS[unknown[1].rsplit(".", 1)[-1]])
    return message + (f" (the nearest valid name is {near[0]})" if near else "")


def _homes(field: str) -> list[str]:
    """The full names of the settings that are called so."""
    return [f"{name}.{field}" for name, fields in _FIELDS.items() if field in fields]


def _near(name: str, valid: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(name, valid, n=1, cutoff=0)
