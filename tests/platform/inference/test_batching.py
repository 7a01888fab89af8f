"""Images of one size form batches, and are read ahead in order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deta.platform.data.image_decoding import ImageError
from deta.platform.inference.batching import (
    NUM_SHOWN,
    WINDOW_BATCHES,
    batches_of_one_shape,
    check_headers,
    read_ahead,
)


def test_without_a_size_a_batch_keeps_the_device_busy() -> None:
    shapes = [(100, 100)] * 40 + [(300, 400)] * 7 + [(800, 1333)] * 2
    sizes = [len(batch) for batch in batches_of_one_shape(shapes, None)]
    assert sizes == [16, 16, 8, 3, 3, 1, 1, 1]
    on_gpu = [len(batch) for batch in batches_of_one_shape(shapes, None, "cuda")]
    assert on_gpu == [16, 16, 8, 7, 2]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_hold_each_image_once_and_one_shape_each(batch_size: int) -> None:
    rng = np.random.default_rng(0)
    window = WINDOW_BATCHES * batch_size
    shapes = [(8, int(width)) for width in rng.integers(1, 5, 3 * window // 2)]

    plan = batches_of_one_shape(shapes, batch_size)

    assert sorted(index for batch in plan for index in batch) == list(range(len(shapes)))
    assert all(len({shapes[index] for index in batch}) == 1 for batch in plan)
    assert max(len(batch) for batch in plan) == batch_size
    # None waits for an image beyond its window.
    assert all(batch[-1] - batch[0] < window for batch in plan)


def test_a_batch_of_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        batches_of_one_shape([(8, 8)], 0)


def test_results_come_in_order_and_an_error_with_its_item() -> None:
    def invert(number: int) -> float:
        return 1 / number

    results = list(read_ahead(invert, [4, 2, 0, 1]))

    assert [item for item, _ in results] == [4, 2, 0, 1]
    assert [future.result() for item, future in results if item] == [0.25, 0.5, 1]
    assert isinstance(results[2][1].exception(), ZeroDivisionError)


def test_all_bad_headers_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    Image.new("RGB", (6, 4)).save(good)
    bad = [tmp_path / f"{number:02}.png" for number in range(NUM_SHOWN + 3)]

    (header,) = check_headers([good], max_pixels=100)
    with pytest.raises(ImageError, match=f"{len(bad)} of {len(bad) + 1} images") as caught:
        check_headers([*bad, good], max_pixels=100)

    assert (header.height, header.width) == (4, 6)
    assert str(bad[NUM_SHOWN - 1]) in str(caught.value)
    assert str(bad[NUM_SHOWN]) not in str(caught.value)
    assert "and 3 more" in str(caught.value)
