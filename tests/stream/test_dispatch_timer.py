"""Timing of speculative dispatch."""

import time

import jax.numpy as jnp
import pytest

from moss_jax.stream.conversation import Plan
from moss_jax.stream.dispatch_timer import DECODE, MARGIN, WEIGHT, DispatchTimer, Kind, StepInFlight


def test_the_delay_is_the_duration_of_a_step_less_that_of_a_dispatch():
    timer = DispatchTimer()
    assert timer.delay(DECODE) == 0
    timer.record_step(DECODE, 0.010)
    timer.record_dispatch(0.002)
    assert timer.delay(DECODE) == pytest.approx(0.008 - MARGIN)
    timer.record_step(DECODE, 0.020)
    assert timer.delay(DECODE) == pytest.approx(0.010 + WEIGHT * 0.010 - 0.002 - MARGIN)
    assert timer.delay(Kind(64)) == 0  # A kind of step without measurements.
    timer.record_dispatch(1.0)
    assert timer.delay(DECODE) == 0


def test_a_dispatch_is_timed_from_where_its_planning_started():
    timer, started = DispatchTimer(), time.monotonic() - 1

    def dispatch(kind: Kind, started: float | None) -> None:
        StepInFlight({0: Plan()}, kind, jnp.zeros(1, jnp.int32), timer, started)

    timer.record_step(DECODE, 5.0)
    dispatch(Kind(64), None)
    assert timer.delay(DECODE) == pytest.approx(5.0 - MARGIN)
    dispatch(Kind(2, 1), started)
    assert timer.delay(DECODE) == pytest.approx(4.0 - MARGIN, abs=0.5)


def test_a_step_behind_frames_that_are_encoded_is_of_another_kind():
    """Or a step without them would seem to take as long, and the device would wait for the next."""
    timer = DispatchTimer()
    timer.record_step(DECODE, 0.010)
    timer.record_step(Kind(1, encoded=8), 0.040)
    assert timer.delay(DECODE) == pytest.approx(0.010 - MARGIN)


def test_one_pause_of_the_process_hardly_counts():
    timer = DispatchTimer()
    for seconds in (0.010, 0.010, 5.0):
        timer.record_step(DECODE, seconds)
    assert timer.delay(DECODE) <= 0.0126 - MARGIN
    # Steps that do take longer count in the end.
    for _ in range(40):
        timer.record_step(DECODE, 0.050)
    assert timer.delay(DECODE) == pytest.approx(0.050 - MARGIN, rel=0.01)


def test_a_late_host_does_not_take_its_own_time_for_that_of_the_step():
    timer, step, host, times = DispatchTimer(), 0.020, 5 * MARGIN, []
    for _ in range(200):
        # The host needs more than the margin before it waits, and the timer does not know of it.
        waits = timer.delay(DECODE) + host
        times.append(max(step, waits))
        timer.record_step(DECODE, times[-1], is_late=waits > step)
    assert sum(times[100:]) / 100 < 1.1 * step


def test_a_step_that_was_done_before_it_is_awaited_is_late():
    timer, tokens = DispatchTimer(), jnp.zeros(1, jnp.int32).block_until_ready()
    timer.record_step(DECODE, 5.0)
    in_flight = StepInFlight({0: Plan()}, DECODE, tokens, timer, time.monotonic())
    in_flight.begun = time.monotonic() - 60
    in_flight.wait()
    # However long ago it began.
    assert timer.delay(DECODE) < 5.0
