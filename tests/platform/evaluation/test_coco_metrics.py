"""COCO AP equals stored reference numbers and pycocotools, and has the properties it must have."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deta.platform.evaluation.coco_metrics import (
    CocoMetrics,
    evaluate_detections,
    merge_shards,
    to_coco_results,
)

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[3] / "../shared")
).resolve()
CASES = sorted(path.parent for path in (SHARED / "eval").glob("*/*/expected.json"))
TOLERANCE = 1e-6  # the references are stored in double precision; no rounding comes near this


@dataclass(frozen=True)
class NamedCategory:
    id: int
    name: str


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_eval_gives_the_stored_numbers_of_pycocotools(case: Path) -> None:
    expected = read(case / "expected.json")

    metrics = evaluate_detections(read(case / "gt.json"), read(case / "dt.json"))

    stats = dict(zip(expected["names"], expected["pycocotools"]["stats"], strict=True))
    assert metrics.as_dict() == pytest.approx(stats, abs=TOLERANCE)
    ap_per_category = {str(key): ap for key, ap in metrics.ap_per_category.items()}
    assert ap_per_category == pytest.approx(
        expected["pycocotools"]["ap_per_category"], abs=TOLERANCE
    )


@pytest.mark.skipif(not CASES, reason="no shared evaluation cases here")
def test_eval_leaves_its_arguments_as_they_were() -> None:
    ground_truth, results = read(CASES[0] / "gt.json"), read(CASES[0] / "dt.json")
    before = copy.deepcopy((ground_truth, results))

    evaluate_detections(ground_truth, results)

    assert (ground_truth, results) == before


def random_problem(seed: int, num_images: int = 12) -> tuple[dict, list[dict]]:
    """Return boxes of every size, crowds, unordered ids, and jittered and false detections."""
    rng = random.Random(seed)
    image_ids = rng.sample(range(1, 10_000), num_images)
    category_ids = sorted(rng.sample(range(100), rng.randint(1, 5)))
    annotations: list[dict] = []
    results: list[dict] = []
    for image_id in image_ids:
        for _ in range(rng.choice([0, 1, 3, 12])):
            box = [rng.uniform(0, 400), rng.uniform(0, 300)]
            box += [math.exp(rng.uniform(1, 5.5)), math.exp(rng.uniform(1, 5.5))]
            category_id = rng.choice(category_ids)
            annotations.append(
                {
                    "id": 7 * len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": box,
                    "area": box[2] * box[3] * rng.uniform(0.3, 1),
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
            for _ in range(rng.choice([0, 1, 1, 1, 3])):
                jittered = [c + rng.gauss(0, 0.08) * box[2 + i % 2] for i, c in enumerate(box)]
                confused = category_id if rng.random() < 0.85 else rng.choice(category_ids)
                # One decimal, so that many scores are equal and their order matters.
                results.append(_result(image_id, confused, jittered, round(rng.random(), 1)))
        for _ in range(rng.choice([0, 2, 20, 120])):
            box = [rng.uniform(0, 400), rng.uniform(0, 300), rng.uniform(-1, 99), 40]
            results.append(_result(image_id, rng.choice([*category_ids, 777]), box, rng.random()))
    rng.shuffle(results)
    rng.shuffle(annotations)
    ground_truth = {
        "images": [{"id": image_id, "width": 640, "height": 480} for image_id in image_ids],
        "annotations": annotations,
        "categories": [{"id": key, "name": f"class {key}"} for key in category_ids],
    }
    return ground_truth, results


def _result(image_id: int, category_id: int, bbox: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}


def by_pycocotools(ground_truth: dict, results: list[dict]) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        expected = COCO()
        expected.dataset = copy.deepcopy(ground_truth)
        expected.createIndex()
        evaluation = COCOeval(expected, expected.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


@pytest.mark.parametrize("seed", range(25))
def test_eval_equals_pycocotools_on_a_random_problem(seed: int) -> None:
    ground_truth, results = random_problem(seed)

    metrics = evaluate_detections(ground_truth, results)

    assert list(metrics.as_dict().values()) == pytest.approx(
        by_pycocotools(ground_truth, results), abs=1e-12
    )


def test_eval_is_the_same_whatever_the_ids_are_called() -> None:
    ground_truth, results = random_problem(seed=3)
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


def test_eval_counts_annotation_0_and_repeated_annotation_ids() -> None:
    ground_truth, results = random_problem(seed=4)
    expected = evaluate_detections(ground_truth, results)

    for annotation in ground_truth["annotations"]:
        annotation["id"] = 0

    assert evaluate_detections(ground_truth, results) == expected


def as_results(annotations: list[dict], rng: random.Random) -> list[dict]:
    return [
        _result(a["image_id"], a["category_id"], list(a["bbox"]), rng.random()) for a in annotations
    ]


@pytest.mark.parametrize("seed", range(5))
def test_eval_gives_1_to_perfect_detections(seed: int) -> None:
    ground_truth, _ = random_problem(seed)
    for annotation in ground_truth["annotations"]:
        annotation["iscrowd"] = 0

    metrics = evaluate_detections(
        ground_truth, as_results(ground_truth["annotations"], random.Random(seed))
    )

    assert metrics.AP == metrics.AP50 == metrics.AR100 == pytest.approx(1)
    assert list(metrics.ap_per_category.values()) == pytest.approx(
        [1] * len(metrics.ap_per_category)
    )


@pytest.mark.parametrize("seed", range(5))
def test_eval_does_not_depend_on_the_order_of_results_with_different_scores(seed: int) -> None:
    ground_truth, results = random_problem(seed)
    scores = random.Random(seed).sample(range(10**6), len(results))
    results = [{**r, "score": score / 10**6} for r, score in zip(results, scores, strict=True)]
    shuffled = random.Random(seed + 1).sample(results, len(results))

    assert evaluate_detections(ground_truth, shuffled) == evaluate_detections(ground_truth, results)


def test_eval_of_no_results_is_zero_and_of_no_boxes_undefined() -> None:
    ground_truth, results = random_problem(seed=0)
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
def test_eval_refuses_a_bad_result_and_names_it(change: dict, named: str) -> None:
    ground_truth, results = random_problem(seed=1)
    listed = ground_truth["categories"][0]["id"]
    results[3] = {**results[3], "category_id": listed, **change}

    with pytest.raises(ValueError, match=named):
        evaluate_detections(ground_truth, results)


def test_eval_refuses_entries_without_their_keys() -> None:
    ground_truth, results = random_problem(seed=1)
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


@dataclass(frozen=True)
class PixelDetections:
    scores: torch.Tensor
    labels: torch.Tensor
    boxes_px: torch.Tensor


def test_eval_results_carry_the_original_category_ids_and_xywh_boxes() -> None:
    detections = PixelDetections(
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
    with pytest.raises(ValueError, match="1 categories"):
        to_coco_results(detections, image_id=1, category_ids=[3])


def test_eval_results_of_no_detections_are_an_empty_list() -> None:
    detections = PixelDetections(
        torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0, 4)
    )

    assert to_coco_results(detections, image_id=1, category_ids=[3]) == []


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
def test_eval_of_merged_shards_equals_eval_in_one_piece(num_workers: int) -> None:
    ground_truth, results = random_problem(seed=6, num_images=13)
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


def test_eval_table_shows_the_twelve_numbers_and_every_category() -> None:
    ground_truth, results = random_problem(seed=2)
    metrics = evaluate_detections(ground_truth, results)
    categories = [NamedCategory(c["id"], c["name"]) for c in ground_truth["categories"]]

    table = metrics.table([*categories, NamedCategory(500, "never seen")])

    for name in (*metrics.as_dict(), *(category.name for category in categories)):
        assert name in table
    assert f"{metrics.percent()['AP']:.1f}" in table
    assert "never seen     -" in table
    assert np.isclose(metrics.percent()["AP50"], 100 * metrics.AP50)
    assert max(map(len, table.splitlines())) <= 100
