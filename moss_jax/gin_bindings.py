"""The only file that knows gin: it binds the settings' dataclasses to names in `.gin` files."""

import dataclasses
import difflib
import re
from collections.abc import Sequence

import gin

from moss_jax.config import ConfigError, EngineConfig, FrameSampling, SessionConfig, TokenSampling

_SETTINGS = (EngineConfig, FrameSampling, SessionConfig, TokenSampling)
_BOUND = {setting: gin.external_configurable(setting, module="moss_jax") for setting in _SETTINGS}
_NAMES = [setting.__name__ for setting in _SETTINGS]
_FIELDS = [field.name for setting in _SETTINGS for field in dataclasses.fields(setting)]


def parse(files: Sequence[str] = (), parameters: Sequence[str] = ()) -> None:
    """Reads gin files, then single bindings such as `SessionConfig.tokens_per_second = 8`.

    Raises:
      ConfigError: an unreadable file, a syntax error, or an unknown name, with the nearest valid one.
    """
    gin.clear_config()
    try:
        gin.parse_config_files_and_bindings(list(files), list(parameters))
    except (OSError, SyntaxError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(_explain(error)) from error


def settings[Setting](kind: type[Setting]) -> Setting:
    """The settings of one kind, with what the parsed gin files say of them.

    Raises:
      ConfigError: a value that the settings refuse.
    """
    try:
        return _BOUND[kind]()
    except (TypeError, ValueError) as error:
        raise ConfigError(_explain(error)) from error


def _explain(error: Exception) -> str:
    """gin's message on one line, with the name that was probably meant."""
    message = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    unknown = re.search(r"(No configurable matching|doesn't have a parameter named) '([^']*)'", message)
    if unknown:
        valid = _NAMES if unknown[1].startswith("No") else _FIELDS
        near = difflib.get_close_matches(unknown[2], valid, n=1, cutoff=0)
        message += f" (the nearest valid name is {near[0]})"
    return message
