"""Per-stream limits: the memory policy, and the share of a slot's buffers."""

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
    """The config of an engine, narrowed to the limits of one of its streams.

    A `Conversation` or `SlotContents` plans with these limits; the engine's buffers and programs do not
    change.

    Args:
      memory: of the stream; None for the engine's.
      bank_capacity: whole frames that the stream may have in the bank; None for the engine's.
      text_capacity: tokens that it may have in the text cache; None for the engine's.
      model: if given, checks that the bank is not too small for the policy.

    Raises:
      ConfigError: a capacity exceeds the engine's, the engine has no program for the policy or stores the
        bank or the text cache in another dtype, or the bank is too small for the policy.
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
    for name, part in (("bank_dtype", "bank"), ("text_dtype", "text cache")):
        dtype, wanted = getattr(engine.memory, name), getattr(memory, name)
        if wanted != dtype:
            raise ConfigError(
                f"all streams of an engine have a {part} of one dtype: {name} must be {dtype!r}, "
                f"not {wanted!r}"
            )
    config = dataclasses.replace(engine, memory=memory, **changes)
    if model is not None:
        make_policy(memory, model, config.bank_capacity)
    return config


def saved_config(engine: EngineConfig, settings: Mapping[str, Any]) -> EngineConfig:
    """The `stream_config` of a saved stream.

    Falls back to the engine's own config if it has no room or no policy for the stream; the check of the
    settings then reports the difference.

    Args:
      settings: from `Engine.stream_settings`, as saved.
    """
    fields = {field.name for field in dataclasses.fields(MemoryConfig)}
    memory: dict[str, Any] = {name: settings.get(f"memory.{name}") for name in fields}
    capacities = (settings.get(f"engine.{name}") for name in ("bank_capacity", "text_capacity"))
    try:
        return stream_config(engine, MemoryConfig(**memory), *capacities)
    except ConfigError:
        return engine
