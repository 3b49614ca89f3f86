"""Preprocessing: within one 8-bit level of the original's image processor, and exact up to rounding.

A normalised value is the result of three float32 operations on numbers of at most its own size, so its
error is well below `ROUNDING` times that. A resized one is a weighted mean of 8-bit levels, whose error
`resize_error` bounds; a level halfway between two integers may be rounded either way.
"""

import functools
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from moss_jax.config import moss_tiny, moss_video_11b
from moss_jax.video import fit_frame, fitted_size, preprocess

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "preprocess.npz"
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # as in the golden file
EPSILON = float(np.finfo(np.float32).eps)
ROUNDING = 8 * EPSILON
VISION = moss_tiny().vision


def picture(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def levels_of(pixels, mean=VISION.image_mean, std=VISION.image_std) -> np.ndarray:
    """Inverts the normalisation: 8-bit levels as floats."""
    return (np.asarray(pixels) * np.float32(std) + np.float32(mean)) * 255


def axes(height: int, width: int, image_size: int) -> list[tuple[int, int]]:
    """Size before and after resizing, of both axes."""
    return list(zip((height, width), fitted_size(height, width, image_size), strict=True))


def resize_error(*shape_and_size: int) -> float:
    """Bounds the float32 error of a resize in levels: for each axis eps sqrt(taps) 255, doubled."""
    taps = [2 * max(1.0, old / new) for old, new in axes(*shape_and_size)]
    return 2 * 255 * EPSILON * sum(map(math.sqrt, taps))


def exact_levels(rgb: np.ndarray, image_size: int) -> np.ndarray:
    """Resizes with a triangle filter, in float64 and without rounding to integers."""
    filters = []
    for old, new in axes(*rgb.shape[:2], image_size):
        centres = (np.arange(new) + 0.5) * old / new - 0.5
        weights = np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(old)) / max(old / new, 1))
        filters.append(weights / weights.sum(axis=1, keepdims=True))
    return np.einsum("yh,xw,hwc->yxc", *filters, rgb, optimize=True)


def assert_rounded(levels: np.ndarray, expected: np.ndarray, error: float) -> None:
    """The part of `levels` that `expected` covers is that, give or take `error`, rounded to integers."""
    levels = levels[..., : expected.shape[-3], : expected.shape[-2], :]
    assert np.abs(levels - expected).max() <= 0.5 + error + 255 * ROUNDING


@pytest.mark.parametrize("image_size", [56, 112])
@pytest.mark.parametrize("name", ["photo", "gradient", "noise"])
def test_agrees_with_the_original(name, image_size):
    with np.load(GOLDEN) as golden:
        rgb, expected = golden[f"{name}_rgb"], golden[f"{name}_{image_size}"]
    result = np.asarray(preprocess(rgb, image_size=image_size, **HALF))
    assert result.dtype == np.float32
    assert np.abs(result - expected).max() <= 2 / 255 + ROUNDING
    assert np.abs(result - expected).mean() < 0.002  # a quarter of the values by one level


@pytest.mark.parametrize(
    ("height", "width", "image_size", "expected"),
    [
        (333, 77, 112, (112, 25)),
        (360, 640, 112, (62, 112)),  # 360 * (112 / 640) < 63 in floats, and the original rounds so
        (720, 1280, 560, (315, 560)),
        (40, 90, 112, (49, 112)),
        (560, 560, 560, (560, 560)),
        (2, 3000, 112, (1, 112)),
        (1, 1, 56, (56, 56)),
    ],
)
def test_sizes(height, width, image_size, expected):
    assert fitted_size(height, width, image_size) == expected


def test_the_longer_side_fills_the_tile():
    assert {fitted_size(side, max(1, side // 2), 112)[0] for side in range(1, 5000)} == {112}


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (300, 200), (64, 64), (7, 900)])
def test_padding_is_black_below_and_right(shape):
    result = np.asarray(
        preprocess(picture(*shape), image_size=112, mean=VISION.image_mean, std=VISION.image_std)
    )
    height, width = fitted_size(*shape, 112)
    black = np.broadcast_to(-np.float32(VISION.image_mean) / np.float32(VISION.image_std), result.shape)
    np.testing.assert_allclose(result[height:], black[height:], rtol=ROUNDING)
    np.testing.assert_allclose(result[:, width:], black[:, width:], rtol=ROUNDING)
    levels = levels_of(result)[:height, :width]
    np.testing.assert_allclose(levels, np.round(levels), rtol=0, atol=255 * ROUNDING)
    assert levels.std() > 5


def test_a_frame_of_the_tiles_size_is_only_normalised():
    rgb = picture(112, 112)
    result = preprocess(rgb, image_size=112, mean=VISION.image_mean, std=VISION.image_std)
    expected = (rgb / 255 - np.array(VISION.image_mean)) / np.array(VISION.image_std)
    np.testing.assert_allclose(result, expected, rtol=0, atol=np.abs(expected).max() * ROUNDING)


@pytest.mark.parametrize("shape", [(1, 1), (60, 90), (500, 1000)])
def test_a_flat_colour_stays(shape):
    rgb = np.broadcast_to(np.uint8([200, 7, 99]), (*shape, 3))
    result = np.asarray(preprocess(rgb, image_size=56, mean=(0, 0, 0), std=(1, 1, 1)))
    height, width = fitted_size(*shape, 56)
    inside = result[:height, :width] * 255
    np.testing.assert_allclose(inside, np.broadcast_to(np.float32([200, 7, 99]), inside.shape), rtol=ROUNDING)


def test_leading_axes_and_jit_change_nothing():
    frames = picture(6, 48, 80)
    run = functools.partial(preprocess, image_size=56, **HALF)
    exact = np.stack([exact_levels(frame, 56) for frame in frames])
    jitted = jax.jit(run)(frames.reshape(2, 3, 48, 80, 3))
    assert jitted.shape == (2, 3, 56, 56, 3)
    assert jitted.dtype == np.float32
    one_by_one = np.stack([run(frame) for frame in frames])
    for pixels in (one_by_one, run(frames), np.reshape(jitted, one_by_one.shape)):
        assert_rounded(levels_of(pixels, **HALF), exact, resize_error(48, 80, 56))


@pytest.mark.parametrize("image_size", [56, 112])
@pytest.mark.parametrize(
    "shape", [(333, 77), (360, 640), (40, 90), (112, 112), (1080, 1920), (2, 3000), (1, 1), (56, 20)]
)
def test_fitting_on_the_host_is_the_same(shape, image_size):
    rgb = picture(*shape)
    fitted = fit_frame(rgb, image_size)
    assert fitted.dtype == np.uint8
    assert fitted.shape == (image_size, image_size, 3)
    run = functools.partial(preprocess, image_size=image_size, mean=VISION.image_mean, std=VISION.image_std)
    exact = exact_levels(rgb, image_size)
    for pixels in (run(rgb), run(fitted)):
        assert_rounded(levels_of(pixels), exact, resize_error(*shape, image_size))
    height, width = exact.shape[:2]
    assert not fitted[height:].any()
    assert not fitted[:, width:].any()


@pytest.mark.parametrize(
    "shape", [(333, 77), (1080, 1920), (2, 3000), (3000, 2), (9, 56), (5, 3), (1, 1), (1, 100_000), (2, 9, 8)]
)
def test_resizes_as_jax_does(shape):
    rgb = picture(*shape)
    result = preprocess(rgb, image_size=56, mean=(0, 0, 0), std=(1, 1, 1))
    height, width = fitted_size(*shape[-2:], 56)
    resized = (*rgb.shape[:-3], height, width, 3)
    expected = np.asarray(jax.image.resize(np.float32(rgb), resized, "linear", antialias=True))
    # JAX computes the filter's positions in float32, with an error of eps times the size.
    positions = sum(min(pair) for pair in axes(*shape[-2:], 56))
    error = 2 * resize_error(*shape[-2:], 56) + 4 * 255 * EPSILON * positions
    assert_rounded(np.asarray(result) * 255, expected, error)


@pytest.mark.parametrize(
    ("shape", "matmuls"), [((8, 1080, 1920, 3), 0), ((360, 640, 3), 0), ((1, 5000, 3), 1)]
)
def test_only_very_large_frames_are_resized_by_matmul(shape, matmuls):
    run = jax.jit(functools.partial(preprocess, image_size=112, **HALF))
    program = run.lower(jax.ShapeDtypeStruct(shape, np.uint8)).as_text()
    assert program.count("dot_general") == matmuls


@pytest.mark.parametrize("name", ["photo", "gradient", "noise"])
def test_fitting_on_the_host_agrees_with_the_original(name):
    with np.load(GOLDEN) as golden:
        rgb, expected = golden[f"{name}_rgb"], golden[f"{name}_112"]
    assert np.abs(fit_frame(rgb, 112) - levels_of(expected, **HALF)).max() <= 1 + 255 * ROUNDING


def test_the_full_size_tile():
    vision = moss_video_11b().vision
    run = functools.partial(
        preprocess, image_size=vision.image_size, mean=vision.image_mean, std=vision.image_std
    )
    pixels = jax.eval_shape(run, jax.ShapeDtypeStruct((4, 720, 1280, 3), np.uint8))
    assert (pixels.shape, pixels.dtype) == ((4, 560, 560, 3), np.float32)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((4, 4, 3), np.float32), ((4, 4), np.uint8), ((4, 4, 4), np.uint8), ((0, 4, 3), np.uint8)],
)
def test_other_arrays_are_refused(shape, dtype):
    with pytest.raises(ValueError, match=r"frames must be uint8 \[\.\.\., H, W, 3\]"):
        preprocess(np.zeros(shape, dtype), image_size=56, **HALF)
    with pytest.raises(ValueError, match=r"frames must be uint8 \[\.\.\., H, W, 3\]"):
        fit_frame(np.zeros(shape, dtype), 56)
