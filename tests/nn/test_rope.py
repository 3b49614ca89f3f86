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


MODELS = [PRESETS["moss_video_11b"]().decoder, PRESETS["moss_tiny"]().decoder]
# Products are rounded by up to 2^-8 at the end of a block, and a block's own angle by 2^-19 turns; cosines
# and sines, and the products of two, add some units of float32. A distance has two ends.
FAR_BOUND = 2 * (2**-8 + 2 * math.pi * 2**-19 + 10 * 2**-24)


@pytest.mark.parametrize("decoder", MODELS, ids=["moss_video_11b", "moss_tiny"])
def test_the_positions_of_the_original_have_its_angles(decoder):
    """Float32 products of position and frequency, bit for bit."""
    rng = np.random.default_rng(0)
    positions = np.concatenate([np.arange(4096), rng.integers(4096, 2**17, 4096), [2**17 - 1]])
    angles = jnp.asarray(positions, jnp.float32)[None, :, None] * frequencies(decoder.rope, decoder.head_dim)
    turned = rotation(jnp.asarray(positions)[None], decoder.rope, decoder.head_dim)
    np.testing.assert_array_equal(turned.cos, jnp.cos(angles))
    np.testing.assert_array_equal(turned.sin, jnp.sin(angles))


def complex_rotation(positions, decoder) -> np.ndarray:
    turned = rotation(jnp.asarray(positions)[None], decoder.rope, decoder.head_dim)
    return np.asarray(turned.cos, np.float64)[0] + 1j * np.asarray(turned.sin, np.float64)[0]


@pytest.mark.parametrize("decoder", MODELS, ids=["moss_video_11b", "moss_tiny"])
@pytest.mark.parametrize("begin", [10**6, 10**7, 10**9, 2**31 - 1 - 2**18])
def test_distances_far_out_are_as_exact_as_near(decoder, begin):
    """Against float64, also across the borders of blocks."""
    rng = np.random.default_rng(0)
    distances = np.concatenate([np.arange(200), rng.integers(200, 2**17, 800)])
    starts = begin + rng.integers(0, 2**17, len(distances))
    between = complex_rotation(starts + distances, decoder) * complex_rotation(starts, decoder).conj()
    radians = frequencies(decoder.rope, decoder.head_dim)
    assert radians.dtype == np.float32
    exact = np.exp(1j * distances[:, None] * radians.astype(np.float64))
    assert abs(between - exact).max() < FAR_BOUND


@pytest.mark.parametrize("decoder", MODELS, ids=["moss_video_11b", "moss_tiny"])
def test_scores_far_out_are_those_near(decoder):
    width, rng = decoder.head_dim, np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, width)).astype(np.float32)

    def score(first, distance):
        at, of = (rotation(jnp.array([[p]]), decoder.rope, width) for p in (first + distance, first))
        return float((rotate(q, at) * rotate(k, of)).sum())

    lengths = [np.hypot(*x[0, 0].reshape(2, width // 2)) for x in (q, k)]  # Of each pair of channels.
    bound = 2 * FAR_BOUND * (lengths[0] * lengths[1]).sum()
    for distance in (0, 1, 17, 1000, 100_000):
        assert abs(score(10**8 + 10**3, distance) - score(10**3, distance)) < bound
