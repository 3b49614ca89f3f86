"""Pictures for notebooks: what they show where."""

import io

import numpy as np
import pytest
from PIL import Image

from moss_jax.eval import plots


def pixels(picture) -> np.ndarray:
    image = Image.open(io.BytesIO(picture._repr_jpeg_()))
    assert image.format == "JPEG"
    return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture
def frames():
    return np.full((3, 64, 64, 3), 255, np.uint8)


def test_film_has_a_place_for_each_frame(frames):
    frames[1] = (255, 0, 0)
    shown = pixels(plots.film(frames, ["0 s", "1 s", "2 s"]))
    red = (shown[..., 0] > 200) & (shown[..., 1] < 60)
    _, columns = np.nonzero(red)
    assert 1 / 3 <= columns.min() / shown.shape[1] <= columns.max() / shown.shape[1] <= 2 / 3


def test_light_falls_where_the_weight_is(frames):
    weights = np.zeros(5)
    weights[3] = 1  # after the class token: left above, right above, left below
    shown = pixels(plots.over_frames(frames[:1], [weights]))
    dim = (shown.max(axis=-1) < 100) & (shown.min(axis=-1) > 30)
    rows, columns = np.nonzero(dim)
    cells = shown[rows.min() : rows.max(), columns.min() : columns.max()].mean(axis=-1)
    height, width = cells.shape
    quarters = cells[: height // 2 * 2, : width // 2 * 2].reshape(2, height // 2, 2, width // 2).mean((1, 3))
    assert np.unravel_index(quarters.argmax(), (2, 2)) == (1, 0)
    assert np.sort(quarters.ravel())[-2] < 0.5 * quarters.max()


def test_maps_leave_blank_what_comes_later():
    maps = np.zeros((1, 2, 2))
    maps[0, 0] = 1
    maps[0, 1, 1] = 0.5
    picture = plots.heat_maps(maps, titles=["layer"], rows=["0 s", "1 s"], columns=["a", "b"])
    grey = np.abs(pixels(picture) - round(0.92 * 255)).max(axis=-1) < 4
    # Of the four cells only the lower left one; what is written and the edges have some grey, too.
    rows, columns = np.nonzero(grey)
    height, width = grey.shape
    assert grey.sum() > 0.1 * grey.size
    assert ((columns < width / 2) & (rows > 0.2 * height)).mean() > 0.95


def test_a_curve_is_drawn():
    picture = plots.curve([3, 2, 1], xlabel="step", ylabel="loss")
    shown = pixels(picture)
    blue = (shown[..., 2] - shown[..., 0]) > 80
    rows, columns = np.nonzero(blue)
    assert rows[columns.argmin()] < rows[columns.argmax()]
    assert repr(picture) == f"<picture of {len(picture.jpeg) / 1000:.0f} kB>"
