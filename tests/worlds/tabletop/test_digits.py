"""The handwritten digits and their split."""

import numpy as np

from moss_jax.worlds.tabletop import digits


def test_images_and_labels():
    image = digits.digit_image(0)
    assert image.shape == (8, 8)
    assert image.dtype == np.float32
    assert image.min() == 0
    assert image.max() <= 1
    assert digits.label(0) == 0


def test_split_is_disjoint_complete_and_stratified():
    train, test = digits.train_indices(), digits.test_indices()
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(1797))
    labels = np.array([digits.label(i) for i in range(1797)])
    share = np.bincount(labels[test], minlength=10) / np.bincount(labels, minlength=10)
    np.testing.assert_allclose(share, 0.2, atol=0.01)


def test_no_image_for_testing_is_trained_with():
    train = {digits.digit_image(i).tobytes() for i in digits.train_indices()}
    assert not any(digits.digit_image(i).tobytes() in train for i in digits.test_indices())


def test_split_never_changes():
    # Numbers measured with one split do not compare with those of another.
    assert digits.test_indices()[:5].tolist() == [5, 9, 12, 14, 16]
    assert digits.test_indices().sum() == 324981
