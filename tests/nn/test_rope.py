"""Rotary embedding against its definition in complex numbers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moss_jax.config import PRESETS, RopeConfig
from moss_jax.nn.rope import frequencies, rotation
from moss_jax.ops.rotary import rotate


def llama3(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Wave by wave, as the paper's code has it."""
    scaled = []
    for i in range(head_dim // 2):
        frequency = rope.theta ** (-2 * i / head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < rope.original_max_positions / rope.high_freq_factor:
            scaled.append(frequency)
        elif wavelength > rope.original_max_positions / rope.low_freq_factor:
            scaled.append(frequency / rope.factor)
        else:
            smooth = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
                rope.high_freq_factor - rope.low_freq_factor
            )
            scaled.append((1 - smooth) * frequency / rope.factor + smooth * frequency)
    return np.array(scaled)


@pytest.mark.parametrize(
    ("rope", "head_dim"),
    [
        (PRESETS["moss_video_11b"]().decoder.rope, 128),
        (RopeConfig(original_max_positions=64), 16),
        (RopeConfig(theta=10_000.0, factor=4.0, low_freq_factor=2.0, original_max_positions=2048), 64),
    ],
)
def test_frequencies(rope, head_dim):
    expected = llama3(rope, head_dim)
    # Rounding the exponent, up to ln(500,000) = 13, costs 13 units in the last place; the ramp adds some.
    np.testing.assert_allclose(frequencies(rope, head_dim), expected, rtol=50 * 2**-24)
    unscaled = rope.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    # Short waves, long waves and the ramp between them are all there.
    assert expected[0] == unscaled[0]
    assert expected[-1] == unscaled[-1] / rope.factor
    assert ((expected < unscaled) & (expected > unscaled / rope.factor)).any()


def test_a_factor_of_one_scales_nothing():
    np.testing.assert_allclose(
        frequencies(RopeConfig(theta=100.0, factor=1), 8), [1, 100**-0.25, 0.1, 100**-0.75], rtol=1e-6
    )


ROPE = RopeConfig(original_max_positions=64)


@pytest.mark.parametrize("heads", [(), (3,), (2, 3)])
def test_rotates_pairs_of_channels_as_complex_numbers(heads):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, *heads, 16)).astype(np.float32)
    positions = np.array([[0, 1, 2, 30, 500], [7, 7, 0, 1, 100]])
    turned = np.exp(1j * positions[..., None] * llama3(ROPE, 16)).reshape(2, 5, *[1] * len(heads), 8)
    expected = (x[..., :8] + 1j * x[..., 8:]) * turned
    actual = rotate(x, rotation(jnp.asarray(positions), ROPE, 16))
    # Angles of up to 500 radians, off by some units of float32, turn numbers of up to 4.
    np.testing.assert_allclose(actual, np.concatenate([expected.real, expected.imag], -1), rtol=0, atol=5e-4)
    assert rotate(x.astype(jnp.bfloat16), rotation(jnp.asarray(positions), ROPE, 16)).dtype == jnp.bfloat16


@given(first=st.integers(0, 400), second=st.integers(0, 400), shift=st.integers(0, 100))
def test_a_score_depends_on_the_distance_alone(first, second, shift):
    q, k = np.random.default_rng(1).standard_normal((2, 1, 1, 16)).astype(np.float32)

    def score(at, of):
        at, of = (rotation(jnp.array([[p]]), ROPE, 16) for p in (at, of))
        return float((rotate(q, at) * rotate(k, of)).sum())

    assert score(first, second) == pytest.approx(score(first + shift, second + shift), abs=2e-3)
