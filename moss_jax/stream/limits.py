"""The limits of one stream: its memory policy, and its share of a slot's buffers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moss_jax.config import ConfigError, EngineConfig, MemoryConfig, ModelConfig
from moss_jax.memory.policies import FULL, make_policy


def stream_config(
    engine: EngineConfig,
    memory: MemoryConfig | None = None,
    bank_capacity: int | None = None,
    text_capacity: int | None = None,
    *,
    model: ModelConfig | None = None,
) -> EngineConfig:
    """The config of an engine with the limits that one of its streams is to keep.

    A `Conversation` or `SlotContents` that is given it plans with the stream's own numbers; the engine's
    buffers and programs stay what they are.

    Args:
      memory: of the stream; None for the engine's.
      bank_capacity: whole frames that the stream may have in the bank; None for all that there is room for.
      text_capacity: tokens that it may have in the text cache; None likewise.
      model: if given, it is checked that the bank is not too small for the policy.

    Raises:
      ConfigError: a capacity is beyond the engine's, the engine has no program for the policy or stores the
        bank in another dtype, or the bank is too small for the policy.
    """
    memory = memory or engine.memory
    changes = {"bank_capacity": bank_capacity, "text_capacity": text_capacity}
    changes = {name: size for name, size in changes.items() if size is not None}
    for name, size in changes.items():
        if size > (most := getattr(engine, name)):
            raise ConfigError(
                f"a stream's {name} can be at most {most}, the engine's, not {size}; "
                f"raise engine.{name}, or give the stream less"
            )
    allowed = dict.fromkeys((*engine.allowed_policies, FULL))
    if memory.policy not in allowed:
        raise ConfigError(
            f"a stream's memory policy must be one of {', '.join(map(repr, allowed))}, which the engine was "
            f"made for, not {memory.policy!r}; name it in engine.policies"
        )
    if memory.bank_dtype != engine.memory.bank_dtype:
        raise ConfigError(
            f"all streams of an engine have a bank of one dtype: bank_dtype must be "
            f"{engine.memory.bank_dtype!r}, not {memory.bank_dtype!r}"
        )
    config = dataclasses.replace(engine, memory=memory, **changes)
    if model is not None:
        make_policy(memory, model, config.bank_capacity)
    return config


def saved_config(engine: EngineConfig, settings: Mapping[str, Any]) -> EngineConfig:
    """The `stream_config` of a saved stream.

    If the engine has no room or no policy for it, its own config, so that the settings differ.

    Args:
      settings: of `Engine.stream_settings`, as they have been saved.
    """
    fields = {field.name for field in dataclasses.fields(MemoryConfig)}
    memory: dict[str, Any] = {name: settings.get(f"memory.{name}") for name in fields}
    capacities = (settings.get(f"engine.{name}") for name in ("bank_capacity", "text_capacity"))
    try:
        return stream_config(engine, MemoryConfig(**memory), *capacities)
    except ConfigError:
        return engine
