"""The numbers of an explanation, against direct and slow computations, and planted wrong labels."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from deta.platform.analysis.analysis import CONFIDENT_FROM, NUM_BINS, explain, scalars
from deta.platform.analysis.label_errors import MISSING, NEEDLESS, SHIFTED, WRONG_CLASS
from deta.platform.evaluation.coco_metrics import evaluate_detections

NAMES = ("<cat>", "dog", "a/b: c")


def scene(seed: int, num_images: int = 12, num_boxes: int = 4) -> dict[str, Any]:
    """Boxes of three classes that do not touch each other."""
    rng = np.random.default_rng(seed)
    annotations = [
        {"id": 10 * image + n + 1, "image_id": image, "category_id": int(rng.integers(1, 4)),
         "bbox": [100.0 * n + rng.uniform(0, 20), rng.uniform(0, 50), *rng.uniform(20, 60, 2)],
         "iscrowd": 0}
        for image in range(num_images) for n in range(num_boxes)
    ]  # fmt: skip
    for one in annotations:
        one["area"] = one["bbox"][2] * one["bbox"][3]
    return {
        "images": [{"id": image, "file_name": f"{image}.jpg"} for image in range(num_images)],
        "annotations": annotations,
        "categories": [{"id": k, "name": name} for k, name in enumerate(NAMES, start=1)],
    }


def detections_of(ground_truth: dict[str, Any], seed: int, noise: float) -> list[dict[str, Any]]:
    """What a model finds there: boxes a little off, some names wrong, some missed, some made up."""
    rng = np.random.default_rng(seed)
    results = []
    for one in ground_truth["annotations"]:
        if rng.random() < 0.3 * noise:
            continue
        category = one["category_id"] if rng.random() > 0.3 * noise else int(rng.integers(1, 4))
        moved = (np.array(one["bbox"]) + rng.normal(0, 1 + 8 * noise, 4)).tolist()
        results.append({"image_id": one["image_id"], "category_id": category,
                        "bbox": [*moved[:2], max(2, moved[2]), max(2, moved[3])],
                        "score": float(rng.uniform(0.6, 1))})  # fmt: skip
    for _ in range(round(40 * noise)):
        results.append({"image_id": int(rng.integers(12)), "category_id": int(rng.integers(1, 4)),
                        "bbox": [*rng.uniform(0, 400, 2), *rng.uniform(5, 60, 2)],
                        "score": float(rng.uniform(0, 0.8))})  # fmt: skip
    return results


def iou(a: list[float], b: list[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(0.0, width) * max(0.0, height)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def matches(
    ground_truth: dict[str, Any], results: list[dict[str, Any]], *, by_class: bool
) -> dict[int, int]:
    """Greedy matching at an IoU of 0.5: detection to annotation, by their places in the lists."""
    taken: dict[int, int] = {}
    for m in sorted(range(len(results)), key=lambda m: -results[m]["score"]):
        found = results[m]
        free = [
            a for a, one in enumerate(ground_truth["annotations"])
            if one["image_id"] == found["image_id"] and a not in taken.values()
            and (not by_class or one["category_id"] == found["category_id"])
            and iou(one["bbox"], found["bbox"]) >= 0.5
        ]  # fmt: skip
        if free:
            taken[m] = max(
                free, key=lambda a: iou(ground_truth["annotations"][a]["bbox"], found["bbox"])
            )
    return taken


@pytest.mark.parametrize("seed", range(8))
def test_calibration_is_the_weighted_gap_of_ten_bins(seed: int) -> None:
    ground_truth = scene(seed)
    results = detections_of(ground_truth, seed, noise=1)
    correct = matches(ground_truth, results, by_class=True)

    def gap(least: float) -> tuple[float, float]:
        bins: list[list[tuple[float, bool]]] = [[] for _ in range(NUM_BINS)]
        for m, found in enumerate(results):
            if found["score"] >= least:
                bins[min(NUM_BINS - 1, int(found["score"] * NUM_BINS))].append(
                    (found["score"], m in correct)
                )
        total = sum(map(len, bins))
        gaps = [abs(sum(s for s, _ in one) - sum(right for _, right in one)) for one in bins if one]
        worst = max(g / len(one) for g, one in zip(gaps, filter(None, bins), strict=True))
        return sum(gaps) / total, worst

    told = explain(ground_truth, results).calibration
    error, largest = gap(0.0)
    assert told.error == pytest.approx(error, abs=1e-9)
    assert told.largest == pytest.approx(largest, abs=1e-9)
    assert told.confident_error == pytest.approx(gap(CONFIDENT_FROM)[0], abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_confusions_are_those_of_greedy_matching_of_all_classes(seed: int) -> None:
    ground_truth = scene(seed)
    results = detections_of(ground_truth, seed, noise=1)

    told = explain(ground_truth, results)

    sure = [one for one in results if one["score"] >= told.operating_score]
    taken = matches(ground_truth, sure, by_class=False)
    expected = np.zeros((4, 4), int)
    for m, found in enumerate(sure):
        true = ground_truth["annotations"][taken[m]]["category_id"] if m in taken else 4
        expected[true - 1, found["category_id"] - 1] += 1
    for a, one in enumerate(ground_truth["annotations"]):
        if a not in taken.values():
            expected[one["category_id"] - 1, 3] += 1
    assert told.confusion.tolist() == expected.tolist()


@pytest.mark.parametrize("seed", range(8))
def test_the_operating_score_has_the_highest_f1_of_all(seed: int) -> None:
    ground_truth = scene(seed)
    results = detections_of(ground_truth, seed, noise=1)
    correct = matches(ground_truth, results, by_class=True)

    def f1(least: float) -> float:
        kept = [m for m, one in enumerate(results) if one["score"] >= least]
        right = sum(m in correct for m in kept)
        return 2 * right / (len(kept) + len(ground_truth["annotations"]))

    told = explain(ground_truth, results)
    assert told.best_f1 == pytest.approx(max(f1(one["score"]) for one in results))
    assert f1(told.operating_score) == pytest.approx(told.best_f1)
    # False and missing boxes of each image, at that score.
    for worst in told.worst:
        sure = {m for m, one in enumerate(results) if one["score"] >= told.operating_score}
        kept = [m for m in sure if results[m]["image_id"] == worst.image_id]
        found = {correct[m] for m in kept if m in correct}
        true = [a for a, one in enumerate(ground_truth["annotations"])
                if one["image_id"] == worst.image_id]  # fmt: skip
        assert worst.num_false == len(kept) - len(found)
        assert worst.num_missed == len(true) - len(found)
    errors = [one.num_false + one.num_missed for one in told.worst]
    assert errors == sorted(errors, reverse=True)


def test_numbers_of_classes_are_those_of_the_evaluation() -> None:
    ground_truth = scene(0)
    ground_truth["categories"].append({"id": 9, "name": "never"})
    results = detections_of(ground_truth, 0, noise=0.5)
    metrics = evaluate_detections(ground_truth, results)

    told = explain(ground_truth, results)

    assert {c.category_id: c.AP for c in told.classes if c.AP >= 0} == metrics.ap_per_category
    real = [one for one in told.classes if one.num_boxes]
    assert np.mean([one.AP50 for one in real]) == pytest.approx(metrics.AP50)
    assert np.mean([one.AR for one in real]) == pytest.approx(metrics.AR100)
    assert np.mean([one.by_size["medium"] for one in real]) == pytest.approx(metrics.APm)
    assert told.errors.ap50 == pytest.approx(metrics.AP50)
    assert told.classes[3].AP == -1
    numbers = scalars(told)
    assert numbers["val/error_missed"] == 100 * told.errors.cost["missed"]
    assert {name for name in numbers if "class/" in name} == {f"AR_of_class/{n}" for n in NAMES}


@pytest.mark.parametrize("what", ["nothing found", "nothing to find", "neither"])
def test_an_evaluation_of_nothing_is_explained_too(what: str) -> None:
    ground_truth = scene(0)
    results = [] if what != "nothing to find" else detections_of(ground_truth, 0, noise=0)
    if what != "nothing found":
        ground_truth["annotations"] = []
    told = explain(ground_truth, results)
    assert told.best_f1 == 0
    assert told.operating_score == 1
    assert all(np.isfinite(list(scalars(told).values())))


def test_scores_that_are_no_shares_are_refused() -> None:
    ground_truth = scene(0)
    results = detections_of(ground_truth, 0, noise=0)
    results[0]["score"] = 7.5
    with pytest.raises(ValueError, match=r"to 7.5, not in 0..1"):
        explain(ground_truth, results)


@pytest.mark.parametrize("seed", range(5))
def test_planted_wrong_labels_come_first(seed: int) -> None:
    """A renamed, a deleted, a shifted and a needless box among 96, and a good model."""
    truth = scene(seed, num_images=24)
    results = detections_of(truth, seed, noise=0) + [
        {**one, "score": one["score"] / 4} for one in detections_of(truth, seed + 50, noise=1)
    ]
    wrong = copy.deepcopy(truth)
    boxes = wrong["annotations"]
    chosen = np.random.default_rng(seed).permutation(24)[:4] * 4  # first boxes of four images
    renamed, deleted, shifted = (boxes[place] for place in chosen[:3])
    renamed["category_id"] = renamed["category_id"] % 3 + 1
    shifted["bbox"][0] += 0.55 * shifted["bbox"][2]  # IoU 0.29
    needless = {**boxes[chosen[3]], "id": 9999, "bbox": [20.0, 300.0, 40.0, 40.0], "area": 1600.0}
    boxes.remove(deleted)
    boxes.append(needless)

    suspects = explain(wrong, results).suspects

    rows = {place: one["id"] for place, one in enumerate(boxes)}
    first = {(one.kind, one.image_id, rows.get(one.true)) for one in suspects[:4]}
    assert first == {
        (WRONG_CLASS, renamed["image_id"], renamed["id"]),
        (MISSING, deleted["image_id"], None),
        (SHIFTED, shifted["image_id"], shifted["id"]),
        (NEEDLESS, needless["image_id"], needless["id"]),
    }


def test_correct_labels_and_a_perfect_model_leave_no_suspect() -> None:
    truth = scene(3)
    results = [
        {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"],
         "score": 0.9}
        for one in truth["annotations"]
    ]  # fmt: skip
    told = explain(truth, results)
    assert told.suspects == ()
    assert told.worst == ()
    assert max(told.errors.cost.values()) == 0
