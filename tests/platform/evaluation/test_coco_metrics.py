"""COCO AP equals stored reference numbers and pycocotools, and has the properties it must have."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deta.model.postprocess import Detections
from deta.platform.data.coco_dataset import Category
from deta.platform.evaluation.coco_metrics import (
    CocoMetrics,
    evaluate_detections,
    merge_shards,
    to_coco_results,
)
from tests.platform.evaluation.detection_cases import random_case

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[3] / "../shared")
).resolve()
CASES = sorted(path.parent for path in (SHARED / "eval").glob("*/*/expected.json"))
TOLERANCE = 1e-6  # the references are stored in double precision; no rounding comes near this


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("engine", ["hotcoco", "pycocotools"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_eval_gives_the_stored_numbers_of_pycocotools(case: Path, engine: Any) -> None:
    expected, truth, results = (read(case / f"{name}.json") for name in ("expected", "gt", "dt"))

    metrics = evaluate_detections(truth, results, engine)

    stats = dict(zip(expected["names"], expected["pycocotools"]["stats"], strict=True))
    assert metrics.as_dict() == pytest.approx(stats, abs=TOLERANCE)
    ap_per_category = {str(key): ap for key, ap in metrics.ap_per_category.items()}
    assert ap_per_category == pytest.approx(
        expected["pycocotools"]["ap_per_category"], abs=TOLERANCE
    )


@pytest.fixture
def problem() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return random_case(3, rounded=True)


def _result(image_id: int, category_id: int, bbox: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}


def test_eval_is_the_same_whatever_the_ids_are_called(problem) -> None:
    ground_truth, results = problem
    order = sorted(image["id"] for image in ground_truth["images"])
    huge = {image_id: 2**62 + 3 * order.index(image_id) for image_id in order}
    texts = {image_id: f"image-{order.index(image_id):05d}" for image_id in order}
    expected = evaluate_detections(ground_truth, results)

    for names in (huge, texts):
        renamed = copy.deepcopy(ground_truth)
        for image in renamed["images"]:
            image["id"] = names[image["id"]]
        for annotation in renamed["annotations"]:
            annotation["image_id"] = names[annotation["image_id"]]
        renamed_results = [{**result, "image_id": names[result["image_id"]]} for result in results]
        assert evaluate_detections(renamed, renamed_results) == expected


def test_eval_counts_annotation_0_and_repeated_annotation_ids(problem) -> None:
    ground_truth, results = problem
    expected = evaluate_detections(ground_truth, results)

    for annotation in ground_truth["annotations"]:
        annotation["id"] = 0

    assert evaluate_detections(ground_truth, results) == expected


def test_eval_gives_1_to_perfect_detections(problem) -> None:
    ground_truth, _ = problem
    annotations = [entry | {"iscrowd": 0} for entry in ground_truth["annotations"]]
    results = [
        _result(entry["image_id"], entry["category_id"], list(entry["bbox"]), 1 / (place + 1))
        for place, entry in enumerate(annotations)
    ]

    metrics = evaluate_detections(ground_truth | {"annotations": annotations}, results)

    assert metrics.AP == metrics.AP50 == metrics.AR100 == pytest.approx(1)
    assert [*metrics.ap_per_category.values()] == pytest.approx([1] * len(metrics.ap_per_category))


def test_eval_does_not_depend_on_the_order_of_results_with_different_scores() -> None:
    ground_truth, results = random_case(3)

    turned = evaluate_detections(ground_truth, results[::-1])

    assert turned == evaluate_detections(ground_truth, results)


def test_eval_of_no_results_is_zero_and_of_no_boxes_undefined(problem) -> None:
    ground_truth, results = problem
    empty = {"images": [], "annotations": [], "categories": []}

    assert evaluate_detections(ground_truth, []).AP == 0
    assert evaluate_detections({**ground_truth, "annotations": []}, results).AP == -1
    nothing = evaluate_detections(empty, [])
    assert set(nothing.as_dict().values()) == {-1}
    assert nothing.ap_per_category == {}
    assert nothing.percent() == {}


def test_eval_takes_the_area_of_the_box_only_where_none_is_given() -> None:
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50]}  # medium
    images, categories = [{"id": 1}], [{"id": 1, "name": "disc"}]

    def metrics(**area: float) -> CocoMetrics:
        return evaluate_detections(
            {"images": images, "annotations": [box | area], "categories": categories}, []
        )

    assert (metrics().APs, metrics().APm) == (-1, 0)
    assert (metrics(area=100).APs, metrics(area=100).APm) == (0, -1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"score": math.nan}, "score"),
        ({"score": None}, "score"),
        ({"bbox": [0, 0, math.inf, 1]}, "bbox"),
        ({"bbox": [0, 0, 1]}, "bbox"),
        ({"image_id": 123456789}, "123456789"),
        ({"image_id": "1"}, "not in the ground truth"),
    ],
)
def test_eval_refuses_a_bad_result_and_names_it(problem, change: dict, named: str) -> None:
    ground_truth, results = problem
    listed = ground_truth["categories"][0]["id"]
    results[3] = {**results[3], "category_id": listed, **change}

    with pytest.raises(ValueError, match=named):
        evaluate_detections(ground_truth, results)


def test_eval_refuses_entries_without_their_keys(problem) -> None:
    ground_truth, results = problem
    listed = ground_truth["categories"][0]["id"]
    image_id = ground_truth["images"][0]["id"]

    with pytest.raises(ValueError, match="score"):
        evaluate_detections(
            ground_truth, [{"image_id": image_id, "category_id": listed, "bbox": [0, 0, 1, 1]}]
        )
    with pytest.raises(ValueError, match="lacks image_id or category_id"):
        evaluate_detections(ground_truth, [{"image_id": image_id}])
    with pytest.raises(ValueError, match="annotations"):
        evaluate_detections({"images": [], "categories": []}, results)


def test_eval_results_carry_the_original_category_ids_and_xywh_boxes() -> None:
    detections = Detections(
        scores=torch.tensor([0.5, 0.25]),
        labels=torch.tensor([1, 0]),
        boxes_px=torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 10.5, 3.0]]),
    )

    results = to_coco_results(detections, image_id=2**40, category_ids=[3, 90])

    assert results == [
        {"image_id": 2**40, "category_id": 90, "bbox": [1, 2, 3, 6], "score": 0.5},
        {"image_id": 2**40, "category_id": 3, "bbox": [0, 0, 10.5, 3], "score": 0.25},
    ]
    assert detections.boxes_px[0].tolist() == [1, 2, 4, 8]
    json.dumps(results)
    nothing = Detections(torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0, 4))
    assert to_coco_results(nothing, image_id=1, category_ids=[3]) == []
    with pytest.raises(ValueError, match="1 categories"):
        to_coco_results(detections, image_id=1, category_ids=[3])


@pytest.mark.parametrize("num_workers", [1, 5])
def test_eval_of_merged_shards_equals_eval_in_one_piece(problem, num_workers: int) -> None:
    ground_truth, results = problem
    image_ids = [image["id"] for image in ground_truth["images"]]
    padded = image_ids + image_ids[: -len(image_ids) % num_workers]  # as a sampler fills up ranks
    shards = [
        {image_id: [r for r in results if r["image_id"] == image_id] for image_id in seen}
        for seen in (padded[rank::num_workers] for rank in range(num_workers))
    ]

    merged = merge_shards(shards, image_ids)

    assert len(merged) == len(results)
    assert evaluate_detections(ground_truth, merged) == evaluate_detections(ground_truth, results)


def test_eval_shards_keep_the_first_of_two_answers_and_allow_images_without_detections() -> None:
    first, second = _result(1, 1, [0, 0, 1, 1], 0.9), _result(1, 1, [0, 0, 1, 1], 0.8)

    assert merge_shards([{1: [first], 2: []}, {1: [second]}], image_ids=[2, 1]) == [first]


def test_eval_shards_that_miss_or_add_an_image_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"2 of 3 images .*: 20, 30"):
        merge_shards([{10: []}], image_ids=[10, 20, 30])
    with pytest.raises(RuntimeError, match="40"):
        merge_shards([{10: []}, {40: []}], image_ids=[10])


def test_eval_table_shows_the_twelve_numbers_and_every_category(problem) -> None:
    ground_truth, results = problem
    metrics = evaluate_detections(ground_truth, results)
    categories = [Category(c["id"], c["name"]) for c in ground_truth["categories"]]

    table = metrics.table([*categories, Category(500, "never seen")])

    for name in (*metrics.as_dict(), *(category.name for category in categories)):
        assert name in table
    assert f"{metrics.percent()['AP']:.1f}" in table
    assert "never seen     -" in table
    assert np.isclose(metrics.percent()["AP50"], 100 * metrics.AP50)
    assert max(map(len, table.splitlines())) <= 100
