"""Two lists of detections are compared, and speed is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deta.model.postprocess import Detections
from deta.platform.inference.export_check import (
    OutputDifference,
    compare_detections,
    measure_runtime_speed,
)
from deta.platform.inference.exported_model import PackedImages

DETECTIONS = Detections(
    scores=torch.tensor([0.9, 0.8, 0.3, 0.1]),
    labels=torch.tensor([0, 1, 0, 2]),
    boxes_px=torch.tensor([[0.0, 0, 50, 50], [10, 10, 90, 90], [60, 0, 99, 40], [5, 5, 9, 9]]),
)


def changed(place: int, score: float = 0.0, shift_px: float = 0.0) -> Detections:
    scores, boxes_px = DETECTIONS.scores.clone(), DETECTIONS.boxes_px.clone()
    scores[place] += score
    boxes_px[place, 2] += shift_px
    return replace(DETECTIONS, scores=scores, boxes_px=boxes_px)


def test_equal_detections_differ_by_nothing_in_any_order():
    order = torch.tensor([1, 0, 3, 2])
    other = Detections(
        DETECTIONS.scores[order], DETECTIONS.labels[order], DETECTIONS.boxes_px[order]
    )

    assert compare_detections(DETECTIONS, other, (100, 200), 100) == OutputDifference(1, 4)


def test_differences_are_measured():
    score = compare_detections(DETECTIONS, changed(1, score=0.0005), (100, 200), 100)
    box = compare_detections(DETECTIONS, changed(2, shift_px=0.1), (100, 200), 100)

    assert score.scores == pytest.approx(0.0005, abs=1e-6)
    assert score.is_small
    assert box.boxes == pytest.approx(0.0005, abs=1e-6)
    assert box.boxes_px == pytest.approx(0.1, abs=1e-4)
    assert (score + box).boxes == box.boxes
    assert (score + box).num_images == 2


@pytest.mark.parametrize(
    "other",
    [
        changed(0, score=-0.01),
        changed(1, shift_px=2.0),
        changed(1, shift_px=90.0),
        replace(DETECTIONS, labels=torch.tensor([0, 2, 0, 2])),
        Detections(DETECTIONS.scores[:3], DETECTIONS.labels[:3], DETECTIONS.boxes_px[:3]),
    ],
)
def test_other_detections_are_refused(other):
    assert not compare_detections(DETECTIONS, other, (100, 200), 100).is_small
    assert not compare_detections(other, DETECTIONS, (100, 200), 100).is_small


def test_the_last_one_of_a_full_list_may_be_another():
    other = replace(changed(3, score=0.0002), labels=torch.tensor([0, 1, 0, 1]))

    assert compare_detections(DETECTIONS, other, (100, 200), 4) == OutputDifference(1, 3)
    assert not compare_detections(DETECTIONS, other, (100, 200), 100).is_small


def test_nothing_compared_is_no_proof():
    assert not OutputDifference().is_small


def test_batches_are_doubled_while_that_is_faster(monkeypatch):
    now_s = 0.0
    cost_s = {1: 0.4, 2: 0.5, 4: 0.7, 8: 2.0}

    def run(batch: PackedImages) -> None:
        nonlocal now_s
        now_s += cost_s[len(batch.images)]

    monkeypatch.setattr("time.perf_counter", lambda: now_s)
    one = PackedImages(torch.zeros(1, 3, 8, 8), torch.tensor([[8, 8]]), torch.tensor([[8, 8]]))

    speed = measure_runtime_speed(run, one)

    assert speed.latency_ms == pytest.approx(400)
    assert (speed.best_batch, speed.images_per_s) == (4, pytest.approx(4 / 0.7))
