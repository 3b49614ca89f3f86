"""A stream that outlives its capacities many times over costs the same all the time."""

import gc
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from moss_jax.config import MemoryConfig, SessionConfig
from moss_jax.stream import End, FrameSeen, Turn

ROOT = Path(__file__).parents[2]
FRAMES = 3000


@pytest.mark.slow
def test_nothing_grows_with_a_stream_but_its_position(make_engine, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import endless  # pyright: ignore[reportMissingImports]

    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 256, (50, 28, 28, 3), dtype=np.uint8))
    engine = make_engine(text_capacity=256, bank_capacity=16, memory=MemoryConfig())
    engine.warm_up(pictures[0].shape)
    answer = endless.answering(engine)
    seen, objects, counted, ends = 0, {}, {"prompts": 0}, []

    def hear(event):
        nonlocal seen
        answer(event)
        if isinstance(event, FrameSeen):
            assert event.index == seen
            seen += 1
            if seen in (1000, FRAMES - 100):
                gc.collect()
                objects[seen] = sys.getallocatedblocks(), len(jax.live_arrays())
        elif isinstance(event, Turn):
            counted["prompts"] += bool(event.prompt)
        elif isinstance(event, End):
            ends.append(event)

    settings = SessionConfig(tokens_per_second=8, max_tokens_per_turn=endless.ANSWER)
    monkeypatch.setattr(endless, "EVERY", 500)
    prompts = ["What is there?", "And now?"]
    rows = list(endless.endless(engine, pictures, prompts, FRAMES, settings, hear))
    (end,) = ends
    assert (end.reason, end.counters.frames, seen) == ("finished", FRAMES, FRAMES)
    assert counted["prompts"] >= FRAMES // endless.PROMPT_GAP[1]
    assert end.counters.tokens >= 0.9 * endless.ANSWER * counted["prompts"]
    # Python's memory: less than a block for every frame. Arrays: none.
    early, late = objects.values()
    assert late[0] - early[0] < (FRAMES - 1100) / 2
    assert late[1] <= early[1]
    assert len(rows) == 5
    assert rows[-1]["resident_mb"] < 1.05 * rows[0]["resident_mb"]
    assert len({row["programs"] for row in rows}) == 1
    assert all(row["bank_vectors"] <= 16 * engine.model_config.vectors_per_frame for row in rows)
    assert all(row["text_tokens"] <= 256 for row in rows)
    # A frame and a silence a second at least.
    positions = [row["position"] for row in rows]
    assert (np.diff(positions) >= 2 * 500).all()
    compactions = [row["compactions"] for row in rows]
    for kind in ("bank", "text"):
        assert (np.diff([counts[kind] for counts in compactions]) > 0).all()
