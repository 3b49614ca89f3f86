"""Plots for notebooks: frames, attention over frames and within them, curves.

F frames, H W pixels, N vectors a frame, R rows, C columns
"""

import io
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moss_jax.video import fit_frame

DPI = 80
WIDTH = 10.0  # inches
COLOURS = "magma"


class Picture:
    """A rendered figure, which a notebook shows as the result of a cell.

    Args:
      figure: to be rendered.
      dpi: pixels per inch.

    Attributes:
      jpeg: content of the file. Camera frames take a fraction of their size in PNG.
    """

    def __init__(self, figure: Figure, dpi: int = DPI):
        file = io.BytesIO()
        options = {"quality": 90, "subsampling": 0, "optimize": True}
        figure.savefig(file, format="jpeg", dpi=dpi, pil_kwargs=options)
        self.jpeg = file.getvalue()

    def __repr__(self) -> str:
        return f"<picture of {len(self.jpeg) / 1000:.0f} kB>"

    def _repr_jpeg_(self) -> bytes:
        return self.jpeg


def film(
    frames: Sequence[UInt8[np.ndarray, "H W 3"]], labels: Sequence[str] = (), *, columns: int = 8
) -> Picture:
    """Plots frames side by side, each under its label."""
    figure, panels = _panels(len(frames), columns)
    for panel, frame in zip(panels, frames, strict=True):
        panel.imshow(frame)
    for panel, label in zip(panels, labels, strict=False):
        panel.set_title(label, fontsize=9)
    return Picture(figure)


def over_frames(
    frames: Sequence[UInt8[np.ndarray, "H W 3"]],
    weights: Sequence[Float[np.ndarray, " N"]],
    labels: Sequence[str] = (),
    *,
    columns: int = 4,
) -> Picture:
    """Plots frames, padded to the model's square tile, with their brightness by attention weight.

    Args:
      frames: to be plotted.
      weights: of each frame's vectors: the class token, whose weight is printed below, then a square grid.
      labels: labels of the frames.
      columns: frames side by side.
    """
    figure, panels = _panels(len(frames), columns, captions=2)
    for panel, frame, (whole, *grid) in zip(panels, frames, weights, strict=True):
        side = math.isqrt(len(grid))
        light = np.reshape(grid, (side, side))
        # A lower bound on the brightness, so that dark parts can still be seen.
        light = 0.25 + 0.75 * light / max(light.max(), 1e-9)
        tile = fit_frame(frame, max(frame.shape[:2]))
        size = len(tile)
        cell = np.arange(size) * side // size
        panel.imshow(tile / 255 * light[cell][:, cell, None])
        panel.set_xlabel(f"class token {whole:.0%}", fontsize=8)
    for panel, label in zip(panels, labels, strict=False):
        panel.set_title(label, fontsize=9)
    return Picture(figure)


def heat_maps(
    maps: Float[np.ndarray, "P R C"],
    *,
    titles: Sequence[str],
    rows: Sequence[str],
    columns: Sequence[str],
    row_label: str = "",
) -> Picture:
    """Plots maps of weights one above the other, on a common scale from 0 to 1.

    Cells below the last nonzero weight of a column in any map are left blank: frames that are still to come.

    Args:
      maps: maps of weights.
      titles: titles of the maps.
      rows: labels of the rows.
      columns: labels of the columns.
      row_label: label of the vertical axes.
    """
    count, height, width = np.shape(maps)
    below = np.flip(np.cumsum(np.flip(np.max(maps, axis=0), 0), axis=0), 0) == 0
    maps = np.where(below, np.nan, maps)
    cell = WIDTH / (width + 6)
    figure = Figure(figsize=(WIDTH, count * (height * cell * 0.6 + 0.3) + 0.6), layout="constrained")
    panels = figure.subplots(count, sharex=True, squeeze=False)[:, 0]
    for panel, weights, title in zip(panels, maps, titles, strict=True):
        image = panel.imshow(weights, vmin=0, vmax=1, cmap=COLOURS, aspect="auto", interpolation="nearest")
        panel.set_facecolor("0.92")
        panel.set_title(title, fontsize=9, loc="left")
        panel.set_ylabel(row_label)
        panel.set_yticks(range(height), rows, fontsize=6)
    panels[-1].set_xticks(range(width), columns, rotation=90, fontsize=8)
    figure.colorbar(image, ax=panels, fraction=0.02, pad=0.01)
    return Picture(figure)


def curve(values: Sequence[float], *, xlabel: str, ylabel: str) -> Picture:
    """Plots a sequence of values against their index, from 1."""
    figure = Figure(figsize=(WIDTH * 0.6, WIDTH * 0.3), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(alpha=0.3)
    return Picture(figure)


def _panels(count: int, columns: int, captions: int = 1):
    """Creates a figure of `count` square panels without ticks."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    side = min(WIDTH / columns, 2.0)
    figure = Figure(figsize=(columns * side, rows * (side + 0.2 * captions)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels:
        panel.set(xticks=[], yticks=[])
        panel.set_frame_on(False)
    return figure, panels[:count]
