"""Test `arrow_tables.py`: tables survive the way to Arrow and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.shards.arrow_tables import from_arrow, to_arrow


def write_dataset(folder: Path) -> CocoDataset:
    """Write three images with two, no and three annotations: a crowd, and boxes not trained on."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in (3, 5, 9)]
    for image in images:
        Image.new("RGB", (40, 30)).save(folder / image["file_name"])
    boxes = [
        (3, 7, [1, 2, 3, 4], 0), (3, 2, [0.1, 0.2, 39, 29], 1), (9, 2, [5, 5, 0, 3], 0),
        (9, 7, [38, 28, 9, 9], 0), (9, 2, [50, 5, 8, 3], 0),
    ]  # fmt: skip
    annotations = [
        {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": n / 3, "iscrowd": crowd}
        for n, (i, c, b, crowd) in enumerate(boxes)
    ]
    categories = [{"id": 7, "name": "b"}, {"id": 2, "name": "a"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return CocoDataset.open(folder, folder / "annotations.json")


def test_tables_are_equal_after_arrow_bit_by_bit(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path)
    names, image_rows, annotation_rows = dataset.tables

    parts = [to_arrow(dataset, range(1)), to_arrow(dataset, range(1, 3))]
    table = pa.concat_tables(parts)
    found_names, found_images, found_annotations = from_arrow(table, dataset.categories)

    assert found_names == names
    assert np.array_equal(found_images, image_rows)
    assert found_annotations.tobytes() == annotation_rows.tobytes()
