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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deta.model.postprocess import Detections
from deta.platform.data.coco_dataset import Category
from deta.platform.evaluation.result_list import listed_results
from deta.platform.system.atomic_write import replacing

ROWS_PER_GROUP = 100_000  # collected in memory, then written
CORNERS = ("x1_px", "y1_px", "x2_px", "y2_px")
_TEXT = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        *(("image", _TEXT), ("image_id", pa.int64())),
        *(("score", pa.float32()), ("label", pa.int32())),
        *(("category_id", pa.int64()), ("category", _TEXT)),
        *((corner, pa.float32()) for corner in CORNERS),
        ("weights_sha256", _TEXT),
    ]
)


class DetectionTable:
    """Writes a Parquet file in row groups. The file gets its name when it is complete.

    with DetectionTable(path, predictor.categories, predictor.weights_sha256) as table:
        table.add("street/1.jpg", 1, detections)
    """

    def __init__(self, path: Path, categories: Sequence[Category], weights_sha256: str) -> None:
        self.categories = categories
        self.weights_sha256 = weights_sha256
        self._tables: list[pa.Table] = []
        self._open = ExitStack()
        unfinished = self._open.enter_context(replacing(path))
        self._writer = self._open.enter_context(
            pq.ParquetWriter(unfinished, SCHEMA, compression="zstd")
        )

    def add(self, image: str, image_id: int, found: Detections) -> None:
        number = len(found.labels)
        self._tables.append(
            _table(
                [image] * number,
                [image_id] * number,
                found.scores.float().numpy(),
                found.labels.numpy(),
                self.categories,
                found.boxes_px.float().numpy(),
                self.weights_sha256,
            )
        )
        if sum(map(len, self._tables)) >= ROWS_PER_GROUP:
            self._flush()

    def __enter__(self) -> DetectionTable:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            self._flush()
        self._open.__exit__(kind, *error)

    def _flush(self) -> None:
        if self._tables:
            self._writer.write_table(pa.concat_tables(self._tables).unify_dictionaries())
        self._tables = []


def _table(
    images: Sequence[str],
    image_ids: Sequence[int],
    scores: np.ndarray,  # N
    labels: np.ndarray,  # N
    categories: Sequence[Category],  # by label
    boxes_px: np.ndarray,  # N 4, xyxy
    weights_sha256: str,
) -> pa.Table:
    chosen = [categories[label] for label in labels.tolist()]
    columns = [
        images,
        image_ids,
        scores,
        labels,
        [category.id for category in chosen],
        [category.name for category in chosen],
        *boxes_px.T,
        [weights_sha256] * len(chosen),
    ]
    return pa.Table.from_pydict(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)


def table_of_results(
    results: Sequence[Mapping[str, Any]], ground_truth: Mapping[str, Any], weights_sha256: str
) -> pa.Table:
    """Return a COCO results list as a table, in its order, with the ground truth's file names.

    A label is the rank of the category's id, from 0.

    Raises:
        ValueError: a result is of an image or a category that is not listed.
    """
    results = listed_results(results, ground_truth, "detections")
    paths = {image["id"]: str(image.get("file_name", "")) for image in ground_truth["images"]}
    listed = sorted(ground_truth["categories"], key=lambda category: category["id"])
    categories = [Category(category["id"], str(category["name"])) for category in listed]
    label_of = {category.id: label for label, category in enumerate(categories)}
    boxes = np.array([result["bbox"] for result in results], np.float64).reshape(-1, 4)  # N 4, xywh
    boxes[:, 2:] += boxes[:, :2]  # N 4, xyxy
    return _table(
        [paths[result["image_id"]] for result in results],
        [result["image_id"] for result in results],
        np.array([result["score"] for result in results], np.float32),
        np.array([label_of[result["category_id"]] for result in results], np.int32),
        categories,
        boxes.astype(np.float32),
        weights_sha256,
    )


def results_of_table(table: pa.Table) -> list[dict[str, Any]]:
    """Return the COCO results list of a table, in its order.

    Raises:
        KeyError: the table lacks a column.
    """
    boxes = np.stack([table[name].to_numpy().astype(np.float64) for name in CORNERS], axis=1)
    boxes[:, 2:] -= boxes[:, :2]  # N 4, xyxy to xywh
    names = ("image_id", "category_id", "bbox", "score")
    image_ids, category_ids, scores = (
        table[name].to_pylist() for name in ("image_id", "category_id", "score")
    )
    rows = zip(image_ids, category_ids, boxes.tolist(), scores, strict=True)
    return [dict(zip(names, row, strict=True)) for row in rows]
