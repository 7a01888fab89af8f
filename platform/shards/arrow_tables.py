"""Convert the tables of a data set to Arrow and back, without loss."""

# I images   A annotations of all images

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from deta.platform.data.coco_dataset import Category, CocoDataset
from deta.platform.data.coco_tables import (
    ANNOTATION_ROW,
    IMAGE_ROW,
    CocoTables,
    set_ranges,
    set_training_boxes,
)

BOX = pa.list_(pa.float64(), 4)  # x, y, width, height in px, as in the annotation file
ANNOTATION_FIELDS = [
    pa.field("image_id", pa.int64(), nullable=False),
    pa.field("file_name", pa.string(), nullable=False),
    pa.field("width", pa.int64(), nullable=False),
    pa.field("height", pa.int64(), nullable=False),
    pa.field("num_bytes", pa.int64(), nullable=False),
    pa.field("boxes", pa.list_(BOX), nullable=False),
    pa.field("area", pa.list_(pa.float64()), nullable=False),
    pa.field("category_id", pa.list_(pa.int64()), nullable=False),
    pa.field("iscrowd", pa.list_(pa.bool_()), nullable=False),
]


def to_arrow(dataset: CocoDataset, images: range) -> pa.Table:
    """Return an Arrow table with a row for each of some consecutive images."""
    file_names, image_rows, rows = dataset.tables
    image_rows = image_rows[images.start : images.stop]
    rows = rows[image_rows["start"][0] : image_rows["end"][-1]]
    ends = image_rows["end"] - image_rows["start"][0]
    offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
    category_ids = np.array([category.id for category in dataset.categories], np.int64)
    boxes = pa.FixedSizeListArray.from_arrays(pa.array(rows["bbox"].ravel()), 4)
    lists = {
        "boxes": boxes,
        "area": pa.array(rows["area"]),
        "category_id": pa.array(category_ids[rows["label"]]),
        "iscrowd": pa.array(rows["crowd"]),
    }
    columns: dict[str, Any] = {
        "image_id": pa.array(image_rows["id"]),
        "file_name": pa.array(file_names[images.start : images.stop], pa.string()),
        "width": pa.array(image_rows["width"]),
        "height": pa.array(image_rows["height"]),
        "num_bytes": pa.array(image_rows["num_bytes"]),
    } | {name: pa.ListArray.from_arrays(offsets, values) for name, values in lists.items()}
    return pa.table(
        [columns[field.name].cast(field.type) for field in ANNOTATION_FIELDS],
        schema=pa.schema(ANNOTATION_FIELDS),
    )


def from_arrow(table: pa.Table, categories: tuple[Category, ...]) -> CocoTables:
    """Return tables equal to those that `make_tables` made."""

    def column(name: str) -> Any:
        return table[name].combine_chunks()

    image_rows = np.zeros(len(table), IMAGE_ROW)
    for name, source in (
        ("id", "image_id"), ("height", "height"), ("width", "width"), ("num_bytes", "num_bytes"),
    ):  # fmt: skip
        image_rows[name] = table[source].to_numpy()
    counts = np.diff(column("boxes").offsets.to_numpy()).astype(np.int64)
    set_ranges(image_rows, counts)

    rows = np.zeros(int(counts.sum()), ANNOTATION_ROW)
    rows["bbox"] = column("boxes").flatten().flatten().to_numpy().reshape(-1, 4)
    rows["area"] = column("area").flatten().to_numpy()
    rows["crowd"] = column("iscrowd").flatten().to_numpy(zero_copy_only=False)
    category_ids = np.array([category.id for category in categories], np.int64)
    rows["label"] = np.searchsorted(category_ids, column("category_id").flatten().to_numpy())
    sizes_px = np.stack([image_rows["height"], image_rows["width"]], axis=1)
    set_training_boxes(rows, np.repeat(sizes_px, counts, axis=0))
    return CocoTables(table["file_name"].to_pylist(), image_rows, rows)
