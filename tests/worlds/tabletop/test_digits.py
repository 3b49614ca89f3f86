"""The handwritten digits and their split."""

import hashlib

import numpy as np

from moss_jax.worlds.tabletop import digits

COUNT = 1797


def test_the_images_are_those_of_scikit_learn():
    """Levels and labels of `sklearn.datasets.load_digits()`, as uint8."""
    images = np.stack([digits.digit_image(index) for index in range(COUNT)])
    labels = np.array([digits.label(index) for index in range(COUNT)])
    assert images.dtype == np.float32
    levels = images * 16
    assert (levels == levels.astype(np.uint8)).all()
    assert [hashlib.sha256(array.astype(np.uint8)).hexdigest() for array in (levels, labels)] == [
        "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3",
        "8ba4f891220f5e4c9c819638d1602d74b83618f167043c6da52a2a247841ddf0",
    ]


def test_the_split_is_disjoint_complete_and_stratified():
    training, held_out = digits.training_indices(), digits.held_out_indices()
    assert np.array_equal(np.sort(np.concatenate([training, held_out])), np.arange(COUNT))
    labels = np.array([digits.label(i) for i in range(COUNT)])
    share = np.bincount(labels[held_out], minlength=10) / np.bincount(labels, minlength=10)
    np.testing.assert_allclose(share, 0.2, atol=0.01)


def test_no_image_is_in_both_parts_of_the_split():
    """By its pixels, in case the data had duplicates."""
    training = {digits.digit_image(i).tobytes() for i in digits.training_indices()}
    assert not any(digits.digit_image(i).tobytes() in training for i in digits.held_out_indices())


def test_the_split_never_changes():
    # Figures measured with one split can't be compared with those of another.
    assert digits.held_out_indices()[:5].tolist() == [5, 9, 12, 14, 16]
    assert digits.held_out_indices().sum() == 324981
