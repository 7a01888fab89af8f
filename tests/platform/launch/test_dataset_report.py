"""The report counts what the annotations contain, and warns of mistakes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deta.platform.launch import dataset_report
from deta.platform.launch.dataset_report import (
    DatasetSummary,
    shared_images_note,
    summarize_datasets,
)
from deta.platform.shards.object_store import ObjectStore
from deta.platform.shards.open_dataset import open_dataset
from deta.platform.shards.packer import pack_dataset
from tests.platform.launch.tiny_splits import DATA, write_split


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> DatasetSummary:
    folder = tmp_path_factory.mktemp("report")
    big, tiny = [10, 10, 120, 80], [150, 20, 30, 10]
    train = write_split(
        folder / "train", [[(0, big), (1, tiny)], [(0, [0, 0, 40, 40])], [], [(1, tiny)]]
    )
    val = write_split(folder / "val", [[(0, big)], [(2, big), (2, big)]], colour=1)
    return summarize_datasets(train, val, DATA)


def test_images_boxes_and_classes_are_counted(summary: DatasetSummary):
    assert summary.train.boxes_of_image.tolist() == [2, 1, 0, 1]
    assert summary.train.boxes_of_class.tolist() == [2, 2, 0, 0]
    assert summary.val.boxes_of_class.tolist() == [1, 0, 2, 0]
    assert summary.val.images_of_class.tolist() == [1, 0, 1, 0]


def test_sizes_are_those_of_the_file_and_those_that_the_model_sees(summary: DatasetSummary):
    assert summary.train.sides_px.tolist() == [[120, 80], [30, 10], [40, 40], [30, 10]]
    assert summary.train.sides_seen_px[:2].tolist() == [[60, 40], [15, 5]]  # half, at 50 px
    assert summary.train.is_tiny.sum() == 2  # 30 x 10 becomes 15 x 5


def test_the_user_is_warned_of_what_cannot_work(summary: DatasetSummary):
    warnings = "\n".join(summary.warnings())
    assert "class bird: only in validation" in warnings
    assert "class dog: only in training" in warnings
    assert "class unicorn: listed, but in neither" in warnings
    assert "50 % of the training boxes have a side under 8 px" in warnings
    assert "1 record of the same class and place" in warnings
    table = "\n".join(summary.lines())
    assert "! not in training" in table
    assert "! not in validation" in table


def test_a_long_list_of_classes_is_cut_in_the_middle(summary: DatasetSummary):
    count = 100
    labels = np.repeat(np.arange(count), np.arange(count, 0, -1))
    split = replace(
        summary.train,
        labels=labels,
        boxes_of_class=np.bincount(labels),
        images_of_class=np.bincount(labels),
    )
    categories = tuple(replace(summary.categories[0], id=i, name=f"c{i}") for i in range(count))
    lines = DatasetSummary(categories, split, split, ()).lines()
    assert len(lines) < 50
    assert any("70 more classes" in line for line in lines)
    assert any(line.startswith("c0 ") for line in lines)
    assert any(line.startswith("c99") for line in lines)


def test_a_data_set_without_any_box_gives_a_warning(tmp_path: Path):
    empty = write_split(tmp_path / "train", [[], []])
    found = summarize_datasets(empty, empty, DATA)
    assert any("nothing to learn" in warning for warning in found.warnings())
    assert found.lines()


def test_validation_images_that_are_training_images_are_counted_by_id(tmp_path: Path):
    train = write_split(tmp_path / "train", [[], [], []], colour=0)
    val = write_split(tmp_path / "val", [[], [], []], colour=1)  # its first two are there too
    sharded = []
    for dataset, name in ((train, "a"), (val, "b")):
        pack_dataset(dataset, ObjectStore(tmp_path / name), shard_bytes=1000)
        sharded.append(open_dataset(tmp_path / name))
    for one, other in ((train, val), sharded, (train, sharded[1])):
        said = shared_images_note(one, other)
        assert said is not None
        assert said.startswith("! 2 of the 3 validation images")
        assert "ids 0, 1" in said
    assert shared_images_note(train.subset([0]), val) is None


def test_files_that_begin_alike_are_compared_to_their_end(tmp_path: Path):
    sets = [write_split(tmp_path / name, [[], []]) for name in ("train", "val")]
    for dataset, end in zip(sets, (b"1", b"2"), strict=True):
        for record in dataset.records:
            with open(record.path, "ab") as file:
                file.write(bytes(dataset_report.NUM_FIRST_BYTES) + end)
        dataset.tables.images["num_bytes"] += dataset_report.NUM_FIRST_BYTES + 1

    assert shared_images_note(*sets) is None
    sets[1].records[1].path.write_bytes(sets[0].records[1].path.read_bytes())
    assert "1 of the 2" in str(shared_images_note(*sets))
    sets[0].records[1].path.unlink()  # told elsewhere
    assert shared_images_note(*sets) is None
