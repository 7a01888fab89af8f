"""Tiny data sets and runs for the tests of this folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from deta.model.config import BackboneConfig, ModelConfig
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.image_sizes import AugmentationConfig, EvaluationSize
from deta.platform.run.config import ClusterConfig, DataConfig, RunConfig
from deta.platform.run.run import Run

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
    """Write images of 200 x 100 with the given boxes: class index and xywh in px."""
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
