"""When the next step is dispatched: late enough, early enough."""

import time
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from moss_jax.stream.pace import MARGIN, WEIGHT, Pace
from moss_jax.stream.session import GOING_ON, _Flight


def test_lead_is_what_a_step_takes_less_the_dispatch_of_the_next():
    pace = Pace()
    assert pace.lead(GOING_ON) == 0
    pace.landed(GOING_ON, 0.010)
    pace.dispatched(0.002)
    assert pace.lead(GOING_ON) == pytest.approx(0.008 - MARGIN)
    pace.landed(GOING_ON, 0.020)
    assert pace.lead(GOING_ON) == pytest.approx(0.010 + WEIGHT * 0.010 - 0.002 - MARGIN)
    assert pace.lead((64, 0)) == 0  # Of steps that are new to it.
    pace.dispatched(1.0)
    assert pace.lead(GOING_ON) == 0


def test_only_steps_that_go_on_tell_how_long_dispatch_takes():
    """A step with a frame is dispatched after the frame has been sent and its encoding begun."""
    pace, started = Pace(), time.monotonic() - 1

    def flight(tokens, frames):
        plan = SimpleNamespace(tokens=[0] * tokens, frames=[0] * frames)
        return _Flight({0: plan}, jnp.zeros(1, jnp.int32), pace, started)

    pace.landed(GOING_ON, 5.0)
    flight(2, 1)
    flight(64, 0)
    assert pace.lead(GOING_ON) == pytest.approx(5.0 - MARGIN)
    flight(1, 0)
    assert pace.lead(GOING_ON) == pytest.approx(4.0 - MARGIN, abs=0.5)
