"""Timing of the steps of an engine."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from moss_jax.stream import EngineLike, Row, Sampled


class Stopwatch:
    """An engine whose steps are timed synchronously; those that compile a program are left out.

    Args:
      engine: to be timed.
      compiled: returns the number of programs that have been compiled so far.
    """

    def __init__(self, engine: EngineLike, compiled: Callable[[], int]):
        self._engine, self._compiled = engine, compiled
        self.config, self.tokenizer = engine.config, engine.tokenizer
        self.perception_device = engine.perception_device
        self.start, self.distance = engine.start, engine.distance
        self._began: float | None = None
        # Seconds of the steps without frames, and of those with frames.
        self._tokens: list[float] = []
        self._frames: list[float] = []

    def encode(self, frames: Sequence[np.ndarray]) -> Any:
        """Encodes frames; the time counts towards the next step."""
        self._began = time.monotonic()
        return self._engine.encode(frames)

    def step(self, state: Any, rows: Sequence[Row | None], features: Any = None) -> tuple[Any, Sampled]:
        """Steps the engine and waits for the tokens."""
        before = self._compiled()
        began = time.monotonic() if self._began is None else self._began
        self._began = None
        state, sampled = self._engine.step(state, rows, features)
        jax.block_until_ready(sampled.tokens)
        seconds = time.monotonic() - began
        if self._compiled() == before:
            brings_frames = any(row and row.frames for row in rows)
            (self._frames if brings_frames else self._tokens).append(seconds)
        return state, sampled

    def times(self) -> dict[str, float | None]:
        """Mean times of the steps, in ms: of those that append only tokens, and of those with frames.

        The latter include the encoding of the frames and compactions, if there are any.
        """

        def mean(seconds: Sequence[float]) -> float | None:
            return 1000 * sum(seconds) / len(seconds) if seconds else None

        return {"ms_per_token": mean(self._tokens), "ms_per_frame": mean(self._frames)}
