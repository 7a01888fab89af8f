"""Each kind of source becomes a side with what is known of its model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from deta.platform.comparison.sources import open_side
from deta.platform.evaluation.coco_metrics import evaluate_detections
from deta.platform.evaluation.evaluation_folder import Origin, write_evaluation
from tests.platform.comparison.cases import boxes, detection

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[3] / "../shared")
).resolve()


def test_a_run_brings_its_best_evaluation_curve_and_cost(tmp_path: Path) -> None:
    truth = boxes(3)
    run = tmp_path / "tuned"
    for step, found in ((10, 3), (20, 1)):
        results = [detection(i, 0, 0.9) for i in range(found)]
        metrics = evaluate_detections(truth, results)
        folder = run / "evaluations" / f"step-{step:08d}"
        write_evaluation(folder, truth, results, metrics, Origin(description=f"step {step}"))
    config = {"optim": {"lr": 0.1}, "cluster": {"num_workers": 2, "gpu": True}}
    (run / "run.json").write_text(json.dumps({"config": config}))
    events = [
        {"kind": "begin", "time_s": 1000.0, "step": 0},
        {"kind": "evaluation", "time_s": 1500.0, "step": 10,
         "metrics": {"val/AP": 40.0, "val/epoch": 1.0}},
        {"kind": "begin", "time_s": 9000.0, "step": 10},  # begun again after a night
        {"kind": "end", "time_s": 9100.0, "step": 20, "metrics": {}},
    ]  # fmt: skip
    (run / "journal.jsonl").write_text("".join(json.dumps(event) + "\n\n" for event in events))

    found = open_side(str(run))

    assert (found.name, found.description) == ("tuned", "step 10")
    assert found.curve == ((1.0, 40.0),)
    assert found.config == {"optim.lr": 0.1, "cluster.num_workers": 2, "cluster.gpu": True}
    assert found.cost is not None
    assert found.cost.wall_s == 600
    assert found.cost.gpu_hours == pytest.approx(1200 / 3600)
    inner = open_side(str(run / "evaluations" / "step-00000020"))
    assert inner.name == "tuned, step-00000020"
    assert inner.curve == found.curve


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "is no folder, file, models:/NAME@ALIAS, or id of an MLflow run"),
        ("empty", "holds neither a run .* nor an evaluation"),
        ("run", "this run has no evaluation in it; make one with jobs/evaluate.py"),
        ("found.json", "needs its boxes: --annotations FILE"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"config": {}}')
    (tmp_path / "found.json").write_text("[]")
    with pytest.raises(ValueError, match=words):
        open_side(str(tmp_path / name))


def test_detections_of_unknown_categories_are_refused_or_left_out(tmp_path: Path) -> None:
    truth = boxes(3)
    results = [detection(0, 0, 0.9), {**detection(1, 0, 0.9), "category_id": 77}]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    path = tmp_path / "found.json"
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"found\.json: 1 of 2 detections are of 1 categories"):
        open_side(str(path), annotations=tmp_path / "truth.json")

    said: list[str] = []
    side = open_side(str(path), annotations=tmp_path / "truth.json", say=said.append)

    assert list(side.results) == results[:1]
    assert "Left out: 1 of 2" in said[0]


def test_the_files_in_each_others_place_are_named(tmp_path: Path) -> None:
    truth, found = tmp_path / "truth.json", tmp_path / "found.json"
    truth.write_text(json.dumps(boxes(3)))
    found.write_text(json.dumps([detection(0, 0, 0.9)]))
    with pytest.raises(ValueError, match=r"found\.json: is a results file"):
        open_side(str(truth), annotations=found)


REPORTED = sorted((SHARED / "reports").glob("unknown_category*/*.json"))


@pytest.mark.parametrize("path", REPORTED, ids=lambda path: path.stem)
def test_reported_results_are_read_whole_or_refused_with_a_count(path: Path) -> None:
    if isinstance(json.loads(path.read_text()), dict):
        return  # the annotations
    annotations = path.with_name("ann.json")
    known = {c["id"] for c in json.loads(annotations.read_text())["categories"]}
    unknown = [r for r in json.loads(path.read_text()) if r["category_id"] not in known]
    if unknown:
        with pytest.raises(ValueError, match=rf"{len(unknown)} of \d+ detections"):
            open_side(str(path), annotations=annotations)
    left = open_side(str(path), annotations=annotations, say=lambda line: None)
    assert {r["category_id"] for r in left.results} <= known
