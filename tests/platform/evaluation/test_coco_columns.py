"""Annotations and detections become columns of ranks and numbers."""

from __future__ import annotations

import numpy as np
import pytest

from deta.platform.evaluation.coco_columns import read_columns

TRUTH = {
    "images": [{"id": "b"}, {"id": "a"}],
    "categories": [{"id": 90, "name": "disc"}, {"id": 3, "name": "ring"}],
    "annotations": [
        {"image_id": "b", "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 1},
        {"image_id": "gone", "category_id": 3, "bbox": [0, 0, 1, 1]},
        {"image_id": "a", "category_id": 90, "bbox": [0, 0, 5, 5], "area": 7.5},
    ],
}


def test_ids_become_ranks_and_unlisted_entries_are_left_out() -> None:
    results = [
        {"image_id": "a", "category_id": 7, "bbox": [0, 0, 1, 1], "score": 0.5},
        {"image_id": "b", "category_id": 90, "bbox": [0, 0, 2, 1], "score": 0.25},
    ]

    columns = read_columns(TRUTH, results)

    assert (columns.image_ids, columns.category_ids) == (["a", "b"], [3, 90])
    assert columns.true.images.tolist() == [2, 1]
    assert columns.true.categories.tolist() == [1, 2]
    assert columns.true_rows.tolist() == [0, 2]
    assert columns.crowd.tolist() == [True, False]
    assert columns.areas.tolist() == [12, 7.5]  # of the box where the annotation has none
    assert columns.found_rows.tolist() == [1]
    assert columns.found.boxes.tolist() == [[0, 0, 2, 1]]
    assert columns.scores.tolist() == [0.25]


def test_no_entries_give_columns_of_length_0() -> None:
    columns = read_columns({**TRUTH, "annotations": []}, [])

    assert columns.true.boxes.shape == columns.found.boxes.shape == (0, 4)
    assert columns.scores.shape == columns.areas.shape == (0,)


@pytest.mark.parametrize("area", [np.nan, "wide", [1.0]])
def test_an_area_that_is_no_number_is_refused(area: object) -> None:
    broken = [{**TRUTH["annotations"][2], "area": area}]

    with pytest.raises(ValueError, match="area that is not a finite number"):
        read_columns({**TRUTH, "annotations": broken}, [])
