"""Renders the demo clip: a table seen from above, on which things come, move, are covered and go.

Run it as `python assets/make_demo_clip.py`; it writes demo.mp4 beside itself. What happens, in seconds:
   1.0   a red ball rolls in from the left and stops
   3.0   a blue square slides in from the top, turning
   5.0   a green triangle appears below them
   6.5   a sheet of white paper comes from the right and covers the square
   8.5   the ball rolls away to the lower left
  10.0   the paper leaves again; the square is still there

Axes: H, W height and width of the picture.
"""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FPS, SECONDS = 15, 12
HEIGHT, WIDTH = 240, 320
RED, BLUE, GREEN, PAPER = (208, 44, 40), (38, 84, 190), (46, 148, 74), (240, 238, 230)
LIGHT = np.array([4.0, 6.0])  # pixels by which a shadow falls to the right and below


def glide(t: float, start: float, end: float, a: tuple[float, float], b: tuple[float, float]) -> np.ndarray:
    """The point (x, y) on the way from a to b, with a soft start and stop."""
    s = np.clip((t - start) / (end - start), 0, 1)
    return np.array(a) + s * s * (3 - 2 * s) * (np.array(b) - np.array(a))


# The shapes are signed distances in pixels, [H, W], negative inside.


def disc(xy: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    return np.linalg.norm(xy - centre, axis=-1) - radius


def box(xy: np.ndarray, centre: np.ndarray, half: tuple[float, float], angle: float) -> np.ndarray:
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (np.abs((xy - centre) @ turn) - half).max(-1)


def triangle(xy: np.ndarray, centre: np.ndarray, size: float) -> np.ndarray:
    normals = [(np.cos(a), np.sin(a)) for a in np.radians([90, 210, 330])]
    return np.max([(xy - centre) @ np.array(normal) for normal in normals], axis=0) - size / 2


def table(xy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Planks of wood, float [H, W, 3]."""
    x, y = xy[..., 0], xy[..., 1]
    plank = (y // 60).astype(int)
    tone = rng.uniform(0.94, 1.06, 5)[plank]
    grain = np.sin(y * 0.55 + 3 * np.sin(x * 0.013 + plank * 2.1) + plank * 4.0)
    gap = np.where(y % 60 < 1.5, 0.72, 1.0)
    shade = tone * gap * (1 + 0.035 * grain) * (1.06 - 0.12 * (x + y) / (WIDTH + HEIGHT))
    return shade[..., None] * np.array([176.0, 134.0, 92.0])


def lay(
    picture: np.ndarray,
    shape: Callable[[np.ndarray], np.ndarray],
    xy: np.ndarray,
    colour: tuple[int, int, int],
    opacity: float = 1.0,
) -> np.ndarray:
    """Puts a shape with its shadow on the picture; `shape` maps points to signed distances."""
    shadow = 0.4 * opacity * np.clip(0.5 - shape(xy - LIGHT) / 9, 0, 1)[..., None]
    distance = shape(xy)[..., None]
    cover = opacity * np.clip(0.5 - distance, 0, 1)
    shaded = np.array(colour) * (0.95 + 0.07 * np.clip(-distance / 14, 0, 1))
    return picture * (1 - shadow) * (1 - cover) + shaded * cover


def render(t: float, wood: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """The scene after t seconds, float [H, W, 3]."""
    picture = wood
    if t >= 3.0:
        centre, turned = glide(t, 3.0, 4.6, (222, -40), (222, 92)), glide(t, 3.0, 4.6, (-1.6, 0), (0.35, 0))
        picture = lay(picture, lambda p: box(p, centre, (24, 24), turned[0]), xy, BLUE)
    if t >= 5.0:
        grown = glide(t, 5.0, 5.6, (0.2, 0), (1, 0))[0]
        picture = lay(picture, lambda p: triangle(p, np.array([160, 186]), 34 * grown), xy, GREEN, grown)
    if 1.0 <= t < 10.0:
        came = glide(t, 1.0, 2.6, (-40, 70), (88, 112))
        centre = came + glide(t, 8.5, 9.9, (0, 0), (-150, 120))
        picture = lay(picture, lambda p: disc(p, centre, 25), xy, RED)
        glint = 0.5 * np.exp(-((disc(xy, centre - 8, 0) / 7) ** 2))[..., None]
        picture = picture * (1 - glint) + 255 * glint
    if 6.5 <= t < 11.8:
        x = glide(t, 6.5, 7.8, (400, 0), (232, 0))[0] + glide(t, 10.0, 11.5, (0, 0), (180, 0))[0]
        picture = lay(picture, lambda p: box(p, np.array([x, 96]), (58, 48), 0.08), xy, PAPER)
    return picture


def main() -> None:
    rng = np.random.default_rng(7)
    xy = np.stack(np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5), axis=-1)  # [H, W, 2]
    wood = table(xy, rng)
    path = Path(__file__).with_name("demo.mp4")
    # One thread, as the encoder's output depends on their number.
    options = {"crf": "22", "preset": "veryslow", "threads": "1"}
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(FPS * SECONDS):
            noise = rng.normal(0, 3.0, (HEIGHT, WIDTH, 1))
            rgb = np.clip(render(i / FPS, wood, xy) + noise, 0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
