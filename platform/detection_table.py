"""Detections as a Parquet file, one row each.

| column | type | |
|---|---|---|
| image | string | the picture's path, as it was found |
| image_id | int64 | of the annotation file, or the number of the picture |
| score | float | 0..1 |
| label | int32 | class index of the model |
| category_id | int64 | id of the class in the training data |
| category | string | its name |
| x1_px, y1_px, x2_px, y2_px | float | corners, in pixels of the picture as stored |
| weights_sha256 | string | of the file that the model's weights are from |

A picture without detections has no row. Text columns are stored as dictionaries. Read it with
`pandas.read_parquet`, `pyarrow.parquet.read_table` or DuckDB.
"""

# N detections of one image

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from deta.model.postprocess import Detections
from deta.platform.coco import Category

ROWS_PER_GROUP = 100_000  # gathered in memory before they are written
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
    """Writes a Parquet file piece by piece; it gets its name when it is complete.

    with DetectionTable(path, predictor.categories, predictor.weights_sha256) as table:
        table.add("street/1.jpg", 1, detections)
    """

    def __init__(self, path: Path, categories: Sequence[Category], weights_sha256: str) -> None:
        self.path = path
        self.categories = categories
        self.weights_sha256 = weights_sha256
        self._unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
        self._writer = pq.ParquetWriter(self._unfinished, SCHEMA, compression="zstd")
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
        if kind is None:
            self._unfinished.replace(self.path)
        else:
            self._unfinished.unlink()

    def _flush(self) -> None:
        if self._tables:
            self._writer.write_table(pa.concat_tables(self._tables).unify_dictionaries())
        self._tables, self._num_rows = [], 0
