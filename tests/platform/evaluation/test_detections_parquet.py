"""Detections are written to Parquet row by row, and a COCO results list is read back equal."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from deta.model.postprocess import Detections
from deta.platform.data.coco_dataset import Category
from deta.platform.evaluation.detections_parquet import (
    SCHEMA,
    DetectionTable,
    results_of_table,
    table_of_results,
)

CATEGORIES = (Category(3, "disc"), Category(90, "ring"))
TRUTH = {
    "images": [{"id": 5, "file_name": "b.jpg"}, {"id": 2, "file_name": "a.jpg"}],
    "categories": [{"id": 90, "name": "ring"}, {"id": 3, "name": "disc"}],
}


def detections(*labels: int) -> Detections:
    boxes_px = torch.tensor([[1.0, 2, 4, 8]]).repeat(len(labels), 1)
    scores = torch.linspace(0.75, 0.25, max(2, len(labels)))[: len(labels)]
    return Detections(scores, torch.tensor(labels, dtype=torch.int64), boxes_px)


def test_each_detection_is_a_row_with_its_image_and_category(tmp_path: Path) -> None:
    path = tmp_path / "found.parquet"
    with DetectionTable(path, CATEGORIES, "ab" * 32) as table:
        table.add("street/1.jpg", 7, detections(1, 0))
        table.add("street/2.jpg", 8, detections())
        assert not path.exists()  # it gets its name when it is complete

    read = pq.read_table(path)

    assert read.schema.names == SCHEMA.names
    first, second = read.to_pylist()
    assert first["image"] == second["image"] == "street/1.jpg"
    assert [row["category"] for row in (first, second)] == ["ring", "disc"]
    assert [row["category_id"] for row in (first, second)] == [90, 3]
    assert (first["score"], first["image_id"]) == (0.75, 7)
    assert [first[name] for name in ("x1_px", "y1_px", "x2_px", "y2_px")] == [1, 2, 4, 8]
    assert first["weights_sha256"] == "ab" * 32


def test_an_error_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "found.parquet"

    def write_and_fail() -> None:
        with DetectionTable(path, CATEGORIES, "") as table:
            table.add("1.jpg", 1, detections(0))
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_results_are_read_back_in_their_order() -> None:
    results = [
        {"image_id": 2, "category_id": 90, "bbox": [1.0, 2, 3, 6], "score": 0.5},
        {"image_id": 5, "category_id": 3, "bbox": [0.5, 0, 10, 3], "score": 0.75},
    ]

    table = table_of_results(results, TRUTH, "cd")

    assert results_of_table(table) == results
    assert table["image"].to_pylist() == ["a.jpg", "b.jpg"]
    assert table["label"].to_pylist() == [1, 0]  # by ascending id of the category


@pytest.mark.parametrize("ids", [(6, 3), (5, 4)])
def test_a_result_of_an_unknown_image_or_category_is_refused(ids: tuple[int, int]) -> None:
    result = {"image_id": ids[0], "category_id": ids[1], "bbox": [0, 0, 1, 1], "score": 1.0}

    with pytest.raises(ValueError, match=r"1 of 1 detections are of 1 .* does not have"):
        table_of_results([result], TRUTH, "")
