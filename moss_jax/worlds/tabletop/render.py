"""Renderer of the table: flat coloured shapes, a card with a digit and a cloth, seen from straight above.

`paint` renders a scene in the light of its stream; `photograph` adds the camera's shake, flicker and noise. A
scene that does not change is painted once and photographed often.

Shapes are signed distance fields, evaluated only in the box around each item; the distance in pixels also
gives the antialiased edge and the shadow. Positions and lengths are in table units, in which the picture is
[0, 1] x [0, 1], x to the right and y down.

Axes: H, W height and width of an item's box; P side of a painted picture, margins included; S side of a
photograph; C colour channels.
"""

import dataclasses
import functools
import math
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8

from moss_jax.worlds.tabletop import digits

RGB = {
    "red": (206, 44, 40),
    "green": (48, 150, 66),
    "blue": (36, 84, 200),
    "yellow": (240, 206, 36),
    "purple": (134, 56, 164),
    "black": (26, 26, 28),
}
COLOURS = tuple(RGB)

CARD_RGB, INK_RGB = (246, 244, 238), (22, 26, 58)
CLOTH_RGB, STRIPE_RGB = (178, 192, 208), (132, 152, 180)

# Base colours of the tables. None is so saturated or dark that one of the shapes' colours would vanish on it.
TABLES = (
    (204, 170, 126),  # light wood
    (176, 134, 92),  # oak
    (142, 102, 72),  # walnut
    (186, 150, 128),  # reddish wood
    (148, 148, 146),  # grey
    (190, 180, 160),  # cream
    (128, 142, 126),  # greenish cloth
)

# Half the width and half the height of the rectangles.
CARD = (0.13, 0.16)
DIGIT = (0.095, 0.12)
COVER = (0.18, 0.20)
STRIPE = 0.055  # period of the cloth's stripes

# Offset, half the width of the soft edge, and opacity of shadows: the cover must also hide a card's shadow.
SHADOW, SHADOW_SOFT, SHADOW_DEPTH = 0.0125, 0.008, 0.32


@dataclasses.dataclass(frozen=True)
class Item:
    """A flat thing on the table: a coloured shape or the card with a digit.

    Attributes:
      kind: one of SHAPES, or "card".
      x: x coordinate of the centre, in table units.
      y: y coordinate of the centre, in table units.
      colour: one of COLOURS, for a shape.
      digit: index of the card's image in `digits`.
      angle: angle of rotation, in radians, clockwise.
      scale: relative to the usual size.
      opacity: from 0 (absent) to 1, for fading in and out.
    """

    kind: str
    x: float
    y: float
    colour: str = ""
    digit: int = -1
    angle: float = 0.0
    scale: float = 1.0
    opacity: float = 1.0


@dataclasses.dataclass(frozen=True)
class Cover:
    """A striped cloth over everything, large enough to hide any item at its centre.

    Attributes:
      x: x coordinate of the centre, in table units.
      y: y coordinate of the centre, in table units.
      angle: angle of rotation, in radians, clockwise.
      opacity: from 0 (absent) to 1.
    """

    x: float
    y: float
    angle: float = 0.0
    opacity: float = 1.0


@dataclasses.dataclass(frozen=True)
class Scene:
    """The contents of a picture.

    Attributes:
      items: from the lowest to the topmost.
      cover: over all of them.
    """

    items: tuple[Item, ...] = ()
    cover: Cover | None = None


@dataclasses.dataclass(frozen=True)
class Look:
    """Table, light and camera of one stream.

    Attributes:
      seed: seed of the table's texture.
      wood: base colour of the table, in 8-bit levels.
      light: overall gain.
      tint: gain of each channel.
      slope: change of the light across the picture, to the right and down.
      flicker: standard deviation of the gain from one photograph to the next.
      noise: standard deviation of the camera's noise, in 8-bit levels.
      shake: largest offset of the camera, in table units.
      blur: width over which edges are soft, in table units.
    """

    seed: int
    wood: tuple[float, float, float]
    light: float = 1.0
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    slope: tuple[float, float] = (0.0, 0.0)
    flicker: float = 0.0
    noise: float = 0.0
    shake: float = 0.0
    blur: float = 0.0

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Look":
        """Samples a look: a table in some light, seen by a better or worse camera."""
        table = np.array(TABLES[rng.integers(len(TABLES))])
        wood = table * rng.uniform(0.93, 1.05) * rng.uniform(0.97, 1.03, 3)
        return cls(
            seed=int(rng.integers(2**31)),
            wood=tuple(wood.tolist()),
            light=float(rng.uniform(0.75, 1.15)),
            tint=tuple(rng.uniform(0.94, 1.06, 3).tolist()),
            slope=tuple(rng.uniform(-0.2, 0.2, 2).tolist()),
            flicker=float(rng.uniform(0, 0.02)),
            noise=float(rng.uniform(0, 8)),
            shake=float(rng.uniform(0, 0.015)),
            blur=float(rng.uniform(0, 0.014)),
        )


# The outlines are signed distances, negative inside, of points (u, v) in an item's unrotated frame, [H, W].


def _rectangle(u: np.ndarray, v: np.ndarray, half: tuple[float, float]) -> np.ndarray:
    return np.maximum(np.abs(u) - half[0], np.abs(v) - half[1])


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v) - 0.11


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(u * u + v * v) - 0.086) - 0.028


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _rectangle(u, v, (0.096, 0.096))


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(u, v) - 0.114, np.minimum(u, v) - 0.038)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    side = math.sqrt(0.75) * np.abs(u) - 0.5 * v
    return np.maximum(side, v) - 0.066


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # A pentagram is the set of points that are outside at most one of its five lines, so its distance is the
    # second largest of theirs.
    first = second = np.full_like(u, -1)
    for k in range(5):
        angle = 2 * math.pi * k / 5 + math.pi / 2
        beyond = math.cos(angle) * u + math.sin(angle) * v
        second = np.maximum(second, np.minimum(first, beyond))
        first = np.maximum(first, beyond)
    return second - 0.136 * math.cos(2 * math.pi / 5)


# Each shape's outline, and half the width and half the height of its bounding box without rotation.
OUTLINES = {
    "circle": (_circle, (0.11, 0.11)),
    "square": (_square, (0.096, 0.096)),
    "triangle": (_triangle, (0.116, 0.132)),
    "star": (_star, (0.13, 0.136)),
    "cross": (_cross, (0.114, 0.114)),
    "ring": (_ring, (0.114, 0.114)),
}
SHAPES = tuple(OUTLINES)


@functools.lru_cache(maxsize=4096)
def _ink(index: int, width: int, height: int) -> np.ndarray:
    """Upsamples a digit's ink smoothly: float32 [height + 2, width + 2] in [0, 1], with an empty border."""

    def enlarge(n: int) -> np.ndarray:
        at = (np.arange(4 * n) + 0.5) * 8 / (4 * n) - 0.5
        t = np.abs(at[:, None] - np.arange(8))
        # A Catmull-Rom spline: smooth, yet the small holes of an 8 or a 4 stay open.
        return np.where(
            t < 1, 1 - 2.5 * t**2 + 1.5 * t**3, np.where(t < 2, 2 - 4 * t + 2.5 * t**2 - t**3 / 2, 0)
        )

    fine = enlarge(height) @ digits.digit_image(index) @ enlarge(width).T
    t = np.clip((fine - 0.3) / 0.55, 0, 1)
    ink = (t * t * (3 - 2 * t)).reshape(height, 4, width, 4).mean((1, 3))
    return np.pad(ink, 1).astype(np.float32)


def _written(index: int, u: np.ndarray, v: np.ndarray, size: int) -> np.ndarray:
    """Samples a digit's ink at points (u, v) of the card: float32 [H, W] in [0, 1]."""
    width, height = (round(2 * half * size) for half in DIGIT)
    ink = _ink(index, width, height)
    # Bilinear interpolation; 1e-3 keeps the right and the lower neighbour of the last point within the
    # border.
    x = ((u / (2 * DIGIT[0]) + 0.5) * width + 0.5).clip(0, width + 1 - 1e-3)
    y = ((v / (2 * DIGIT[1]) + 0.5) * height + 0.5).clip(0, height + 1 - 1e-3)
    i, j = y.astype(np.int32), x.astype(np.int32)
    y -= i
    x -= j
    ink, i = ink.ravel(), i * (width + 2) + j
    top = ink.take(i) * (1 - x) + ink.take(i + 1) * x
    i += width + 2
    return top * (1 - y) + (ink.take(i) * (1 - x) + ink.take(i + 1) * x) * y


@functools.lru_cache(maxsize=16)
def _master(kind: int, size: int) -> np.ndarray:
    """Texture of a large table, float32 [2.5 size, 2.5 size] around 1; kinds: planks, board, linen."""
    rng = np.random.default_rng(kind)
    n = round(2.5 * size)
    x, y = np.meshgrid(*2 * [(np.arange(n, dtype=np.float32) + 0.5) / size])  # along and across the grain
    if kind == 2:
        weave = np.sin(2 * np.pi * 22 * x) * np.sin(2 * np.pi * 22 * y)
        folds = np.sin(3.1 * x + 2.3 * y + np.sin(2.7 * y - x))
        return (1 + 0.035 * weave + 0.02 * folds).astype(np.float32)
    plank = np.floor(y / 0.27).astype(int) if kind == 0 else np.zeros((n, n), int)
    grain = np.zeros_like(x)
    # Streaks along x that wander slowly, none finer than about three pixels at a size of 112.
    for frequency in (3, 7, 13, 21, 33):
        phase, bend, where = rng.uniform(0, 2 * np.pi, (3, plank.max() + 1)).astype(np.float32)
        wander = np.sin(1.7 * x + bend[plank]) + 0.5 * np.sin(4.3 * x + where[plank])
        grain += np.sin(2 * np.pi * frequency * y + 0.09 * frequency * wander + phase[plank])
    shade = 1 + 0.016 * grain
    if kind == 0:
        shade *= rng.uniform(0.94, 1.06, plank.max() + 1)[plank]
        gap = np.abs((y + 0.135) % 0.27 - 0.135) * size
        # One pixel wide at a size of 112, and in proportion at others.
        shade *= 1 - 0.22 * np.clip(size / 224 + 0.5 - gap, 0, 1)
    return shade.astype(np.float32)


@functools.lru_cache(maxsize=32)
def _table(look: Look, size: int, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """Renders the empty table and the light on it, float32 [C, P, P] each."""
    rng = np.random.default_rng(look.seed)
    master = _master(int(rng.integers(3)), size)
    side = size + 2 * margin
    # Offsets are multiples of 1 / 112, so that a table looks the same at all multiples of a size of 112.
    i, j = (round(k / 112 * size) - margin for k in rng.integers(8, 140, 2))
    shade = master[i : i + side, j : j + side]
    if rng.integers(2):
        shade = shade.T
    table = np.array(look.wood, np.float32)[:, None, None] * shade
    across = (np.arange(side, dtype=np.float32) + 0.5 - margin) / size - 0.5
    light = 1 + look.slope[0] * across + look.slope[1] * across[:, None]
    return table, (look.light * np.array(look.tint, np.float32))[:, None, None] * light


def _margin(look: Look, size: int) -> int:
    return math.ceil(look.shake * size)


class _Canvas:
    """A picture in progress, float32 [C, P, P] (channels first, which is faster in NumPy)."""

    def __init__(self, look: Look, size: int):
        self.size, self.margin = size, _margin(look, size)
        table, self.light = _table(look, size, self.margin)
        self.picture = table.copy()
        self.edge = math.hypot(1, look.blur * size)
        self.shift = round(SHADOW * size)

    def region(
        self, thing: Item | Cover, half: tuple[float, float], scale: float = 1.0
    ) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray] | None:
        """Finds the box of pixels around a thing, and their coordinates in the thing's frame.

        Returns:
          The slices of the box, and (u, v), [H + shift, W + shift], which begin further up and left, where
          the shadow is cast from; None if the box is empty.
        """
        cos, sin = math.cos(thing.angle), math.sin(thing.angle)
        around = self.edge / 2 + SHADOW_SOFT * self.size + 1
        box, offsets = [], []
        for centre, reach in (
            (thing.y, abs(sin) * half[0] + abs(cos) * half[1]),
            (thing.x, abs(cos) * half[0] + abs(sin) * half[1]),
        ):
            middle, reach = centre * self.size + self.margin, scale * reach * self.size + around
            start = max(0, math.floor(middle - reach))
            stop = min(self.picture.shape[-1], math.ceil(middle + reach) + self.shift)
            if start >= stop:
                return None
            box.append(slice(start, stop))
            pixels = np.arange(start - self.shift, stop, dtype=np.float32)
            offsets.append((pixels + (0.5 - middle)) / (scale * self.size))
        dy, dx = offsets
        u = cos * dx + (sin * dy)[:, None]
        v = -sin * dx + (cos * dy)[:, None]
        return tuple(box), u, v

    def lay(self, box: tuple[slice, slice], distance: np.ndarray, rgb: np.ndarray, opacity: float) -> None:
        """Composites a thing and its shadow; distance in pixels [H + shift, W + shift], rgb [C, H, W]."""
        k = self.shift
        soft = 2 * SHADOW_SOFT * self.size
        h, w = distance.shape
        shadow = (0.5 - distance[: h - k, : w - k] / soft).clip(0, 1)
        cover = (0.5 - distance[k:, k:] / self.edge).clip(0, 1)
        cover *= opacity
        region = self.picture[:, box[0], box[1]]
        region *= (1 - (SHADOW_DEPTH * opacity) * shadow) * (1 - cover)
        region += rgb * cover


def _colour(rgb: tuple[float, float, float]) -> np.ndarray:
    return np.array(rgb, np.float32)[:, None, None]


_PAINT = {name: _colour(rgb) for name, rgb in RGB.items()}
_CARD, _INK, _CLOTH, _STRIPES = (_colour(rgb) for rgb in (CARD_RGB, INK_RGB, CLOTH_RGB, STRIPE_RGB))


def _with_python_floats[T: (Item, Cover)](thing: T) -> T:
    """Converts NumPy's floats, which would promote the float32 arrays to float64."""
    numbers = {name: float(value) for name, value in vars(thing).items() if isinstance(value, np.floating)}
    return dataclasses.replace(thing, **numbers) if numbers else thing


def _lay_item(canvas: _Canvas, item: Item) -> None:
    item = _with_python_floats(item)
    outline, half = (None, CARD) if item.kind == "card" else OUTLINES[item.kind]
    if item.opacity <= 0 or item.scale <= 0 or (region := canvas.region(item, half, item.scale)) is None:
        return
    box, u, v = region
    k, unit = canvas.shift, item.scale * canvas.size
    if outline is None:
        distance = _rectangle(u, v, CARD) * unit
        rgb = _CARD + (_INK - _CARD) * _written(item.digit, u[k:, k:], v[k:, k:], canvas.size)
    else:
        distance = outline(u, v) * unit
        # Slightly darker towards the rim, which sets a shape off from the table.
        rgb = _PAINT[item.colour] * (0.9 - distance[k:, k:] * (0.1 / (0.03 * canvas.size))).clip(0.9, 1)
    canvas.lay(box, distance, rgb, item.opacity)


def _lay_cover(canvas: _Canvas, cover: Cover) -> None:
    cover = _with_python_floats(cover)
    if cover.opacity <= 0 or (region := canvas.region(cover, COVER)) is None:
        return
    box, u, v = region
    k = canvas.shift
    stripes = 0.5 + 0.5 * np.cos((2 * math.pi / STRIPE) * v[k:, k:])
    canvas.lay(
        box, _rectangle(u, v, COVER) * canvas.size, _CLOTH + (_STRIPES - _CLOTH) * stripes, cover.opacity
    )


def paint(scene: Scene, look: Look, size: int) -> Float[np.ndarray, "P P 3"]:
    """Renders a scene in the light of its stream, without the camera's flaws.

    Args:
      scene: to be rendered.
      look: look of the stream.
      size: side of the photographs.

    Returns:
      float32 in 8-bit levels (bright light may exceed 255), P = size + 2 margin; the margin on each side is
      the largest offset by which the camera shakes.
    """
    canvas = _Canvas(look, size)
    for item in scene.items:
        _lay_item(canvas, item)
    if scene.cover is not None:
        _lay_cover(canvas, scene.cover)
    picture = np.empty((*canvas.picture.shape[1:], 3), np.float32)
    np.multiply(canvas.picture, canvas.light, out=picture.transpose(2, 0, 1))
    return picture


# Brightness of the pictures of a camera that is covered or blinded, in 8-bit levels.
BLACK, OVEREXPOSED = 3.0, 252.0
# A strong blur: width of the Gaussian in picture widths, and the side of the grid that it is computed on.
BLUR, BLUR_GRID = 0.3, 16


def impair(
    picture: Float[np.ndarray, "P P 3"], kind: Literal["black", "blurred", "overexposed"]
) -> Float[np.ndarray, "P P 3"]:
    """Renders what a camera with a covered lens, far out of focus, or in blinding light sees of a picture.

    Args:
      picture: from `paint`.
      kind: kind of impairment.

    Returns:
      A picture for `photograph`, on which nothing can be recognised.
    """
    if kind != "blurred":
        return np.full_like(picture, BLACK if kind == "black" else OVEREXPOSED)
    side = len(picture)
    edges = np.linspace(0, side, min(BLUR_GRID, side), endpoint=False).astype(int)
    sums = np.add.reduceat(np.add.reduceat(picture, edges, axis=0), edges, axis=1)
    cells = np.diff(edges, append=side).astype(np.float32)
    small = sums / (cells[:, None] * cells)[:, :, None]
    at, centres = (np.arange(side) + 0.5) / side, (edges + cells / 2) / side
    weights = np.exp(-(((at[:, None] - centres) / BLUR) ** 2) / 2)
    weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return np.einsum("pi,ijc,qj->pqc", weights, small, weights, optimize=True)


@functools.lru_cache(maxsize=4)
def _noise(count: int) -> np.ndarray:
    """Standard normal noise, float32 [9 count], of which photographs use stretches of `count`."""
    return np.random.default_rng(0).standard_normal(9 * count, np.float32)


def photograph(
    picture: Float[np.ndarray, "P P 3"], look: Look, rng: np.random.Generator, size: int
) -> UInt8[np.ndarray, "S S 3"]:
    """Takes a photograph, with the camera's shake, flicker and noise.

    Args:
      picture: from `paint`.
      look: look of the stream.
      rng: for shake, flicker and noise.
      size: side of the photograph, S.
    """
    room, count = len(picture) - size, 3 * size * size
    i, j = rng.integers(0, room + 1, 2)
    start = rng.integers(8 * count)
    # A stretch of fixed noise with a random start serves as well as fresh noise, at a tenth of its cost.
    shot = _noise(count)[start : start + count].reshape(size, size, 3) * float(look.noise)
    shot += picture[i : i + size, j : j + size] * (1 + look.flicker * float(rng.standard_normal()))
    shot += 0.5  # the conversion to integers truncates
    return shot.clip(0, 255, out=shot).astype(np.uint8)
