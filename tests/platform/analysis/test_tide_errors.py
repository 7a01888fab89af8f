"""Kinds of errors and their costs, against a plain and slow reference after Bolya et al. 2020."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deta.platform.analysis.tide_errors import (
    CORRECT,
    KINDS,
    NOT_COUNTED,
    best_overlaps,
    find_errors,
    of_each_image,
)
from deta.platform.evaluation.coco_engines import match_detections
from deta.platform.evaluation.coco_metrics import evaluate_detections


def random_case(seed: int, *, crowds: bool = False) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A few images and classes; detections are true boxes, moved, renamed, repeated and made up."""
    rng = np.random.default_rng(seed)
    num_images, num_classes = rng.integers(1, 6), rng.integers(1, 5)
    images = [{"id": 3 * i + 1} for i in range(num_images)]
    categories = [{"id": 10 * k + 5, "name": f"c{k}"} for k in range(num_classes)]
    annotations, results = [], []
    for image in images:
        for _ in range(rng.integers(0, 6)):
            box = [*rng.uniform(0, 80, 2), *rng.uniform(10, 50, 2)]
            category = 10 * int(rng.integers(num_classes)) + 5
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image["id"], "category_id": category,
                 "bbox": box, "area": box[2] * box[3],
                 "iscrowd": int(crowds and rng.random() < 0.2)}
            )  # fmt: skip
            for _ in range(rng.integers(0, 4)):
                moved = np.array(box) + rng.normal(0, rng.choice([1, 8, 20]), 4)
                named = category if rng.random() < 0.6 else 10 * int(rng.integers(num_classes)) + 5
                results.append(detection(image["id"], named, moved, rng))
        for _ in range(rng.integers(0, 3)):
            box = np.array([*rng.uniform(0, 150, 2), *rng.uniform(5, 60, 2)])
            results.append(
                detection(image["id"], 10 * int(rng.integers(num_classes)) + 5, box, rng)
            )
    rng.shuffle(results)
    return {"images": images, "annotations": annotations, "categories": categories}, results


def detection(image_id: int, category: int, box: np.ndarray, rng: Any) -> dict[str, Any]:
    sides = np.maximum(box[2:], 2)
    return {"image_id": image_id, "category_id": category, "bbox": [*box[:2], *sides],
            "score": float(rng.random())}  # fmt: skip


# The reference: loops over images, detections and boxes, one at a time.


def iou(a: list[float], b: list[float], *, crowd: bool = False) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(0.0, width) * max(0.0, height)
    return common / (a[2] * a[3] if crowd else a[2] * a[3] + b[2] * b[3] - common)


def ap(points: list[tuple[float, bool]], num_true: int) -> float:
    """101 points of the precision envelope."""
    points = sorted(points, key=lambda point: -point[0])
    curve = []  # recall, precision
    right = 0
    for n, (_, is_right) in enumerate(points, start=1):
        right += is_right
        curve.append((right / num_true, right / n))
    total = 0.0
    for threshold in np.linspace(0, 1, 101).tolist():  # pycocotools' own, 0.7 being above 7 / 10
        total += max((p for r, p in curve if r >= threshold), default=0.0)
    return total / 101


def mean_ap(points: dict[int, list[tuple[float, bool]]], num_true: dict[int, int]) -> float:
    aps = [ap(points.get(k, []), n) for k, n in num_true.items() if n > 0]
    return sum(aps) / len(aps) if aps else -1.0


def reference(
    ground_truth: dict[str, Any], results: list[dict[str, Any]]
) -> tuple[list[str], dict[str, float], int, float, float, float]:
    """Kind of each detection, cost of each kind, number missed, AP50, cost of all that is wrong."""
    kinds = [""] * len(results)
    target: dict[int, int] = {}  # detection to the annotation that it is or would be
    found: set[int] = set()
    real = {a["id"]: a for a in ground_truth["annotations"] if not a["iscrowd"]}
    crowds = [a for a in ground_truth["annotations"] if a["iscrowd"]]
    order = sorted(range(len(results)), key=lambda m: -results[m]["score"])
    for m in order:  # COCO's greedy matching, per class
        own = results[m]
        boxes = {
            i: iou(own["bbox"], a["bbox"])
            for i, a in real.items()
            if a["image_id"] == own["image_id"] and a["category_id"] == own["category_id"]
        }
        free = {i: value for i, value in boxes.items() if i not in found and value >= 0.5}
        if free:
            target[m] = max(free, key=lambda i: free[i])
            found.add(target[m])
            kinds[m] = "correct"
        elif any(
            iou(own["bbox"], a["bbox"], crowd=True) >= 0.5
            for a in crowds
            if a["image_id"] == own["image_id"] and a["category_id"] == own["category_id"]
        ):
            kinds[m] = "ignored"
    for m in order:
        if kinds[m]:
            continue
        own = results[m]
        near = {
            i: iou(own["bbox"], a["bbox"])
            for i, a in real.items()
            if a["image_id"] == own["image_id"]
        }
        same = {i: v for i, v in near.items() if real[i]["category_id"] == own["category_id"]}
        other = {i: v for i, v in near.items() if real[i]["category_id"] != own["category_id"]}
        if 0.1 <= max(same.values(), default=0) <= 0.5:
            kinds[m], target[m] = "localisation", max(same, key=lambda i: same[i])
        elif max(other.values(), default=0) >= 0.5:
            kinds[m], target[m] = "classification", max(other, key=lambda i: other[i])
        elif any(v >= 0.5 for i, v in same.items() if i in found):
            kinds[m] = "duplicate"
        elif max(near.values(), default=0) <= 0.1:
            kinds[m] = "background"
        else:
            kinds[m] = "both"
    chosen: dict[int, int] = {}  # annotation to the surest detection that could be repaired to it
    for m in order:
        if kinds[m] in ("localisation", "classification") and target[m] not in found:
            chosen.setdefault(target[m], m)
    lost = [i for i in real if i not in found]
    missed = [i for i in lost if i not in chosen]

    def numbers(without: list[int]) -> dict[int, int]:
        left = {k["id"]: 0 for k in ground_truth["categories"]}
        for i, a in real.items():
            left[a["category_id"]] += i not in without
        return left

    def points(kind: str, *, drop_all_false: bool = False) -> dict[int, list[tuple[float, bool]]]:
        made: dict[int, list[tuple[float, bool]]] = {}
        for m, own in enumerate(results):
            category, right = own["category_id"], kinds[m] == "correct"
            if kinds[m] == "ignored" or (drop_all_false and not right):
                continue
            if kinds[m] == kind:
                if chosen.get(target.get(m, -1)) != m:
                    continue
                category, right = real[target[m]]["category_id"], True
            made.setdefault(category, []).append((own["score"], right))
        return made

    base = mean_ap(points(""), numbers([]))
    cost = {k: max(0.0, mean_ap(points(k), numbers([])) - base) for k in KINDS}
    cost["missed"] = max(0.0, mean_ap(points(""), numbers(missed)) - base)
    no_false = max(0.0, mean_ap(points("", drop_all_false=True), numbers([])) - base)
    no_lost = max(0.0, mean_ap(points(""), numbers(lost)) - base)
    return kinds, cost, len(missed), base, no_false, no_lost


@pytest.mark.parametrize("crowds", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_kinds_and_costs_are_those_of_the_paper(seed: int, crowds: bool) -> None:
    ground_truth, results = random_case(seed, crowds=crowds)
    kinds, cost, num_missed, base, no_false, no_lost = reference(ground_truth, results)

    matched = match_detections(ground_truth, results)
    errors = find_errors(matched, best_overlaps(matched))

    names = dict(enumerate(KINDS)) | {CORRECT: "correct", NOT_COUNTED: "ignored"}
    assert [names[k] for k in errors.kind.tolist()] == kinds
    assert errors.counts.sum(0).tolist() == [
        *(kinds.count(name) for name in KINDS), num_missed,
    ]  # fmt: skip
    assert errors.missed.sum() == num_missed
    assert errors.ap50 == pytest.approx(base, abs=1e-9)
    assert errors.cost == pytest.approx(cost, abs=1e-9)
    assert errors.false_positives_cost == pytest.approx(no_false, abs=1e-9)
    assert errors.false_negatives_cost == pytest.approx(no_lost, abs=1e-9)
    assert errors.ap50 == pytest.approx(evaluate_detections(ground_truth, results).AP50, abs=1e-9)


def test_each_kind_where_only_it_can_be() -> None:
    """By hand: two classes, boxes of 10 by 10, a correct detection and one error of each kind."""

    def box(x: float, y: float = 0.0) -> list[float]:
        return [x, y, 10.0, 10.0]

    boxes = [(1, 0.0), (1, 100.0), (1, 200.0), (1, 300.0), (1, 400.0), (2, 500.0)]
    ground_truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": k, "bbox": box(x), "area": 100.0, "iscrowd": 0}
            for n, (k, x) in enumerate(boxes, start=1)
        ],
    }
    found = [
        (1, box(0.0), 0.9, "correct"),
        (1, box(0.5), 0.8, "duplicate"),  # IoU 0.90, taken
        (1, box(106.0), 0.7, "localisation"),  # IoU 0.25
        (2, box(200.0), 0.6, "classification"),
        (2, box(306.0), 0.5, "both"),
        (1, box(800.0), 0.4, "background"),
    ]
    results = [
        {"image_id": 1, "category_id": k, "bbox": b, "score": score} for k, b, score, _ in found
    ]
    matched = match_detections(ground_truth, results)
    errors = find_errors(matched, best_overlaps(matched))

    names = dict(enumerate(KINDS)) | {CORRECT: "correct"}
    assert [names[k] for k in errors.kind.tolist()] == [kind for *_, kind in found]
    assert errors.box.tolist() == [0, -1, 1, 2, -1, -1]
    # Not the boxes that a better place or another name would find.
    assert errors.missed.tolist() == [False, False, False, True, True, True]


@pytest.mark.parametrize("num_results", [0, 3])
def test_without_boxes_or_detections(num_results: int) -> None:
    ground_truth, _ = random_case(1)
    ground_truth["annotations"] = []
    results = [detection(1, 5, np.array([0.0, 0, 9, 9]), np.random.default_rng(0))] * num_results
    matched = match_detections(ground_truth, results)
    errors = find_errors(matched, best_overlaps(matched))
    assert errors.kind.tolist() == [KINDS.index("background")] * num_results
    assert errors.ap50 == -1
    assert set(errors.cost.values()) == {0.0}


def test_rows_of_one_image_come_together() -> None:
    rng = np.random.default_rng(0)
    images, others = rng.integers(0, 9, 50), rng.integers(3, 12, 40)
    pairs = [(i, j) for i in range(50) for j in range(40) if images[i] == others[j]]
    found = list(of_each_image(images, others))
    assert sorted((i, j) for rows, boxes in found for i in rows for j in boxes) == pairs
    assert all((np.diff(rows) > 0).all() for group in found for rows in group)


@pytest.mark.parametrize("seed", range(20))
def test_costs_without_crowds_are_those_of_hotcoco(seed: int) -> None:
    ground_truth, results = random_case(seed)
    matched = match_detections(ground_truth, results)
    errors = find_errors(matched, best_overlaps(matched))
    theirs = matched.evaluation.tide_errors()
    names = ("Cls", "Loc", "Both", "Dupe", "Bkg")
    assert [errors.cost[kind] for kind in KINDS] == pytest.approx(
        [theirs["delta_ap"][name] for name in names], abs=1e-9
    )
    assert errors.counts.sum(0)[:-1].tolist() == [theirs["counts"][name] for name in names]
