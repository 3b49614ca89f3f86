"""Preprocessing: as the original's image processor did it, to within one 8-bit level."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from moss_jax.config import moss_tiny, moss_video_11b
from moss_jax.video import fit_frame, fitted_size, preprocess

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "preprocess.npz"
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # what the golden file was made with


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("image_size", [56, 112])
@pytest.mark.parametrize("name", ["photo", "gradient", "noise"])
def test_agrees_with_the_original(name, image_size):
    with np.load(GOLDEN) as golden:
        rgb, expected = golden[f"{name}_rgb"], golden[f"{name}_{image_size}"]
    result = np.asarray(preprocess(rgb, image_size=image_size, **HALF))
    assert result.dtype == np.float32
    assert np.abs((result - expected) * 0.5).max() <= 1 / 255 + 1e-6
    assert np.abs(result - expected).mean() < 0.002


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
    vision = moss_tiny().vision
    mean, std = np.float32(vision.image_mean), np.float32(vision.image_std)
    rgb = picture(*shape)
    result = np.asarray(preprocess(rgb, image_size=112, mean=vision.image_mean, std=vision.image_std))
    height, width = fitted_size(*shape, 112)
    black = np.broadcast_to(-mean / std, result.shape)
    np.testing.assert_allclose(result[height:], black[height:], rtol=1e-6)
    np.testing.assert_allclose(result[:, width:], black[:, width:], rtol=1e-6)
    levels = (result * std + mean)[:height, :width] * 255
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-3)
    assert levels.std() > 5


def test_a_frame_of_the_tiles_size_is_only_normalised():
    rgb = picture(112, 112)
    vision = moss_tiny().vision
    result = preprocess(rgb, image_size=112, mean=vision.image_mean, std=vision.image_std)
    expected = (rgb / 255 - np.array(vision.image_mean)) / np.array(vision.image_std)
    np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (60, 90), (500, 1000)])
def test_a_flat_colour_stays(shape):
    rgb = np.broadcast_to(np.uint8([200, 7, 99]), (*shape, 3))
    result = np.asarray(preprocess(rgb, image_size=56, mean=(0, 0, 0), std=(1, 1, 1)))
    height, width = fitted_size(*shape, 56)
    inside = result[:height, :width] * 255
    np.testing.assert_allclose(inside, np.broadcast_to(np.float32([200, 7, 99]), inside.shape), rtol=1e-6)


def test_leading_axes_and_jit_change_nothing():
    frames = np.stack([picture(48, 80, seed) for seed in range(6)])
    run = functools.partial(preprocess, image_size=56, **HALF)
    one_by_one = np.stack([run(frame) for frame in frames])
    np.testing.assert_allclose(run(frames), one_by_one, atol=1e-6)
    jitted = jax.jit(run)(frames.reshape(2, 3, 48, 80, 3))
    assert jitted.shape == (2, 3, 56, 56, 3)
    assert jitted.dtype == np.float32
    # A value halfway between two levels may be rounded either way.
    differences = np.abs(np.reshape(jitted, one_by_one.shape) - one_by_one)
    assert differences.max() <= 2 / 255 + 1e-6
    assert (differences > 1e-6).mean() < 1e-3


@pytest.mark.parametrize("image_size", [56, 112])
@pytest.mark.parametrize(
    "shape", [(333, 77), (360, 640), (40, 90), (112, 112), (1080, 1920), (2, 3000), (1, 1), (56, 20)]
)
def test_fitting_on_the_host_is_the_same(shape, image_size):
    rgb = picture(*shape)
    fitted = fit_frame(rgb, image_size)
    assert fitted.dtype == np.uint8
    assert fitted.shape == (image_size, image_size, 3)
    vision = moss_tiny().vision
    run = functools.partial(preprocess, image_size=image_size, mean=vision.image_mean, std=vision.image_std)
    level = 1 / 255 / min(vision.image_std)
    differences = np.abs(np.asarray(run(fitted)) - np.asarray(run(rgb)))
    # A value halfway between two levels may be rounded either way.
    assert differences.max() <= level + 1e-6
    assert (differences > 1e-6).mean() < 1e-3


@pytest.mark.parametrize(
    "shape", [(333, 77), (1080, 1920), (2, 3000), (3000, 2), (9, 56), (5, 3), (1, 1), (1, 100_000), (2, 9, 8)]
)
def test_resizes_as_jax_does(shape):
    rgb = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    result = preprocess(rgb, image_size=56, mean=(0, 0, 0), std=(1, 1, 1))
    height, width = fitted_size(*shape[-2:], 56)
    resized = (*rgb.shape[:-3], height, width, 3)
    expected = jax.image.resize(np.float32(rgb), resized, "linear", antialias=True)
    levels = np.asarray(result[..., :height, :width, :]) * 255
    assert np.abs(levels - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize(
    ("shape", "products"), [((8, 1080, 1920, 3), 0), ((360, 640, 3), 0), ((1, 5000, 3), 1)]
)
def test_products_are_only_for_very_large_frames(shape, products):
    run = jax.jit(functools.partial(preprocess, image_size=112, **HALF))
    program = run.lower(jax.ShapeDtypeStruct(shape, np.uint8)).as_text()
    assert program.count("dot_general") == products


@pytest.mark.parametrize("name", ["photo", "gradient", "noise"])
def test_fitting_on_the_host_agrees_with_the_original(name):
    with np.load(GOLDEN) as golden:
        rgb, expected = golden[f"{name}_rgb"], golden[f"{name}_112"]
    levels = (expected * 0.5 + 0.5) * 255
    assert np.abs(fit_frame(rgb, 112) - levels).max() <= 1 + 1e-3


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
