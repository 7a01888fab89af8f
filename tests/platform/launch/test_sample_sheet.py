"""The sheet shows the very tensors that the model will see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deta.platform.data.data_loader import train_loader
from deta.platform.data.image_sizes import tiny_augmentation
from deta.platform.launch.sample_sheet import (
    CELL_PX,
    first_epoch_images,
    write_training_sheet,
)
from tests.platform.launch.tiny_splits import DATA, make_run, write_split


def test_the_sheet_shows_the_very_tensors_of_the_first_epoch(tmp_path: Path):
    dataset = write_split(
        tmp_path / "train", [[(i % 3, [10.0 + i, 10, 60, 70])] for i in range(6)], colour=100
    )
    data = replace(DATA, augmentation=tiny_augmentation())
    run = make_run(dataset, tmp_path, data)
    samples = first_epoch_images(run, num_images=6)
    assert len(samples) == 6
    loader = train_loader(
        dataset,
        data.augmentation,
        seed=run.config.seed,
        total_batch_size=6,
        micro_batch_size=1,
        end_step=1,
    )
    (step,) = list(loader)
    for sample, loaded in zip(samples, step, strict=True):
        pixels = torch.from_numpy(np.array(sample.image)).permute(2, 0, 1)
        assert torch.equal(pixels, loaded.batch.images[0])
        boxes = loaded.batch.targets.boxes[0][loaded.batch.targets.present[0]]
        size_px = torch.tensor([sample.image.width, sample.image.height] * 2)
        sides = (sample.boxes_px[:, 2:] - sample.boxes_px[:, :2]) / size_px[:2]
        assert torch.allclose(sides, boxes[:, 2:], atol=1e-5)


def test_every_class_is_on_the_sheet_where_there_is_room(tmp_path: Path):
    boxes: list[list[tuple[int, list[float]]]] = [[(0, [20.0, 20, 60, 60])] for _ in range(20)]
    boxes[13] = [(1, [20.0, 20, 60, 60])]
    boxes[17] = [(2, [20.0, 20, 60, 60])]
    dataset = write_split(tmp_path / "train", boxes)
    samples = first_epoch_images(make_run(dataset, tmp_path, DATA), num_images=4)
    assert {label for sample in samples for label in sample.labels.tolist()} == {0, 1, 2}
    assert len(samples) == 4


@pytest.mark.parametrize("num_boxes", [0, 1, 30])
def test_a_sheet_is_drawn_for_any_number_of_boxes(tmp_path: Path, num_boxes: int):
    boxes = [(i % 4, [5.0 * i, 10, 30, 30]) for i in range(num_boxes)]
    run = make_run(write_split(tmp_path / "train", [boxes]), tmp_path, DATA)
    write_training_sheet(tmp_path / "pictures" / "training.png", run)
    with Image.open(tmp_path / "pictures" / "training.png") as sheet:
        assert sheet.width >= CELL_PX / 2
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["training.png"]
