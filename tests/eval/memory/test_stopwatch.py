"""Times of steps: which count as what, and which are left out."""

import itertools
import types

import numpy as np

from moss_jax.eval.memory import stopwatch
from moss_jax.eval.memory.stopwatch import Stopwatch
from moss_jax.stream import PENDING, Row


def test_steps_with_and_without_frames(scripted, tokenizer, monkeypatch):
    # Every look at the clock is a second after the one before.
    clock, compiled = itertools.count(), [0]
    monkeypatch.setattr(stopwatch, "time", types.SimpleNamespace(monotonic=lambda: float(next(clock))))
    engine = scripted(slots=2)
    watch = Stopwatch(engine, lambda: compiled[0])
    state = watch.start()
    row = Row([tokenizer.special.image], [0])
    state, _ = watch.step(state, [row, None], watch.encode([np.zeros((2, 2, 3), np.uint8)]))
    for _ in range(3):
        state, _ = watch.step(state, [Row([PENDING]), None])
    assert watch.times() == {"ms_per_token": 1000, "ms_per_frame": 1000}
    # Frames are timed from their encoding on.
    features = watch.encode([np.zeros((2, 2, 3), np.uint8)])
    next(clock)
    state, _ = watch.step(state, [row, None], features)
    assert watch.times() == {"ms_per_token": 1000, "ms_per_frame": 1500}

    def compile_program():
        compiled[0] += 1
        next(clock)

    engine.before_step = compile_program
    state, _ = watch.step(state, [Row([PENDING]), Row([PENDING])])
    assert watch.times() == {"ms_per_token": 1000, "ms_per_frame": 1500}


def test_nothing_timed(scripted):
    assert Stopwatch(scripted(), lambda: 0).times() == {"ms_per_token": None, "ms_per_frame": None}
