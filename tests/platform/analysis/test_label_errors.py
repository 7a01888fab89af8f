"""Planted label errors are found first, and correct labels raise no suspicion."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from deta.platform.analysis.analysis import explain
from deta.platform.analysis.label_errors import MISSING, NEEDLESS, SHIFTED, WRONG_CLASS
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
