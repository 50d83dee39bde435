"""The embedded dataset: the same bytes everywhere, balanced, and its classes look different."""

import hashlib

import numpy as np
import pytest

from bdlib import signs


def test_bytes_are_the_same_on_every_machine():
    images, labels = signs.draw(600, seed=5)
    assert (
        hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        == "e73ed3325c9be85fe05bd6c0c4acbdeddde6e7db2fb393f0f4c4d388d8c1dc87"
    )


def test_classes_are_balanced_and_in_random_order():
    _, labels = signs.draw(200, seed=0)
    assert np.bincount(labels).tolist() == [20] * 10
    assert not np.array_equal(labels, np.sort(labels))


def test_another_seed_draws_other_images():
    assert not np.array_equal(signs.draw(10, seed=0)[0], signs.draw(10, seed=1)[0])


@pytest.mark.parametrize(
    ("shape", "area"), [(0, 3.14), (1, 4 * 0.82**2), (2, 2 * 1.15**2), (3, 1.62**2 / 1.73), (4, 1.62**2 / 1.73)]
)
def test_shapes_have_the_area_of_their_formula(shape, area):
    v, u = np.mgrid[-2048:2048:32, -2048:2048:32].astype(np.int32)[:, None]
    inside = signs._inside_shape(u, v, np.array([shape]), 1024)
    assert inside.sum() * 32**2 / 1024**2 == pytest.approx(area, rel=0.03)


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        signs.draw(0, seed=0)
