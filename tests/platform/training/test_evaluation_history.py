"""Which evaluations a training saves, and that a failure there never ends the training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.synthetic_shapes import ShapesDataset, write_shapes
from deta.platform.evaluation.coco_metrics import evaluate_detections
from deta.platform.evaluation.evaluate_model import EvaluationResult
from deta.platform.evaluation.evaluation_folder import REPORT, read_evaluation
from deta.platform.learning.schedule import ScheduleConfig
from deta.platform.run.config import ClusterConfig, RunConfig
from deta.platform.run.run import Run
from deta.platform.run.run_state import RunState
from deta.platform.training.evaluation_history import EVALUATIONS, EvaluationHistory


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> ShapesDataset:
    return write_shapes(tmp_path_factory.mktemp("shapes"), num_train=8, num_val=4, size_px=64)


class RecordedRun:
    """A run of eight steps, and the events it logged."""

    def __init__(self, drawn: ShapesDataset, folder: Path, num_pictures: int = 2) -> None:
        data = CocoDataset.open(drawn.train_images, drawn.train_annotations)
        val = CocoDataset.open(drawn.val_images, drawn.val_annotations)
        config = replace(
            RunConfig(),
            num_pictures=num_pictures,
            total_batch_size=4,
            schedule=ScheduleConfig(epochs=4, lr_drop_epochs=()),
            cluster=ClusterConfig(num_workers=1, gpu=False),
        )
        self.run = Run(config, folder, data, val)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.history = EvaluationHistory(
            self.run, lambda kind, **values: self.events.append((kind, values))
        )
        self.best_ap = 0.0

    def evaluate(self, step: int, share: float) -> dict[str, float]:
        """Evaluate detections that match a share of the boxes exactly."""
        truth = self.run.val_set.ground_truth
        boxes = truth["annotations"][: round(share * len(truth["annotations"]))]
        results = [
            {key: one[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
            for one in boxes
        ]
        evaluation = EvaluationResult(evaluate_detections(truth, results), results)
        ap = 100 * evaluation.metrics.AP
        self.best_ap = max(self.best_ap, ap)
        metrics = self.history.explain(evaluation, step, seconds=9.0)
        state = RunState(step=step, samples_seen=4 * step, epoch=step / 2)
        state = replace(state, metrics={"AP": ap}, best_ap=self.best_ap)
        self.history.save(evaluation, state, seconds=9.0)
        return metrics

    @property
    def saved(self) -> list[str]:
        return sorted(path.name for path in (self.run.folder / EVALUATIONS).iterdir())


def test_the_best_and_the_newest_are_kept(drawn: ShapesDataset, tmp_path: Path) -> None:
    recorded = RecordedRun(drawn, tmp_path)
    for step, share in ((2, 0.3), (4, 0.9), (6, 0.5)):
        recorded.evaluate(step, share)
    assert recorded.saved == ["step-00000004", "step-00000006"]
    recorded.evaluate(8, 0.9)  # equal: the later one, as for checkpoints
    assert recorded.saved == ["step-00000008"]

    read = read_evaluation(tmp_path / EVALUATIONS / "step-00000008")
    assert read.origin.step == 8
    assert read.origin.data_fingerprint == recorded.run.val_set.fingerprint
    assert read.metrics == evaluate_detections(read.ground_truth, read.results)
    assert (read.folder / REPORT).is_file()


def test_metrics_name_the_errors_and_their_cost(drawn: ShapesDataset, tmp_path: Path) -> None:
    metrics = RecordedRun(drawn, tmp_path).evaluate(2, 0.5)
    assert metrics["val/error_missed"] > 0
    assert metrics["val/error_background"] == 0
    assert 0 < metrics["val/explain_share"] < 1
    assert any(name.startswith("AR_of_class/") for name in metrics)


def test_the_best_has_a_report_at_the_end_though_there_was_no_time_before(
    drawn: ShapesDataset, tmp_path: Path
) -> None:
    recorded = RecordedRun(drawn, tmp_path)
    recorded.evaluate(2, 0.3)
    recorded.history.report_took_s = 1e6  # so the next one exceeds the budget
    recorded.evaluate(4, 0.9)
    assert not (tmp_path / EVALUATIONS / "step-00000004" / REPORT).exists()

    recorded.evaluate(8, 0.5)

    assert recorded.saved == ["step-00000004", "step-00000008"]
    for name in recorded.saved:
        assert (tmp_path / EVALUATIONS / name / REPORT).is_file()
    assert [values["step"] for kind, values in recorded.events if kind == "report"] == [2, 8, 4]


def test_without_images_there_is_no_report(drawn: ShapesDataset, tmp_path: Path) -> None:
    recorded = RecordedRun(drawn, tmp_path, num_pictures=0)
    recorded.evaluate(8, 0.5)
    assert not (tmp_path / EVALUATIONS / "step-00000008" / REPORT).exists()
    assert read_evaluation(tmp_path / EVALUATIONS / "step-00000008").results


def test_a_failure_is_logged_and_ends_nothing(drawn: ShapesDataset, tmp_path: Path) -> None:
    recorded = RecordedRun(drawn, tmp_path)
    (tmp_path / EVALUATIONS).write_text("in the way")
    metrics = recorded.evaluate(2, 0.5)
    assert "val/error_missed" in metrics
    assert [kind for kind, _ in recorded.events] == ["explanation_failed"]

    (tmp_path / EVALUATIONS).unlink()
    broken = EvaluationResult(
        evaluate_detections(recorded.run.val_set.ground_truth, []), [{"image_id": 7}]
    )
    assert recorded.history.explain(broken, 4, seconds=1.0) == {}
    assert "explained" in recorded.events[-1][1]["message"]
    recorded.evaluate(6, 0.5)
    assert recorded.saved == ["step-00000006"]
