"""Handwritten digits for the cards: 1,797 images of 8x8 pixels, split for training and evaluation.

`digits.txt` names their source and licence.

Axes: N images.
"""

import functools
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

EVALUATION_SHARE = 0.2


@functools.cache
def _load() -> tuple[Float[np.ndarray, "N 8 8"], Int[np.ndarray, " N"]]:
    """Loads all images, float32 in [0, 1], and their labels."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = (file["images"] / 16).astype(np.float32), file["labels"].astype(np.int64)
    images.flags.writeable = labels.flags.writeable = False
    return images, labels


@functools.cache
def _split() -> tuple[Int[np.ndarray, " training"], Int[np.ndarray, " evaluation"]]:
    """Splits the images: a fixed fifth of each class is for evaluation. Both parts are sorted."""
    rng = np.random.default_rng(0)
    labels = _load()[1]
    held_out = np.zeros(len(labels), bool)
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(labels == digit))
        held_out[members[: round(EVALUATION_SHARE * len(members))]] = True
    split = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    for indices in split:
        indices.flags.writeable = False
    return split


def training_indices() -> Int[np.ndarray, " training"]:
    """Indices of the images for training, sorted; read-only."""
    return _split()[0]


def held_out_indices() -> Int[np.ndarray, " evaluation"]:
    """Indices of the images for evaluation, sorted; read-only."""
    return _split()[1]


def digit_image(index: int) -> Float[np.ndarray, "8 8"]:
    """One handwritten digit, float32 in [0, 1], 1 where there is ink; read-only."""
    return _load()[0][index]


def label(index: int) -> int:
    """The digit that an image shows, 0 to 9."""
    return int(_load()[1][index])
