"""The renderer of the table.

Axes: S side of a photograph.
"""

import dataclasses
import math

import numpy as np
import pytest

from moss_jax.worlds.tabletop import digits
from moss_jax.worlds.tabletop.render import (
    COLOURS,
    OUTLINES,
    RGB,
    SHAPES,
    TABLES,
    Cover,
    Item,
    Look,
    Scene,
    impair,
    paint,
    photograph,
)

SIZE = 112
STILL = Look(seed=3, wood=TABLES[1])
# A point well inside each shape, relative to its centre.
INSIDE = {shape: (0.0, -0.086) if shape == "ring" else (0.0, 0.0) for shape in SHAPES}


def draw_look(seed: int) -> Look:
    return Look.draw(np.random.default_rng(seed))


def inner(picture: np.ndarray, size: int = SIZE) -> np.ndarray:
    margin = (len(picture) - size) // 2
    return picture[margin : margin + size, margin : margin + size]


def some_scene() -> Scene:
    items = [
        Item(shape, 0.2 + 0.3 * (k % 3), 0.25 + 0.5 * (k // 3), COLOURS[k], angle=0.1 * k)
        for k, shape in enumerate(SHAPES)
    ]
    return Scene((*items, Item("card", 0.4, 0.5, digit=7, angle=-0.2)), Cover(0.8, 0.6, angle=0.1))


def test_shapes_and_dtypes():
    look = dataclasses.replace(STILL, shake=0.015, noise=3.0, flicker=0.01)
    picture = paint(some_scene(), look, SIZE)
    assert picture.shape == (SIZE + 4, SIZE + 4, 3)
    assert picture.dtype == np.float32
    photo = photograph(picture, look, np.random.default_rng(0), SIZE)
    assert photo.shape == (SIZE, SIZE, 3)
    assert photo.dtype == np.uint8


@pytest.mark.parametrize("seed", range(3))
def test_rendering_is_deterministic(seed: int):
    look = draw_look(seed)
    assert look == draw_look(seed)
    picture = paint(some_scene(), look, SIZE)
    np.testing.assert_array_equal(picture, paint(some_scene(), look, SIZE))
    photos = [photograph(picture, look, np.random.default_rng(s), SIZE) for s in (5, 5, 6)]
    np.testing.assert_array_equal(photos[0], photos[1])
    assert (photos[0] != photos[2]).any()


def test_numpy_floats_give_the_same_picture_as_python_floats():
    x, y, angle, scale, opacity = np.array([0.4, 0.6, 0.3, 1.1, 0.7])
    item = Item("star", x, y, "red", angle=angle, scale=scale, opacity=opacity)
    plain = Item("star", 0.4, 0.6, "red", angle=0.3, scale=1.1, opacity=0.7)
    pictures = [
        paint(Scene((thing,), Cover(thing.x, thing.y, thing.angle, thing.opacity)), STILL, SIZE)
        for thing in (item, plain)
    ]
    np.testing.assert_array_equal(pictures[0], pictures[1])


def test_looks_differ():
    pictures = [inner(paint(Scene(), draw_look(seed), SIZE)) for seed in range(6)]
    assert min(np.abs(a - b).mean() for k, a in enumerate(pictures) for b in pictures[:k]) > 3


def test_photographs_vary_as_the_look_says():
    look = dataclasses.replace(STILL, noise=4.0)
    picture = np.full((SIZE, SIZE, 3), 128, np.float32)
    rng = np.random.default_rng(0)
    photos = np.array([photograph(picture, look, rng, SIZE) for _ in range(20)], np.float64)
    np.testing.assert_allclose(photos.mean(), 128, atol=0.1)
    np.testing.assert_allclose(photos.std(), 4, rtol=0.02)
    look = dataclasses.replace(STILL, flicker=0.02)
    levels = [photograph(picture, look, rng, SIZE).mean() for _ in range(200)]
    np.testing.assert_allclose(np.std(levels), 0.02 * 128, rtol=0.2)


@pytest.mark.parametrize("seed", range(6))
def test_colours_can_be_told_apart(seed: int):
    look = draw_look(seed)
    gain = look.light * np.array(look.tint)
    for shape in SHAPES:
        dx, dy = INSIDE[shape]
        for k, colour in enumerate(COLOURS):
            x, y = 0.2 + 0.12 * k, 0.4
            photo = photograph(
                paint(Scene((Item(shape, x, y, colour),)), look, SIZE), look, np.random.default_rng(k), SIZE
            )
            j, i = round((x + dx) * SIZE), round((y + dy) * SIZE)
            seen = photo[i - 1 : i + 2, j - 1 : j + 2].mean((0, 1)) / gain
            assert min(RGB, key=lambda name: math.dist(RGB[name], seen)) == colour


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("wood", TABLES)
def test_no_colour_vanishes_on_a_table(colour: str, wood: tuple):
    look = dataclasses.replace(STILL, wood=wood, light=0.75)
    photo = paint(Scene((Item("square", 0.5, 0.5, colour),)), look, SIZE)
    inside, beside = photo[50:62, 50:62].mean((0, 1)), photo[50:62, 20:32].mean((0, 1))
    assert math.dist(inside, beside) > 45


@pytest.mark.parametrize(
    "item",
    [
        *(Item(shape, 0.5, 0.5, "red", angle=0.4) for shape in SHAPES),
        Item("card", 0.5, 0.5, digit=0, angle=0.1),
    ],
    ids=lambda item: item.kind,
)
def test_the_cover_hides_what_is_under_it(item: Item):
    for angle in (-0.05, 0.0, 0.1):
        cover = Cover(0.5, 0.5, angle=angle)
        without = paint(Scene((), cover), STILL, SIZE)
        np.testing.assert_array_equal(paint(Scene((item,), cover), STILL, SIZE), without)


def test_the_cover_does_not_look_like_the_card():
    photo = paint(Scene((Item("card", 0.25, 0.5, digit=0),), Cover(0.7, 0.5)), STILL, SIZE)
    card, cover = photo[44:68, 15:17], photo[45:67, 70:86]
    assert card.min() > 230
    assert cover.mean() < 200
    assert cover.std() > 10


@pytest.mark.parametrize("seed", range(4))
def test_a_large_picture_reduced_is_the_small_one(seed: int):
    look = draw_look(seed)
    small = inner(paint(some_scene(), look, SIZE))
    large = inner(paint(some_scene(), look, 4 * SIZE), 4 * SIZE)
    reduced = large.reshape(SIZE, 4, SIZE, 4, 3).mean((1, 3))
    difference = np.abs(small - reduced)
    assert difference.mean() < 1.5
    assert difference.max() < 60


@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_is_cut_off_by_its_box(shape: str, monkeypatch: pytest.MonkeyPatch):
    scenes = [Scene((Item(shape, 0.5, 0.5, "red", angle=angle),)) for angle in (-0.4, 0.0, 0.25, 2.0)]
    pictures = [paint(scene, STILL, SIZE) for scene in scenes]
    monkeypatch.setitem(OUTLINES, shape, (OUTLINES[shape][0], (0.3, 0.3)))
    for scene, picture in zip(scenes, pictures, strict=True):
        np.testing.assert_allclose(picture, paint(scene, STILL, SIZE), atol=0.01)


def test_absent_things_draw_nothing():
    bare = paint(Scene(), STILL, SIZE)
    absent = (
        Item("star", 0.5, 0.5, "red", opacity=0.0),
        Item("card", 0.5, 0.5, digit=1, opacity=0.0),
        Item("ring", 0.5, 0.5, "red", scale=0.0),
        Item("circle", -0.3, 0.5, "blue"),
        Item("card", 0.5, 1.4, digit=1),
    )
    np.testing.assert_array_equal(paint(Scene(absent, Cover(0.5, 0.5, opacity=0.0)), STILL, SIZE), bare)


def test_opacity_interpolates():
    bare, half, full = (
        paint(Scene((Item("square", 0.5, 0.5, "red", opacity=opacity),)), STILL, SIZE)
        for opacity in (0, 0.5, 1)
    )
    middle = slice(50, 62), slice(50, 62)
    # The shape's own shadow shows through.
    np.testing.assert_allclose(half[middle], (bare[middle] * 0.84 + full[middle]) / 2, atol=1)


@pytest.mark.parametrize(
    "place", [(-0.05, 0.5), (1.05, 0.5), (0.5, -0.05), (0.5, 1.05), (0.0, 0.0), (1.0, 1.0)]
)
def test_things_at_the_edge_are_clipped(place: tuple[float, float]):
    # The same thing within a wide margin, where it is not clipped.
    x, y = place
    for kind in (*SHAPES, "card"):
        scene = Scene((Item(kind, x, y, "red", digit=5, angle=0.3),), Cover(1 - x, 1 - y))
        wide = paint(scene, dataclasses.replace(STILL, shake=0.06), SIZE)
        np.testing.assert_allclose(inner(wide), paint(scene, STILL, SIZE), atol=0.01)


def test_shapes_differ_in_area_and_centre():
    """The share of its bounding box that a shape fills, and whether its centre is open."""
    area = {}
    for shape in SHAPES:
        picture = paint(
            Scene((Item(shape, 0.5, 0.5, "black"),)), dataclasses.replace(STILL, wood=(240,) * 3), 448
        )
        ink = picture.max(-1) < 60
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        box = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert 0.17 < box.shape[1] / 448 < 0.28
        area[shape] = box.mean()
        assert ink[224, 224] == (shape != "ring")
    expected = {"circle": 0.785, "square": 1.0, "triangle": 0.5, "cross": 0.556, "ring": 0.58, "star": 0.31}
    for shape, share in expected.items():
        assert area[shape] == pytest.approx(share, abs=0.03), shape


def test_digits_stay_readable():
    """The nearest neighbour among rendered training cards reads nine of ten held-out cards."""
    look = draw_look(2)
    rng = np.random.default_rng(0)

    def cards(indices: np.ndarray) -> np.ndarray:
        crops = []
        for index in indices:
            picture = paint(Scene((Item("card", 0.5, 0.5, digit=int(index)),)), look, SIZE)
            crops.append(
                photograph(picture, dataclasses.replace(look, shake=0), rng, SIZE)[40:72, 44:68].mean(-1)
            )
        return np.array(crops).reshape(len(indices), -1)

    train, held_out = digits.training_indices(), rng.choice(digits.held_out_indices(), 100, replace=False)
    known, new = cards(train), cards(held_out)
    nearest = ((known**2).sum(1) - 2 * new @ known.T).argmin(1)
    right = [
        digits.label(int(index)) == digits.label(int(train[k]))
        for index, k in zip(held_out, nearest, strict=True)
    ]
    assert np.mean(right) >= 0.9


# ------------------------------------------------------------------------------ impaired pictures


@pytest.mark.parametrize("kind", ["black", "blurred", "overexposed"])
@pytest.mark.parametrize("size", [8, 33, 112])
def test_nothing_can_be_recognised_in_an_impaired_picture(kind, size):
    """A card in the middle of the table is no brighter than what is around it by more than a few levels."""
    look = Look(0, TABLES[2], shake=0.02)
    with_card = paint(Scene((Item("card", 0.5, 0.5, digit=5),)), look, size)
    empty = paint(Scene(), look, size)
    assert np.abs(with_card - empty).max() > 60
    impaired = [impair(picture, kind) for picture in (with_card, empty)]
    assert impaired[0].shape == with_card.shape
    assert impaired[0].dtype == np.float32
    assert np.isfinite(impaired[0]).all()
    assert np.abs(impaired[0] - impaired[1]).max() < 30
    # No edges: neighbouring pixels are nearly alike, more so in larger pictures.
    assert np.abs(np.diff(impaired[0], axis=0)).max() < 100 / size


def test_a_strong_blur_keeps_the_light_of_the_picture():
    flat = np.full((50, 50, 3), (10.0, 90.0, 170.0), np.float32)
    np.testing.assert_allclose(impair(flat, "blurred"), flat, rtol=1e-4)
