"""Resuming a run: what must be the same, and what may have been lost."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deta.platform.checkpoint.local import take_snapshot, write_checkpoint
from deta.platform.data.coco_annotations import DatasetError
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.synthetic_shapes import ShapesDataset, write_shapes
from deta.platform.launch import resume_check
from deta.platform.launch.prepare_run import prepare_run
from deta.platform.run.config import DataConfig, RunConfig, override
from deta.platform.run.dataset_snapshot import DATA_FILE, read_run_snapshot, write_dataset_snapshot
from deta.platform.run.run import Run
from deta.platform.run.run_file import RUN_FILE, describe_run, write_run_file
from deta.platform.run.run_state import RunState


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> ShapesDataset:
    return write_shapes(tmp_path_factory.mktemp("shapes"), num_train=16, num_val=4, size_px=64)


@pytest.fixture
def config(drawn: ShapesDataset, tmp_path: Path) -> RunConfig:
    images = tmp_path / "images"
    shutil.copytree(drawn.train_images, images)
    return RunConfig(
        name="run",
        storage=str(tmp_path / "runs"),
        data=DataConfig(
            train_images=str(images),
            train_annotations=str(drawn.train_annotations),
            val_images=str(drawn.val_images),
            val_annotations=str(drawn.val_annotations),
        ),
    )


def started(config: RunConfig) -> Run:
    run = prepare_run(config)
    resume_check.open_run_folder(run, resume=False)
    write_run_file(run.folder, describe_run(run))
    write_dataset_snapshot(run)
    return run


def save(run: Run, step: int) -> None:
    state = RunState(
        step=step,
        samples_seen=step * run.config.total_batch_size,
        epoch=0.5,
        data_fingerprint=run.train_set.fingerprint,
        code_commit="abc",
    )
    snapshot = take_snapshot(state, run.config, run.train_set.categories, {}, {})
    write_checkpoint(run.checkpoints, snapshot)


def test_a_name_is_taken_once_and_resumed_only_where_it_is(config: RunConfig):
    run = prepare_run(config)
    with pytest.raises(resume_check.RunExistsError, match="no run to resume"):
        resume_check.open_run_folder(run, resume=True)
    started(config)
    with pytest.raises(resume_check.RunExistsError, match="--resume"):
        resume_check.open_run_folder(run, resume=False)
    resume_check.open_run_folder(run, resume=True)
    assert resume_check.changes_since_start(run) == []


def test_changes_of_the_result_are_named_and_the_rest_is_free(config: RunConfig):
    run = started(config)
    free = {"cluster.num_workers": 2, "checkpoint.keep": 5, "max_skipped_steps": 3}
    free |= {"evaluation.engine": "pycocotools"}  # computes the same numbers
    assert resume_check.changes_since_start(replace(run, config=override(run.config, free))) == []
    other = replace(run, config=override(run.config, {"optim.lr": 1e-5}))
    changes = resume_check.changes_since_start(replace(other, train_set=run.train_set.first(9)))
    assert changes[0].startswith("optim.lr: 0.0002 -> 1e-05")
    assert "train data set" in changes[1]
    with pytest.raises(resume_check.RunExistsError, match="--force"):
        resume_check.refuse_changes(run, changes)


def test_a_run_from_before_a_key_existed_has_its_default(config: RunConfig):
    run = started(config)
    content = json.loads((run.folder / RUN_FILE).read_text())
    del content["config"]["evaluation"]
    (run.folder / RUN_FILE).write_text(json.dumps(content))
    assert resume_check.changes_since_start(run) == []


@pytest.mark.parametrize("content", [b"", b'{"config": {"na', None])
def test_without_run_json_the_newest_checkpoint_gives_the_original_run(config: RunConfig, content):
    run = started(config)
    path = run.folder / RUN_FILE
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(resume_check.RunExistsError):
        resume_check.original_run_file(run)
    save(run, 3)
    resume_check.open_run_folder(run, resume=True)
    assert resume_check.changes_since_start(run) == []
    other = replace(run, config=override(run.config, {"optim.lr": 1e-5}))
    assert resume_check.changes_since_start(other)
    write_run_file(run.folder, describe_run(run, resume_check.original_run_file(run)))
    assert resume_check.original_run_file(run)["key"]


def test_images_that_broke_since_do_not_end_a_run(config: RunConfig):
    run = started(config)
    assert read_run_snapshot(run.folder).train_set.fingerprint == run.train_set.fingerprint
    assert (run.folder / DATA_FILE).stat().st_mode & 0o077 == 0
    victim = sorted(Path(config.data.train_images).iterdir())[3]
    victim.write_bytes(b"")
    with pytest.raises(DatasetError, match=victim.name):
        prepare_run(config)
    again = prepare_run(config, resume=True)
    assert again.train_set.fingerprint == run.train_set.fingerprint
    assert resume_check.changes_since_start(again) == []


def test_changed_annotations_are_never_taken_for_those_of_the_beginning(
    config: RunConfig, drawn: ShapesDataset, tmp_path: Path
):
    run = started(config)
    changed = tmp_path / "changed.json"
    changed.write_text(drawn.train_annotations.read_text() + "\n")
    sorted(Path(config.data.train_images).iterdir())[3].unlink()
    with pytest.raises(DatasetError):
        prepare_run(override(config, {"data.train_annotations": str(changed)}), resume=True)
    assert isinstance(run.train_set, CocoDataset)


def test_the_range_of_sixteen_bits_is_measured_once_and_stored_with_the_run(config: RunConfig):
    folder = Path(config.data.train_images)
    paths = sorted(folder.iterdir())
    for path in paths:
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L")).astype(np.uint16)
        Image.fromarray(29000 + grey).save(path, "PNG")
    config = override(config, {"data.sixteen_bit": "stretch"})
    run = started(config)

    least, most = run.config.data.sixteen_bit_range or (0, 0)
    assert 29000 <= least < most <= 29255
    assert run.train_set.rules == run.val_set.rules == run.config.data.pixel_rules
    assert read_run_snapshot(run.folder).train_set.rules == run.train_set.rules
    assert len(np.unique(np.asarray(run.train_set[0].image))) > 10
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(
        paths[0], "PNG"
    )  # it would change the range
    again = prepare_run(config, resume=True)
    assert again.config.data.sixteen_bit_range == (least, most)
    other = prepare_run(override(config, {"data.sixteen_bit_range": "1,2"}), resume=True)
    assert any("sixteen_bit_range" in change for change in resume_check.changes_since_start(other))


def test_stretching_without_sixteen_bits_is_refused(config: RunConfig):
    with pytest.raises(ValueError, match="no training image that was looked at is grey of 16"):
        prepare_run(override(config, {"data.sixteen_bit": "stretch"}))


def test_validation_images_of_the_training_are_told_when_a_run_is_prepared(config: RunConfig):
    images, annotations = config.data.train_images, config.data.train_annotations
    changes = {"data.val_images": images, "data.val_annotations": annotations}
    run = prepare_run(override(config, changes))

    said = [note for note in run.val_set.notes if "in training too" in note]

    assert len(said) == 1
    assert said[0].startswith("! 16 of the 16 validation images")
    assert prepare_run(config).val_set.notes == []
