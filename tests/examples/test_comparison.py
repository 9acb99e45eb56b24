"""The picture of the README."""

import numpy as np
from PIL import Image

from examples.benchmarks import comparison


def test_the_rows_are_in_the_order_of_their_distance():
    plain, predicted, published = comparison.drawn(12).values()
    assert 0 < np.square(predicted - plain).mean() < np.square(published - plain).mean() / 4


def test_the_picture_is_as_wide_as_a_readme(tmp_path):
    comparison.main(tmp_path / "comparison.png", steps=1)
    with Image.open(tmp_path / "comparison.png") as picture:
        assert 800 < picture.width < 900
