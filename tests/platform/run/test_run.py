"""When a run evaluates, when it stops, and what run.json says of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.synthetic_shapes import write_shapes
from deta.platform.run.config import ClusterConfig, DataConfig, RunConfig, override
from deta.platform.run.run import Run
from deta.platform.run.run_file import describe_run, read_run_file, tracking_uri, write_run_file
from deta.platform.run.run_state import RunState


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Ten training images, total batch 4: two and a half steps per epoch."""
    shapes = write_shapes(tmp_path_factory.mktemp("shapes"), num_train=10, num_val=2, size_px=48)
    data = DataConfig(
        train_images=str(shapes.train_images), train_annotations=str(shapes.train_annotations)
    )
    config = RunConfig(data=data, cluster=ClusterConfig(num_workers=1), total_batch_size=4)
    return Run(
        override(config, {"schedule.epochs": 4, "schedule.lr_drop_epochs": "[]"}),
        shapes.train_images.parent,
        CocoDataset.open(shapes.train_images, shapes.train_annotations),
        CocoDataset.open(shapes.val_images, shapes.val_annotations),
        code_commit="abc",
    )


def with_config(run: Run, **changes: Any) -> Run:
    flat = {key.replace("__", "."): value for key, value in changes.items()}
    return replace(run, config=override(run.config, flat))


def state_at(step: int, **values: Any) -> RunState:
    return RunState(step=step, samples_seen=4 * step, epoch=step * 0.4, **values)


def test_steps_follow_from_epochs_images_and_batch(drawn: Run):
    assert drawn.num_steps == 10
    assert drawn.evaluation_steps() == {3, 5, 8, 10}
    assert with_config(drawn, evaluate_every_epochs=3).evaluation_steps() == {8, 10}
    assert drawn.epoch_at(5) == 2.0


def test_a_run_is_done_after_its_last_evaluation_or_early_stopping(drawn: Run):
    assert not drawn.is_done(state_at(8, metrics={"AP": 1.0}))
    assert not drawn.is_done(state_at(10))  # not evaluated yet
    assert drawn.is_done(state_at(10, metrics={"AP": 1.0}))

    patient = with_config(drawn, schedule__patience=1)
    stopped = state_at(5, metrics={"AP": 1.0}, ap_history=[2.0, 1.0])
    assert "stopped early after step 5 of 10" in patient.reason_to_stop(stopped)
    assert patient.is_done(stopped)
    assert not drawn.is_done(stopped)


def test_the_run_file_describes_the_run_and_survives_a_resume(drawn: Run, tmp_path: Path):
    first = describe_run(drawn, tags={"a": "1"}, parent="sweep")
    write_run_file(tmp_path, first)
    again = describe_run(drawn, read_run_file(tmp_path), tags={"b": "2"})

    for key in ("key", "created_s", "parent"):
        assert again[key] == first[key]
    assert again["tags"] == {"a": "1", "b": "2"}
    assert again["train_fingerprint"] == drawn.train_set.fingerprint
    assert again["data"]["training"]["num_images"] == 10
    assert any(package.startswith("torch==") for package in again["environment"]["packages"])


@pytest.mark.parametrize("content", ["[]", "{}", '{"config": 1}', "{"])
def test_a_damaged_run_file_is_a_value_error(tmp_path: Path, content: str):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"damaged|Expecting"):
        read_run_file(tmp_path)


def test_mlflow_is_that_of_the_environment_or_a_file_beside_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path.resolve()}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri(tmp_path) == "http://host:5000"


def test_a_state_is_plain_data():
    state = state_at(3, metrics={"AP": 1.0})
    assert RunState(**json.loads(json.dumps(vars(state)))) == state
