"""Settings of one session: what its client has set, over the server's defaults."""

import dataclasses
from typing import Any

from moss_jax.config import ConfigError, MemoryConfig, SessionConfig, TokenSampling
from moss_jax.serving import protocol
from moss_jax.serving.hub import Hub
from moss_jax.serving.protocol import ProtocolError
from moss_jax.serving.session import Session
from moss_jax.stream import Engine
from moss_jax.text import chat


class Settings:
    """The settings of one session.

    Attributes:
      moss: the negotiated extension; None without it.
      instructions: the system prompt.
      max_output_tokens: the client's limit for a response; None for that of the server.
      system: texts of system items, which follow the instructions.
    """

    def __init__(self, hub: Hub):
        self._hub = hub
        self.moss: protocol.MossSettings | None = None
        self.instructions: str = chat.SYSTEM_PROMPT
        self.max_output_tokens: int | None = None
        self.system: list[str] = []

    def describe(self, session: Session, resumed: protocol.Resumed | None = None) -> protocol.SessionObject:
        """The session settings in force."""
        moss = None
        if self.moss is not None:
            stream, memory = self.session_config(), self._memory() or self._engine_memory()
            limits = ("tokens_per_second", "tail_seconds", "max_tokens_per_second", "max_fps")
            moss = protocol.MossSession(
                version=protocol.VERSION,
                clock=stream.clock,
                frames=self.moss.frames or "items",
                token=session.token,
                grace_seconds=self._hub.config.grace_seconds,
                sampling=dataclasses.asdict(self._sampling() or self._engine_sampling()),
                memory=dataclasses.asdict(memory) | self._capacities(),
                selection=dataclasses.asdict(stream.selection),
                limits={name: getattr(stream, name) for name in limits},
                correction=self._hub.config.correction,
                image_size=self._hub.image_size,
                resumed=resumed,
            )
        return protocol.SessionObject(
            id=session.id,
            model=self._hub.model,
            instructions=self.system_prompt(),
            max_output_tokens=self.max_output_tokens or self._hub.session_config.max_tokens_per_turn,
            moss=moss,
        )

    def of_stream(self) -> dict[str, Any]:
        """The arguments of `Session.open`."""
        return {
            "config": self.session_config(),
            "system": self.system_prompt() or None,
            "sampling": self._sampling(),
            "memory": self._memory(),
            **(self._capacities() if self.moss and self.moss.memory else {}),
        }

    def update(self, settings: protocol.SessionSettings, *, is_open: bool) -> None:
        """Changes settings, all or none.

        Args:
          is_open: whether the stream is open, so that most settings are fixed.

        Raises:
          ProtocolError: a setting is fixed.
          ConfigError: a value is invalid.
        """
        before = self.instructions, self.max_output_tokens, self.moss
        fixed = self._fixed()
        if settings.instructions is not None:
            self.instructions = settings.instructions
        if settings.max_output_tokens is not None:
            most = settings.max_output_tokens
            self.max_output_tokens = None if most == "inf" else most
        if settings.moss is not None:
            old = self.moss.model_dump(exclude_none=True) if self.moss else {}
            new = settings.moss.model_dump(exclude_none=True, exclude={"resume", "token", "after"})
            self.moss = protocol.MossSettings.model_validate(old | new)
        try:
            wrong = [name for name, value in self._fixed().items() if value != fixed[name]]
            if wrong and is_open:
                raise ProtocolError(
                    f"{wrong[0]} is fixed once the stream is open; open another session",
                    code="stream_is_open",
                    param=f"session.{wrong[0]}",
                )
        except (ProtocolError, ConfigError):
            self.instructions, self.max_output_tokens, self.moss = before
            raise

    def system_prompt(self) -> str:
        """Instructions and system items."""
        return "\n".join(part for part in (self.instructions, *self.system) if part)

    def session_config(self) -> SessionConfig:
        """Settings of the stream."""
        config, moss = self._hub.session_config, self.moss
        if moss and moss.selection:
            config = changed(config, selection=changed(config.selection, **given(moss.selection)))
        if moss and moss.limits:
            config = changed(config, **given(moss.limits))
        if self.max_output_tokens:
            most = min(self.max_output_tokens, config.max_tokens_per_turn)
            config = changed(config, max_tokens_per_turn=most)
        return config

    def _engine_memory(self) -> MemoryConfig:
        return self._hub.scheduler.engine.config.memory

    def _engine_sampling(self) -> TokenSampling:
        engine = self._hub.scheduler.engine
        return engine.sampling if isinstance(engine, Engine) else TokenSampling()

    def _memory(self) -> MemoryConfig | None:
        """The stream's memory settings if they differ from the engine's."""
        settings = given(self.moss.memory) if self.moss and self.moss.memory else {}
        settings = {n: x for n, x in settings.items() if n not in ("bank_capacity", "text_capacity")}
        return changed(self._engine_memory(), **settings) if settings else None

    def _capacities(self) -> dict[str, int]:
        engine = self._hub.scheduler.engine.config
        asked = given(self.moss.memory) if self.moss and self.moss.memory else {}
        return {n: asked.get(n, getattr(engine, n)) for n in ("bank_capacity", "text_capacity")}

    def _sampling(self) -> TokenSampling | None:
        settings = given(self.moss.sampling) if self.moss and self.moss.sampling else {}
        return changed(self._engine_sampling(), **settings) if settings else None

    def _fixed(self) -> dict[str, Any]:
        """Validates and returns the settings that are fixed once the stream is open, by name."""
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.session_config().max_tokens_per_turn,
            "moss.limits": dataclasses.replace(self.session_config(), selection=SessionConfig().selection),
            "moss.selection": self.session_config().selection,
            "moss.memory": (self._memory() or self._engine_memory(), self._capacities()),
            "moss.sampling": self._sampling() or self._engine_sampling(),
        }

    def state(self) -> dict[str, Any]:
        """JSON-ready state."""
        return {
            "moss": self.moss.model_dump(exclude_none=True) if self.moss else None,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "system": list(self.system),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self.moss = protocol.MossSettings.model_validate(state["moss"]) if state["moss"] else None
        self.instructions, self.system = state["instructions"], state["system"]
        self.max_output_tokens = state["max_output_tokens"]


def given(settings: protocol.Strict) -> dict[str, Any]:
    """The settings that a client has set."""
    return settings.model_dump(exclude_none=True)


def changed[Config](config: Config, **changes: Any) -> Config:
    """Returns a copy of a config with changed values.

    Raises:
      ConfigError: a value is invalid.
    """
    return dataclasses.replace(config, **changes)  # pyright: ignore[reportArgumentType]
