"""Handwritten digits for the cards: scikit-learn's 1797 images of 8x8 pixels, split for training and testing.

Axes: N images.
"""

import functools

import numpy as np

TEST_SHARE = 0.2


@functools.cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    """All images, float32 [N, 8, 8] in [0, 1], and their labels, int [N]."""
    # Imported here, as it takes a second and only the cards need it.
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    images.flags.writeable = False
    return images, digits.target


@functools.cache
def _split() -> tuple[np.ndarray, np.ndarray]:
    """Indices for training and for testing, each sorted; a fixed fifth of every class is for testing."""
    rng = np.random.default_rng(0)
    labels = _load()[1]
    test = np.zeros(len(labels), bool)
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(labels == digit))
        test[members[: round(TEST_SHARE * len(members))]] = True
    split = np.flatnonzero(~test), np.flatnonzero(test)
    for indices in split:
        indices.flags.writeable = False
    return split


def train_indices() -> np.ndarray:
    """Indices of the images to train with, int [N], sorted."""
    return _split()[0]


def test_indices() -> np.ndarray:
    """Indices of the images kept for evaluation, int [N], sorted."""
    return _split()[1]


# pytest would otherwise take it for a test wherever it is imported.
test_indices.__test__ = False


def digit_image(index: int) -> np.ndarray:
    """One handwritten digit, float32 [8, 8] in [0, 1], 1 where there is ink; read-only."""
    return _load()[0][index]


def label(index: int) -> int:
    """Which digit, 0 to 9, the image shows."""
    return int(_load()[1][index])
