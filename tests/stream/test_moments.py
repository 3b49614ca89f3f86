"""What the bank of a running stream holds of which moment."""

import numpy as np
import pytest

from moss_jax.config import MemoryConfig, SchedulerConfig, SessionConfig
from moss_jax.memory.bank import NO_POSITION
from moss_jax.stream import Scheduler
from moss_jax.stream.moments import BankView, FrameTimes, Moments
from moss_jax.stream.saved import write_stream


def test_vectors_are_counted_by_frame():
    positions = np.array([3, 7, 7, 9, 9, 9, 9, NO_POSITION])
    counts = np.array([12, 2, 2, 1, 1, 1, 1, 0], np.float32)
    frames = FrameTimes(np.array([3, 5, 7, 9]), np.array([0.5, 1.0, 2.0, 3.0]))
    counts, positions = np.stack([0 * counts, counts]), np.stack([0 * positions, positions])
    moments = BankView(positions, counts, 1, frames, 4).moments()
    assert [(m.time, m.vectors, m.frames) for m in moments] == [(0.5, 1, 3), (2.0, 2, 1), (3.0, 4, 1)]
    nothing = FrameTimes(np.array([], int), np.array([]))
    assert BankView(np.full((1, 4), NO_POSITION), None, 0, frames, 4).moments() == []
    assert BankView(positions, None, 1, nothing, 4).moments()[0].time == 0.0


def test_the_oldest_moments_are_forgotten():
    moments = Moments(most=8)
    for position in range(0, 22, 2):
        moments.add(position, position / 2)
    moments.forget(18)
    moments.forget(3)
    assert moments.times().positions.tolist() == [6, 8, 10, 12, 14, 16, 20]
    assert moments.times().times.tolist() == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0]
    saved = moments.times().save(np.array([8, 8, 20, NO_POSITION]))
    resumed = Moments()
    resumed.resume(saved)
    resumed.add(24, 12.0)
    assert resumed.times().positions.tolist() == [8, 20, 24]
    assert resumed.times().times.tolist() == [4.0, 10.0, 12.0]


def test_known_times_stay_as_they_were_when_more_are_added():
    moments = Moments()
    for position in range(200):
        moments.add(position, position / 2)
        if position == 99:
            before = moments.times()
    moments.forget(50)
    assert before.positions.tolist() == list(range(100))
    assert moments.times().times.tolist() == [p / 2 for p in range(200) if p != 50]


@pytest.mark.slow
def test_a_running_stream_tells_what_its_bank_holds(make_engine, frames, tmp_path):
    """Through compactions, and after the stream was saved and resumed."""
    engine = make_engine(slots=2, policies=("pyramid",), bank_capacity=32)
    options = {
        "config": SessionConfig(tokens_per_second=4, max_tokens_per_turn=3),
        "memory": MemoryConfig("pyramid"),
        "bank_capacity": 16,
    }
    with Scheduler(engine, SchedulerConfig(clock="lockstep")) as scheduler:
        stream = scheduler.open(**options)
        for second in range(40):
            stream.push_frame(frames[second % 16], float(second))
        stream.push_prompt("Well?", 40.0)
        # Only what is known to come before something else is taken.
        stream.push_frame(frames[0], 41.0)
        while not any(turn == "Well?" for turn in [getattr(stream.inbox.get(), "prompt", "")]):
            pass
        moments = scheduler.look_at_banks().result(60)[stream].moments()
        newest = moments[-1]
        assert (newest.time, newest.vectors, newest.frames) == (
            39.0,
            engine.model_config.vectors_per_frame,
            1,
        )
        times = [moment.time for moment in moments]
        assert times == sorted(set(times))
        # None is forgotten, and old ones are coarser.
        assert sum(moment.frames for moment in moments) == 40
        assert moments[0].vectors < newest.vectors
        write_stream(tmp_path / "saved", stream.copy_while_running().result(60).fetch())
        again = scheduler.open(resume=tmp_path / "saved")
        again.push_prompt("Well?", 42.0)
        again.push_prompt("And?", 43.0)
        while not any(turn == "Well?" for turn in [getattr(again.inbox.get(), "prompt", "")]):
            pass
        resumed = scheduler.look_at_banks().result(60)[again].moments()
        assert resumed[-1].time == 41.0
        assert {m.time for m in resumed} <= {m.time for m in moments} | {41.0}
        assert sum(moment.frames for moment in resumed) == 41
