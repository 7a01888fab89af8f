"""What is counted is there, the sheet shows what the model sees, and no batch beats the worst."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deta.model.backbone import BackboneConfig
from deta.model.detector import ModelConfig
from deta.platform.data.coco_dataset import CocoDataset, Sample
from deta.platform.data.data_loader import train_loader
from deta.platform.data.sample_order import Draws
from deta.platform.data.transforms import (
    AugmentationConfig,
    EvaluationSize,
    augment,
    tiny_augmentation,
)
from deta.platform.launch import memory_probe as memory_probe
from deta.platform.launch.dataset_report import FirstLook, look_at
from deta.platform.launch.memory_probe import (
    Measured,
    WorstBatch,
    measure,
    suggest_micro_batch,
    worst_batch,
)
from deta.platform.launch.sample_sheet import (
    CELL_PX,
    first_pictures,
    training_sheet,
    write_training_sheet,
)
from deta.platform.run.config import ClusterConfig, DataConfig, RunConfig
from deta.platform.run.run import Run

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[3] / "../shared")
).resolve()
DATA_SETS = sorted(
    path.parent.parent for path in (SHARED / "data").glob("*/annotations/instances_train.json")
)
CLASSES = ("cat", "dog", "bird", "unicorn")
# An image of 200 x 100 is seen at half its size.
DATA = DataConfig(
    augmentation=AugmentationConfig(
        short_edges=(40, 50, 60), max_long_edge=200, crop=False, flip_probability=0
    ),
    evaluation_size=EvaluationSize(short_edge=50, max_long_edge=200),
)


def write_split(
    folder: Path, boxes: list[list[tuple[int, list[float]]]], *, colour: int = 0
) -> CocoDataset:
    """Images of 200 x 100 with the given boxes: class index and xywh in px."""
    folder.mkdir(parents=True)
    annotations: list[dict[str, Any]] = []
    for image_id, own in enumerate(boxes):
        image = Image.new("RGB", (200, 100), (colour + image_id, 90, 90))
        image.save(folder / f"{image_id}.png")
        annotations += [
            {
                "id": len(annotations) + n,
                "image_id": image_id,
                "category_id": label + 1,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for n, (label, box) in enumerate(own)
        ]
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 200, "height": 100}
            for i in range(len(boxes))
        ],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    return CocoDataset.open(folder, folder / "annotations.json")


@pytest.fixture(scope="module")
def look(tmp_path_factory: pytest.TempPathFactory) -> FirstLook:
    folder = tmp_path_factory.mktemp("look")
    big, tiny = [10, 10, 120, 80], [150, 20, 30, 10]
    train = write_split(
        folder / "train", [[(0, big), (1, tiny)], [(0, [0, 0, 40, 40])], [], [(1, tiny)]]
    )
    val = write_split(folder / "val", [[(0, big)], [(2, big), (2, big)]], colour=1)
    return look_at(train, val, DATA)


def test_images_boxes_and_classes_are_counted(look: FirstLook):
    assert (look.train.num_images, look.train.num_empty, look.train.num_boxes) == (4, 1, 4)
    assert look.train.boxes_of_class.tolist() == [2, 2, 0, 0]
    assert look.val.boxes_of_class.tolist() == [1, 0, 2, 0]
    assert look.val.images_of_class.tolist() == [1, 0, 1, 0]
    assert look.val.most_boxes == 2


def test_sizes_are_those_of_the_file_and_those_that_the_model_sees(look: FirstLook):
    assert look.train.areas_px2.tolist() == [9600, 300, 1600, 300]
    assert look.train.areas_seen_px2.tolist() == [2400, 75, 400, 75]  # a quarter, at 50 px
    assert look.train.num_tiny == 2  # 30 x 10 becomes 15 x 5


def test_a_person_is_warned_of_what_cannot_work(look: FirstLook):
    warnings = "\n".join(look.warnings())
    assert "class bird: only in validation" in warnings
    assert "class dog: only in training" in warnings
    assert "class unicorn: listed, but in neither" in warnings
    assert "50 % of the training boxes have a side under 8 px" in warnings
    assert "2 of the validation pictures are in training too" in warnings  # of the same grey
    table = "\n".join(look.lines())
    assert "! not in training" in table
    assert "! not in validation" in table


def test_a_long_list_of_classes_is_cut_in_the_middle(look: FirstLook):
    count = 100
    labels = np.repeat(np.arange(count), np.arange(count, 0, -1))
    split = replace(
        look.train,
        labels=labels,
        boxes_of_class=np.bincount(labels),
        images_of_class=np.bincount(labels),
    )
    categories = tuple(replace(look.categories[0], id=i, name=f"c{i}") for i in range(count))
    lines = FirstLook(categories, split, split, 0).lines()
    assert len(lines) < 50
    assert any("70 more classes" in line for line in lines)
    assert any(line.startswith("c0 ") for line in lines)
    assert any(line.startswith("c99") for line in lines)


def test_a_data_set_without_any_box_is_told_of(tmp_path: Path):
    empty = write_split(tmp_path / "train", [[], []])
    found = look_at(empty, empty, DATA)
    assert any("nothing to learn" in warning for warning in found.warnings())
    assert found.lines()


def make_run(dataset: CocoDataset, folder: Path, data: DataConfig, **changes: Any) -> Run:
    model = ModelConfig(
        backbone=BackboneConfig(
            name="resnet10t", pretrained=False, norm="group", frozen_parts=(), width=0.25
        ),
        num_classes=len(dataset.categories),
        num_levels=4,
        dim=16,
        num_heads=2,
        num_points=1,
        encoder_layers=1,
        decoder_layers=1,
        ffn_dim=16,
        num_queries=8,
    )
    config = RunConfig(
        model=model,
        data=data,
        cluster=ClusterConfig(num_workers=1, gpu=False, cpus_per_worker=1),
        total_batch_size=4,
        micro_batch_size=2,
    )
    return Run(replace(config, **changes), folder, dataset, dataset)


def test_the_sheet_shows_the_very_tensors_of_the_first_epoch(tmp_path: Path):
    dataset = write_split(
        tmp_path / "train", [[(i % 3, [10.0 + i, 10, 60, 70])] for i in range(6)], colour=100
    )
    data = replace(DATA, augmentation=tiny_augmentation())
    run = make_run(dataset, tmp_path, data)
    pictures = first_pictures(run, num_pictures=6)
    assert len(pictures) == 6
    loader = train_loader(
        dataset,
        data.augmentation,
        seed=run.config.seed,
        total_batch_size=6,
        micro_batch_size=1,
        end_step=1,
    )
    (step,) = list(loader)
    for picture, loaded in zip(pictures, step, strict=True):
        pixels = torch.from_numpy(np.array(picture.image)).permute(2, 0, 1)
        seen = loaded.batch.images[0]
        mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        assert torch.allclose((pixels / 255 - mean) / std, seen, atol=1e-5)
        boxes = loaded.batch.targets.boxes[0][loaded.batch.targets.present[0]]
        size_px = torch.tensor([picture.image.width, picture.image.height] * 2)
        sides = (picture.boxes_px[:, 2:] - picture.boxes_px[:, :2]) / size_px[:2]
        assert torch.allclose(sides, boxes[:, 2:], atol=1e-5)


def test_every_class_is_on_the_sheet_where_there_is_room(tmp_path: Path):
    boxes: list[list[tuple[int, list[float]]]] = [[(0, [20.0, 20, 60, 60])] for _ in range(20)]
    boxes[13] = [(1, [20.0, 20, 60, 60])]
    boxes[17] = [(2, [20.0, 20, 60, 60])]
    dataset = write_split(tmp_path / "train", boxes)
    pictures = first_pictures(make_run(dataset, tmp_path, DATA), num_pictures=4)
    assert {label for picture in pictures for label in picture.labels.tolist()} == {0, 1, 2}
    assert len(pictures) == 4


@pytest.mark.parametrize("num_boxes", [0, 1, 30])
def test_a_sheet_is_drawn_of_any_pictures_and_written_whole(tmp_path: Path, num_boxes: int):
    boxes = [(i % 4, [5.0 * i, 10, 30, 30]) for i in range(num_boxes)]
    run = make_run(write_split(tmp_path / "train", [boxes]), tmp_path, DATA)
    write_training_sheet(tmp_path / "pictures" / "training.png", run)
    with Image.open(tmp_path / "pictures" / "training.png") as sheet:
        assert sheet.width >= CELL_PX / 2
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["training.png"]


def test_a_sheet_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one picture"):
        training_sheet([], [])


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(20, 900), st.integers(20, 900)),
    config=st.sampled_from(
        [
            AugmentationConfig(),
            tiny_augmentation(),
            AugmentationConfig(crop=False),
            AugmentationConfig(max_long_edge=800),
        ]
    ),
    seed=st.integers(0, 2**32),
)
def test_no_augmented_picture_exceeds_the_worst_batch(size, config, seed):
    height, width = size
    largest = memory_probe._largest_sizes(height, width, config)
    sample = Sample(
        Image.new("1", (width, height)), torch.zeros(0, 4), torch.zeros(0).long(), 0, size
    )
    draws = Draws(seed)
    for _ in range(3):
        image = augment(sample, config, draws).image
        assert image.height <= max(h for h, _ in largest)
        assert image.width <= max(w for _, w in largest)
        assert image.width * image.height <= max(h * w for h, w in largest)


@pytest.mark.parametrize("folder", DATA_SETS, ids=lambda path: path.name)
def test_the_worst_batch_of_real_pictures_is_nearly_reached(folder: Path):
    dataset = CocoDataset.open(folder / "train", folder / "annotations" / "instances_train.json")
    config = tiny_augmentation()
    worst = worst_batch(dataset, config, 2)
    assert worst.num_boxes == max(len(record.labels) for record in dataset.records)
    blank = [
        Sample(
            Image.new("1", (record.width, record.height)),
            torch.zeros(0, 4),
            torch.zeros(0).long(),
            0,
            (record.height, record.width),
        )
        for record in dataset.records[:100]
    ]
    sizes = [
        augment(one, config, Draws(100 * seed + place)).image.size
        for seed in range(10)
        for place, one in enumerate(blank)
    ]
    heights, widths = [height for _, height in sizes], [width for width, _ in sizes]
    assert 0.85 * worst.height_px <= max(heights) <= worst.height_px
    assert 0.85 * worst.width_px <= max(widths) <= worst.width_px


def test_a_single_image_is_not_tall_and_wide_at_once(tmp_path: Path):
    dataset = write_split(tmp_path / "train", [[], []])  # 2 : 1
    alone = worst_batch(dataset, AugmentationConfig(crop=False), 1)
    assert (alone.height_px, alone.width_px) == (666, 1332)  # as released code resizes 2 : 1
    together = worst_batch(dataset, AugmentationConfig(), 2)
    assert (together.height_px, together.width_px) == (1250, 1332)  # of a crop of 600 x 384


WORST = WorstBatch(96, 128, 5, "a.png", "b.png", "a.png")


def test_a_probe_measures_its_own_process_and_refuses_it_too_much(tmp_path: Path):
    run = make_run(write_split(tmp_path / "train", [[]]), tmp_path, DATA)
    one = measure(run.config, WORST, 1, "cpu", 8 << 30)
    many = measure(run.config, WORST, 24, "cpu", 8 << 30)
    assert one.peak_bytes is not None
    assert many.peak_bytes is not None
    # 23 more images of 96 x 128 px: their pixels alone are 3 MB, with all activations far more.
    assert one.peak_bytes + 3e6 < many.peak_bytes < 8 << 30
    assert many.seconds > 0
    huge = replace(WORST, height_px=2048, width_px=4096)
    assert measure(run.config, huge, 64, "cpu", one.peak_bytes + (256 << 20)).peak_bytes is None


@pytest.mark.parametrize(
    ("configured", "total", "fixed_gib", "gib_an_image", "expected"),
    [
        (2, 16, 1.0, 1.0, 7),  # 8 GiB: 1 + 7 · 1
        (2, 4, 1.0, 1.0, 4),  # a worker's share is all that can help
        (8, 16, 1.0, 1.5, 4),  # what is configured does not fit: 1 + 8 · 1.5
        (1, 16, 1.0, 2.5, 2),
        (2, 16, 1.0, 8.0, 0),  # not even one
    ],
)
def test_the_largest_micro_batch_that_fits_is_found_from_two_sizes(
    tmp_path: Path, monkeypatch, configured, total, fixed_gib, gib_an_image, expected
):
    run = make_run(
        write_split(tmp_path / "train", [[]]),
        tmp_path,
        DATA,
        total_batch_size=total,
        micro_batch_size=configured,
    )
    calls: list[int] = []

    def pretend(config, worst, num_images, device, limit_bytes) -> Measured:
        calls.append(num_images)
        need = int((fixed_gib + gib_an_image * num_images) * 2**30)
        return Measured(num_images, need if need <= limit_bytes * 1.5 else None, 1.0)

    monkeypatch.setattr(memory_probe, "measure", pretend)
    monkeypatch.setattr(memory_probe, "free_bytes", lambda *_: int(8 * 2**30 / 0.8) + 1)
    found = suggest_micro_batch(run, "cpu", lambda line: None)
    assert found.largest == expected
    assert found.fits == (min(configured, total) <= expected)
    assert len(calls) == len(set(calls)) <= 4
    text = "\n".join(found.lines())
    if expected == 0:
        assert "not even one image fits" in text
    else:
        assert f"micro_batch_size={expected}" in text


def test_free_memory_is_linuxs_own_estimate():
    assert memory_probe.available_bytes("MemTotal: 9 kB\nMemAvailable:    2048 kB\n") == 2 << 20
    assert 0 < memory_probe.free_bytes("cpu", 2) < 1 << 50
