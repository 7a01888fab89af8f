"""Matching is that of pycocotools, detection by detection."""

from typing import Any

import numpy as np
import pytest

from deta.platform.evaluation.match_table import match_table
from tests.platform.evaluation.detection_cases import random_case, reference


@pytest.mark.parametrize("rounded", [False, True], ids=["scores differ", "scores tie"])
@pytest.mark.parametrize("seed", range(3))
def test_every_match_is_that_of_pycocotools(seed: int, rounded: bool) -> None:
    truth, results = random_case(seed, rounded=rounded)
    entries = [entry for entry in reference(truth, results).evalImgs if entry is not None]
    table = match_table(truth, results)
    areas = [[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]]

    rows = {int(row): place for place, row in enumerate(table.row)}
    assert len(entries) > 50
    for entry in entries:
        area = areas.index([float(v) for v in entry["aRng"]])
        places = [rows[dt_id - 1] for dt_id in entry["dtIds"]]  # loadRes numbers from 1
        ignored = np.asarray(entry["dtIgnore"], bool).reshape(10, -1)
        matched = np.asarray(entry["dtMatches"]).reshape(10, -1)
        np.testing.assert_array_equal(table.ignored[area][:, places], ignored)
        np.testing.assert_array_equal(table.true[area][:, places], (matched > 0) & ~ignored)
        if area == 0:
            found = table.found[:, places]
            ids = np.where(found >= 0, table.truth_row[found] + 1, 0)
            np.testing.assert_array_equal(ids, matched)
        counted = (table.image_ids[i] == entry["image_id"] for i in table.truth_image)
        category = table.category_ids.index(entry["category_id"])
        here = np.array(list(counted), bool) & (table.truth_category == category)
        assert table.truth_counts[area][here].sum() == (np.asarray(entry["gtIgnore"]) == 0).sum()


def test_a_hundred_detections_of_an_image_and_category_count() -> None:
    truth, _ = random_case(0)
    image_id, box = truth["images"][0]["id"], [0.0, 0.0, 10.0, 10.0]
    results = [
        {"image_id": image_id, "category_id": 1, "bbox": box, "score": i / 200} for i in range(150)
    ]

    table = match_table(truth, results)

    assert table.row.tolist() == list(range(149, 49, -1))


def test_detections_stand_by_category_then_score_then_image() -> None:
    truth, results = random_case(3, rounded=True)
    table = match_table(truth, results)

    keys = list(zip(table.category, -table.score, table.image, strict=True))
    assert keys == sorted(keys)
    assert table.category_ids == (1, 2, 3, 4)
    assert list(table.image_ids) == sorted(table.image_ids)


def test_nothing_detected_and_nothing_to_find_are_no_errors() -> None:
    truth, results = random_case(1)
    assert match_table(truth, []).true.shape == (4, 10, 0)
    empty = truth | {"annotations": []}
    table = match_table(empty, results)
    assert not table.true.any()
    assert len(table.row) == len(results)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": 12345}, "12345; is this the right annotation file"),
        ({"score": float("nan")}, "have a score that is not a finite number; .*: nan"),
        ({"bbox": [0, 0, 1]}, r"have a bbox that is not 4 finite numbers; .*: \[0, 0, 1\]"),
        ({"bbox": None}, "have a bbox that is not 4 finite numbers; .*: None"),
    ],
)
def test_a_broken_result_is_named(change: dict[str, Any], words: str) -> None:
    truth, results = random_case(1)
    with pytest.raises(ValueError, match=words):
        match_table(truth, [*results, results[0] | change])


def test_the_table_of_some_images_is_that_of_their_data_set() -> None:
    truth, results = random_case(3, num_images=20, rounded=True)
    ids = sorted(image["id"] for image in truth["images"])
    chosen = np.array([0, 3, 4, 11, 19])
    kept = {ids[i] for i in chosen}
    part = {
        **truth,
        "images": [one for one in truth["images"] if one["id"] in kept],
        "annotations": [one for one in truth["annotations"] if one["image_id"] in kept],
    }
    table = match_table(truth, results)
    found = table.of_images(chosen)
    wanted = match_table(part, [one for one in results if one["image_id"] in kept])

    assert found.image_ids == wanted.image_ids
    names = ("starts", "image", "score", "true", "ignored", "truth_image", "truth_category",
             "truth_counts", "found")  # fmt: skip
    for name in names:
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), name)
    for i, row in zip(found.truth_image, found.truth_row, strict=True):
        assert truth["annotations"][row]["image_id"] == found.image_ids[i]
    for i, row in zip(found.image, found.row, strict=True):
        assert results[row]["image_id"] == found.image_ids[i]
