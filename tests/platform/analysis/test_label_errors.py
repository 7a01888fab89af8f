"""Planted label errors are found first, and correct labels raise no suspicion."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from deta.platform.analysis.analysis import explain
from deta.platform.analysis.label_errors import (
    LEAST_F1,
    LEAST_SUSPICION,
    MISSING,
    NEEDLESS,
    SHIFTED,
    WRONG_CLASS,
)
from tests.platform.analysis.scenes import detections_of, scene


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

    errors = explain(wrong, results).label_errors

    rows = {place: one["id"] for place, one in enumerate(boxes)}
    first = {(one.kind, one.image_id, rows.get(one.true)) for one in errors[:4]}
    assert first == {
        (WRONG_CLASS, renamed["image_id"], renamed["id"]),
        (MISSING, deleted["image_id"], None),
        (SHIFTED, shifted["image_id"], shifted["id"]),
        (NEEDLESS, needless["image_id"], needless["id"]),
    }


def test_correct_labels_and_a_perfect_model_show_no_label_error() -> None:
    truth = scene(3)
    results = [
        {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"],
         "score": 0.9}
        for one in truth["annotations"]
    ]  # fmt: skip
    found = explain(truth, results)
    assert found.label_errors == ()
    assert found.worst == ()
    assert max(found.errors.cost.values()) == 0


@pytest.mark.parametrize("share_found", [0.9, 0.3])
def test_a_weak_model_lists_none_however_sure_it_is(share_found: float) -> None:
    """It names the class wrongly, at a score of 0.95, where it does not name it rightly."""
    truth = scene(4, num_images=40)
    rng = np.random.default_rng(0)
    results = [
        {"image_id": one["image_id"], "bbox": one["bbox"], "score": 0.95,
         "category_id": one["category_id"] if rng.random() < share_found
         else one["category_id"] % 3 + 1}
        for one in truth["annotations"]
    ]  # fmt: skip
    found = explain(truth, results)

    assert (found.best_f1 < LEAST_F1) == (share_found == 0.3)
    assert bool(found.label_errors) == (share_found == 0.9)


def test_what_is_hardly_suspicious_is_not_listed() -> None:
    """A detection of nothing, at a score just below and at what its kind needs."""
    truth = scene(5, num_images=20)
    right = [
        {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"],
         "score": 0.5}
        for one in truth["annotations"]
    ]  # fmt: skip
    least = LEAST_SUSPICION[MISSING]
    for score, kinds in ((least - 0.01, []), (least + 0.01, [MISSING])):
        nothing = {"image_id": 0, "category_id": 1, "bbox": [20.0, 300.0, 40.0, 40.0]}
        errors = explain(truth, [*right, {**nothing, "score": score}]).label_errors
        assert [one.kind for one in errors] == kinds
