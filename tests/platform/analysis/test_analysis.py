"""The numbers of an analysis, against direct and slow computations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deta.platform.analysis.analysis import CONFIDENT_FROM, NUM_BINS, explain, scalars
from deta.platform.evaluation.coco_metrics import evaluate_detections
from tests.platform.analysis.scenes import NAMES, detections_of, scene


def iou(a: list[float], b: list[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(0.0, width) * max(0.0, height)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def matches(
    ground_truth: dict[str, Any], results: list[dict[str, Any]], *, by_class: bool
) -> dict[int, int]:
    """Match greedily at an IoU of 0.5: detection to annotation, by their places in the lists."""
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

    calibration = explain(ground_truth, results).calibration
    error, largest = gap(0.0)
    assert calibration.error == pytest.approx(error, abs=1e-9)
    assert calibration.largest == pytest.approx(largest, abs=1e-9)
    assert calibration.confident_error == pytest.approx(gap(CONFIDENT_FROM)[0], abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_confusions_are_those_of_greedy_matching_of_all_classes(seed: int) -> None:
    ground_truth = scene(seed)
    results = detections_of(ground_truth, seed, noise=1)

    explanation = explain(ground_truth, results)

    sure = [one for one in results if one["score"] >= explanation.operating_score]
    taken = matches(ground_truth, sure, by_class=False)
    expected = np.zeros((4, 4), int)
    for m, found in enumerate(sure):
        true = ground_truth["annotations"][taken[m]]["category_id"] if m in taken else 4
        expected[true - 1, found["category_id"] - 1] += 1
    for a, one in enumerate(ground_truth["annotations"]):
        if a not in taken.values():
            expected[one["category_id"] - 1, 3] += 1
    assert explanation.confusion.tolist() == expected.tolist()


@pytest.mark.parametrize("seed", range(8))
def test_the_operating_score_has_the_highest_f1_of_all(seed: int) -> None:
    ground_truth = scene(seed)
    results = detections_of(ground_truth, seed, noise=1)
    correct = matches(ground_truth, results, by_class=True)

    def f1(least: float) -> float:
        kept = [m for m, one in enumerate(results) if one["score"] >= least]
        right = sum(m in correct for m in kept)
        return 2 * right / (len(kept) + len(ground_truth["annotations"]))

    explanation = explain(ground_truth, results)
    assert explanation.best_f1 == pytest.approx(max(f1(one["score"]) for one in results))
    assert f1(explanation.operating_score) == pytest.approx(explanation.best_f1)
    # False and missing boxes of each image, at that score.
    for worst in explanation.worst:
        sure = {m for m, one in enumerate(results) if one["score"] >= explanation.operating_score}
        kept = [m for m in sure if results[m]["image_id"] == worst.image_id]
        found = {correct[m] for m in kept if m in correct}
        true = [a for a, one in enumerate(ground_truth["annotations"])
                if one["image_id"] == worst.image_id]  # fmt: skip
        assert worst.num_false == len(kept) - len(found)
        assert worst.num_missed == len(true) - len(found)
    errors = [one.num_false + one.num_missed for one in explanation.worst]
    assert errors == sorted(errors, reverse=True)


def test_numbers_of_classes_are_those_of_the_evaluation() -> None:
    ground_truth = scene(0)
    ground_truth["categories"].append({"id": 9, "name": "never"})
    results = detections_of(ground_truth, 0, noise=0.5)
    metrics = evaluate_detections(ground_truth, results)

    explanation = explain(ground_truth, results)

    assert {c.category_id: c.AP for c in explanation.classes if c.AP >= 0} == pytest.approx(
        metrics.ap_per_category
    )
    real = [one for one in explanation.classes if one.num_boxes]
    assert np.mean([one.AP50 for one in real]) == pytest.approx(metrics.AP50)
    assert np.mean([one.AR for one in real]) == pytest.approx(metrics.AR100)
    assert np.mean([one.by_size["medium"] for one in real]) == pytest.approx(metrics.APm)
    assert explanation.errors.ap50 == pytest.approx(metrics.AP50)
    assert explanation.classes[3].AP == -1
    numbers = scalars(explanation)
    assert numbers["val/error_missed"] == 100 * explanation.errors.cost["missed"]
    assert {name for name in numbers if "class/" in name} == {f"AR_of_class/{n}" for n in NAMES}


@pytest.mark.parametrize("what", ["nothing found", "nothing to find", "neither"])
def test_an_evaluation_of_nothing_is_analysed_too(what: str) -> None:
    ground_truth = scene(0)
    results = [] if what != "nothing to find" else detections_of(ground_truth, 0, noise=0)
    if what != "nothing found":
        ground_truth["annotations"] = []
    explanation = explain(ground_truth, results)
    assert explanation.best_f1 == 0
    assert explanation.operating_score == 1
    assert all(np.isfinite(list(scalars(explanation).values())))


def test_scores_outside_0_to_1_are_refused() -> None:
    ground_truth = scene(0)
    results = detections_of(ground_truth, 0, noise=0)
    results[0]["score"] = 7.5
    with pytest.raises(ValueError, match=r"to 7.5, not in 0..1"):
        explain(ground_truth, results)
