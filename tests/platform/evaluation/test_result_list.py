"""Test `result_list.py`: detections of unknown images and categories are counted and refused."""

from __future__ import annotations

from typing import Any

import pytest

from deta.platform.evaluation.result_list import listed_results

TRUTH = {
    "images": [{"id": 1}, {"id": 2}],
    "annotations": [],
    "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}],
}


def found(image_id: Any, category_id: Any) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": [1, 2, 3, 4], "score": 0.5}


GOOD = [found(1, 1), found(2, 2), found(2, 1)]


def test_listed_detections_are_returned_as_they_are() -> None:
    assert listed_results(GOOD, TRUTH, "a.json") == GOOD
    assert listed_results([], TRUTH, "a.json") == []
    assert listed_results([found(1.0, 2.0)], TRUTH, "a.json")  # numbers of JSON have one type


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([found(1, 77)], r"1 of 4 detections are of 1 categories .*\(77\)"),
        ([found(1, 0), found(2, 0)], r"2 of 5 .*counted from 0 there.* begin with 1"),
        ([found(9, 1)], r"1 of 4 detections are of 1 images .*\(9\)"),
        ([found(9, 77)], r"1 images .*\(9\); 1 of 4 detections are of 1 categories .*\(77\)"),
        ([found("1", 1)], r"1 images .*\('1'\): these ids are text"),
        ([found(1, "1")], r"1 categories .*\('1'\): these ids are text"),
        ([found(1, None)], r"1 categories .*None"),
        ([found(1, [2])], r"1 categories .*\[2\]"),
    ],
)
def test_others_are_counted_and_refused_or_left_out(bad: list[Any], said: str) -> None:
    results = [GOOD[0], *bad, *GOOD[1:]]
    with pytest.raises(ValueError, match=rf"a\.json: .*{said}.*leave them out with --lenient"):
        listed_results(results, TRUTH, "a.json")

    lines: list[str] = []
    assert listed_results(results, TRUTH, "a.json", lines.append) == GOOD
    assert len(lines) == 1
    assert f"Left out: {len(bad)} of {len(results)}" in lines[0]


def test_a_list_without_a_single_listed_detection_is_refused_in_both_modes() -> None:
    for say in (None, print):
        with pytest.raises(ValueError, match="2 of 2 detections"):
            listed_results([found(1, 5), found(2, 6)], TRUTH, "a.json", say)


@pytest.mark.parametrize("entry", [3, {}, {"image_id": 1, "category_id": 1, "bbox": [1] * 4}])
def test_entries_that_are_no_detections_are_named_by_position(entry: Any) -> None:
    with pytest.raises(ValueError, match=r"a\.json: its entry 1 of 2 lacks one of"):
        listed_results([GOOD[0], entry], TRUTH, "a.json")
