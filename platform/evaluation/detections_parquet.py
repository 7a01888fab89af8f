"""Reads and writes detections as a Parquet file, one row for each detection.

| column | type | |
|---|---|---|
| image | string | path of the image, as given |
| image_id | int64 | id in the annotation file, or the number of the image |
| score | float | 0..1 |
| label | int32 | class index of the model |
| category_id | int64 | id of the class in the training data |
| category | string | its name |
| x1_px, y1_px, x2_px, y2_px | float | corners, in pixels of the stored image |
| weights_sha256 | string | hash of the file of the model's weights |

An image without detections has no row. Text columns are stored as dictionaries. Read the file with
`pandas.read_parquet`, `pyarrow.parquet.read_table` or DuckDB.
"""

# N detections of one image

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deta.model.postprocess import Detections
from deta.platform.data.coco_dataset import Category
from deta.platform.system.atomic_write import replacing

ROWS_PER_GROUP = 100_000  # collected in memory, then written
CORNERS = ("x1_px", "y1_px", "x2_px", "y2_px")
_TEXT = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        ("image", _TEXT),
        ("image_id", pa.int64()),
        ("score", pa.float32()),
        ("label", pa.int32()),
        ("category_id", pa.int64()),
        ("category", _TEXT),
        ("x1_px", pa.float32()),
        ("y1_px", pa.float32()),
        ("x2_px", pa.float32()),
        ("y2_px", pa.float32()),
        ("weights_sha256", _TEXT),
    ]
)


class DetectionTable:
    """Writes a Parquet file in row groups. The file gets its name when it is complete.

    with DetectionTable(path, predictor.categories, predictor.weights_sha256) as table:
        table.add("street/1.jpg", 1, detections)
    """

    def __init__(self, path: Path, categories: Sequence[Category], weights_sha256: str) -> None:
        self.path = path
        self.categories = categories
        self.weights_sha256 = weights_sha256
        self._file = replacing(path)
        self._writer = pq.ParquetWriter(self._file.__enter__(), SCHEMA, compression="zstd")
        self._tables: list[pa.Table] = []
        self._num_rows = 0

    def add(self, image: str, image_id: int, found: Detections) -> None:
        labels = found.labels.tolist()
        chosen = [self.categories[label] for label in labels]
        corners = found.boxes_px.float().numpy().T  # 4 N
        columns = [
            pa.array([image] * len(labels), pa.string()).dictionary_encode(),
            pa.array([image_id] * len(labels), pa.int64()),
            pa.array(found.scores.float().numpy()),
            pa.array(labels, pa.int32()),
            pa.array([category.id for category in chosen], pa.int64()),
            pa.array([category.name for category in chosen], pa.string()).dictionary_encode(),
            *(pa.array(corner) for corner in corners),
            pa.array([self.weights_sha256] * len(labels), pa.string()).dictionary_encode(),
        ]
        self._tables.append(pa.Table.from_arrays(columns, schema=SCHEMA))
        self._num_rows += len(labels)
        if self._num_rows >= ROWS_PER_GROUP:
            self._flush()

    def __enter__(self) -> DetectionTable:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._flush()
        self._writer.close()
        self._file.__exit__(kind, error, traceback)

    def _flush(self) -> None:
        if self._tables:
            self._writer.write_table(pa.concat_tables(self._tables).unify_dictionaries())
        self._tables, self._num_rows = [], 0


def table_of_results(
    results: Sequence[Mapping[str, Any]], ground_truth: Mapping[str, Any], weights_sha256: str
) -> pa.Table:
    """Return a COCO results list as a table, in its order, with the ground truth's file names.

    Results of categories that are not listed are left out. A label is the rank of the category's
    id, from 0.

    Raises:
        ValueError: a result is of an image that is not listed.
    """
    images = {image["id"]: row for row, image in enumerate(ground_truth["images"])}
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    counted = [result for result in results if result["category_id"] in label_of]
    if unknown := {result["image_id"] for result in counted} - images.keys():
        raise ValueError(
            f"{len(unknown)} images of the results are not in the ground truth, such as "
            f"{min(unknown, key=str)!r}"
        )
    labels = np.array([label_of[result["category_id"]] for result in counted], np.int32)
    rows = np.array([images[result["image_id"]] for result in counted], np.int32)
    boxes = np.array([result["bbox"] for result in counted], np.float64).reshape(-1, 4)  # N 4, xywh
    boxes[:, 2:] += boxes[:, :2]  # N 4, xyxy
    names = [str(category["name"]) for category in categories]
    paths = [str(image.get("file_name", "")) for image in ground_truth["images"]]
    columns = [
        pa.DictionaryArray.from_arrays(rows, pa.array(paths, pa.string())),
        pa.array(np.array([image["id"] for image in ground_truth["images"]], np.int64)[rows]),
        pa.array(np.array([result["score"] for result in counted], np.float32)),
        pa.array(labels),
        pa.array(np.array([category["id"] for category in categories], np.int64)[labels]),
        pa.DictionaryArray.from_arrays(labels, pa.array(names, pa.string())),
        *(pa.array(corner) for corner in boxes.T.astype(np.float32)),
        pa.DictionaryArray.from_arrays(
            np.zeros(len(labels), np.int32), pa.array([weights_sha256], pa.string())
        ),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def results_of_table(table: pa.Table) -> list[dict[str, Any]]:
    """Return the COCO results list of a table, in its order.

    Raises:
        KeyError: the table lacks a column.
    """
    corners = [table[name].to_numpy().astype(np.float64) for name in CORNERS]
    boxes = np.stack(corners, axis=1)  # N 4, xyxy
    boxes[:, 2:] -= boxes[:, :2]  # N 4, xywh
    return [
        {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        for image_id, category_id, box, score in zip(
            table["image_id"].to_pylist(),
            table["category_id"].to_pylist(),
            boxes.tolist(),
            table["score"].to_pylist(),
            strict=True,
        )
    ]
